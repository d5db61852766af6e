"""Claim 1 as its inventors tried it: section 4.1 of Ioffe and Szegedy, "Batch Normalization", ICML 2015.

Two networks, one with batch normalization and one without, learn black and white images: three hidden layers of 100
sigmoids each, weights that start as small random Gaussians, 50,000 steps of gradient descent on 60 images each. Beside
the accuracy on held-out images, one looks at what comes into a sigmoid of the last hidden layer. The paper gives
neither the learning rate nor the size of the start weights: RATE and START are ours.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np

from fastbn import BatchNorm, data, losses, nn, optim, plots, training

from .common import COLOURS, Pair, Result, about, check_pixels, count_classes, curve, in_parallel, prepare

__all__ = ["run", "typical"]

NETWORKS = ("without", "with")
HIDDEN, BATCH_SIZE = (100, 100, 100), 60
RATE, START = 0.1, 0.1  # the standard deviation of the start weights
PERCENTILES = (15, 50, 85)


def run(dataset: data.Dataset | None = None, *, seeds: int = 1, quick: bool = False, progress: bool = True) -> Result:
    """Measure accuracy, and the percentiles of a last hidden sigmoid's input, over the training of both networks.

    Parameters
    ----------
    dataset : data.Dataset, optional
        Images with labels, pixels from 0 to 1, which are black or white from one half on; the digits by default.
    seeds : int
        Number of runs. Each draws other start values and mini-batches, and another split if the data have no test
        part.
    quick : bool
        Only 300 steps, to try the machinery.
    progress : bool
        Whether a bar is shown.

    Returns
    -------
    Result

    Raises
    ------
    ValueError
        Features that are not from 0 to 1.
    """
    steps, every = (300, 50) if quick else (50_000, 500)
    pairs = [prepare(dataset, seed) for seed in range(seeds)]
    calls = [
        (*map(black_and_white, pairs[seed]), network, seed, steps, every, progress and seeds == 1)
        for network in NETWORKS for seed in range(seeds)
    ]  # fmt: skip
    learnt = iter(in_parallel(learn, calls, progress=progress and seeds > 1))
    return _result({network: [next(learnt) for _ in range(seeds)] for network in NETWORKS}, steps, every, {
        **about(dataset, pairs), "hidden layers": HIDDEN, "activation": "sigmoid",
        "start weights": f"N(0, {START}^2)", "learning rate": RATE, "examples a step": BATCH_SIZE, "steps": steps,
        "looked at every": every,
    })  # fmt: skip


def black_and_white(pair: Pair) -> Pair:
    """Pixels of 0 and 1, white from one half on."""
    X, y = pair
    check_pixels(X)
    return (X >= 0.5).astype(np.float32), y


def learn(
    train: Pair, held_out: Pair, network: str, seed: int, steps: int, every: int, progress: bool
) -> tuple[list[float], np.ndarray]:
    """Accuracies (looks,), and percentiles (looks, 3, units) of what comes into the last hidden layer's sigmoids."""
    if progress:
        from tqdm import tqdm

        # Its own lock, for processes, would be reported as leaked when Ctrl-C ends this one.
        tqdm.set_lock(threading.RLock())
    model = build(network == "with", train[0].shape[1], count_classes(train, held_out), seed)
    below, above = model  # the last sigmoids stand first in the upper part
    accuracies, percentiles = [], []

    def look(step: int, loss: float) -> bool:
        if step % every == 0:
            model.eval()
            z = below(held_out[0])
            accuracies.append(float(np.mean(above(z).argmax(axis=1) == held_out[1])))
            percentiles.append(np.percentile(z[:1000], PERCENTILES, axis=0))
            model.train()
        return step == steps

    steps_an_epoch = len(train[0]) // BATCH_SIZE or 1
    training.fit(
        model, train, losses.softmax_cross_entropy, optim.SGD(model, RATE), epochs=-(-steps // steps_an_epoch),
        batch_size=BATCH_SIZE, seed=seed, on_step=look, progress=progress and network == "with",
    )  # fmt: skip
    return accuracies, np.array(percentiles)


def build(batch_norm: bool, features: int, classes: int, seed: int) -> nn.Sequential:
    """The network in two parts: all up to the last hidden sigmoids' inputs, and the rest."""
    layers: list[Any] = []
    for n_in, n_out in itertools.pairwise([features, *HIDDEN]):
        layers += [nn.Dense(n_in, n_out, bias=not batch_norm), *[BatchNorm(n_out)] * batch_norm, nn.Sigmoid()]
    model = nn.Sequential(nn.Sequential(*layers[:-1]), nn.Sequential(layers[-1], nn.Dense(HIDDEN[-1], classes)))
    rng = np.random.default_rng(seed)
    for part in model:
        for layer in part:
            if isinstance(layer, nn.Dense):
                layer.params["weight"][...] = rng.normal(0, START, layer.params["weight"].shape)
                if layer.bias:
                    layer.params["bias"][...] = 0
    return model


def typical(percentiles: np.ndarray) -> int:
    """The unit whose median moves, over the training, as far as is usual: of (looks, 3, units), the one in the middle.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.experiments.paper import typical
    >>> medians = np.array([[0.0, 0.0, 0.0], [9.0, 0.0, 2.0]])  # unit 0 moves by 9, unit 1 not at all, unit 2 by 2
    >>> typical(np.stack([medians - 1, medians, medians + 1], axis=1))
    2
    """
    moved = np.ptp(percentiles[:, 1], axis=0)
    return int(np.argsort(moved)[len(moved) // 2])


def _result(
    learnt: dict[str, list[tuple[list[float], np.ndarray]]], steps: int, every: int, settings: dict[str, Any]
) -> Result:
    looks = list(range(every, steps + 1, every))
    shown = [step for step in (steps // 50, steps // 10, steps) if step in looks]
    rows, accuracy, inputs, ends = [], [], [], []
    for network, runs in learnt.items():
        at_look = list(zip(*(accuracies for accuracies, _ in runs), strict=True))
        of_unit = [percentiles[:, :, typical(percentiles)] for _, percentiles in runs]  # (looks, 3)
        rows.append([
            network, *(list(at_look[looks.index(step)]) for step in shown),
            [float(np.ptp(unit[:, 1])) for unit in of_unit], [float(np.ptp(unit[0])) for unit in of_unit],
            [float(np.ptp(unit[-1])) for unit in of_unit],
        ])  # fmt: skip
        name = f"{network} batch normalization"
        accuracy.append(curve(name, looks, at_look, style="-"))
        low, median, high = of_unit[0].T.tolist()
        ends += [min(low), max(high)]
        inputs.append(plots.Curve(name, looks, median, low, high, "-", COLOURS[name]))
    return Result(
        name="paper",
        title="Ioffe and Szegedy (2015), section 4.1: accuracy on held-out images, and a typical last sigmoid's input",
        settings=settings,
        columns={"batch normalization": "", **{f"{step:,} steps": ".1%" for step in shown},
                 "median moves by": ".2f", "85th - 15th percentile at first": ".2f", "in the end": ".2f"},
        rows=rows,
        panels=[
            plots.Panel("(a) accuracy", "Step", "Accuracy on held-out images", accuracy, percent=True),
            *(plots.Panel(f"({letter}) a last sigmoid's input", "Step", "15th, 50th and 85th percentile", [drawn],
                          ylim=(min(ends) - 0.2, max(ends) + 0.2)) for letter, drawn in zip("bc", inputs, strict=True)),
        ],
        remarks=[
            f"Learning rate {RATE:g} for both: the paper names none, and of 0.1, 0.3, 1 and 3 this looks most like it.",
            "The typical sigmoid is the one whose median moves as far as is usual in the layer.",
        ],
    )  # fmt: skip
