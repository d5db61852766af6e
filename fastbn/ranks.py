"""Processes, or *ranks*, that compute one thing together: how they exchange numbers, and what fails on one of them.

# Design: ranks exchange float64 arrays of one size, and numbers are merged in the order of ranks: so all have the same
# bits, whatever the library's own order of reduction is. Few numbers are gathered, and every rank merges all of them.
# If there are many, each rank merges one slice, and the slices are gathered: a rank then receives at most twice as many
# numbers as it brings, whatever the number of ranks. Each exchange begins with a header, in which a rank says where in
# the program it is, what it brings, or what went wrong on it. An error on one rank is raised on all, and none waits for
# numbers that never come. An exchange that is broken off between its header and its numbers (Ctrl-C, no memory) cannot
# be made good: the rank then ends all of them.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from .state import Array

__all__ = ["Communicator", "Gloo", "Group", "RankError", "in_pairs"]

# Float64 values of a header: whether something failed, whether the rank is at the end, facts, and the bytes of a text,
# which is the place in the program or an error.
HEADER = 64
HAS_FAILED, AT_END, FACTS, TEXT = 0, 1, 2, 16
_ROOM = 8 * (HEADER - TEXT)  # bytes of the text
# Number of float64 values of all ranks together from which they are merged in slices.
SLICED_FROM = 1 << 17
END = "the end of what the ranks do together"


class RankError(RuntimeError):
    """Another rank failed, which the message names with its error, or the ranks are at different places."""


class Communicator(Protocol):
    """What is asked of a library for messages. A communicator of mpi4py is taken as it is, without these names.

    There may be a fifth member, ``alltoall(array)``, which sends ``array[r]`` to rank r and returns what the ranks have
    sent to this one, as `allgather` does. With many ranks or many numbers it saves time and memory.

    Attributes
    ----------
    rank, size : int
        Number of this rank, from 0, and number of all ranks.
    """

    rank: int
    size: int

    def allgather(self, array: Array, /) -> Sequence[Array] | Array:
        """Return the arrays of all ranks, in their order, as a list, or as one new array.

        They are of float64, C-contiguous, and of one shape on all ranks. Every byte must arrive as it is: some numbers
        are other things, such as text, packed as float64.
        """

    def abort(self, code: int, /) -> Any:
        """End all ranks, or make their next exchange fail."""


class _MPI:
    """A communicator of mpi4py, whose own allgather pickles."""

    def __init__(self, comm: Any) -> None:
        if not comm:
            raise ValueError("expected a communicator of processes that this one is among, got MPI.COMM_NULL")
        if comm.Is_inter():  # its Allgather gives what the other group's processes brought
            raise ValueError("expected a communicator of one group of processes, got an intercommunicator")
        self._comm, self.rank, self.size = comm, comm.Get_rank(), comm.Get_size()

    def allgather(self, array: Array, /) -> Array:
        if not self._comm:
            raise ValueError("expected a communicator that is still there, got one after its Free()")
        gathered = np.empty((self.size, *array.shape))
        self._comm.Allgather(array, gathered)
        return gathered

    def alltoall(self, array: Array, /) -> Array:
        received = np.empty_like(array)
        self._comm.Alltoall(array, received)
        return received

    def abort(self, code: int, /) -> Any:
        if self._comm:  # else all ranks, which freed it together, have the error
            traceback.print_exc()  # nothing after Abort is executed
            self._comm.Abort(code)


class Gloo:
    """The processes of torch.distributed, on its backend for CPUs, gloo.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        Group of processes. The default is all of them.

    Raises
    ------
    RuntimeError
        ``torch.distributed.init_process_group("gloo")`` was not called before.
    ImportError
        PyTorch is not installed.

    Examples
    --------
    >>> from fastbn.distributed import Gloo, SyncBatchNorm
    >>> import torch.distributed                                            # doctest: +SKIP
    >>> torch.distributed.init_process_group("gloo")                        # doctest: +SKIP
    >>> layer = SyncBatchNorm(64, comm=Gloo())                              # doctest: +SKIP
    """

    def __init__(self, group: Any = None) -> None:
        try:
            import torch
            import torch.distributed
        except ImportError as error:
            raise ImportError('this needs torch: pip install "fastbn[torch]"') from error
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError('expected torch.distributed.init_process_group("gloo") to be called before')
        self._torch, self.group = torch, torch.distributed.group.WORLD if group is None else group
        self.rank, self.size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)

    def allgather(self, array: Array, /) -> list[Array]:
        mine = self._torch.from_numpy(array)
        gathered = [self._torch.empty_like(mine) for _ in range(self.size)]
        self._torch.distributed.all_gather(gathered, mine, group=self.group)
        return [tensor.numpy() for tensor in gathered]

    def alltoall(self, array: Array, /) -> Array:
        received = np.empty_like(array)
        to, of = self._torch.from_numpy(received), self._torch.from_numpy(array)
        self._torch.distributed.all_to_all_single(to, of, group=self.group)
        return received

    def abort(self, code: int, /) -> None:
        """Leave the group: the exchanges of the other ranks then fail."""
        if self._torch.distributed.is_initialized():
            self._torch.distributed.destroy_process_group(self.group)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gloo) and other.group is self.group

    def __hash__(self) -> int:
        return hash((Gloo, self.group))


class Exchanged(NamedTuple):
    """What all ranks brought, in their order."""

    facts: Array  # (size, number of facts)
    numbers: Array  # (size, *shape), or what they were merged to


class Group:
    """The ranks, as one of them sees them. Copies share it; what is unpickled elsewhere has none."""

    def __init__(self, comm: Any) -> None:
        self.given = comm
        self.comm: Communicator = _MPI(comm) if hasattr(comm, "Allgather") else comm
        for name in ("rank", "size", "allgather", "abort"):
            if not hasattr(self.comm, name):
                raise TypeError(
                    f"expected comm with rank, size, allgather and abort, got {type(comm).__name__} without {name}"
                )
        if not 0 <= self.comm.rank < self.comm.size:  # such as -1, where a process is in no group of torch.distributed
            raise ValueError(
                f"expected comm with a rank from 0 on, below size, got {self.comm.rank} of {self.comm.size}"
            )

    def exchange(
        self,
        place: str,
        *,
        alike: Mapping[str, float] | None = None,
        facts: Sequence[float] = (),
        numbers: Array | None = None,
        merge: Callable[[Array, Array], Array] | None = None,
    ) -> Exchanged:
        """The facts and the numbers of all ranks, each of which calls this at the same place in the program.

        merge(numbers of all ranks, their facts) makes one array of them, whose last axis is that of the numbers. It
        treats each place on that axis by itself.

        Raises
        ------
        RankError
            A rank told an error, or is at another place.
        ValueError
            What should be alike differs. Either is raised on all ranks.
        """
        alike = {} if alike is None else alike
        with self._or_abort():
            brought = np.empty(0) if numbers is None else np.ascontiguousarray(numbers, np.float64)
            headers = self._of_all(_header(place, [*alike.values(), brought.size, *facts]))
            wrong = _what_is_wrong(headers, place, [*alike, "count of numbers"])
            first = FACTS + len(alike) + 1
            known = headers[:, first : first + len(facts)]
            if wrong is not None or not brought.size:
                of_all = np.empty(0)
            elif merge is None:
                of_all = self._of_all(brought)
            elif self.can_slice and self.comm.size * brought.size >= SLICED_FROM:
                of_all = self._of_slices(brought, lambda slices: merge(slices, known))
            else:
                of_all = merge(self._of_all(brought), known)
        if wrong is not None:
            raise wrong[0](wrong[1])
        return Exchanged(known, of_all)

    @property
    def can_slice(self) -> bool:
        """Whether each rank can merge a slice of many numbers for all others."""
        return hasattr(self.comm, "alltoall")

    def _of_slices(self, numbers: Array, merge: Callable[[Array], Array]) -> Array:
        """What merge makes of the numbers of all ranks, each of which merges a slice."""
        *others, n = numbers.shape
        size, width = self.comm.size, -(-n // self.comm.size)
        if n < size * width:
            padded = np.zeros((*others, size * width))
            padded[..., :n] = numbers
            numbers = padded
        to_ranks = np.moveaxis(numbers.reshape(*others, size, width), -2, 0)
        communicator: Any = self.comm
        own = merge(_in_one(communicator.alltoall(np.ascontiguousarray(to_ranks))))
        slices = np.moveaxis(self._of_all(np.ascontiguousarray(own)), 0, -2)
        return slices.reshape(*own.shape[:-1], size * width)[..., :n]

    def tell(self, error: BaseException) -> None:
        """Take part in the exchange that the others are at, by an error, which the caller then raises."""
        with self._or_abort():
            self._of_all(_header("", [], error))

    def end(self, error: BaseException | None) -> None:
        """The end of what is done together, by success or by an error: no rank goes on before all have come here.

        Raises RankError where all is well here, but not on another rank.
        """
        wrong = None
        try:
            while True:
                with self._or_abort():
                    headers = self._of_all(_header(END, [], error))
                wrong = wrong or _what_is_wrong(headers, END, [])
                if headers[:, AT_END].all():
                    break  # else, whoever was elsewhere has now heard that something is wrong, and comes here
        except BaseException:
            if error is None:
                raise
        if error is None and wrong is not None:
            raise wrong[0](wrong[1])

    @contextlib.contextmanager
    def _or_abort(self) -> Iterator[None]:
        """What fails within ends all ranks: the others may wait for it."""
        try:
            yield
        except BaseException:
            self.comm.abort(1)
            raise

    def _of_all(self, array: Array) -> Array:
        return _in_one(self.comm.allgather(array))

    def __deepcopy__(self, memo: Any) -> Group:
        return self

    def __reduce__(self) -> Any:
        return _no_group, ()


def _in_one(of_all: Sequence[Array] | Array) -> Array:
    return of_all if isinstance(of_all, np.ndarray) else np.stack(of_all)


def _no_group() -> None:
    return None


def _header(place: str, facts: Sequence[float], error: BaseException | None = None) -> Array:
    header = np.zeros(HEADER)
    header[HAS_FAILED], header[AT_END] = error is not None, place == END
    header[FACTS:TEXT][: len(facts)] = facts  # an error, if they are too many
    text = place if error is None else _words(error)
    header[TEXT:] = np.frombuffer(text.encode(errors="replace")[:_ROOM].ljust(_ROOM, b"\0"))
    return header


def _words(error: BaseException) -> str:
    """Whatever the error is: one whose words cannot be told would leave the others waiting."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _what_is_wrong(headers: Array, place: str, alike: Sequence[str]) -> tuple[type[Exception], str] | None:
    """The error to raise, on all ranks; None where all are well, at this place, and what should be alike is."""
    same = headers.view(np.int64) == headers[0].view(np.int64)
    if same[:, : FACTS + len(alike)].all() and same[:, TEXT:].all() and not headers[0, HAS_FAILED]:
        return None  # as in nearly every exchange: a short way
    for rank, header in enumerate(headers):
        if header[HAS_FAILED]:
            return RankError, f"rank {rank} of {len(headers)} failed: {_text(header)}"
    for rank, header in enumerate(headers):
        if (text := _text(header)) != place:
            return RankError, f"expected all ranks in {place}, got rank {rank} in {text}"
    first = headers[0].tolist()
    for i, name in enumerate(alike, FACTS):
        if (headers[:, i] != first[i]).any():
            return ValueError, f"expected the same {name} on all ranks, got {[int(n) for n in headers[:, i]]}"
    return None


def _text(header: Array) -> str:
    return header[TEXT:].tobytes().rstrip(b"\0").decode(errors="ignore")


def in_pairs(of_all: Array, facts: Array | None = None) -> Array:
    """The sum over all ranks, in the order of a tree of pairs; one that `Group.exchange` merges by."""
    while (n := len(of_all)) > 1:
        paired = of_all[: n - n % 2]
        sums = paired[::2] + paired[1::2]
        of_all = np.concatenate([sums, of_all[n - 1 :]]) if n % 2 else sums
    total: Array = of_all[0]
    return total
