"""Inference of a network and of its folded one: python -m bench.folded

In one process for each number of threads, in turn by bursts of about a millisecond, so that both meet the same machine;
medians, and the median of the bursts' ratios.
"""

import argparse
import multiprocessing
from itertools import pairwise, product

import numpy as np

import fastbn
from bench import machine
from bench.step import network
from bench.workers import burst, environ, environment, in_turn, repeats
from fastbn import nn

WIDTHS = 784, 256, 128, 10
BATCHES = 1, 32, 128, 1024


def apart(*widths: int) -> nn.Sequential:
    """As bench.step's, with ReLU a layer of its own."""
    layers = []
    for i, (n_in, n_out) in enumerate(pairwise(widths[:-1])):
        layers += [nn.Dense(n_in, n_out, bias=False, seed=i), fastbn.BatchNorm(n_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dense(*widths[-2:], seed=9))


NETWORKS = {"ReLU in BatchNorm": network, "ReLU of its own": apart}


def compare(name: str, batch: int, threads: int, rounds: int) -> tuple[float, float, float]:
    """Seconds of a forward before and after folding, and how many times as fast it is."""
    fastbn.set_num_threads(threads)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, WIDTHS[0]), dtype=np.float32)
    model = NETWORKS[name](*WIDTHS)
    model(rng.standard_normal((1024, WIDTHS[0]), dtype=np.float32))
    folded = model.eval().folded()
    count = max(1, repeats(lambda: model(x), 0.1) // 100)
    return in_turn(lambda: burst(lambda: model(x), count), lambda: burst(lambda: folded(x), count), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of NumPy's matrix products and fastbn")
    parser.add_argument("--quick", action="store_true", help="few rounds; the figures mean nothing")
    options = parser.parse_args()
    print(machine.in_words(machine.describe()))
    print(f"\n{'-'.join(map(str, WIDTHS))}, float32\n{'':<18}threads  batch    eval us  folded us  times as fast")
    for threads in options.threads:
        with environ(environment(threads)), multiprocessing.get_context("spawn").Pool(1) as pool:
            for name, batch in product(NETWORKS, BATCHES):
                before, after, ratio = pool.apply(compare, (name, batch, threads, 3 if options.quick else 200))
                print(f"{name:<18}{threads:7}{batch:7}{before * 1e6:11.1f}{after * 1e6:11.1f}{ratio:15.3f}", flush=True)


if __name__ == "__main__":
    main()
