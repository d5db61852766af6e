"""Dask: batch normalization of arrays that are larger than memory, or spread over a cluster.

The extra is ``pip install "fastbn[dask]"``.

# Design: statistics are a dask array of records, one for each feature, so that dask's own reduction merges them in a
# tree and cuts them as x's features are cut. A block is computed by one thread: dask runs several blocks at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from copy import copy
from importlib import import_module
from typing import Any

import numpy as np

from .. import calls, functional
from ..arguments import floating
from ..batchstats import BatchStats, merged
from ..calls import Constants
from ..state import Array
from .layers import library

__all__ = ["batch_norm", "moments"]

RECORD = np.dtype([("mean", "f8"), ("mean_low", "f8"), ("var", "f8"), ("count", "i8")])
# Results of blocks along each axis that one task merges, by the number of axes that are summed over. They decide bits,
# so they are not dask's setting.
MERGED_AT_ONCE = {1: 16, 2: 4}


def moments(x: Any, axis: int = 1) -> Any:
    """Return mean and variance of each feature of a dask array, when they are computed.

    Parameters
    ----------
    x : dask.array.Array of float32 or float64
        Array of any shape and in any chunks, with C features along the feature axis. Integers and bool become float64.
        Chunks may have an unknown size along all other axes.
    axis : int
        The feature axis.

    Returns
    -------
    dask.delayed.Delayed
        ``moments(x).compute()`` is the `fastbn.BatchStats` that `fastbn.moments` gives for an array in memory: mean (in
        two parts), var and count. ``dask.compute`` takes several of them at once, and an attribute such as
        ``moments(x).mean`` is lazy too.

    Raises
    ------
    TypeError
        x is no dask array, has another dtype, or has blocks that are masked or on a GPU.
    numpy.exceptions.AxisError
        x has no such axis.
    ValueError
        The number of features is unknown.
    ImportError
        dask is not installed.

    Notes
    -----
    `fastbn.moments` computes each block. Then 16 neighbours at a time are merged, in the order of the blocks, by the
    rule of Chan, Golub & LeVeque (1979). (Along two axes these are 4 by 4, along more axes 2 by 2 by ...). So the bits
    depend on the chunks, and neither on dask's scheduler nor on the number of workers. An array of one block has the
    bits of `fastbn.moments`, if it lies in C or Fortran order; blocks that lie otherwise are copied into C order first.
    Two ways to cut an array differ by a few units of rounding.

    Examples
    --------
    >>> import dask.array as da
    >>> from fastbn.interop.dask import moments
    >>> x = da.from_array([[1.0, 10.0], [3.0, 30.0], [5.0, 50.0]], chunks=(2, 2))
    >>> moments(x).compute().mean
    array([ 3., 30.])
    """
    _, k = _checked(x, axis)
    # Part by part: delayed would rename all that an array needs, and some graphs (P2P rechunking) do not outlive that.
    parts = _records(x, k).to_delayed().tolist()
    return library("dask", "dask").delayed(_stats, pure=True)(parts)


def batch_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
) -> Any:
    """Normalise a dask array block by block, when it is computed.

    It is `fastbn.batch_norm`, except that nothing is updated in place: with ``training=True`` there are no running
    statistics, and so no momentum. There is no ``out=``, and each block is computed by one thread.

    Parameters
    ----------
    x : dask.array.Array of float32 or float64
        Array of any shape and in any chunks, with C features along the feature axis. Integers and bool become float64.
        Chunks may have an unknown size along all other axes.
    running_mean, running_var : array_like or dask.array.Array of shape (C,), optional
        Statistics that x is normalised with, where training is False. They are copied.
    weight, bias : array_like or dask.array.Array of shape (C,), optional
        Scale and shift of each feature. The defaults are 1 and 0. They are copied.
    training : bool
        Whether x is normalised with its own statistics, which are those of `moments`.
    eps : float
        Positive number that is added to the variance.
    axis : int
        The feature axis.
    activation : {None, "relu", "leaky_relu"}
        Function that is applied to y in the same pass over memory. The slope of leaky_relu is 0.01.

    Returns
    -------
    dask.array.Array
        y, with the shape, chunks and dtype of x.

    Raises
    ------
    ValueError
        ``training=False`` without running statistics, ``training=True`` with them, one of the two without the other,
        a wrong shape, an eps that is not positive, or an unknown number of features. When y is computed: a single value
        per feature in training.
    TypeError, numpy.exceptions.AxisError, ImportError
        The same as in `moments`.

    Notes
    -----
    With given statistics, y has the bits that `fastbn.batch_norm` gives for the whole array.

    With ``training=True`` each block of x is computed twice: once for the statistics and, after these, once more for y.
    Otherwise dask would keep every block in memory from the first use to the second. If x takes longer to compute than
    to read, and its blocks fit into memory, persist it first. Where one such call takes the result of another, each of
    them doubles the work: store or persist what lies between. Where x itself goes into the same computation, as in
    ``x + batch_norm(x, training=True)``, dask keeps its blocks: compute the statistics first, by `moments`.

    Examples
    --------
    >>> import dask.array as da
    >>> from fastbn.interop.dask import batch_norm
    >>> x = da.from_array([[1.0], [3.0], [5.0], [7.0]], chunks=(2, 1))
    >>> y = batch_norm(x, training=True)
    >>> y.compute().round(2).ravel().tolist()
    [-1.34, -0.45, 0.45, 1.34]
    """
    dtype, k = _checked(x, axis)
    Constants(eps=eps, activation=activation)  # for their errors
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected both running_mean and running_var or neither, got one of them")
    if not training and running_mean is None:
        raise ValueError("expected running_mean and running_var where training=False, got None")
    if training and running_mean is not None:
        raise ValueError("expected no running_mean and running_var where training=True: nothing is updated in place")
    affine = _of_features(weight, "weight", x, k), _of_features(bias, "bias", x, k)
    if training:
        records = _records(x, k)
        return _by_blocks(_normalized, _again(x, records), dtype, k, records, *affine, eps=eps, activation=activation)
    mean, var = _of_features(running_mean, "running_mean", x, k), _of_features(running_var, "running_var", x, k)
    options = {"eps": eps, "activation": activation, "num_threads": 1}
    return _by_blocks(functional.batch_norm, x, dtype, k, mean, var, *affine, **options)


def is_dask(x: Any) -> bool:
    """Whether x is a dask array. Nobody has one who has not imported dask.array, which takes time."""
    return isinstance(x, getattr(sys.modules.get("dask.array"), "Array", ()))


def _checked(x: Any, axis: int) -> tuple[np.dtype[Any], int]:
    """The dtype of y, and the feature axis from 0."""
    da = library("dask.array", "dask")
    if not isinstance(x, da.Array):
        raise TypeError(f"expected x to be a dask array, got {type(x).__name__}")
    meta = floating(x._meta, "x")  # of the type and dtype of x's blocks
    calls.moments(Constants(axis=axis), meta)  # for its errors
    k = axis % x.ndim
    if math.isnan(x.shape[k]):
        raise ValueError(
            f"expected a known number of features along axis {axis} of x, got chunks of unknown size: "
            "x.compute_chunk_sizes() finds it"
        )
    return meta.dtype, k


def _records(x: Any, k: int) -> Any:
    """The statistics of x: a dask array of RECORDs, (C,), in the chunks of x's features."""
    over = [i for i in range(x.ndim) if i != k]
    at_once = MERGED_AT_ONCE.get(len(over), 2)
    return library("dask.array", "dask").reduction(
        x, _records_of_block, _merged, combine=_merged, axis=tuple(over), split_every=dict.fromkeys(over, at_once),
        dtype=RECORD, meta=np.empty(0, RECORD),
    )  # fmt: skip


def _again(x: Any, records: Any) -> Any:
    """x, computed once more after the records."""
    graph = x.__dask_graph__()
    layers = graph.layers
    spec: Any = sys.modules.get("dask._task_spec")
    if hasattr(getattr(spec, "GraphNode", None), "substitute"):  # dask 2024.12 and later
        layers = {name: _cloneable(layer, spec) for name, layer in layers.items()}
    x = library("dask.array", "dask").Array(type(graph)(layers, graph.dependencies), x.name, x.chunks, meta=x._meta)
    return library("dask.graph_manipulation", "dask").bind(x, records, seed=records.name)


def _cloneable(layer: Any, spec: Any) -> Any:
    """The layer, with a `clone` that gives tasks the new names of what they need.

    The clones of dask 2024.12 to (at least) 2026.8 need the old ones (dask issue 12455). These stay in memory.
    """
    if type(layer).clone is not import_module("dask.highlevelgraph").Layer.clone:
        return layer
    tasks = {key: task for key, task in layer.items() if isinstance(task, spec.GraphNode)}
    if any(type(task).__module__ != spec.__name__ for task in tasks.values()):
        return layer  # P2P rechunking: a second one of the same name fails
    data = {key for key, task in tasks.items() if isinstance(task, spec.DataNode)}
    clone_key, bind = import_module("dask.base").clone_key, import_module("dask.graph_manipulation").chunks.bind

    def clone(keys: set[Any], seed: Any, bind_to: Any) -> tuple[Any, bool]:
        again, bound = layer.clone(keys, seed, bind_to)
        for key, task in tasks.items():
            needs = task.dependencies & keys
            if key in keys and (needs or key in data):
                new = clone_key(key, seed)
                made = task.substitute({need: clone_key(need, seed) for need in needs}, key=new)
                # Data wait for nothing: a task that has to wait for them, too, lets other blocks go first.
                waits = needs <= data and key not in data
                again.mapping[new] = spec.Task(new, bind, made, spec.TaskRef(bind_to)) if waits else made
        return again, bound

    copied = copy(layer)
    copied.clone = clone
    return copied


def _records_of_block(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    """RECORDs with x's dimensions, all of length 1 but that of the features."""
    k = next(i for i in range(x.ndim) if i not in axis)
    if isinstance(x, np.ndarray) and not (x.flags.c_contiguous or x.flags.f_contiguous):
        x = x.copy()  # in C order, as it would arrive in another process: the order decides bits
    stats = calls.moments(Constants(axis=k, num_threads=1), x)
    return np.expand_dims(_as_records(stats), axis)


def _merged(parts: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    """One record for each feature, merged in the order of the blocks."""
    k = next(i for i in range(parts.ndim) if i not in axis)
    rows = np.moveaxis(parts, k, -1)
    rows = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
    numbers = np.stack([rows["mean"], rows["mean_low"], rows["var"]], axis=1)
    records = _as_records(merged(numbers, rows["count"].max(axis=1, initial=0)))
    return np.expand_dims(records, axis) if keepdims else records


def _as_records(stats: BatchStats) -> Array:
    records = np.empty(stats.mean.shape, RECORD)
    records["mean"], records["mean_low"] = stats.mean, stats.mean_low
    records["var"], records["count"] = stats.var, stats.count
    return records


def _stats(parts: list[Array]) -> BatchStats:
    """Statistics of all features from their records, of which each part has some."""
    records = np.concatenate(parts)
    count = int(records["count"].max(initial=0))  # the same for all features
    return BatchStats(records["mean"], records["var"], count, records["mean_low"])


def _normalized(
    x: Array, records: Array, weight: Array | None, bias: Array | None, *, eps: float, axis: int, activation: str | None
) -> Array:
    """A block, by statistics of all blocks."""
    stats = _stats([records])
    if stats.count == 1:
        raise ValueError("Expected more than 1 value per channel when training, got 1 in all blocks together")
    constants = Constants(-1, weight, bias, eps, axis=axis, activation=activation, num_threads=1)
    return calls.normalize(constants, x, stats, None)


def _of_features(a: Any, name: str, x: Any, k: int) -> Any:
    """The (C,) argument a as a dask array in the chunks of x's features."""
    if a is None:
        return None
    lazy = is_dask(a)
    given = floating(a._meta if lazy else a, name)
    shape = a.shape if lazy else given.shape
    if shape != (x.shape[k],):
        raise ValueError(f"expected {name} of shape ({x.shape[k]},), got {shape}")
    if lazy:
        return a.rechunk((x.chunks[k],))
    # A copy: a layer's running averages may have changed before y is computed.
    return library("dask.array", "dask").from_array(given.copy(), chunks=(x.chunks[k],))


def _by_blocks(
    function: Callable[..., Array], x: Any, dtype: np.dtype[Any], k: int, *of_features: Any, **options: Any
) -> Any:
    """function(block, part of each array of_features, axis=k, **options) of each block of x."""
    index = tuple(range(x.ndim))
    pairs = [part for a in of_features for part in (a, None if a is None else (k,))]
    return library("dask.array", "dask").blockwise(
        function, index, x, index, *pairs, dtype=dtype, meta=np.empty((0,) * x.ndim, dtype), align_arrays=False, axis=k,
        **options,
    )  # fmt: skip
