"""Batch normalization in plain NumPy and wider arithmetic: what the tests compare fastbn with.

float32 data are computed in float64, float64 data (and integers) in longdouble, always in two passes about the mean.
Nothing here is fast, and nothing here comes from fastbn.
"""

import math
from typing import NamedTuple

import numpy as np

SLOPE = {None: 1.0, "relu": 0.0, "leaky_relu": 0.01}


def unit(dtype):
    """The unit roundoff u of a floating dtype."""
    return np.finfo(dtype).eps / 2


def wide(a):
    a = np.asarray(a)
    return a.astype(np.float64 if a.dtype.type is np.float32 else np.longdouble)


def columns(x, axis=1):
    """(C, m): the values of each feature in one row, so that NumPy's sums over them are pairwise."""
    x = np.moveaxis(wide(x), axis, 0)
    return np.ascontiguousarray(x).reshape(len(x), math.prod(x.shape[1:]))


def uncolumns(cols, shape, axis=1):
    """The inverse of columns, for an x of this shape."""
    rest = [n for k, n in enumerate(shape) if k != axis % len(shape)]
    return np.moveaxis(cols.reshape(len(cols), *rest), 0, axis)


class Stats(NamedTuple):
    """The mean is pivot + shift: one number could not hold it where the mean is much larger than the deviation."""

    pivot: np.ndarray  # (C,)
    shift: np.ndarray  # (C,)
    var: np.ndarray  # (C,), over m
    count: int

    @property
    def mean(self):
        return self.pivot + self.shift


def statistics(x, axis=1):
    cols = columns(x, axis)
    count = cols.shape[1]
    pivot = cols[:, :1]
    pivot = pivot + (cols - pivot).mean(1, keepdims=True)
    shift = (cols - pivot).mean(1)
    var = ((cols - pivot - shift[:, None]) ** 2).mean(1)
    return Stats(pivot[:, 0], shift, var, count)


def given(mean, var):
    """Stats of running averages."""
    mean, var = np.asarray(mean, np.longdouble), np.asarray(var, np.longdouble)
    return Stats(mean, np.zeros_like(mean), var, 0)


def _vector(v, default, cols):
    v = np.full(len(cols), default) if v is None else np.asarray(v)
    return v.astype(cols.dtype)[:, None]


def _normalized(x, stats, eps, axis):
    cols = columns(x, axis)
    invstd = (1 / np.sqrt(stats.var + cols.dtype.type(eps)))[:, None]
    return (cols - stats.pivot[:, None] - stats.shift[:, None]) * invstd, invstd


def forward(x, stats, weight=None, bias=None, eps=1e-5, axis=1, activation=None):
    """y, and (|weight|(1 + |x*|) + |bias|), the measure of its error in the numerics contract."""
    xhat, _ = _normalized(x, stats, eps, axis)
    w, b = _vector(weight, 1, xhat), _vector(bias, 0, xhat)
    z = w * xhat + b
    y = np.where(z > 0, z, SLOPE[activation] * z)
    measure = abs(w) * (1 + abs(xhat)) + abs(b)
    return uncolumns(y, np.shape(x), axis), uncolumns(measure, np.shape(x), axis)


def backward(dy, x, stats, weight=None, eps=1e-5, axis=1, activation=None, y=None, training=True):
    """(dx, dweight, dbias) and the measure of the error of each.

    y is what the forward gave: its signs are the mask of the activation, also where rounding decided them.
    """
    xhat, invstd = _normalized(x, stats, eps, axis)
    w = _vector(weight, 1, xhat)
    dz = columns(dy, axis)
    if activation is not None:
        dz = np.where(columns(y, axis) > 0, dz, SLOPE[activation] * dz)
    scale = w * invstd
    if training:
        dx = scale * (dz - _mean(dz) - xhat * _mean(dz * xhat))
        size = abs(scale) * (abs(dz) + _mean(abs(dz)) + abs(xhat) * _mean(abs(dz * xhat)))
    else:
        dx, size = scale * dz, abs(scale * dz)
    shape = np.shape(x)
    results = uncolumns(dx, shape, axis), (dz * xhat).sum(1), dz.sum(1)
    measures = uncolumns(size, shape, axis), (abs(dz) * (1 + abs(xhat))).sum(1), abs(dz).sum(1)
    return results, measures


def _mean(cols):
    return cols.sum(1, keepdims=True) / max(cols.shape[1], 1)


def averaged(old, batch, momentum):
    """The exponentially weighted average after one more batch."""
    return (1 - np.longdouble(momentum)) * old + np.longdouble(momentum) * batch


def unbiased(stats):
    return stats.var * stats.count / (stats.count - 1)


def within(actual, expected, bound):
    """Asserts |actual - expected| <= bound everywhere; says by how much it is missed."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype.kind == "f", actual.dtype
    # Below the smallest normal number the spacing is constant, and no relative bound can hold.
    bound = np.broadcast_to(bound + np.finfo(actual.dtype).smallest_subnormal, expected.shape)
    error = abs(actual.astype(np.longdouble) - expected)
    if not (error <= bound).all():  # written so that NaN fails
        k = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error / bound)), error.shape)
        k = tuple(int(i) for i in k)
        times = error[k] / bound[k]
        raise AssertionError(f"at {k}: got {actual[k]!r}, expected {expected[k]!r}, error {times:.4g} x bound")
