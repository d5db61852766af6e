"""Claim 2: batch normalization holds the inputs of hidden layers still, and a network up when its data change.

What a hidden layer gets moves while the layers before it learn ("internal covariate shift", Ioffe & Szegedy 2015).
Normalised, it can move by weight and bias alone. That this is why the normalised network learns faster is disputed:
Santurkar et al. (2018, section 2.2) move the normalised values at random in every step, and it still learns fast. So
one of the networks here does that.

Then the data themselves change: pen on paper, recoloured. Running averages of the old colours are no help; averages
of the new images, which needs no labels, may be (Li et al. 2016, "adaptive batch normalization").
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np

from fastbn import BatchNorm, data, losses, nn, optim, plots, training

from .common import Pair, Result, about, accuracy, check_pixels, count_classes, curve, in_parallel, prepare

__all__ = ["RECOLOURED", "Jittered", "moved", "recolour", "run"]

NETWORKS = ("neither", "inputs normalised", "batch normalization", "with jitter")
HIDDEN = (100, 100, 100)
RATE, BATCH_SIZE, JITTER = 0.1, 60, 0.5
# Paper and ink, which are 0 and 1 in the images as they are; a pair is the range that each image draws its own from.
RECOLOURED: dict[str, tuple[Any, Any]] = {
    "as trained": (0, 1), "faint": (0, 0.25), "bright": (0.5, 1), "each its own": ((0, 0.5), (0.5, 1)),
    "inverted": (1, 0),
}  # fmt: skip


def run(dataset: data.Dataset | None = None, *, seeds: int = 5, quick: bool = False, progress: bool = True) -> Result:
    """Measure how far the last hidden layer's inputs move between checkpoints, and accuracies on recoloured images.

    Parameters
    ----------
    dataset : data.Dataset, optional
        Images with values within [0, 1], 0 the background; the digits by default. At most 10,000 training and 1,000
        held-out examples are used.
    seeds : int
        Number of runs. Each draws another start and order of the examples, and another split if the data have no test
        part.
    quick : bool
        Only 40 steps, to try the machinery.
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
    steps, every = (40, 20) if quick else (1000, 50)
    at = range(every, steps + 1, every)
    pairs = [prepare(dataset, seed, train=10_000, held_out=1000) for seed in range(seeds)]
    check_pixels(pairs[0][0][0])
    calls = [(*pairs[seed], network, seed, steps, every) for network in NETWORKS for seed in range(seeds)]
    runs = iter(in_parallel(learn, calls, progress=progress))
    found = {network: [next(runs) for _ in range(seeds)] for network in NETWORKS}

    def cells(key: Any) -> list[Any]:
        return [[run.get(key) for run in found[network]] if key in found[network][0] else None for network in NETWORKS]

    def curves(networks: tuple[str, ...], keys: list[Any], x: Any, **style: Any) -> list[plots.Curve]:
        return [curve(name, x, [[run[key] for run in found[name]] for key in keys], **style) for name in networks]

    first, last = ("moved", at[0]), ("moved", at[-1])
    rows = [
        [f"moved in steps 1 to {every}", *cells(first)],
        [f"moved in steps {steps - every + 1} to {steps}", *cells(last)],
        *([f"accuracy after {t} steps", *cells(("accuracy", t))] for t in (at[0], at[-1])),
        *([f"{name}, {how}", *cells((name, how))] for name in RECOLOURED for how in ("frozen", "re-estimated")),
    ]
    names, still = [*RECOLOURED], NETWORKS[:3]
    panels = [
        plots.Panel(
            f"Last hidden layer's inputs, every {every} steps", "Step", "Moved by, in standard deviations",
            curves(NETWORKS, [("moved", t) for t in at], at, style="-"), yscale="log",
        ),
        plots.Panel(
            "What is learnt meanwhile", "Step", "Held-out images right",
            curves(NETWORKS, [("accuracy", t) for t in at], at, style="-"), percent=True, ylim=(-0.02, 1.02),
        ),
        *(
            plots.Panel(title, "Held-out images", "Right",
                        curves(which, [(name, how) for name in names], names, style="o"), percent=True,
                        ylim=(-0.02, 1.02))
            for title, how, which in (
                ("Recoloured images, statistics of training", "frozen", still),
                ("Recoloured images, statistics re-estimated", "re-estimated", still[1:]),
            )
        ),
    ]  # fmt: skip
    settings = {
        **about(dataset, pairs), "hidden layers": HIDDEN, "activation": "relu", "optimizer": f"SGD {RATE}",
        "examples a step": BATCH_SIZE, "jitter": JITTER, "steps": steps,
    }  # fmt: skip
    return Result(
        "shift",
        "How far the last hidden layer's inputs move, and accuracy on recoloured images",
        settings,
        dict.fromkeys(("", *NETWORKS), ".3f"),
        rows,
        panels,
        [
            "moved: earth mover's distance of the last hidden layer's inputs before and after, in standard deviations.",
            "frozen, re-estimated: normalised with the statistics of the training images, or of the recoloured ones.",
        ],
    )


def learn(train: Pair, held_out: Pair, network: str, seed: int, steps: int, every: int) -> dict[Any, float]:
    """One run: ("moved", step) and ("accuracy", step) of the checkpoints; (domain, "frozen" or "re-estimated")."""
    X = train[0]
    model = build(network, X, count_classes(train, held_out), seed)
    found: dict[Any, float] = {}
    before = last_inputs(model, X)

    def on_step(step: int, loss: float) -> bool:
        nonlocal before
        if step % every == 0:
            after = last_inputs(model, X)
            found["moved", step] = moved(before, after)
            found["accuracy", step] = accuracy(re_estimated(model, network, X), held_out)
            before = after
        return step == steps

    training.fit(
        model, train, losses.softmax_cross_entropy, optim.SGD(model, RATE), epochs=steps, batch_size=BATCH_SIZE,
        seed=seed, on_step=on_step, progress=False,
    )  # fmt: skip
    trained = re_estimated(model, network, X)  # exact, so that averages that lag are not mistaken for a shift
    for name, (paper, ink) in RECOLOURED.items():
        images = recolour(held_out[0], paper, ink, seed)
        found[name, "frozen"] = accuracy(trained, (images, held_out[1]))
        if network != "neither":
            found[name, "re-estimated"] = accuracy(re_estimated(trained, network, images), (images, held_out[1]))
    return found


def build(network: str, X: np.ndarray, n_classes: int, seed: int) -> nn.Sequential:
    """Three hidden layers, each z = Wa, normalised or not, and max(z, 0)."""
    layers: list[Any] = [nn.Standardize(X.shape[1]).fit(X)] if network == "inputs normalised" else []
    normalised = network in ("batch normalization", "with jitter")
    for k, (n_in, n_out) in enumerate(itertools.pairwise((X.shape[1], *HIDDEN)), 10 * seed):
        layers.append(nn.Dense(n_in, n_out, bias=not normalised, seed=k))
        if normalised:
            layers.append(Jittered(n_out, seed=k) if network == "with jitter" else BatchNorm(n_out))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Dense(HIDDEN[-1], n_classes, seed=10 * seed + 9))


class Jittered(BatchNorm):
    """Batch normalization, and then each feature scaled and shifted at random, anew in every training step."""

    def __init__(self, num_features: int, *, seed: int) -> None:
        super().__init__(num_features)
        self.rng = np.random.default_rng(seed)

    def forward(self, x: Any, out: Any = None, *, mask: Any = None) -> np.ndarray:
        y = super().forward(x, out, mask=mask)
        self.scale = np.ones(self.num_features, y.dtype)
        if self.training:
            self.scale[...] = np.exp(self.rng.normal(0, JITTER, self.num_features))
            y *= self.scale
            y += self.rng.normal(0, JITTER, self.num_features).astype(y.dtype)
        return y

    __call__ = forward

    def backward(self, dy: Any, out: Any = None) -> np.ndarray:
        return super().backward(dy * self.scale, out)


def re_estimated(model: nn.Sequential, network: str, X: np.ndarray) -> nn.Sequential:
    """A copy whose layers normalise with the statistics of X."""
    twin = copy.deepcopy(model)
    if network == "inputs normalised":
        twin[0].fit(X)
    elif network != "neither":
        training.recalibrate(twin, X)
    return twin


def last_inputs(model: nn.Sequential, X: np.ndarray) -> np.ndarray:
    """What the last hidden layer's activation gets in training, (N, features). Leaves the model alone."""
    for layer in list(copy.deepcopy(model).train())[:-2]:
        X = layer(X)
    return X


def moved(before: np.ndarray, after: np.ndarray) -> float:
    """Distance of two samples, (N, features) each, in standard deviations of the first.

    The earth mover's: the least that values must move, on average, to make one distribution into the other. In one
    dimension that is mean |sorted before - sorted after|. Means over the features, of distance and of deviation.
    """
    distance = np.abs(np.sort(before, axis=0) - np.sort(after, axis=0)).mean()
    return float(distance / max(before.std(axis=0).mean(), 1e-12))


def recolour(X: np.ndarray, paper: Any, ink: Any, seed: int) -> np.ndarray:
    """paper where X is 0, ink where it is 1; a pair is a range from which every image draws its own."""
    rng = np.random.default_rng(seed)
    ranges = [value if isinstance(value, tuple) else (value, value) for value in (paper, ink)]
    background, pen = (rng.uniform(low, high, (len(X), 1)) for low, high in ranges)
    coloured: np.ndarray = (background + (pen - background) * X).astype(X.dtype)
    return coloured
