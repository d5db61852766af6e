"""Losses: each takes (prediction, target) and returns the loss, a float, and its gradient by the prediction.

# Design: a loss and its gradient share their exponentials, so one function returns both. The gradient has the
# prediction's shape and dtype; the mean is taken in float64. NaN and inf pass through, without warnings. Weights
# multiply, and what they are divided by is the number of examples: a mini-batch whose weights are all 0 has the loss
# 0, and mini-batches with larger weights count more.
"""

from __future__ import annotations

from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .state import Array, Float, as_array, as_float

__all__ = ["mse", "sigmoid_cross_entropy", "softmax_cross_entropy"]


@overload
def softmax_cross_entropy(
    prediction: NDArray[Float], target: ArrayLike, sample_weight: ArrayLike | None = None
) -> tuple[float, NDArray[Float]]: ...
@overload
def softmax_cross_entropy(
    prediction: ArrayLike, target: ArrayLike, sample_weight: ArrayLike | None = None
) -> tuple[float, Array]: ...
@np.errstate(over="ignore", under="ignore", invalid="ignore")
def softmax_cross_entropy(
    prediction: ArrayLike, target: ArrayLike, sample_weight: ArrayLike | None = None
) -> tuple[float, Array]:
    """Return the mean over the rows of ``-log softmax(prediction)[target]``, and its gradient.

    It is the function that PyTorch calls ``cross_entropy``.

    Parameters
    ----------
    prediction : (N, K) float32 or float64 array
        Numbers before the softmax (logits). Integers and bool become float64.
    target : (N,) integer array
        Labels from 0 to K - 1.
    sample_weight : (N,) array, optional
        Finite weights of at least 0. The loss of each row is multiplied by its weight before the mean is taken. Weights
        with mean 1 leave the scale of the loss as it is. Without them, all weights are 1.

    Returns
    -------
    loss : float
        Mean loss.
    gradient : (N, K) array of the prediction's dtype
        ``sample_weight*(softmax(prediction) - onehot(target))/N``

    Raises
    ------
    ValueError
        A wrong shape, an empty batch, a label out of range, or a weight that is negative or not finite.
    TypeError
        Labels that are not integers, or a prediction of another type.

    Notes
    -----
    z is ``prediction - max(prediction)``, row by row. The loss of a row is ``log(sum(exp(z))) - z[target]``. So no
    exponential overflows, and the sum is at least 1 (Goodfellow et al., "Deep Learning", 2016, section 4.1).

    Examples
    --------
    >>> from fastbn import losses
    >>> loss, gradient = losses.softmax_cross_entropy([[0.0, 0.0], [1000.0, 0.0]], [1, 0])
    >>> round(loss, 6)
    0.346574
    >>> gradient
    array([[ 0.25, -0.25],
           [ 0.  ,  0.  ]])
    """
    logits, labels = as_float(prediction, "prediction"), as_array(target, "target")
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"expected prediction (N, K) and labels (N,), got {logits.shape} and {labels.shape}")
    n, k = logits.shape
    if n == 0:
        raise ValueError("expected at least one example, got an empty batch")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"expected integer labels, got {labels.dtype}")
    weight = None if sample_weight is None else _weights(sample_weight, logits)
    at = labels.astype(np.intp)
    if np.maximum.reduce(at.view(np.uintp)) >= k:  # as unsigned numbers, the negative ones are the largest
        wrong = labels[(labels < 0) | (labels >= k)][0]
        raise ValueError(f"expected labels from 0 to {k - 1} for K = {k} classes, got {wrong}")
    at += np.arange(0, n * k, k)
    z = np.empty((n, k), logits.dtype)
    np.subtract(logits, np.maximum.reduce(logits, axis=1, keepdims=True), out=z)
    flat = z.reshape(-1)
    at_label = flat[at]
    np.exp(z, out=z)
    sums = np.add.reduce(z, axis=1, keepdims=True)
    rows = np.log(sums[:, 0]) - at_label
    if weight is not None:
        rows = rows * weight[:, 0]
    loss = np.add.reduce(rows, dtype=np.float64) / n
    sums *= n
    z /= sums
    flat[at] -= 1 / n
    if weight is not None:
        z *= weight.astype(z.dtype)
    return float(loss), z


@overload
def mse(
    prediction: NDArray[Float], target: ArrayLike, sample_weight: ArrayLike | None = None
) -> tuple[float, NDArray[Float]]: ...
@overload
def mse(prediction: ArrayLike, target: ArrayLike, sample_weight: ArrayLike | None = None) -> tuple[float, Array]: ...
@np.errstate(over="ignore", under="ignore", invalid="ignore")
def mse(prediction: ArrayLike, target: ArrayLike, sample_weight: ArrayLike | None = None) -> tuple[float, Array]:
    """Return the mean over all elements of ``(prediction - target)**2``, and its gradient.

    It is the function that PyTorch calls ``mse_loss``.

    Parameters
    ----------
    prediction, target : float32 or float64 arrays of one shape
        Numbers. Integers and bool become float64. Nothing is broadcast.
    sample_weight : (N,) array, optional
        Finite weights of at least 0. The loss of each row is multiplied by its weight before the mean is taken. Weights
        with mean 1 leave the scale of the loss as it is. Without them, all weights are 1.

    Returns
    -------
    loss : float
        Mean loss.
    gradient : array like prediction
        ``2*sample_weight*(prediction - target)/size``

    Raises
    ------
    ValueError
        Two shapes, an empty batch, or a weight that is negative or not finite.
    TypeError
        An array of another type.

    Examples
    --------
    >>> from fastbn import losses
    >>> losses.mse([1.0, 2.0], [0.0, 2.0])
    (0.5, array([1., 0.]))
    """
    y, t = _pair(prediction, target)
    gradient = np.empty_like(y)
    np.subtract(y, t, out=gradient)
    squares = np.square(gradient, dtype=np.float64)
    gradient *= 2 / gradient.size
    if sample_weight is not None:
        weight = _weights(sample_weight, y)
        squares *= weight
        gradient *= weight.astype(gradient.dtype)
    return float(squares.mean()), gradient


@overload
def sigmoid_cross_entropy(
    prediction: NDArray[Float], target: ArrayLike, sample_weight: ArrayLike | None = None
) -> tuple[float, NDArray[Float]]: ...
@overload
def sigmoid_cross_entropy(
    prediction: ArrayLike, target: ArrayLike, sample_weight: ArrayLike | None = None
) -> tuple[float, Array]: ...
@np.errstate(over="ignore", under="ignore", invalid="ignore")
def sigmoid_cross_entropy(
    prediction: ArrayLike, target: ArrayLike, sample_weight: ArrayLike | None = None
) -> tuple[float, Array]:
    """Return the mean over all elements of ``-t*log(s(z)) - (1 - t)*log(1 - s(z))``, and its gradient.

    s is the sigmoid, z the prediction and t the target. It is the function that PyTorch calls
    ``binary_cross_entropy_with_logits``.

    Parameters
    ----------
    prediction : float32 or float64 array
        Numbers before the sigmoid (logits). Integers and bool become float64.
    target : array of the prediction's shape
        Probabilities, or classes 0 and 1, of the shape of the prediction. Nothing is broadcast.
    sample_weight : (N,) array, optional
        Finite weights of at least 0. The loss of each row is multiplied by its weight before the mean is taken. Weights
        with mean 1 leave the scale of the loss as it is. Without them, all weights are 1.

    Returns
    -------
    loss : float
        Mean loss.
    gradient : array like prediction
        ``sample_weight*(s(prediction) - target)/size``

    Raises
    ------
    ValueError
        Two shapes, an empty batch, a target outside [0, 1], or a weight that is negative or not finite.
    TypeError
        An array of another type.

    Notes
    -----
    Computed as ``max(z, 0) - z t + log(1 + exp(-|z|))``, where no exponential overflows.

    Examples
    --------
    >>> from fastbn import losses
    >>> loss, gradient = losses.sigmoid_cross_entropy([0.0, 1000.0], [1, 1])
    >>> round(loss, 6), gradient
    (0.346574, array([-0.25,  0.  ]))
    """
    z, t = _pair(prediction, target)
    if t.min() < 0 or t.max() > 1:
        raise ValueError(f"expected targets within [0, 1], got {t.min()} to {t.max()}")
    weight = None if sample_weight is None else _weights(sample_weight, z)
    e = np.exp(-np.abs(z))
    each = np.maximum(z, 0) - z * t + np.log1p(e)
    loss = np.mean(each if weight is None else each * weight, dtype=np.float64)
    gradient = np.empty_like(z)
    np.divide(np.where(z < 0, e, 1), e + 1, out=gradient)
    gradient -= t
    gradient /= gradient.size
    if weight is not None:
        gradient *= weight.astype(gradient.dtype)
    return float(loss), gradient


def _pair(prediction: ArrayLike, target: ArrayLike) -> tuple[Array, Array]:
    y, t = as_float(prediction, "prediction"), as_float(target, "target")
    if y.shape != t.shape:
        raise ValueError(f"expected a target of the prediction's shape {y.shape}, got {t.shape}")
    if y.size == 0:
        raise ValueError("expected at least one example, got an empty batch")
    return y, t


def _weights(sample_weight: ArrayLike, like: Array) -> Array:
    """A float64 weight for each row of `like`, with its number of axes."""
    weight = as_float(sample_weight, "sample_weight").astype(np.float64)
    if like.ndim == 0 or weight.shape != like.shape[:1]:
        raise ValueError(f"expected sample_weight of shape {like.shape[:1] or '(N,)'}, got {weight.shape}")
    if not (weight.min() >= 0 and weight.max() <= np.finfo(like.dtype).max):
        raise ValueError(
            f"expected weights of at least 0 that are finite in {like.dtype}, got {weight.min()} to {weight.max()}"
        )
    return weight.reshape(-1, *[1] * (like.ndim - 1))
