"""A call of the layer as several batches, or as a part of one: ghost batches and masks.

# Design: a batch is what one call takes: a slice of x along the batch axis, written into the same slice of y, or the
# valid positions of one, gathered as rows (m, C) and scattered afterwards. Everything about the whole call is checked
# before the first batch is computed, which works with copies of the running averages: an error changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import EllipsisType
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from . import calls
from .arguments import checked_mask
from .batchstats import BatchStats
from .state import Array

_Part = tuple[tuple[slice, ...] | EllipsisType, Array | None]


class Batch(NamedTuple):
    """What backward needs of one batch."""

    where: tuple[slice, ...] | EllipsisType  # in x
    valid: Array | None  # the mask of that part of x; None where all of it is valid
    stats: BatchStats


def forward(
    constants: calls.Constants,
    x: ArrayLike,
    out: Array | None,
    mask: ArrayLike | None,
    training: bool,
    ghost_size: int | None,
    averaging: tuple[float | None, int],
) -> tuple[Array, list[Batch], bool, list[tuple[Array, Array]], int]:
    """y, the batches that it was made of, whether x is still there, what becomes of the running averages (each with its
    new values), and of the number of batches that they hold.

    `averaging` is momentum and that number.
    """
    x, y, out, kept = calls.arrays_of_forward(constants, x, out, training)
    axis = constants.axis % x.ndim
    parts = list(_parts(x.shape, axis, ghost_size, None if mask is None else checked_mask(mask, x, axis)))
    if training:
        _refuse_single_values(x, axis, parts)
    mean, var = constants.mean, constants.var
    if training and mean is not None and var is not None:
        mean, var = mean.copy(), var.copy()
    whole, rows = constants.like(mean, var, axis), constants.like(mean, var, 1)
    momentum, tracked = averaging
    batches = []
    for where, valid in parts:
        given = x[where] if valid is None else gather(x[where], axis, valid)
        by, to = (whole, y[where]) if valid is None else (rows, None)
        if training:
            factor = 1 / (tracked + 1) if momentum is None else momentum
            done, stats, _ = calls.forward(by, given, to, factor)
            tracked += stats.count > 0
        else:
            done, stats, _ = calls.infer(by, given, to)
        if valid is not None:
            scatter(done, y[where], axis, valid)
        batches.append(Batch(where, valid, stats))
    if y is not out:
        np.copyto(np.asarray(out), y)
    if training and constants.mean is not None and constants.var is not None and mean is not None and var is not None:
        return out, batches, kept, [(constants.mean, mean), (constants.var, var)], tracked
    return out, batches, kept, [], averaging[1]


def backward(
    constants: calls.Constants,
    dy: ArrayLike,
    x: ArrayLike,
    batches: list[Batch],
    training: bool,
    out: Array | None,
    dweight: Array | None,
    dbias: Array | None,
) -> Array:
    """dx; the gradients of weight and bias are the batches' float64 ones, added up in order."""
    dy, x, dx, out = calls.arrays_of_backward(constants, dy, x, out, dweight, dbias)
    axis = constants.axis % x.ndim
    rows = constants.like(constants.mean, constants.var, 1)
    total, part = np.zeros((2, x.shape[axis])), np.zeros((2, x.shape[axis]))
    with np.errstate(all="ignore"):  # as everywhere: what is not finite stays in its feature, without a word
        for where, valid, stats in batches:
            if valid is None:
                given = dy[where], x[where], stats
                calls.backward_into(constants, *given, training, dx[where], part[0], part[1])
            else:
                given = gather(dy[where], axis, valid), gather(x[where], axis, valid), stats
                done = calls.backward_into(rows, *given, training, None, part[0], part[1])
                scatter(done, dx[where], axis, valid)
            total += part
        if dweight is not None and dbias is not None:
            dweight[...], dbias[...] = total
    if dx is not out:
        np.copyto(np.asarray(out), dx)
    return out


def _parts(shape: tuple[int, ...], axis: int, ghost_size: int | None, mask: Array | None) -> Iterator[_Part]:
    """Where in x each batch stands, and which of its positions are valid: None for all of them."""
    n = shape[0 if axis else 1] if len(shape) > 1 else 1
    if ghost_size is None or ghost_size >= n:
        yield ..., None if mask is None or mask.all() else mask
        return
    starts = list(range(0, n, ghost_size))
    if n % ghost_size == 1:
        starts.pop()  # a single example may have no variance
    for a, b in zip(starts, [*starts[1:], n], strict=True):
        valid = None if mask is None or mask[a:b].all() else mask[a:b]
        yield (slice(a, b),) if axis else (slice(None), slice(a, b)), valid


def _refuse_single_values(x: Array, axis: int, parts: list[_Part]) -> None:
    for where, valid in parts:
        shape = x[where].shape
        if valid is None and x[where].size == shape[axis]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
        if valid is not None and np.count_nonzero(valid) == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {shape} with 1 valid position"
            )


def gather(x: Array, axis: int, valid: Array) -> Array:
    """The valid positions of x, (m, C)."""
    return np.ascontiguousarray(np.moveaxis(x, axis, -1)[valid])


def scatter(rows: Array, y: Array, axis: int, valid: Array) -> None:
    """The inverse of gather; 0 elsewhere."""
    y[...] = 0
    np.moveaxis(y, axis, -1)[valid] = rows
