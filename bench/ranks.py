"""What bench.scaling measures, on every rank: mpiexec -n 4 python -m mpi4py -m bench.ranks FILE [--quick]

1. Steps of `training.fit`: by ranks together, by one alone, and by two at the same time, each for itself.
2. An allgather of few bytes and of many.
3. What Python and NumPy do around the exchanges of a step: two ranks at the same time, each among up to 1,000 `Copies`
   of itself.

Two at the same time share caches and memory, as ranks of one machine do. Ranks that are not measured sleep, because one
that waits for a message of MPI keeps its processor busy.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.machine import processors
from bench.workers import burst, elapsed, repeats
from fastbn import BatchNorm, losses, nn, optim, training
from fastbn.distributed import convert
from fastbn.parallel import ROOM, Ranks
from fastbn.ranks import _MPI, HEADER, Group
from fastbn.state import Array

NETWORKS = {
    "digits": (64, 100, 100, 100, 10),
    "wide": (784, 1024, 1024, 10),
    "narrow and deep": (64, *[32] * 16, 10),
}
NORMS = SYNC, GHOSTS, APART, NONE = "SyncBatchNorm", "ghost batches", "ghost batches, nothing exchanged", "none"
GHOST = 32  # examples of a ghost batch
PART, WHOLE = 64, 256  # examples of each rank where that is fixed, and of all ranks where that is fixed
ALL = 4096  # examples of the data


class Case(NamedTuple):
    """Steps of a network with that many examples on each of so many ranks."""

    network: str
    norm: str
    ranks: int
    examples: int
    together: bool  # else each rank trains for itself, at the same time


def cases(networks: list[str], sizes: list[int], beside: int) -> list[Case]:
    found = []
    for network, norm in product(networks, NORMS):
        apart = dict.fromkeys([(1, PART), (1, WHOLE), *((beside, n) for n in (PART // 4, PART, WHOLE))])
        found += [Case(network, norm, k, n, False) for k, n in apart]
        together = dict.fromkeys((k, n) for k in sizes for n in (PART, WHOLE // k))
        found += [Case(network, norm, k, n, True) for k, n in together]
    return found


def network(widths: tuple[int, ...], norm: str, comm: Any = None) -> nn.Sequential:
    layers: list[Any] = []
    for i, (n_in, n_out) in enumerate(pairwise(widths[:-1])):
        if norm == NONE:
            layers.append(nn.Dense(n_in, n_out, activation="relu", seed=i))
        else:
            layers += [nn.Dense(n_in, n_out, bias=False, seed=i), normalization(n_out, norm)]
    model = nn.Sequential(*layers, nn.Dense(*widths[-2:], seed=99))
    return convert(model, comm) if norm in (SYNC, GHOSTS) else model


def normalization(features: int, norm: str) -> BatchNorm:
    """A layer that exchanges nothing yet. `fit` takes one on several ranks only if it has no running averages."""
    ghost_size = None if norm == SYNC else GHOST
    return BatchNorm(features, activation="relu", ghost_size=ghost_size, track_running_stats=norm != APART)


@cache
def data(n_in: int, n_out: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((ALL, n_in), dtype=np.float32), rng.integers(0, n_out, ALL)


def steps(case: Case, comm: Any, seconds: float, least: int) -> list[float]:
    """Seconds of each step, without the first of `fit` and of each epoch."""
    widths = NETWORKS[case.network]
    model = network(widths, case.norm, comm)
    batch = case.examples * (1 if comm is None else comm.size)
    ends: list[float] = []

    def on_step(step: int, loss: float) -> bool:
        ends.append(time.perf_counter())
        return len(ends) > least and ends[-1] - ends[0] > seconds

    training.fit(
        model, data(widths[0], widths[-1]), losses.softmax_cross_entropy, optim.SGD(model, 0.001),
        epochs=10**6, batch_size=batch, comm=comm, on_step=on_step, progress=False,
    )  # fmt: skip
    return [b - a for i, (a, b) in enumerate(pairwise(ends), 1) if i % (ALL // batch)]


class Copies:
    """A communicator whose other ranks bring what this one brings: so many ranks, but for their messages."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size
        self.brought: list[int] = []  # bytes
        self._rows: dict[tuple[int, ...], list[Array]] = {}

    def allgather(self, array: Array, /) -> list[Array]:
        """What each brings lies elsewhere in memory. Of numbers they are those of the first time."""
        self.brought.append(array.nbytes)
        if array.shape == (HEADER,):
            return [array] * self.size
        if array.shape not in self._rows:
            self._rows[array.shape] = list(np.repeat(array[None], self.size, axis=0))
        return self._rows[array.shape]

    def abort(self, code: int, /) -> None: ...


def a_header(ranks: int, numbers: int) -> Callable[[], Any]:
    group = Group(Copies(ranks))
    return lambda: group.exchange("nowhere")


def a_layer(norm: str, ranks: int, features: int) -> Callable[[], Any]:
    """Forward and backward; of no rank: without an exchange."""
    layer = normalization(features, norm)
    if ranks:
        convert(layer, Copies(ranks))
    x = np.random.default_rng(0).standard_normal((PART, features), dtype=np.float32)

    def call() -> None:
        layer(x)
        layer.backward(x)

    return call


def the_gradients(ranks: int, numbers: int) -> Callable[[], Any]:
    model, all_ranks = nn.Dense(numbers // 10, 10, bias=False, seed=0), Ranks(Copies(ranks))
    return lambda: all_ranks.add([*model.grads.values()])


MANY = 2, 16, 128, 1000
# What is measured, with which numbers of ranks, and of numbers or features of each.
WORK = {
    "header": (a_header, [*product(MANY, (1,))]),
    SYNC: (partial(a_layer, SYNC), [*product((0, *MANY), (16, 1024))]),
    GHOSTS: (partial(a_layer, GHOSTS), [*product((0, *MANY), (16, 1024))]),
    # In one exchange, where all ranks merge all numbers (Copies has no alltoall), and no more than fit sends at a time.
    # Those of one rank lie in the caches, those of all ranks together mostly do not.
    "gradients": (the_gradients, [(k, n) for k, n in product((2, 4, 16, 128), (1000, 30000, 10**6)) if k * n <= ROOM]),
}


def main() -> None:
    from mpi4py import MPI

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="to which rank 0 writes its measurements, as JSON")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    everyone = MPI.COMM_WORLD
    rank = everyone.Get_rank()
    sizes = [k for k in (2, 4) if k <= everyone.Get_size()]
    comms = {k: everyone.Split(int(rank >= k), rank) for k in (1, *sizes)}
    rounds, seconds, least = (2, 0.0, 3) if options.quick else (5, 0.1, 5)
    beside = everyone.bcast(min(2, processors(), everyone.Get_size()))
    steps_of = {case: ([], []) for case in cases(["digits"] if options.quick else [*NETWORKS], sizes, beside)}
    wire = {(k, n): [] for k, n in product(sizes, (64, 2**10, 2**14, 2**17, 2**20))}
    work = {(what, *pair): [] for what, (_, pairs) in WORK.items() for pair in pairs}
    calls = {key: WORK[key[0]][0](*key[1:]) for key in work} if rank < beside else {}
    counts = everyone.bcast({key: repeats(call, seconds / 10) for key, call in calls.items()} if rank == 0 else None)
    _wait(everyone)
    for turn in range(rounds):
        order = [*steps_of, *wire, *work]
        np.random.default_rng(turn).shuffle(order)
        for key in order:
            _wait(everyone)
            if isinstance(key, Case) and rank < key.ranks:
                comm = comms[key.ranks]
                comm.Barrier()
                times = comm.gather(steps(key, comm if key.together else None, seconds, least))
                if rank == 0:
                    slowest = np.max(times, axis=0) if key.together else max(times, key=statistics.median)
                    low, middle, high = np.quantile(slowest, (0.25, 0.5, 0.75)).tolist()
                    steps_of[key][0].append(middle)
                    steps_of[key][1].append((high - low) / 1.349 / middle)  # the Gaussian's whose quartiles these are
            elif key in wire and rank < key[0]:
                times = comms[key[0]].gather(_allgather(comms[key[0]], key[1], seconds / 4))
                if rank == 0:
                    wire[key].append(max(times))
            elif key in calls:
                comms[beside].Barrier()
                times = comms[beside].gather(burst(calls[key], counts[key]))
                if rank == 0:
                    work[key].append(max(times))
    if rank == 0:
        measured = {
            "sizes": sizes,
            "beside": beside,
            "steps": [c._asdict() | {"seconds": s, "spread": spread} for c, (s, spread) in steps_of.items()],
            "wire": [{"ranks": k, "bytes": 8 * n, "seconds": s} for (k, n), s in wire.items()],
            "work": [{"what": what, "ranks": k, "numbers": n, "seconds": s} for (what, k, n), s in work.items()],
        }
        options.file.write_text(json.dumps(measured))
    _wait(everyone)


def _allgather(comm: Any, numbers: int, seconds: float) -> float:
    """Seconds of one, as fastbn makes it."""
    mine, ours = np.zeros(numbers), _MPI(comm)
    call = lambda: ours.allgather(mine)  # noqa: E731
    comm.Barrier()
    once = comm.bcast(elapsed(call, 3) / 3)
    comm.Barrier()
    return elapsed(call, count := max(3, int(seconds / once))) / count


def _wait(comm: Any) -> None:
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.002)


if __name__ == "__main__":
    main()
