"""Claim 3: the statistics of a mini-batch are noisy, which regularises a little, and less the larger the mini-batch is.

Few training examples, so that a network learns them by heart; how much it does is the gap between its loss on held-out
examples and on those. Every network takes the same number of steps (Hoffer et al. 2017). But a smaller mini-batch makes
the gradients noisier too, with batch normalization or without: so there are ghost batches as well (the same paper),
which cut a large mini-batch for the normalisation alone.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from fastbn import BatchNorm, data, losses, nn, optim, plots, schedules, training

from .common import Pair, Result, about, count_classes, curve, in_parallel, prepare, spread

__all__ = ["noise_to_signal", "run"]

NETWORKS = ("neither", "batch normalization", "dropout", "both")
GHOSTS = "ghost batches"
SIZES = (4, 16, 64, 256)
HIDDEN, RATE, MOMENTUM, DROPPED, EXAMPLES = (100, 100), 0.02, 0.9, 0.5, 500
PASSES = 10  # over the training examples, to measure the noise


def run(dataset: data.Dataset | None = None, *, seeds: int = 5, quick: bool = False, progress: bool = True) -> Result:
    """Measure the noise in the hidden layers, and what is learnt, for every network and mini-batch size.

    Parameters
    ----------
    dataset : data.Dataset, optional
        Data with labels; the digits by default. 500 training and at most 1,000 held-out examples are drawn from it.
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
    steps = 20 if quick else 1000
    pairs = [prepare(dataset, seed, train=EXAMPLES, held_out=1000) for seed in range(seeds)]
    settings = [*itertools.product(NETWORKS, SIZES), *((GHOSTS, size) for size in SIZES[:-1])]
    calls = [(*pairs[seed], *setting, seed, steps) for setting in settings for seed in range(seeds)]
    runs = iter(in_parallel(learn, calls, progress=progress))
    found = {setting: [next(runs) for _ in range(seeds)] for setting in settings}
    found[GHOSTS, SIZES[-1]] = found["batch normalization", SIZES[-1]]  # the whole mini-batch is one

    columns = {"noise": ".2f", "training right": ".1%", "held-out right": ".1%", "held-out loss": ".3f", "gap": ".3f"}
    rows = [[*setting, *([run[what] for run in found[setting]] for what in columns)] for setting in settings]

    def curves(what: str, names: tuple[str, ...]) -> list[plots.Curve]:
        texts = [str(size) for size in SIZES]
        return [curve(name, texts, [[run[what] for run in found[name, size]] for size in SIZES]) for name in names]

    beside = []
    for size in SIZES[:-1]:
        pairs_of_runs = zip(found[GHOSTS, size], found[GHOSTS, SIZES[-1]], strict=True)
        low, median, high = spread(ghosts["gap"] - whole["gap"] for ghosts, whole in pairs_of_runs)
        beside.append(f"{median:+.3f} ({low:+.3f} to {high:+.3f}) of {size}")
    everyone = (*NETWORKS, GHOSTS)
    by = "Examples in a mini-batch (or ghost batch)"
    panels = [
        plots.Panel("Noise in the last hidden layer", by, "Noise to signal", curves("noise", everyone[1:]),
                    yscale="log"),
        plots.Panel("How much is learnt by heart", by, "Held-out less training loss", curves("gap", everyone)),
        plots.Panel("How much is learnt", by, "Held-out examples right", curves("held-out right", everyone),
                    percent=True),
    ]  # fmt: skip
    return Result(
        name="noise",
        title="Gap between training and held-out examples, by how many are normalised together",
        settings={
            **about(dataset, pairs), "hidden layers": HIDDEN, "activation": "relu", "dropout": DROPPED,
            "optimizer": f"SGD {RATE}, momentum {MOMENTUM}, cosine", "steps": steps,
        },
        columns={"network": "", "examples": "d", **columns},
        rows=rows,
        panels=panels,
        remarks=[
            f"examples: in a mini-batch; of ghost batches, which are batch normalization's: normalised together, in a "
            f"mini-batch of {SIZES[-1]}.",
            "noise: deviation of the last hidden layer's output for an example, from one mini-batch to the next, in "
            "units of that among examples.",
            "gap: held-out less training loss, at test time with exact statistics, so that no average's lag is in it.",
            f"gap with ghost batches less that without, seed by seed: {', '.join(beside)}.",
        ],
    )  # fmt: skip


def learn(train: Pair, held_out: Pair, network: str, size: int, seed: int, steps: int) -> dict[str, float]:
    """Train for so many steps; what the columns are called, each with its figure."""
    model = build(network, train[0].shape[1], count_classes(train, held_out), size, seed)
    batch_size = SIZES[-1] if network == GHOSTS else size
    steps_an_epoch = len(train[0]) // batch_size + (len(train[0]) % batch_size > 1)
    training.fit(
        model, train, losses.softmax_cross_entropy, optim.SGD(model, RATE, momentum=MOMENTUM),
        epochs=math.ceil(steps / steps_an_epoch), batch_size=batch_size, seed=seed,
        schedule=schedules.cosine(), on_step=lambda step, loss: step == steps, progress=False,
    )  # fmt: skip
    noise = noise_to_signal(list(model)[:-1], train[0], batch_size, seed)
    if any(isinstance(layer, BatchNorm) for layer in model):
        training.recalibrate(model, train[0])
    (a, right), (b, held_out_right) = (
        training.evaluate(model, pair, losses.softmax_cross_entropy) for pair in (train, held_out)
    )
    assert right is not None
    assert held_out_right is not None
    return {"noise": noise, "training right": right, "held-out right": held_out_right, "held-out loss": b, "gap": b - a}


def noise_to_signal(layers: list[Any], X: np.ndarray, batch_size: int, seed: int) -> float:
    """Deviation of an example's outputs over random mini-batches with it, in units of that among the examples.

    In training mode. Squares are averaged over examples and features. 0 where mini-batches change nothing.
    """
    rng = np.random.default_rng(seed)
    outputs = np.full((PASSES, len(X), HIDDEN[-1]), np.nan)  # one example left over alone gets none
    for output in outputs:
        for rows in data.minibatches(len(X), batch_size, rng):
            y = X[rows]
            for layer in layers:
                y = layer(y)
            output[rows] = y
    noise, signal = np.nanvar(outputs, axis=0, ddof=1).mean(), np.nanmean(outputs, axis=0).var(axis=0).mean()
    return math.sqrt(noise / signal)


def build(network: str, n_inputs: int, n_classes: int, ghost_size: int, seed: int) -> nn.Sequential:
    """Dense and ReLU, with batch normalization before and dropout after the activation, as the name says."""
    seeds = np.random.default_rng(seed).integers(2**31, size=2 * len(HIDDEN) + 1).tolist()
    layers: list[Any] = []
    for n_in, n_out in itertools.pairwise((n_inputs, *HIDDEN)):
        if network in ("neither", "dropout"):
            layers.append(nn.Dense(n_in, n_out, activation="relu", seed=seeds.pop()))
        else:
            layers.append(nn.Dense(n_in, n_out, bias=False, seed=seeds.pop()))
            layers.append(BatchNorm(n_out, activation="relu", ghost_size=ghost_size))
        dropout = nn.Dropout(DROPPED, seed=seeds.pop())
        if network in ("dropout", "both"):
            layers.append(dropout)
    return nn.Sequential(*layers, nn.Dense(HIDDEN[-1], n_classes, seed=seeds.pop()))
