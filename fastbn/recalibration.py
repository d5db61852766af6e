"""Running averages taken anew: the exact statistics of a data set."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .atomic import change
from .batchnorm import BatchNorm
from .functional import moments
from .nn import Sequential, leaves, walk
from .running import RunningStats
from .state import Array, as_float, whole

__all__ = ["recalibrate", "retake", "tracking"]


def recalibrate(model: Any, X: ArrayLike, batch_size: int = 1024) -> Any:
    """Replace the running averages of every BatchNorm by the exact statistics of a data set.

    The cure for averages that lag behind the weights, or that are those of other data. They become what one training
    forward of all of X with momentum 1 would make them (ghost batches, renormalisation and freezing apart), at the
    memory of a mini-batch: layer after layer, from the first, X goes through those before it, which normalise with the
    statistics of X that they have just got.

    Parameters
    ----------
    model : nn.Sequential or BatchNorm
        Its running averages are changed in place, and num_batches_tracked, which becomes the number of mini-batches.
        Modes, momentum, gradients and random states stay. Dropout does nothing here.
    X : array_like of float32 or float64, (N, ...)
    batch_size : int
        Examples that go through the model at once, at least 1: a matter of memory, not of the result. (Not so behind a
        BatchNorm without running averages: it has nothing to replace, and normalises with those of each mini-batch.)

    Returns
    -------
    model

    Raises
    ------
    ValueError
        The model has no BatchNorm with running averages; X does not fit it, is empty, or holds one value per feature;
        a statistic is not finite; a subclass of Sequential with a forward of its own has a BatchNorm within. Nothing
        has been changed then.
    TypeError
        X is of another dtype, or masked.

    Notes
    -----
    There is one pass over X for each BatchNorm. Mini-batches are merged by the rule of Chan, Golub & LeVeque (1979).

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import BatchNorm, training
    >>> bn = BatchNorm(1)
    >>> training.recalibrate(bn, [[1.0], [2.0], [6.0]], batch_size=2)
    BatchNorm(1)
    >>> bn.running_mean, bn.running_var, bn.num_batches_tracked
    (array([3.]), array([7.]), 2)
    """
    if whole(batch_size, "batch_size") < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    X = as_float(X, "X")
    if X.ndim == 0 or len(X) == 0:
        raise ValueError(f"expected X with at least 1 example, got shape {X.shape}")
    found = tracking(model)
    if not found:
        raise ValueError("expected a model with a BatchNorm that has running averages, got one without")
    retake(model, found, X, batch_size)
    return model


def tracking(model: Any) -> list[int]:
    """Which of the model's leaves are BatchNorm with running averages; ValueError where some are out of reach."""
    layers = [*leaves([model])]
    for own in (layer for layer in layers if isinstance(layer, Sequential)):
        if any(isinstance(layer, BatchNorm) for layer in walk(own)):
            raise ValueError(f"expected no BatchNorm within a forward of one's own, got one in {type(own).__name__}")
    return [i for i, layer in enumerate(layers) if isinstance(layer, BatchNorm) and layer.running_mean is not None]


def retake(model: Any, found: list[int], X: Array, batch_size: int = 1024) -> None:
    """Take the averages of these leaves anew, as `recalibrate` does; the others normalise with those that they have."""
    twin = copy.deepcopy(model)  # so that an error, or Ctrl-C, leaves the model as it was
    twin.train(False)
    layers, originals = [*leaves([twin])], [*leaves([model])]
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is an error below
        twin(X[:2])  # X that does not fit is an error of the layer that it does not fit
        exact = {i: _statistics(layers[:i], layers[i], X, batch_size) for i in found}
    averages: list[tuple[Any, Array]] = []
    for i, stats in exact.items():
        correction = stats.count / (stats.count - 1) if originals[i].unbiased else 1
        averages += [(originals[i].running_mean, stats.mean), (originals[i].running_var, stats.var * correction)]
    change(averages, *((originals[i], "num_batches_tracked", stats.num_batches) for i, stats in exact.items()))


def _statistics(before: list[Any], norm: BatchNorm, X: Array, batch_size: int) -> RunningStats:
    """Those of what reaches norm, which then normalises with them; of 1/m, as a training forward does."""
    stats = RunningStats(norm.num_features, momentum=None, unbiased=False)
    for start in range(0, len(X), batch_size):
        x: Any = X[start : start + batch_size]
        for layer in before:
            x = layer(x)
        stats.update(moments(x, axis=norm.axis))
    if stats.count < 2:
        raise ValueError(f"expected more than 1 value per feature, got X of shape {X.shape}")
    if wrong := np.flatnonzero(~np.isfinite(stats.mean + stats.var)).tolist():
        raise ValueError(f"the statistics of features {wrong[:5]} of {norm!r} are not finite: X or the weights are not")
    norm.running_mean, norm.running_var = stats.mean, stats.var
    return stats
