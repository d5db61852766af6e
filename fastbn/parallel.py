"""A training over several processes: every rank has its part of each mini-batch, and all take the same step.

# Design: `fit` runs on every rank, with the same data, and asks `Ranks` wherever ranks have to agree. Without a
# communicator, `Ranks` is one rank, which agrees with itself. Parameters, averages and decisions have the same bits on
# all ranks, because they are computed from what was exchanged, in the order of ranks. What a rank computes of its own
# part alone stays with it.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from .batchnorm import BatchNorm
from .distributed import SyncBatchNorm, summed
from .nn import Dropout, walk
from .ranks import Exchanged, Group, RankError, in_pairs
from .runstate import OPTIMIZER_STATE
from .state import Array
from .terminal import CtrlC

__all__ = ["Ranks"]

# Float64 values, 32 MB of them: a rank brings no more to an exchange, or receives no more where all ranks merge.
ROOM = 1 << 22
# Values that a Dropout of one rank takes in one step, at most: the next step's begin behind them.
STEP_OF_A_STREAM = 1 << 64


class Ranks:
    """The ranks of one training, as one of them sees them.

    As a context manager, it is left by all ranks together: an error on one of them is raised on all.

    Parameters
    ----------
    comm : mpi4py communicator, or `fastbn.distributed.Communicator`, or None
        None: there is this process alone.
    """

    def __init__(self, comm: Any) -> None:
        self._group = None if comm is None else Group(comm)
        self.rank, self.size = (0, 1) if self._group is None else (self._group.comm.rank, self._group.comm.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._group is None:
            return
        with CtrlC() as ctrl_c:
            try:
                self._group.end(error)
            except RankError:
                if not ctrl_c.pressed:  # most often, another rank ended by the same Ctrl-C
                    raise
            ctrl_c.pressed &= error is None  # an error of this rank's own goes on instead

    def begin(
        self,
        model: Any,
        optimizer: Any,
        data: Mapping[str, Array | None],
        arguments: Mapping[str, object],
        file: str | os.PathLike[str] | None,
    ) -> None:
        """ValueError where ranks do not begin alike, or the model would come to differ between them."""
        for layer in walk([model]):
            if not isinstance(layer, BatchNorm):
                continue
            group = layer.group if isinstance(layer, SyncBatchNorm) else None
            if group is None:
                # Ghost batches are of a rank's own examples everywhere; what is averaged over them is not.
                apart = layer.ghost_size is not None and layer.running_mean is None
                if self._group is not None and not layer.frozen and not apart:
                    raise ValueError(
                        f"expected SyncBatchNorm with comm, got {layer!r}, whose statistics would be those of a rank's "
                        "own examples: distributed.convert(model, comm)"
                    )
            elif self._group is None:
                if group.comm.size > 1 and not layer.frozen:
                    raise ValueError(f"expected comm, the processes that {layer!r} is for, got comm=None")
            elif group.given != self._group.given:
                raise ValueError(f"expected {layer!r} to have the comm of fit: distributed.convert(model, comm)")
        if self._group is None:
            return
        numbers = {name: getattr(optimizer, name) for name in OPTIMIZER_STATE if hasattr(optimizer, name)}
        state = optimizer.state_dict() if hasattr(optimizer, "state_dict") else {}
        _exchange(
            self._group,
            "the arguments of fit",
            alike={f"{name} of fit (its checksum)": _checksum(value) for name, value in arguments.items()},
        )
        _exchange(
            self._group,
            "the beginning of fit",
            alike={f"checksum of {name}": _checksum(array) for name, array in data.items()}
            | {
                "checksum of the model": _checksum(*_described(model), *model.state_dict().values()),
                "checksum of the optimizer": _checksum(type(optimizer).__name__, numbers, *state.values()),
                "checksum of the checkpoint": 0 if file is None else _checksum(Path(file).read_bytes()),
            },
        )

    def wait(self, place: str) -> None:
        """Until all ranks are there, and no longer than all are well."""
        if self._group is not None:
            _exchange(self._group, place)

    # --- a step

    def part(self, n: int) -> slice:
        """Which of n examples are this rank's; they may be none."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    @contextlib.contextmanager
    def streams(self, model: Any) -> Iterator[None]:
        """Within, each Dropout draws from a stream of this rank's own; afterwards all ranks' have gone on alike."""
        if self.size == 1:
            yield
            return
        shared: list[tuple[Dropout, Any]] = [
            (layer, layer.rng) for layer in walk([model]) if isinstance(layer, Dropout)
        ]
        for layer, rng in shared:
            layer.rng = np.random.Generator(rng.bit_generator.jumped(self.rank))
        try:
            yield
        finally:
            for layer, rng in shared:
                rng.bit_generator.advance(STEP_OF_A_STREAM)
                layer.rng = rng

    def mean(self, value: float, n: int, right: int, decisions: int) -> tuple[float, int, int, int]:
        """The mean of a loss over n examples, n, and how many decisions were right, of all ranks."""
        if self._group is None or self.size == 1:
            return value, n, right, decisions
        sums = _exchange(self._group, "the loss of fit", facts=[float(value) * n, n, right, decisions]).facts
        with np.errstate(all="ignore"):
            total, n, right, decisions = in_pairs(sums).tolist()
        return total / n, int(n), int(right), int(decisions)

    def backward(self, model: Any, gradient: Array) -> None:
        """Every gradient becomes the sum of those of all ranks, rounded once; SyncBatchNorm's are that already."""
        with summed() as done:
            model.backward(gradient)
        self.add([gradient for gradient in model.grads.values() if id(gradient) not in done])

    def add(self, gradients: Sequence[Array]) -> None:
        """Each of them becomes the sum of those of all ranks, rounded once."""
        if self._group is None or self.size == 1:
            return
        narrow = all(gradient.dtype == np.float32 for gradient in gradients)
        count = sum(gradient.size for gradient in gradients)
        flat = np.zeros(count + narrow * count % 2, np.float32 if narrow else np.float64)
        np.concatenate([flat[:0], *map(np.ravel, gradients)], out=flat[:count])
        packed, merge = flat.view(np.float64), _in_pairs_of_float32 if narrow else in_pairs
        most = ROOM if self._group.can_slice else max(ROOM // self.size, 1)
        with np.errstate(all="ignore"):
            for start in range(0, max(packed.size, 1), most):
                numbers = packed[start : start + most]
                summed_up = _exchange(self._group, "the gradients of fit", numbers=numbers, merge=merge)
                numbers[...] = summed_up.numbers
            ends = np.cumsum([gradient.size for gradient in gradients], dtype=np.intp)
            for gradient, part in zip(gradients, np.split(flat, ends), strict=False):
                gradient[...] = part.reshape(gradient.shape)

    def check_same(self, model: Any, epoch: int) -> None:
        """ValueError where the ranks' models have come apart, as by a callback of one rank."""
        if self._group is not None:
            name = f"model after epoch {epoch} (its checksum)"
            _exchange(self._group, "the end of an epoch of fit", alike={name: _checksum(*model.state_dict().values())})

    def stops(self, here: bool, ctrl_c: CtrlC) -> bool:
        """Whether one of the ranks stops, by a callback or by Ctrl-C, which is then Ctrl-C on all of them."""
        if self._group is None:
            return here or ctrl_c.pressed
        facts = _exchange(self._group, "the end of a step of fit", facts=[here, ctrl_c.pressed]).facts
        ctrl_c.pressed |= bool(facts[:, 1].any())
        return bool(facts.any())

    def take_first(self, model: Any) -> None:
        """The running averages of all ranks become those of rank 0: matrix products of the same numbers may differ."""
        if self._group is None or self.size == 1:
            return
        for layer in walk([model]):
            if isinstance(layer, BatchNorm) and layer.running_mean is not None:
                both = np.stack([layer.running_mean, layer.running_var])
                layer.running_mean, layer.running_var = _exchange(
                    self._group, "the average of fit", numbers=both
                ).numbers[0]


def _exchange(group: Group, place: str, **what: Any) -> Exchanged:
    """`Group.exchange`, which Ctrl-C does not break off: it acts afterwards."""
    with CtrlC():
        return group.exchange(place, **what)


def _in_pairs_of_float32(of_all: Array, facts: Array) -> Array:
    """`in_pairs`, in float64, of float32 numbers of which one of float64 holds two: half as much is sent."""
    total = in_pairs(of_all.view(np.float32).astype(np.float64))
    return total.astype(np.float32).view(np.float64)


def _described(model: Any) -> Iterator[object]:
    """What two equal models share beside their arrays."""
    for layer in walk([model]):
        yield type(layer).__name__, layer.training, getattr(layer, "frozen", False)
        if type(layer).__module__.startswith("fastbn."):
            config: dict[str, Any] = getattr(layer, "config", dict)()
            yield {name: value for name, value in config.items() if name != "num_threads"}  # is a matter of the machine
        if isinstance(layer, Dropout):
            yield layer.rng.bit_generator.state


def _checksum(*parts: Array | bytes | object) -> int:
    crc = 0
    for part in parts:
        if isinstance(part, np.ndarray):
            crc = zlib.crc32(f"{part.dtype} {part.shape}".encode(), crc)
            crc = zlib.crc32(np.ascontiguousarray(part).data, crc)
        else:
            crc = zlib.crc32(part if isinstance(part, bytes) else repr(part).encode(), crc)
    return crc
