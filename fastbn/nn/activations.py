"""ReLU, leaky ReLU, sigmoid, tanh, softmax; and dropout, which is a function of each value in training."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..state import Array, as_float, checked_seed, whole
from .layer import Activation

__all__ = ["Dropout", "LeakyReLU", "ReLU", "Sigmoid", "Softmax", "Tanh", "relu_gradient", "slopes"]


def relu_gradient(y: Array, dy: Array, dx: Array) -> Array:
    """dx = dy where y > 0, else 0, also where dy is infinite or NaN; returns dx."""
    # As integers: 0 and 1 times dy's bits. np.where takes four times as long, and as floats 0 times inf is NaN.
    integer = f"i{dy.itemsize}"
    bits = dx.view(integer)
    np.greater(y, 0, out=bits)
    bits *= dy.view(integer)
    return dx


def slopes(y: Array, negative_slope: float) -> Array:
    """1 where y > 0, else negative_slope."""
    slope = np.empty_like(y)
    np.greater(y, 0, out=slope)
    return np.maximum(slope, negative_slope, out=slope)


class ReLU(Activation):
    """The rectifier, ``y = max(x, 0)``. dx is dy where y is above 0, and 0 elsewhere.

    If you change y before backward, the gradients are wrong.

    Examples
    --------
    >>> from fastbn import nn
    >>> nn.ReLU()([-1.0, 2.0])
    array([0., 2.])
    """

    def _forward(self, x: Array, y: Array) -> Array:
        return np.maximum(x, 0, out=y)

    def _backward(self, saved: Array, dy: Array, dx: Array) -> None:
        relu_gradient(saved, dy, dx)


class LeakyReLU(Activation):
    """The leaky rectifier: y is x where x is above 0, and ``negative_slope*x`` elsewhere.

    Parameters
    ----------
    negative_slope : float
        Slope below 0, within [0, 1].

    Examples
    --------
    >>> from fastbn import nn
    >>> nn.LeakyReLU(0.1)([-1.0, 2.0])
    array([-0.1,  2. ])
    """

    def __init__(self, negative_slope: float = 0.01) -> None:
        if not 0 <= negative_slope <= 1:
            raise ValueError(f"expected negative_slope within [0, 1], got {negative_slope}")
        self.negative_slope = float(negative_slope)
        super().__init__()

    def _forward(self, x: Array, y: Array) -> Array:
        slope = slopes(x, self.negative_slope)
        np.multiply(x, slope, out=y)
        return slope

    def _backward(self, saved: Array, dy: Array, dx: Array) -> None:
        np.multiply(dy, saved, out=dx)


class Sigmoid(Activation):
    """The sigmoid, ``y = 1/(1 + exp(-x))``, for x of any size; ``dx = dy*y*(1 - y)``.

    The relative error is small in both tails. If you change y before backward, the gradients are wrong.

    Examples
    --------
    >>> from fastbn import nn
    >>> nn.Sigmoid()([-1e4, 0.0, 1e4])
    array([0. , 0.5, 1. ])
    """

    def _forward(self, x: Array, y: Array) -> Array:
        np.negative(x, out=y)
        # exp may overflow to inf or underflow to 0, and the quotient is then the right one
        with np.errstate(over="ignore", under="ignore"):
            np.exp(y, out=y)
            y += 1
            return np.divide(1, y, out=y)

    def _backward(self, saved: Array, dy: Array, dx: Array) -> None:
        np.subtract(1, saved, out=dx)
        dx *= saved
        dx *= dy


class Tanh(Activation):
    """The hyperbolic tangent, ``y = tanh(x)``; ``dx = dy*(1 - y**2)``.

    If you change y before backward, the gradients are wrong.

    Examples
    --------
    >>> from fastbn import nn
    >>> nn.Tanh()([-1e4, 0.0, 1e4])
    array([-1.,  0.,  1.])
    """

    def _forward(self, x: Array, y: Array) -> Array:
        return np.tanh(x, out=y)

    def _backward(self, saved: Array, dy: Array, dx: Array) -> None:
        np.multiply(saved, saved, out=dx)
        np.subtract(1, dx, out=dx)
        dx *= dy


class Softmax(Activation):
    """The softmax, ``y = exp(x)/sum(exp(x))`` along an axis, for x of any size; ``dx = y*(dy - sum(dy*y))``.

    A network that ends with it gives probabilities. Train ``model[:-1]`` with `fastbn.losses.softmax_cross_entropy`,
    which has a softmax of its own. If you change y before backward, the gradients are wrong.

    Parameters
    ----------
    axis : int
        Axis along which y sums to 1.

    Examples
    --------
    >>> from fastbn import nn
    >>> nn.Softmax()([0.0, 1e4, 1e4])
    array([0. , 0.5, 0.5])
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis = whole(axis, "axis")
        super().__init__()

    def _forward(self, x: Array, y: Array) -> Array:
        with np.errstate(all="ignore"):  # numbers that are far apart; infinity and NaN make their own sum NaN
            if x.size:  # nothing has no largest
                np.subtract(x, x.max(axis=self.axis, keepdims=True), out=y)
            np.exp(y, out=y)
            y /= y.sum(axis=self.axis, keepdims=True)
        return y

    def _backward(self, saved: Array, dy: Array, dx: Array) -> None:
        np.multiply(dy, saved, out=dx)
        mean = dx.sum(axis=self.axis, keepdims=True)
        np.subtract(dy, mean, out=dx)
        dx *= saved


class Dropout(Activation):
    """Dropout: in training, each value becomes 0 with probability p, and the rest is divided by ``1 - p``.

    In inference, x is handed on. This is the inverted form of dropout (Srivastava et al., JMLR 15, 2014), as in
    PyTorch.

    Parameters
    ----------
    p : float
        Probability, within [0, 1].
    seed : int or None
        Seed of the random numbers of this layer.

    Attributes
    ----------
    rng : numpy.random.Generator
        Source of these random numbers. It is no part of `state_dict`.

    Examples
    --------
    >>> from fastbn import nn
    >>> nn.Dropout(0.5, seed=0)([1.0, 1.0, 1.0])
    array([2., 0., 0.])
    >>> nn.Dropout(0.5).eval()([1.0, 1.0, 1.0])
    array([1., 1., 1.])
    """

    def __init__(self, p: float, *, seed: int | None = None) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"expected p within [0, 1], got {p}")
        self.p, self.seed = float(p), checked_seed(seed)
        super().__init__()

    @cached_property
    def rng(self) -> np.random.Generator:  # made when it is asked for: inference does without
        return np.random.default_rng(self.seed)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rng": self.rng}  # a copy draws the same numbers

    def forward(self, x: ArrayLike) -> Array:
        """Return y, of the shape and dtype of x; in inference x itself."""
        if self.training:
            return super().forward(x)
        a = as_float(x)
        self._saved = np.ones((), a.dtype), a.shape
        return a

    def _forward(self, x: Array, y: Array) -> Array:
        scale: Array = self.rng.random(x.shape, dtype=x.dtype.type)
        np.greater_equal(scale, self.p, out=scale)
        scale *= 1 / (1 - self.p) if self.p < 1 else 0
        np.multiply(x, scale, out=y)
        return scale

    def _backward(self, saved: Array, dy: Array, dx: Array) -> None:
        np.multiply(dy, saved, out=dx)
