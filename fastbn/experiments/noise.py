"""Claim 3: the statistics of a small mini-batch are noisy, and that noise keeps a network from overfitting a little.

Few training examples, so that a network can learn them by heart; the gap between its loss on held-out examples and on
those it was trained on says how much it did. Smaller mini-batches make every gradient noisier, with batch
normalization or without. What the statistics' noise does is seen where only they are of fewer examples: ghost batches
(Hoffer et al. 2017) cut a mini-batch of 256 into smaller ones for the normalisation alone.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from fastbn import BatchNorm, data, losses, nn, optim, plots, schedules, training

from .common import Pair, Result, count_classes, curve, in_parallel, prepare, spread

__all__ = ["run"]

NETWORKS = ("neither", "batch normalization", "dropout", "both")
HIDDEN, RATE, MOMENTUM, DROPPED, EXAMPLES = (100, 100), 0.05, 0.9, 0.5, 500
SIZES = (8, 16, 32, 64, 128, 256)


def run(dataset: data.Dataset | None = None, *, seeds: int = 5, quick: bool = False, progress: bool = True) -> Result:
    """Loss and accuracy on training and held-out examples, for every network, mini-batch size and ghost batch size.

    Parameters
    ----------
    dataset : data.Dataset, optional
        With labels; the digits by default. 500 training and at most 1,000 held-out examples are drawn from it.
    seeds : int
        Each draws other examples, start values and mini-batches.
    quick : bool
        20 steps, to try the machinery.
    progress : bool
        Show a bar.

    Returns
    -------
    Result
    """
    steps = 20 if quick else 1000
    pairs = [prepare(dataset, seed, train=EXAMPLES, held_out=1000) for seed in range(seeds)]
    whole = [(network, size, size) for network in NETWORKS for size in SIZES]
    ghosts = [("batch normalization", SIZES[-1], size) for size in SIZES[:-1]]
    calls = [(*pairs[seed], *setting, seed, steps) for setting in whole + ghosts for seed in range(seeds)]
    runs = iter(in_parallel(learn, calls, progress=progress))
    found = {setting: list(zip(*(next(runs) for _ in range(seeds)), strict=True)) for setting in whole + ghosts}

    def gaps(setting: tuple[str, int, int]) -> list[float]:
        train, held_out, *_ = found[setting]
        return [b - a for a, b in zip(train, held_out, strict=True)]

    rows = [
        [network, size, None if ghost == size else ghost, *map(list, found[network, size, ghost]),
         gaps((network, size, ghost))]
        for network, size, ghost in whole + ghosts
    ]  # fmt: skip
    by_size = [curve(name, SIZES, [gaps((name, size, size)) for size in SIZES]) for name in NETWORKS]
    right = [curve(name, SIZES, [found[name, size, size][3] for size in SIZES]) for name in NETWORKS]
    largest = SIZES[-1]
    by_ghost = [
        curve("batch normalization", SIZES, [gaps(("batch normalization", largest, size)) for size in SIZES]),
        *(plots.Curve(name, [*SIZES], [spread(gaps((name, largest, largest)))[1]] * len(SIZES), style="--")
          for name in ("neither", "dropout")),
    ]  # fmt: skip
    gap = "Loss, held-out less training"
    panels = [
        plots.Panel("Gap against mini-batch size", "Examples in a mini-batch", gap, by_size, xscale="log"),
        plots.Panel("Accuracy", "Examples in a mini-batch", "Held-out examples right", right, xscale="log",
                    percent=True),
        plots.Panel("Noise of the statistics alone", f"Examples normalised together, of {largest}", gap, by_ghost,
                    xscale="log"),
    ]  # fmt: skip
    return Result(
        "noise", "Gap between training and held-out examples, by how many are normalised together",
        {
            "data": "digits" if dataset is None else dataset.name, "training examples": len(pairs[0][0][0]),
            "held-out examples": len(pairs[0][1][0]), "hidden layers": HIDDEN, "activation": "relu",
            "dropout": DROPPED, "optimizer": f"SGD {RATE}, momentum {MOMENTUM}, cosine", "steps": steps, "seeds": seeds,
        },
        {"network": "", "mini-batch": "d", "ghost batch": "d", "training loss": ".3f", "held-out loss": ".3f",
         "training right": ".1%", "held-out right": ".1%", "gap of the losses": ".3f"},
        rows, panels,
        ["Averages at test time: the exact statistics of the training examples, so that their lag plays no part."],
    )  # fmt: skip


def learn(
    train: Pair, held_out: Pair, network: str, size: int, ghost: int, seed: int, steps: int
) -> tuple[float, float, float, float]:
    """Train for so many steps; loss on training and held-out examples, then accuracy on both."""
    model = build(network, train[0].shape[1], count_classes(train, held_out), ghost, seed)
    training.fit(
        model, train, losses.softmax_cross_entropy, optim.SGD(model, RATE, momentum=MOMENTUM),
        epochs=math.ceil(steps / math.ceil(len(train[0]) / size)), batch_size=size, seed=seed,
        schedule=schedules.cosine(), on_step=lambda step, loss: step == steps, progress=False,
    )  # fmt: skip
    if network in ("batch normalization", "both"):
        training.recalibrate(model, train[0])
    (a, right_a), (b, right_b) = (training.evaluate(model, p, losses.softmax_cross_entropy) for p in (train, held_out))
    assert right_a is not None
    assert right_b is not None
    return a, b, right_a, right_b


def build(network: str, n_inputs: int, n_classes: int, ghost: int, seed: int) -> nn.Sequential:
    """Dense and ReLU, with batch normalization before and dropout after the activation, as the name says."""
    widths = [n_inputs, *HIDDEN]
    seeds = np.random.default_rng(seed).integers(2**31, size=2 * len(HIDDEN) + 1).tolist()
    layers: list[Any] = []
    for n_in, n_out in itertools.pairwise(widths):
        if network in ("batch normalization", "both"):
            layers += [nn.Dense(n_in, n_out, bias=False, seed=seeds.pop()),
                       BatchNorm(n_out, activation="relu", ghost_size=ghost)]  # fmt: skip
        else:
            layers += [nn.Dense(n_in, n_out, activation="relu", seed=seeds.pop())]
        if network in ("dropout", "both"):
            layers.append(nn.Dropout(DROPPED, seed=seeds[-1] + 1))
    return nn.Sequential(*layers, nn.Dense(widths[-1], n_classes, seed=seeds.pop()))
