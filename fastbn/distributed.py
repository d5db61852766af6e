"""Batch normalization over several processes.

Processes, or *ranks*, that train one network together each hold a part of the batch. `SyncBatchNorm` normalises with
the statistics of the whole batch. mpi4py brings the processes and their messages (``pip install "fastbn[mpi]"``), or
torch.distributed, or anything that has the four members of `Communicator`.

# Design: what ranks say to each other stands in ranks.py. The arithmetic on x is that of the kernels, in halves:
# statistics, exchange, y; sums of the gradients, exchange, dx. What can fail on one rank alone comes before the
# exchange, as far as that can be, so that its error reaches the others.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import batches, calls
from .arguments import checked_mask
from .atomic import change
from .batchnorm import BatchNorm
from .batchstats import BatchStats, averaged, merged
from .nn import walk
from .ranks import Communicator, Gloo, Group, RankError, in_pairs
from .state import Array, Float

__all__ = ["Communicator", "Gloo", "RankError", "SyncBatchNorm", "convert"]

FORWARD, BACKWARD = "a forward of SyncBatchNorm", "a backward of SyncBatchNorm"
GHOSTS = "a forward of SyncBatchNorm in ghost batches"
SETTINGS = "settings of SyncBatchNorm (their checksum)"

# The ids of the gradients that became sums over all ranks, while `summed` collects them.
_summed: ContextVar[set[int] | None] = ContextVar("_summed", default=None)


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

    Every rank must make the layer with the same arguments, and call it and its backward as often as the others and in
    the same order. An error before the exchange, such as a wrong x, on one rank is raised on all, and the running
    statistics stay as they were.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, axis, dtype, activation, unbiased, num_threads,
    ghost_size, renorm
        The same as in `fastbn.BatchNorm`.
    comm : mpi4py communicator, or `Communicator`
        The ranks.

    Raises
    ------
    ValueError
        A training forward where num_features or other settings of the layer, or the dimensions, the feature axis or
        the dtype of x differ between ranks, or where all ranks together have a single value of each feature. Every rank
        raises it. Or what `fastbn.BatchNorm` raises; the other ranks then raise the next one. Or a comm that is an
        intercommunicator, or one that this process is not among.
    TypeError
        comm lacks what a `Communicator` has.
    RankError
        Another rank failed, which the message names with its error, or is at another place in the program.

    Notes
    -----
    A training forward exchanges 64 numbers of float64, and then 3 for each feature; a backward 64, and then 2 for each
    feature. With ghost_size, a forward exchanges 128, and then 3 for each feature and ghost batch; a backward nothing.
    The parts are merged by the rule of Chan, Golub & LeVeque (1979). If all ranks together bring 131,072 numbers or
    more, each rank merges those of some of the features, and tells the others.

    The gradients of weight and bias are sums over all ranks already: do not add them up again.

    A pickled layer has no communicator: it computes as `fastbn.BatchNorm` does, until `convert` gives it one.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.distributed import SyncBatchNorm
    >>> class One:  # a group of one
    ...     rank, size = 0, 1
    ...     def allgather(self, array):
    ...         return [array]
    ...     def abort(self, code):
    ...         raise SystemExit(code)
    >>> SyncBatchNorm(1, comm=One())(np.array([[1.0], [3.0]])).round(3)
    array([[-1.],
           [ 1.]])
    """

    known_as = BatchNorm  # in files and folded networks, which are for inference
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

    @property
    def group(self) -> Group | None:
        """The ranks; None for a layer that was unpickled."""
        return self._group

    @overload
    def __call__(
        self, x: NDArray[Float], out: NDArray[Float] | None = None, *, mask: ArrayLike | None = None
    ) -> NDArray[Float]: ...
    @overload
    def __call__(self, x: ArrayLike, out: Array | None = None, *, mask: ArrayLike | None = None) -> Array: ...
    def __call__(self, x: ArrayLike, out: Array | None = None, *, mask: ArrayLike | None = None) -> Array:
        group = self._spoken_to()
        if group is None:
            return super().__call__(x, out, mask=mask)
        if self._ghost_size is not None:
            return self._forward_in_ghosts(group, x, out, mask)
        return self._forward_together(group, x, out, mask)

    def forward(self, x: ArrayLike, out: Array | None = None, *, mask: ArrayLike | None = None) -> Array:
        """The same as calling the layer, see `fastbn.BatchNorm.forward`."""
        return self(x, out, mask=mask)

    def _spoken_to(self) -> Group | None:
        """The ranks, where a forward is now one over all of them."""
        return self._group if self.training and not self.frozen else None

    def _forward_together(self, group: Group, x: ArrayLike, out: Array | None, mask: ArrayLike | None) -> Array:
        constants = self._constants
        try:
            a, y, out, kept = calls.arrays_of_forward(constants, x, out, True)
            axis = constants.axis % a.ndim
            valid = None if mask is None else checked_mask(mask, a, axis)
            if valid is not None and valid.all():
                valid = None
            by = constants.like(None, None, axis if valid is None else 1)
            given = a if valid is None else batches.gather(a, axis, valid)
            local = calls.moments(by, given)
            numbers = np.stack([local.mean, local.mean_low, local.var])
            alike = {
                "num_features": self.num_features, "dimensions of x": a.ndim, "feature axis": axis,
                "bytes of an element": a.itemsize, SETTINGS: self._settings(),
            }  # fmt: skip
        except BaseException as error:
            group.tell(error)
            raise
        facts, (mean, low, var) = group.exchange(
            FORWARD, alike=alike, facts=[local.count], numbers=numbers, merge=_merged
        )
        count = int(facts.sum())
        if count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got 1 on {len(facts)} ranks together"
            )
        stats = BatchStats(mean, var, count, low)
        corrections = self._corrections(stats)
        if corrections is not None:
            by = self._corrected(by, corrections)
        done = calls.normalize(by, given, stats, y if valid is None else None)
        if valid is not None:
            batches.scatter(done, y, axis, valid)
        if y is not out:
            np.copyto(np.asarray(out), y)
        shared = Shared(group, by, stats, valid, corrections)
        self._take(np.array([[mean, var]]), [count], (backward, x, shared, True) if kept else None)
        return out

    def _forward_in_ghosts(self, group: Group, x: ArrayLike, out: Array | None, mask: ArrayLike | None) -> Array:
        """Ghost batches are local; only the running statistics are those of all."""
        try:
            averaging = self._momentum, self.num_batches_tracked
            # Its running averages, of this rank's ghost batches, are for renormalisation alone.
            y, parts, kept, _, _ = batches.forward(self._constants, x, out, mask, True, self._ghost_size, averaging)
            stats = [part.stats for part in parts if part.stats.count]
            alike = {"num_features": self.num_features, SETTINGS: self._settings()}
        except BaseException as error:
            group.tell(error)
            raise
        facts = group.exchange(GHOSTS, alike=alike, facts=[len(stats)]).facts[:, 0]
        try:
            numbers = np.zeros((int(facts.max()), 3, self.num_features))
            for row, part in zip(numbers, stats, strict=False):
                row[0], row[1], row[2] = part.mean, part.var, part.count
        except BaseException as error:
            group.tell(error)
            raise
        # Ranks with fewer ghost batches than others have empty ones behind them.
        taken = group.exchange(GHOSTS, numbers=numbers).numbers.reshape(-1, 3, self.num_features)
        self._take(taken[:, :2], taken[:, 2, 0], (batches.backward, x, parts, True) if kept else None)
        return y

    def backward(self, dy: ArrayLike, out: Array | None = None) -> Array:
        """Return dx, and fill ``grads``, see `fastbn.BatchNorm.backward`."""
        try:
            return super().backward(dy, out)
        except RuntimeError as error:
            group = self._spoken_to()
            if self._saved is None and group is not None and self._ghost_size is None:
                group.tell(error)  # x is missing here, while the other ranks may be in an exchange
            raise

    def _settings(self) -> int:
        """What makes y and the running statistics, beside num_features and axis, as one number."""
        learns, tracks = self._weight is not None, self._running_mean is not None
        settings = (
            self._eps, self._momentum, learns, tracks, self._activation, self._unbiased, self._ghost_size, self._renorm,
        )  # fmt: skip
        return zlib.crc32(repr(settings).encode())

    def _take(self, numbers: Array, counts: ArrayLike, saved: Any) -> None:
        """The running statistics after batches of these means and variances, with all else that a forward changes."""
        tracked, changed = self.num_batches_tracked, []
        if self._running_mean is not None and self._running_var is not None:
            before = self._running_mean, self._running_var
            mean, var, tracked = averaged(before, numbers, counts, self._momentum, tracked, self._unbiased)
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
    try:
        g, a, dx, out = calls.arrays_of_backward(constants, dy, x, out, dweight, dbias)
        axis = constants.axis % a.ndim
        if valid is not None:
            g, a = batches.gather(g, axis, valid), batches.gather(a, axis, valid)
        sums = np.stack(calls.gradients(by, g, a, stats))
    except BaseException as error:
        group.tell(error)
        raise
    with np.errstate(all="ignore"):  # as everywhere: what is not finite stays in its feature, without a word
        dweight_of_all, dbias_of_all = group.exchange(
            BACKWARD, alike={"num_features": sums.shape[1]}, numbers=sums, merge=in_pairs
        ).numbers
        done = calls.input_gradient(by, g, a, stats, dweight_of_all, dbias_of_all, dx if valid is None else None)
        if valid is not None:
            batches.scatter(done, dx, axis, valid)
        if dx is not out:
            np.copyto(np.asarray(out), dx)
        if dweight is not None and dbias is not None:
            if corrections is not None:
                r, d = corrections
                dweight_of_all = r * dweight_of_all + d * dbias_of_all
            change([(dweight, dweight_of_all), (dbias, dbias_of_all)])
            if (collected := _summed.get()) is not None:
                collected |= {id(dweight), id(dbias)}
    return out


@contextlib.contextmanager
def summed() -> Iterator[set[int]]:
    """The ids of the gradients that become sums over all ranks within, wherever in a model their layers are.

    Those of ghost batches, and where a layer is frozen, stay this rank's own.
    """
    collected: set[int] = set()
    before = _summed.set(collected)
    try:
        yield collected
    finally:
        _summed.reset(before)


def _merged(of_all: Array, counts: Array) -> Array:
    """Means in two parts, and variances: (3, C) of (size, 3, C). An array, since slices of it are put together."""
    stats = merged(of_all, counts[:, 0])
    return np.stack([stats.mean, stats.mean_low, stats.var])


def convert(model: Any, comm: Any) -> Any:
    """Let every BatchNorm of a model normalise over all ranks.

    The layers stay the same objects with the same arrays, so that an optimizer keeps its meaning. Only their class
    changes, to `SyncBatchNorm`. What a layer of your own holds is not seen: make that a `SyncBatchNorm` yourself.

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

    Raises
    ------
    TypeError
        comm lacks what a `Communicator` has, or a BatchNorm is of a class of your own, whose training is not known.
    ValueError
        comm is an intercommunicator, or one that this process is not among. After either, nothing has been changed.

    Examples
    --------
    >>> from fastbn import BatchNorm, nn
    >>> from fastbn.distributed import convert
    >>> from mpi4py import MPI                                              # doctest: +SKIP
    >>> model = nn.Sequential(nn.Dense(4, 8, bias=False), BatchNorm(8), nn.ReLU())
    >>> convert(model, MPI.COMM_WORLD)                                      # doctest: +SKIP
    Sequential(
        Dense(n_in=4, n_out=8, bias=False),
        SyncBatchNorm(8),
        ReLU(),
    )
    """
    group = None if comm is None else Group(comm)
    norms: list[Any] = [layer for layer in walk([model]) if isinstance(layer, BatchNorm)]
    for layer in norms:
        if type(layer) not in (BatchNorm, SyncBatchNorm):
            raise TypeError(f"expected BatchNorm itself, got its subclass {type(layer).__name__}: {layer!r}")
    for layer in norms:
        layer.__class__ = BatchNorm if group is None else SyncBatchNorm
        layer._group = group
    return model
