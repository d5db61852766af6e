"""A training step of PyTorch models, as they are and with fastbn's batch normalization: python -m bench.replace

In one process for each number of threads, which both libraries get, in turn by single steps, so that both meet the
same machine; medians, and the median of the steps' ratios.
"""

import argparse
import copy
import multiprocessing
import time
from itertools import pairwise

import fastbn
from bench import machine
from bench.workers import environ, environment, in_turn
from fastbn.interop.torch import replace


def mlp(torch, batch):
    """784-256-128-10, as bench.step's."""
    widths, layers = (784, 256, 128), []
    for n_in, n_out in pairwise(widths):
        layers += [torch.nn.Linear(n_in, n_out, bias=False), torch.nn.BatchNorm1d(n_out), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], 10)), torch.randn(batch, widths[0])


def cnn(torch, batch):
    """Four convolutions on images of 32 x 32 pixels, as in the first stages of a small ResNet."""
    widths, layers = (3, 32, 32, 64, 64), []
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        convolution = torch.nn.Conv2d(n_in, n_out, 3, stride=1 + i // 2, padding=1, bias=False)
        layers += [convolution, torch.nn.BatchNorm2d(n_out), torch.nn.ReLU()]
    head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(widths[-1], 10)
    return torch.nn.Sequential(*layers, *head), torch.randn(batch, 3, 32, 32)


def channels_last(torch, batch):
    """The same, its tensors in the other memory format."""
    model, x = cnn(torch, batch)
    return model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


MODELS = {"MLP": (mlp, (32, 128, 1024)), "CNN": (cnn, (32, 128)), "CNN channels-last": (channels_last, (32, 128))}


def compare(name: str, batch: int, threads: int, rounds: int) -> tuple[float, float, float]:
    """Seconds of a step with torch.nn's batch normalization and with fastbn's, and how many times as fast it is."""
    import torch

    torch.set_num_threads(threads)
    fastbn.set_num_threads(threads)
    torch.manual_seed(0)
    plain, x = MODELS[name][0](torch, batch)
    target = torch.randint(0, 10, (batch,))

    def step(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def once():
            start = time.perf_counter()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
            return time.perf_counter() - start

        return once

    steps = [step(copy.deepcopy(plain)), step(replace(copy.deepcopy(plain)))]
    for _ in range(3):
        for once in steps:
            once()
    return in_turn(*steps, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of PyTorch and of fastbn")
    parser.add_argument("--quick", action="store_true", help="few rounds; the figures mean nothing")
    options = parser.parse_args()
    print(machine.in_words(machine.describe()))
    print(f"\n{'a training step, float32':<26}threads  batch   torch.nn ms   fastbn ms  times as fast")
    for threads in options.threads:
        with environ(environment(threads)), multiprocessing.get_context("spawn").Pool(1) as pool:
            for name, batch in ((name, batch) for name, (_, batches) in MODELS.items() for batch in batches):
                rounds = 3 if options.quick else 60 if "CNN" in name else 400
                before, after, ratio = pool.apply(compare, (name, batch, threads, rounds))
                print(f"{name:<26}{threads:7}{batch:7}{before * 1e3:14.3f}{after * 1e3:12.3f}{ratio:15.3f}", flush=True)


if __name__ == "__main__":
    main()
