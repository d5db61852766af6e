"""Batch normalization over several processes.

Processes, or *ranks*, that train one network together each hold a part of the batch. `SyncBatchNorm` normalises with
the statistics of the whole batch. mpi4py brings the processes and their messages (``pip install "fastbn[mpi]"``), or
torch.distributed, or anything that has the four members of `Communicator`.

# Design: ranks exchange float64 arrays of one size, by allgather alone, and every rank merges what it gets in the order
# of ranks: so all have the same bits, whatever the library's own order of reduction is. Each exchange begins with a
# header, in which a rank says what it brings, or what went wrong on it. An error on one rank is raised on all, and none
# waits for numbers that never come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from . import batches, calls
from .arguments import checked_mask
from .atomic import change
from .batchnorm import BatchNorm
from .batchstats import BatchStats
from .nn import walk
from .running import merge
from .state import Array

__all__ = ["Communicator", "SyncBatchNorm", "convert"]

HEADER = 64  # float64 numbers: whether all is well, facts, and the bytes of a message
FACTS = 8
FORWARD, BACKWARD = 1.0, 2.0
WHERE = {FORWARD: "a forward of SyncBatchNorm", BACKWARD: "a backward of SyncBatchNorm"}


class Communicator(Protocol):
    """What is asked of a library for messages; a communicator of mpi4py is taken as it is."""

    rank: int
    size: int

    def allgather(self, array: Array) -> Sequence[Array]:
        """Return the arrays of all ranks, in their order."""

    def abort(self, code: int) -> Any:
        """End all ranks."""


class _MPI:
    """A communicator of mpi4py, whose own allgather pickles."""

    def __init__(self, comm: Any) -> None:
        self._comm, self.rank, self.size = comm, comm.Get_rank(), comm.Get_size()

    def allgather(self, array: Array) -> Array:
        gathered = np.empty((self.size, *array.shape))
        self._comm.Allgather(array, gathered)
        return gathered

    def abort(self, code: int) -> Any:
        self._comm.Abort(code)


class Group:
    """The ranks, as one of them sees them. Copies share it; what is unpickled elsewhere has none."""

    def __init__(self, comm: Any) -> None:
        self.comm: Communicator = _MPI(comm) if hasattr(comm, "Allgather") else comm
        if missing := [name for name in ("rank", "size", "allgather") if not hasattr(self.comm, name)]:
            raise TypeError(
                f"expected comm with rank, size and allgather, got {type(comm).__name__} without {missing[0]}"
            )

    def gather(self, facts: Sequence[float], error: BaseException | None = None) -> Array:
        """The facts of all ranks, (size, len(facts)); the first is the place in the program.

        Raises `error`, or where another rank brought one, a RuntimeError with its rank and words.
        """
        header = np.zeros(HEADER)
        header[0], header[1 : 1 + len(facts)] = error is None, facts
        if error is not None:
            text = f"{type(error).__name__}: {error}".encode()[: 8 * (HEADER - FACTS)]
            header[FACTS:].view(np.uint8)[: len(text)] = np.frombuffer(text, np.uint8)
        gathered = np.stack(self.comm.allgather(header))
        if error is not None:
            raise error
        for rank, there in enumerate(gathered):
            if there[0] != 1:
                text = bytes(there[FACTS:].view(np.uint8)).rstrip(b"\0").decode(errors="replace")
                raise RuntimeError(f"rank {rank} of {self.comm.size} failed: {text}")
        facts_of_all = gathered[:, 1 : 1 + len(facts)]
        for rank, place in enumerate(facts_of_all[:, 0]):
            if place != facts[0]:
                here, there = WHERE[facts[0]], WHERE.get(place, "another place")
                raise RuntimeError(f"expected all ranks in {here}, got rank {rank} in {there}")
        return facts_of_all

    def numbers(self, array: Array) -> Array:
        """These of all ranks, (size, *shape), after `gather` found all well."""
        return np.stack(self.comm.allgather(np.ascontiguousarray(array, np.float64)))

    def __deepcopy__(self, memo: Any) -> Group:
        return self

    def __reduce__(self) -> Any:
        return _no_group, ()


def _no_group() -> None:
    return None


class Shared(NamedTuple):
    """What backward needs of a forward over all ranks."""

    group: Group
    by: calls.Constants  # with weight and bias as renormalisation left them
    stats: BatchStats  # of all ranks
    valid: Array | None  # this rank's mask
    corrections: tuple[Array, Array] | None  # r and d


class SyncBatchNorm(BatchNorm):
    """Batch normalization of a batch that several processes share.

    In training, mean and variance are those of the parts of all ranks together, and so are the running statistics, and
    the gradients of weight and bias: all ranks have the same ones, bit for bit. x, y and dx are the rank's own part.
    Parts may differ in length, and be empty. In inference, and where the layer is frozen, nothing is exchanged.

    With ghost_size, every rank normalises ghost batches of its own examples, and the running statistics take those of
    all ranks in, in the order of ranks.

    Every rank must call the layer and its backward, as often as the others and in the same order. An error on one rank
    is raised on all.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, axis, dtype, activation, unbiased, num_threads,
    ghost_size, renorm
        The same as in `fastbn.BatchNorm`.
    comm : mpi4py communicator, or `Communicator`
        The ranks.

    Notes
    -----
    A training forward exchanges 64 numbers of float64, and then 3 for each feature; a backward 64, and then 2 for each
    feature. The parts are merged by the rule of Chan, Golub & LeVeque (1979).

    The gradients of weight and bias are sums over all ranks already: do not add them up again.

    A pickled layer has no communicator: it computes as a `BatchNorm` does, until `convert` gives it one.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.distributed import SyncBatchNorm
    >>> class One:  # a group of one
    ...     rank, size = 0, 1
    ...     def allgather(self, array):
    ...         return [array]
    >>> SyncBatchNorm(1, comm=One())(np.array([[1.0], [3.0]])).round(3)
    array([[-1.],
           [ 1.]])
    """

    _group: Group | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        comm: Any,
        **options: Any,
    ) -> None:
        self._group = Group(comm)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)

    def __call__(self, x: ArrayLike, out: Array | None = None, *, mask: ArrayLike | None = None) -> Array:  # type: ignore[override]
        if self._group is None or not self.training or self.frozen:
            return super().__call__(x, out, mask=mask)
        if self._ghost_size is not None:
            return self._forward_in_ghosts(self._group, x, out, mask)
        return self._forward_together(self._group, x, out, mask)

    forward = __call__

    def _forward_together(self, group: Group, x: ArrayLike, out: Array | None, mask: ArrayLike | None) -> Array:
        constants, error = self._constants, None
        facts = [FORWARD, self.num_features, 0, 0, 0, 0]
        try:
            a, y, out, kept = calls.arrays_of_forward(constants, x, out, True)
            axis = constants.axis % a.ndim
            valid = None if mask is None else checked_mask(mask, a, axis)
            by = constants.like(None, None, axis if valid is None else 1)
            given = a if valid is None else batches.gather(a, axis, valid)
            local = calls.moments(by, given)
            facts[2:] = a.ndim, axis, a.itemsize, local.count
        except BaseException as failed:
            error = failed
        facts_of_all = group.gather(facts, error)
        _check_alike(facts_of_all)
        counts = [int(n) for n in facts_of_all[:, 5]]
        if sum(counts) == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got 1 on {len(counts)} ranks together"
            )
        stats = _merged(group.numbers(np.stack([local.mean, local.mean_low, local.var])), counts)
        corrections = self._corrections(stats)
        if corrections is not None:
            by = self._corrected(by, corrections)
        done = calls.normalize(by, given, stats, y if valid is None else None)
        if valid is not None:
            batches.scatter(done, y, axis, valid)
        if y is not out:
            np.copyto(np.asarray(out), y)
        shared = Shared(group, by, stats, valid, corrections)
        self._take([stats], (backward, x, shared, True) if kept else None)
        return out

    def _forward_in_ghosts(self, group: Group, x: ArrayLike, out: Array | None, mask: ArrayLike | None) -> Array:
        """Ghost batches are local; only the running statistics are those of all."""
        error = None
        facts = [FORWARD, self.num_features, 0.0]
        try:
            averaging = self._momentum, self.num_batches_tracked
            y, parts, kept, _, _ = batches.forward(self._constants, x, out, mask, True, self._ghost_size, averaging)
            stats = [part.stats for part in parts if part.stats.count]
            facts[2] = len(stats)
        except BaseException as failed:
            error = failed
        facts_of_all = group.gather(facts, error)
        _check_alike(facts_of_all[:, :2])
        most = int(facts_of_all[:, 2].max())
        brought = np.zeros((most, 3, self.num_features))
        for i, part in enumerate(stats):
            brought[i, 0], brought[i, 1], brought[i, 2] = part.mean, part.var, part.count
        of_all = group.numbers(brought)
        taken = [
            BatchStats(mean, var, int(count[0]))
            for rank, n in enumerate(facts_of_all[:, 2])
            for mean, var, count in of_all[rank, : int(n)]
        ]
        self._take(taken, (batches.backward, x, parts, True) if kept else None)
        return y

    def _take(self, all_stats: list[BatchStats], saved: Any) -> None:
        """The running statistics after these batches, with all else that a forward changes."""
        tracked, changed = self.num_batches_tracked, []
        if self._running_mean is not None and self._running_var is not None:
            mean, var = self._running_mean, self._running_var
            with np.errstate(all="ignore"):
                for stats in all_stats:
                    if stats.count:
                        tracked += 1
                        factor = 1 / tracked if self._momentum is None else self._momentum
                        correction = stats.count / (stats.count - 1) if self._unbiased else 1.0
                        mean = (1 - factor) * mean + factor * stats.mean
                        var = (1 - factor) * var + factor * (stats.var * correction)
            changed = [(self._running_mean, mean), (self._running_var, var)]
        change(changed, (self, "num_batches_tracked", tracked), (self, "_saved", saved))

    def _corrections(self, stats: BatchStats) -> tuple[Array, Array] | None:
        """r and d of batch renormalisation (Ioffe 2017, algorithm 1)."""
        if self._renorm is None or self._running_mean is None or self._running_var is None or not stats.count:
            return None
        r_max, d_max = self._renorm
        with np.errstate(all="ignore"):
            running_std = np.sqrt(self._running_var + self._eps)
            r = np.clip(np.sqrt(stats.var + self._eps) / running_std, 1 / r_max, r_max)
            d = np.clip(((stats.mean - self._running_mean) + stats.mean_low) / running_std, -d_max, d_max)
        return r, d

    def _corrected(self, by: calls.Constants, corrections: tuple[Array, Array]) -> calls.Constants:
        """With ``weight*r`` and ``bias + weight*d``."""
        r, d = corrections
        weight = np.ones(self.num_features) if self._weight is None else self._weight.astype(np.float64)
        bias = np.zeros(self.num_features) if self._bias is None else self._bias.astype(np.float64)
        with np.errstate(all="ignore"):
            weight, bias = weight * r, bias + weight * d
        return calls.Constants(
            self.num_features, weight, bias, self._eps, axis=by.axis, activation=self._activation,
            num_threads=self._num_threads,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Sync{super().__repr__()}"


def backward(
    constants: calls.Constants,
    dy: ArrayLike,
    x: ArrayLike,
    shared: Shared,
    training: bool,
    out: Array | None,
    dweight: Array | None,
    dbias: Array | None,
) -> Array:
    """dx of this rank's part; the gradients of weight and bias are those of all ranks."""
    group, by, stats, valid, corrections = shared
    error = None
    try:
        g, a, dx, out = calls.arrays_of_backward(constants, dy, x, out, dweight, dbias)
        axis = constants.axis % a.ndim
        if valid is not None:
            g, a = batches.gather(g, axis, valid), batches.gather(a, axis, valid)
        sums = calls.gradients(by, g, a, stats)
    except BaseException as failed:
        error = failed
    group.gather([BACKWARD], error)
    with np.errstate(all="ignore"):
        total = _in_pairs(list(group.numbers(np.stack(sums))))
        done = calls.input_gradient(by, g, a, stats, *total, dx if valid is None else None)
        if valid is not None:
            batches.scatter(done, dx, axis, valid)
        if dx is not out:
            np.copyto(np.asarray(out), dx)
        if dweight is not None and dbias is not None:
            if corrections is not None:
                r, d = corrections
                total = r * total[0] + d * total[1], total[1]
            change([(dweight, total[0]), (dbias, total[1])])
    return out


def _in_pairs(parts: list[Any]) -> Any:
    """Their sum, in the order of a tree of pairs."""
    while len(parts) > 1:
        parts = [sum(parts[i + 1 : i + 2], parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]


def _merged(parts: Array, counts: list[int]) -> BatchStats:
    """Statistics of all parts, (size, 3, C): means in two parts, and variances."""
    filled = [(part, n) for part, n in zip(parts, counts, strict=True) if n]
    if len(filled) <= 1:  # with its own bits
        (mean, low, var), n = filled[0] if filled else (parts[0], 0)
        return BatchStats(mean, var, n, low)
    mean, low, spread = np.zeros((3, parts.shape[2]))
    seen = 0
    with np.errstate(all="ignore"):
        for (part_mean, part_low, part_var), n in filled:
            merge((mean, low, spread), seen, (part_mean, part_low, part_var * n), n)
            seen += n
        return BatchStats(mean, spread / seen, seen, low)


def _check_alike(facts: Array) -> None:
    """ValueError, the same on every rank, where features, dimensions, axes or dtypes differ."""
    names = "place", "num_features", "dimensions of x", "feature axis", "bytes of an element"
    for name, column in zip(names[: facts.shape[1]], facts.T, strict=False):
        if len({*column}) > 1:
            raise ValueError(f"expected the same {name} on all ranks, got {[int(n) for n in column]}")


def convert(model: Any, comm: Any) -> Any:
    """Let every BatchNorm of a model normalise over all ranks.

    The layers stay the same objects with the same arrays, so that an optimizer keeps its meaning. Only their class
    changes, to `SyncBatchNorm`.

    Parameters
    ----------
    model : nn.Sequential, BatchNorm or any layer
        Model, which is changed in place.
    comm : mpi4py communicator, or `Communicator`, or None
        The ranks. With None, each SyncBatchNorm becomes a BatchNorm again.

    Returns
    -------
    model
        The model itself.
    """
    group = None if comm is None else Group(comm)
    for layer in walk([model]):
        if type(layer) in (BatchNorm, SyncBatchNorm):
            layer.__class__ = BatchNorm if group is None else SyncBatchNorm
            layer._group = group
    return model
