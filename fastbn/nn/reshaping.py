"""Layers that compute nothing: Flatten, Identity."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ..state import Array, as_float
from .layer import Layer

__all__ = ["Flatten", "Identity"]


class Identity(Layer):
    """The identity, y = x: a place in a network where another layer may stand.

    Examples
    --------
    >>> from fastbn import nn
    >>> nn.Identity()([1.0, 2.0])
    array([1., 2.])
    """

    def _shaped(self, x: Array) -> Array:
        return x

    def forward(self, x: ArrayLike) -> Array:
        """Return y, which shares the memory of x where NumPy can do that."""
        a = as_float(x)
        y = self._shaped(a)
        self._saved = np.empty(0, a.dtype), y.shape, a.shape
        return y

    def backward(self, dy: ArrayLike) -> Array:
        """Return dx, of the shape and dtype of x."""
        _, grad = self._incoming(dy)
        return grad.reshape(self._saved[2])


class Flatten(Identity):
    """All axes but the first as one: (N, H, W, C) becomes (N, H*W*C), as images for a `Dense`.

    Values keep the order of their indices, as in PyTorch, Keras and ONNX.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import nn
    >>> nn.Flatten()(np.ones((5, 8, 8))).shape
    (5, 64)
    """

    def _shaped(self, x: Array) -> Array:
        if x.ndim == 0:
            raise ValueError("Flatten expected x of shape (N, ...), got a single number")
        return x.reshape(len(x), math.prod(x.shape[1:]))
