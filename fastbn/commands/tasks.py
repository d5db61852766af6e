"""What `fastbn train` learns: classes or numbers. Each has a loss, targets, scores, and what is printed and drawn."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastbn import data, losses, nn, plots, training

__all__ = ["Classification", "Regression", "kind_of", "task_of"]


def task_of(args: argparse.Namespace, train: data.Dataset) -> Classification | Regression:
    """The task that the training data were read for."""
    return Classification(train) if train.classes is not None else Regression(train, standardize=args.standardize)


def kind_of(dataset: data.Dataset) -> str:
    """What --task auto has chosen, and why."""
    if dataset.classes is not None:
        return f"classification, since the target holds {len(dataset.classes)} different labels"
    assert dataset.y is not None
    fractions = bool((dataset.y % 1).any())
    reason = "numbers with a fraction" if fractions else f"{len(np.unique(dataset.y))} different whole numbers"
    return f"regression, since the target holds {reason}"


class Classification:
    """The largest output is the class: softmax and cross-entropy."""

    loss = staticmethod(losses.softmax_cross_entropy)
    formats: ClassVar = {"accuracy": ".2%", "loss": ".4f"}

    def __init__(self, train: data.Dataset) -> None:
        assert train.classes is not None
        self.outputs = len(train.classes)
        self.about = f"{self.outputs} classes"
        self.metadata = {"classes": train.classes.tolist()}

    def targets(self, dataset: data.Dataset) -> Any:
        """As the loss takes them."""
        return dataset.y

    def scores(self, model: nn.Sequential, dataset: data.Dataset) -> dict[str, Any]:
        """By name; "loss" is finite unless training went astray."""
        loss, accuracy = training.evaluate(model, (dataset.X, self.targets(dataset)), self.loss)
        return {"accuracy": accuracy, "loss": loss}

    def epochs(self, history: training.History, target: Any, validation: Any) -> dict[str, list[float]]:
        """What was measured, epoch by epoch; `target` and `validation` are the targets of both parts."""
        return dataclasses.asdict(history)

    def draw(self, epochs: Mapping[str, dict[str, list[float]]], path: Path) -> None:
        """The learning curves."""
        plots.learning_curves({name: training.History(**lists) for name, lists in epochs.items()}, path)


class Regression:
    """One output is the number, less the mean of the training targets and divided by their deviation: mse."""

    loss = staticmethod(losses.mse)
    formats: ClassVar = {"RMSE": ".5g", "R2": ".4f"}
    outputs = 1

    def __init__(self, train: data.Dataset, *, standardize: bool) -> None:
        assert train.y is not None
        y = train.y
        if y.min() == y.max():
            raise ValueError(f"{train.name}: expected targets that differ, got {y[0]:g} alone")
        self.about = f"targets from {y.min():.10g} to {y.max():.10g}"
        self._scale = nn.Standardize(1, dtype="float32")
        if standardize:
            self._scale.fit(y[:, np.newaxis])
        else:
            self._scale.var[...], self._scale.count = 1, len(y)
        self._std = math.sqrt(float(self._scale.var[0]))
        if not self._std > 0:
            raise ValueError(f"{train.name}: the squares of targets that differ by {y.max() - y.min():g} leave float64")
        if not np.isfinite(self.targets(train)).all():
            raise ValueError(f"{train.name}: targets beyond float32's range, leave out --no-standardize")
        target = {"mean": float(self._scale.mean[0]), "mean_low": float(self._scale.mean_low[0]), "std": self._std}
        self.metadata = {"classes": None, "target": target}

    def targets(self, dataset: data.Dataset) -> Any:
        """As the loss takes them: (N, 1) float32."""
        assert dataset.y is not None
        return self._scale(dataset.y[:, np.newaxis])

    def scores(self, model: nn.Sequential, dataset: data.Dataset) -> dict[str, Any]:
        """RMSE in the target's unit, R2 (None where the targets do not differ), and the loss."""
        target = self.targets(dataset)
        loss, _ = training.evaluate(model, (dataset.X, target), self.loss)
        return {"RMSE": self._rmse(loss), "R2": _r2(loss, target), "loss": loss}

    def epochs(self, history: training.History, target: Any, validation: Any) -> dict[str, list[float]]:
        """RMSE and R2 of both parts, epoch by epoch; `target` and `validation` are the targets of these."""
        found: dict[str, list[float]] = {}
        for prefix, part_losses, part in (("", history.loss, target), ("val_", history.val_loss, validation)):
            found[f"{prefix}rmse"] = [self._rmse(loss) for loss in part_losses]
            found[f"{prefix}r2"] = [r2 for loss in part_losses if (r2 := _r2(loss, part)) is not None]
        return found | {"lr": history.lr, "seconds": history.seconds}

    def draw(self, epochs: Mapping[str, dict[str, list[float]]], path: Path) -> None:
        """The learning curves."""
        curves = {
            name: training.History(lists["rmse"], lists["r2"], lists["val_rmse"], lists["val_r2"])
            for name, lists in epochs.items()
        }
        plots.learning_curves(curves, path, ("RMSE", "R2"))

    def _rmse(self, loss: float) -> float:
        return math.sqrt(loss) * self._std


def _r2(loss: float, target: Any) -> float | None:
    var = float(target.var(dtype=np.float64))
    return 1 - loss / var if var > 0 else None
