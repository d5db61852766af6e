"""A training step that alternates NumPy's matrix products with fastbn, on threads of both: python -m bench.step

Threads of OpenMP and of OpenBLAS spin for a while after their work, in case more follows, and may then hold a processor
that the other library wants. Each way to run is a process of its own, measured in turn; medians of ratios.
"""

import argparse
import statistics
from collections.abc import Callable
from itertools import pairwise

import numpy as np

import fastbn
from bench import machine, results
from bench.workers import Entrant, Worker, contest
from fastbn import losses, nn, optim

# What is read when a process starts.
WAITING = {
    "as they come": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "both libraries passive": {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "4"},
}
# OpenBLAS's threads spin for 2^26 cycles.
SETTLE = 0.05


def network(*widths: int) -> nn.Sequential:
    layers = []
    for i, (n_in, n_out) in enumerate(pairwise(widths[:-1])):
        layers += [nn.Dense(n_in, n_out, bias=False, seed=i), fastbn.BatchNorm(n_out, activation="relu")]
    return nn.Sequential(*layers, nn.Dense(*widths[-2:], seed=9))


STEPS = {
    "784-256-128-10, batch 128": (128, (784, 256, 128, 10)),
    "1024-1024-10, batch 4096": (4096, (1024, 1024, 10)),
}


def prepare(step: str, threads: int) -> Callable[[], None]:
    """A step of gradient descent: forward, loss, backward, update."""
    fastbn.set_num_threads(threads)
    batch, widths = STEPS[step]
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((batch, widths[0]), dtype=np.float32), rng.integers(0, widths[-1], batch)
    model = network(*widths)
    optimizer = optim.SGD(model, lr=0.01)

    def call() -> None:
        _, gradient = losses.softmax_cross_entropy(model(x), target)
        model.backward(gradient)
        optimizer.step()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="the larger number of threads; the other is 1")
    parser.add_argument("--quick", action="store_true", help="few rounds; the figures mean nothing")
    options = parser.parse_args()
    print(machine.in_words(machine.describe()))
    n = options.threads
    rounds, seconds = (3, 0.02) if options.quick else (15, 0.05)
    ways = [(1, 1, "as they come"), (1, n, "as they come"), (n, 1, "as they come"), *((n, n, wait) for wait in WAITING)]
    workers = {}
    for blas, ours, wait in ways:
        variables = {"OPENBLAS_NUM_THREADS": str(blas), "MKL_NUM_THREADS": str(blas), "OMP_NUM_THREADS": str(ours)}
        workers[blas, ours, wait] = Worker(max(blas, ours), variables | WAITING[wait])
    for step in STEPS:
        entrants = {way: Entrant(worker, prepare, (step, way[1])) for way, worker in workers.items()}
        times, failed = contest(entrants, rounds, seconds, SETTLE)
        assert not failed, failed
        print(f"\n{step}\n BLAS  fastbn  {'threads wait':<26}        us  least us  as fast as 1 and 1")
        for (blas, ours, wait), values in times.items():
            middle, least = statistics.median(values) * 1e6, min(values) * 1e6
            faster = results.ratio(times[ways[0]], values)
            print(f"{blas:5}{ours:8}  {wait:<26}{middle:10.1f}{least:10.1f}{faster:20.2f}", flush=True)
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
