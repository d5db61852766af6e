"""Claim 4: at test time, averages kept during training stand in for the mini-batch, so that one example is enough.

Exponentially weighted averages start from mean 0 and variance 1 and follow weights that are still moving. So a small
momentum remembers the start for long (unless that is divided out: Kingma & Ba 2015, section 3), and a large one follows
the noise of the last few mini-batches. How far are they from the exact statistics of the training examples, which
`training.recalibrate` takes, and what does it cost?
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np

from fastbn import BatchNorm, BatchStats, RunningStats, data, losses, nn, optim, plots, training

from .common import Pair, Result, about, accuracy, count_classes, curve, in_parallel, prepare

__all__ = ["distance", "run"]

HIDDEN, RATE, BATCH_SIZE = (100, 100), 0.1, 32
MOMENTA = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001)
KINDS = {False: "from 0 and 1", True: "debiased"}
SHADES = ("#9ECAE1", "#4292C6", "#08519C")  # of one network's colour, from the first look on


def run(dataset: data.Dataset | None = None, *, seeds: int = 5, quick: bool = False, progress: bool = True) -> Result:
    """Measure how far averages are from the exact statistics, and the accuracy with them, by momentum and steps.

    Parameters
    ----------
    dataset : data.Dataset, optional
        Data with labels; the digits by default. At most 10,000 training and 1,000 held-out examples are used.
    seeds : int
        Number of runs. Each draws other examples, start values and mini-batches.
    quick : bool
        Only 20 steps, to try the machinery.
    progress : bool
        Whether a bar is shown.

    Returns
    -------
    Result
    """
    looks = [5, 20] if quick else [10, 100, 1000]
    pairs = [prepare(dataset, seed, train=10_000, held_out=1000) for seed in range(seeds)]
    runs = in_parallel(learn, [(*pairs[seed], seed, looks) for seed in range(seeds)], progress=progress)

    def cells(kind: Any, step: int, what: int) -> list[float]:
        return [run[kind, step][what] for run in runs]

    shown = (looks[0], looks[-1])
    rows = [
        [name, *(cells(kind, step, what) for what in (1, 0) for step in shown)]
        for name, kind in [
            *((f"momentum {m:g}, {KINDS[debias]}", (m, debias)) for debias in KINDS for m in MOMENTA),
            ("momentum None, plain average", (None, False)),
            ("exact statistics, recalibrated", "exact"),
        ]
    ]

    def curves(debias: bool, what: int) -> list[plots.Curve]:
        kinds = [(m, debias) for m in MOMENTA] + [(None, False)] * debias  # to which small momenta come, debiased
        texts = [str(m) for m, _ in kinds]
        return [
            curve(f"after {step} steps", texts, [cells(kind, step, what) for kind in kinds], colour=shade)
            for step, shade in zip(looks, SHADES, strict=False)
        ]

    panels = [
        panel
        for debias, kind in KINDS.items()
        for panel in (
            plots.Panel(f"Averages {kind}, error", "Momentum", "Normalised values off by (rms)", curves(debias, 1),
                        yscale="log", ylim=(0.01, 1)),
            plots.Panel(f"Averages {kind}, accuracy", "Momentum", "Held-out examples right", curves(debias, 0),
                        percent=True, ylim=(-0.02, 1.02)),
        )
    ]  # fmt: skip
    apart, other = max(run["alone"][0] for run in runs), sum(run["alone"][1] for run in runs)
    return Result(
        "testtime", "Averages at test time beside the exact statistics, by momentum and number of steps",
        {
            **about(dataset, pairs), "hidden layers": HIDDEN, "activation": "relu", "optimizer": f"SGD {RATE}",
            "examples a step": BATCH_SIZE,
        },
        {"averages": "", **{f"off after {step}": ".3f" for step in shown},
         **{f"right after {step}": ".1%" for step in shown}},
        rows, panels,
        [f"One example at a time beside all at once: outputs differ by {apart:.1e} at most, {other:.0f} of "
         f"{seeds * len(pairs[0][1][0])} predictions differ.",
         "off: what the averages' error makes of a normalised value, which is of deviation 1; root of the mean square.",
         "right: of the held-out examples, with these averages."],
    )  # fmt: skip


def learn(train: Pair, held_out: Pair, seed: int, looks: list[int]) -> dict[Any, tuple[float, float]]:
    """One training under all averages at once: they change nothing in it. (accuracy, distance) of each at each look."""
    model = build(train[0].shape[1], count_classes(train, held_out), seed)
    norms = [layer for layer in model if isinstance(layer, BatchNorm)]
    kept: dict[tuple[float | None, bool], list[RunningStats]] = {
        (m, debias): [RunningStats(n.num_features, m, unbiased=False, debias=debias) for n in norms]
        for m, debias in itertools.product(MOMENTA, KINDS)
    }
    kept[None, False] = [RunningStats(n.num_features, 1, unbiased=False) for n in norms]
    found: dict[Any, tuple[float, float]] = {}

    def look(step: int, loss: float) -> bool:
        for i, norm in enumerate(norms):  # with momentum 1, its averages are the statistics of this mini-batch
            state = norm.state_dict()
            stats = BatchStats(state["running_mean"], state["running_var"], BATCH_SIZE)
            kept[None, False][i].momentum = 1 / step  # the plain average of all so far, as BatchNorm(momentum=None)'s
            for averages in kept.values():
                averages[i].update(stats)
        if step in looks:
            exact = training.recalibrate(copy.deepcopy(model), train[0])
            found["exact", step] = accuracy(exact, held_out), 0.0
            for kind, averages in kept.items():
                found[kind, step] = accuracy(having(model, averages), held_out), distance(averages, exact)
        return step == looks[-1]

    training.fit(
        model, train, losses.softmax_cross_entropy, optim.SGD(model, RATE), epochs=looks[-1], batch_size=BATCH_SIZE,
        seed=seed, on_step=look, progress=False,
    )  # fmt: skip
    usual = having(model, kept[0.1, False]).eval()
    X = held_out[0]
    alone, together = np.concatenate([usual(X[i : i + 1]) for i in range(len(X))]), usual(X)
    other = np.count_nonzero(alone.argmax(axis=1) != together.argmax(axis=1))
    found["alone"] = float(np.abs(alone - together).max()), float(other)
    return found


def build(n_inputs: int, n_classes: int, seed: int) -> nn.Sequential:
    """Hidden layers z = Wa, normalised, max(z, 0)."""
    widths = [n_inputs, *HIDDEN]
    *seeds, last = np.random.default_rng(seed).integers(2**31, size=len(HIDDEN) + 1)
    layers: list[Any] = []
    for s, (n_in, n_out) in zip(seeds, itertools.pairwise(widths), strict=True):
        layers += [nn.Dense(n_in, n_out, bias=False, seed=s), BatchNorm(n_out, momentum=1, activation="relu")]
    return nn.Sequential(*layers, nn.Dense(widths[-1], n_classes, seed=last))


def having(model: nn.Sequential, averages: list[RunningStats]) -> nn.Sequential:
    """A copy of the model with these averages."""
    twin = copy.deepcopy(model)
    for norm, stats in zip((layer for layer in twin if isinstance(layer, BatchNorm)), averages, strict=True):
        norm.running_mean, norm.running_var = stats.mean, stats.var
    return twin


def distance(averages: list[RunningStats], exact: nn.Sequential) -> float:
    """Root mean square of what a normalised value is off by, over all values of all features.

    With mean m and deviation s in the place of mu and sigma, (x - m)/s in that of (x - mu)/sigma, the mean square is
    ((mu - m)^2 + (sigma - s)^2) / s^2.
    """
    squares = []
    for stats, norm in zip(averages, (layer for layer in exact if isinstance(layer, BatchNorm)), strict=True):
        mean, deviation = norm.state_dict()["running_mean"], np.sqrt(norm.state_dict()["running_var"] + norm.eps)
        s = np.sqrt(stats.var + norm.eps)
        squares.append(((mean - stats.mean) ** 2 + (deviation - s) ** 2) / s**2)
    return float(np.sqrt(np.mean(squares)))
