"""pytest-benchmark suite, a group for each shape and operation: python -m pytest bench

Every result is checked before it is timed. JAX takes its threads and the width of
its vectors from the environment, so it is timed on one thread and as it comes.
"""

import os
from dataclasses import replace
from itertools import product

import pytest

from bench.cases import LAYOUTS, OPERATIONS, Case
from bench.peers import PEERS, Peer, prepare

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("NUMBA_NUM_THREADS", "2")  # the most that it can be told later

SHAPES = [Case(shape, last, operation) for (shape, last), operation in product(LAYOUTS, OPERATIONS)]
# Settings that a shape says little about, on three shapes: how the arrays lie, their dtype, threads, new outputs.
SETTINGS = [
    Case(shape, last, operation, dtype, preallocated, offset, threads)
    for (shape, last), dtype, offset, operation, preallocated, threads in product(
        [((256, 256), False), ((100_000, 3), False), ((32, 256, 14, 14), True)],
        ("float32", "float64"),
        (None, 0),
        OPERATIONS,
        (True, False),
        (1, 2),
    )
]


ON_ANY_THREADS = ("fastbn", "torch", "onnxruntime", "numba", "numexpr")


def pairs(cases, choose):
    """A parameter for each case and each peer that has it; a library that is missing is skipped by name."""
    for peer in PEERS.values():
        if peer.missing:
            yield pytest.param(None, None, id=peer.name, marks=pytest.mark.skip(peer.missing))
    for case in cases:
        for peer in PEERS.values():
            chosen = choose(peer, case)
            measured = chosen and not peer.missing and not peer.xla_flags
            if measured and (case.threads == 1 or peer.library in ON_ANY_THREADS):
                yield pytest.param(peer, chosen, id=f"{chosen} {peer.name}")


@pytest.mark.benchmark(max_time=0.1, min_rounds=3)
@pytest.mark.parametrize(("peer", "case"), [*pairs(SHAPES, Peer.at_its_best)])
def test_shapes(benchmark, peer, case):
    """Each peer at its best: into given arrays where it can."""
    benchmark.group = f"{replace(case, preallocated=True)}"
    benchmark(prepare(peer.name, case))


@pytest.mark.benchmark(max_time=0.1, min_rounds=3)
@pytest.mark.parametrize(("peer", "case"), [*pairs(SETTINGS, Peer.exactly)])
def test_settings(benchmark, peer, case):
    benchmark.group = str(case)
    benchmark(prepare(peer.name, case))
