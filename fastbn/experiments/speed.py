"""Claim 1: batch normalization speeds up learning, and lets the learning rate be larger.

Four networks learn the same images by gradient descent and nothing else, with the same mini-batches: one as it is, one
whose inputs are normalised, one that starts with larger weights too, so that ReLU does not shrink the signal from layer
to layer (He et al. 2015), one with batch normalization in its hidden layers. How many steps does each need, at which
learning rates?
"""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any

import numpy as np

from fastbn import BatchNorm, data, losses, nn, optim, plots, training

from .common import Pair, Result, about, accuracy, count_classes, curve, in_parallel, prepare, spread

__all__ = ["run", "steps_to"]

NETWORKS = ("neither", "inputs normalised", "inputs normalised, He's start", "batch normalization")
HIDDEN, BATCH_SIZE = (100, 100, 100), 32

Curves = dict[tuple[str, float], list[list[float]]]  # network and rate -> for each seed, accuracy after so many steps


def run(dataset: data.Dataset | None = None, *, seeds: int = 5, quick: bool = False, progress: bool = True) -> Result:
    """Count the steps to an accuracy on held-out examples, for every network and learning rate.

    Parameters
    ----------
    dataset : data.Dataset, optional
        Data with labels; the digits by default. At most 10,000 training and 1,000 held-out examples are drawn.
    seeds : int
        Number of runs. Each draws other examples, start values and mini-batches.
    quick : bool
        Only three rates and a tenth of the steps, to try the machinery.
    progress : bool
        Whether a bar is shown.

    Returns
    -------
    Result
    """
    rates = [0.01, 0.1, 10.0] if quick else [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
    steps, every = (200, 20) if quick else (2000, 10)
    pairs = [prepare(dataset, seed, train=10_000, held_out=1000) for seed in range(seeds)]
    settings = list(itertools.product(NETWORKS, rates))
    calls = [(*pairs[seed], *setting, seed, steps, every) for setting in settings for seed in range(seeds)]
    learnt = iter(in_parallel(learn, calls, progress=progress))
    curves = {setting: [next(learnt) for _ in range(seeds)] for setting in settings}
    return _result(curves, rates, every, {
        **about(dataset, pairs), "hidden layers": HIDDEN, "activation": "relu", "examples a step": BATCH_SIZE,
        "steps": steps, "accuracy measured every": every,
    })  # fmt: skip


def learn(train: Pair, held_out: Pair, network: str, rate: float, seed: int, steps: int, every: int) -> list[float]:
    """Train a network for so many steps; its accuracy on held-out examples at the start and after every few of them.

    Shorter where the loss stopped being finite on the way.
    """
    model = build(network, train[0], count_classes(train, held_out), seed)
    accuracies: list[float] = []

    def look(step: int, loss: float) -> bool:
        if step % every == 0:
            accuracies.append(accuracy(model, held_out))
        return step == steps

    look(0, math.nan)
    with contextlib.suppress(FloatingPointError):
        training.fit(
            model, train, losses.softmax_cross_entropy, optim.SGD(model, rate), epochs=steps, batch_size=BATCH_SIZE,
            seed=seed, on_step=look, progress=False,
        )  # fmt: skip
    return accuracies


def build(network: str, X: np.ndarray, classes: int, seed: int) -> nn.Sequential:
    """Dense layers that start alike for one seed, but for He's start, with what the network's name says between."""
    widths = [X.shape[1], *HIDDEN, classes]
    layers: list[Any] = [nn.Standardize(X.shape[1]).fit(X)] if network in NETWORKS[1:3] else []
    *seeds, last = np.random.default_rng(seed).integers(2**31, size=len(HIDDEN) + 1)
    for s, n_in, n_out in zip(seeds, widths, HIDDEN, strict=False):
        if network == "batch normalization":
            layers += [nn.Dense(n_in, n_out, bias=False, seed=s), BatchNorm(n_out, activation="relu")]
        else:
            layers += [nn.Dense(n_in, n_out, seed=s), nn.ReLU()]
    layers.append(nn.Dense(widths[-2], widths[-1], seed=last))
    if network == "inputs normalised, He's start":
        for layer in layers:
            if isinstance(layer, nn.Dense):
                layer.params["weight"] *= math.sqrt(6)  # a variance of 2/n_in instead of 1/(3 n_in)
                layer.params["bias"][...] = 0
    return nn.Sequential(*layers)


def steps_to(goal: float, accuracies: list[float], every: int) -> int | None:
    """The first step at which the accuracy was as high, None where it never was.

    Examples
    --------
    >>> from fastbn.experiments.speed import steps_to
    >>> steps_to(0.9, [0.1, 0.8, 0.95, 0.9], every=10), steps_to(0.96, [0.1, 0.8, 0.95, 0.9], every=10)
    (20, None)
    """
    return next((i * every for i, accuracy in enumerate(accuracies) if accuracy >= goal), None)


def _result(curves: Curves, rates: list[float], every: int, settings: dict[str, Any]) -> Result:
    steps, seeds = settings["steps"], settings["seeds"]
    best = {setting: [max(run) for run in runs] for setting, runs in curves.items()}
    goal = math.floor(95 * max(map(max, best.values()))) / 100
    needed = {setting: [steps_to(goal, run, every) for run in runs] for setting, runs in curves.items()}

    rows, learning, remarks = [], [], []
    for network in NETWORKS:
        for rate in rates:
            reached = seeds - needed[network, rate].count(None)
            diverged = sum(len(run) <= steps // every for run in curves[network, rate])
            rows.append([network, rate, needed[network, rate], reached, diverged, best[network, rate]])
        # the fewest steps; where it never gets there, the highest accuracy
        fastest = min(rates, key=lambda r: (_median(needed[network, r]), -_median(best[network, r])))
        at_step = itertools.zip_longest(*curves[network, fastest])
        learning.append(curve(network, range(0, steps + 1, every), at_step, style="-"))
        sure = [f"{rate:g}" for rate in rates if None not in needed[network, rate]]
        remarks.append(f"{network}: fastest at {fastest:g}; every seed gets there at {', '.join(sure) or 'no rate'}")
    within = f"within {steps:,} steps"
    return Result(
        name="speed",
        title=f"Steps of gradient descent until {goal:.0%} of the held-out examples are right (95 % of the best seen)",
        settings=settings,
        columns={"network": "", "rate": "g", "steps": ",.0f", "reached": "", "diverged": "", "best accuracy": ".1%"},
        rows=rows,
        panels=[
            plots.Panel(
                f"Steps to {goal:.0%} accuracy", "Learning rate", "Steps", xscale="log", yscale="log",
                ylim=(every / 2, 2 * steps), missing=f"not {within}",
                curves=[curve(network, rates, [needed[network, rate] for rate in rates]) for network in NETWORKS],
            ),
            plots.Panel("Each at its fastest rate", "Step", "Accuracy on held-out examples", learning, percent=True),
        ],
        remarks=remarks,
        missing="never",
    )  # fmt: skip


def _median(values: list[Any]) -> float:
    median = spread(values)[1]
    return math.inf if median is None else median
