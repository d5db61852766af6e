"""Standardize: inputs of mean 0 and variance 1, by the statistics of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import calls
from ..atomic import change
from ..functional import moments
from ..state import Array, as_float, check_state, checked_dtype, whole
from .layer import Layer

__all__ = ["Standardize"]

# A call wants a positive one; added to any variance of normal size, this one changes nothing.
_EPS = 5e-324


class Standardize(Layer):
    """Scaling of inputs, ``y = (x - mean)/sqrt(var)``, with mean and variance of a data set, in both modes.

    As the first layer it makes the normalisation of the inputs a part of the network and of its saved file. A constant
    feature is only centred.

    Parameters
    ----------
    num_features : int
        Number of features, C, at least 1.
    axis : int
        The feature axis: 1 for (N, C, ...), -1 for channels-last.
    dtype : dtype, optional
        Type of y, float32 or float64. Without it, y has the type of x. With float32, a network in float32 takes float64
        data of many digits: the mean is subtracted in float64, and the rest is rounded once.

    Attributes
    ----------
    mean, mean_low, var : numpy.ndarray of shape (C,), float64
        Statistics of the data that `fit` saw; the variance is of ``1/m``. The mean is ``mean + mean_low``: far from
        zero, float64 holds a mean to fewer digits than the deviations have.
    count : int
        Number of values per feature that `fit` saw, 0 before it.
    params, grads : dict
        Empty dicts: nothing here is trained.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import nn
    >>> X = np.array([[1.0, 7.0], [3.0, 7.0]])
    >>> nn.Standardize(2).fit(X)(X)
    array([[-1.,  0.],
           [ 1.,  0.]])
    >>> seconds = [[1700000001.0], [1700000059.0]]
    >>> nn.Standardize(1, dtype="float32").fit(seconds)(seconds)
    array([[-1.],
           [ 1.]], dtype=float32)
    """

    def __init__(self, num_features: int, *, axis: int = 1, dtype: DTypeLike | None = None) -> None:
        self.num_features, self.axis = whole(num_features, "num_features"), whole(axis, "axis")
        self.dtype = None if dtype is None else checked_dtype(dtype)
        if self.num_features < 1:
            raise ValueError(f"expected num_features to be at least 1, got {num_features}")
        super().__init__()
        self.mean, self.mean_low, self.var = np.zeros((3, self.num_features))
        self.count = 0

    def fit(self, X: ArrayLike) -> Self:
        """Take the statistics of X, which replace any before, and return the layer.

        Parameters
        ----------
        X : array_like of float32 or float64
            Data with C features along the feature axis. A NaN makes its own feature NaN.

        Raises
        ------
        ValueError
            Another number of features, or no values. The statistics stay as they were.
        TypeError
            Another dtype, or a masked array.
        numpy.exceptions.AxisError
            X has no such axis.
        """
        a = as_float(X, "X")
        stats = moments(a, self.axis)
        if stats.mean.shape != self.mean.shape:
            raise ValueError(f"expected X with {self.num_features} features along axis {self.axis}, got {a.shape}")
        if stats.count == 0:
            raise ValueError(f"expected at least 1 value of each feature, got X of shape {a.shape}")
        self._take(stats.mean, stats.mean_low, stats.var, stats.count)
        return self

    def forward(self, x: ArrayLike) -> Array:
        """Return y, of the shape of x; RuntimeError before `fit`, ValueError for another number of features."""
        if not self.count:
            raise RuntimeError("Standardize needs the statistics of a data set: call fit(X) before forward")
        a = as_float(x)
        dtype = a.dtype if self.dtype is None else self.dtype
        y = self._scaled(a.astype(dtype) if dtype.itemsize > a.itemsize else a, self.mean, -self.mean_low)
        with np.errstate(all="ignore"):  # infinity, as float32 itself would have it
            y = y.astype(dtype, copy=False)
        self._saved = np.empty(0, a.dtype), y.shape
        return y

    def __call__(self, x: ArrayLike) -> Array:  # not always of the dtype of x, as other layers' y is
        return self.forward(x)

    def backward(self, dy: ArrayLike) -> Array:
        """Return ``dx = dy/sqrt(var)``, of the shape and dtype of x."""
        _, grad = self._incoming(dy)
        return self._scaled(grad, np.zeros_like(self.mean), np.zeros_like(self.mean))

    def _scaled(self, x: Array, centre: Array, rest: Array) -> Array:
        """(x - centre + rest) / sqrt(var)."""
        var = np.where(self.var == 0, 1, self.var)
        with np.errstate(all="ignore"):  # a file may hold any variance
            shift = rest / np.sqrt(var)
        constants = calls.Constants(self.num_features, None, shift, _EPS, mean=centre, var=var, axis=self.axis)
        return calls.infer(constants, x, None)[0]

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the statistics."""
        arrays = {"mean": self.mean, "mean_low": self.mean_low, "var": self.var}
        return {k: a.copy() for k, a in arrays.items()} | {"count": np.array(self.count, dtype=np.int64)}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Copy state into the statistics.

        If a key or shape does not fit, this is a ValueError, and nothing is changed.
        """
        given: dict[str, Any] = check_state(state, self.state_dict())
        self._take(given["mean"], given["mean_low"], given["var"], int(given["count"]))

    def _take(self, mean: Array, low: Array, var: Array, count: int) -> None:
        change([(self.mean, mean), (self.mean_low, low), (self.var, var)], (self, "count", count))
