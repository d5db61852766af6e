"""What `fastbn train` learns: classes or numbers. Each has a loss, targets, scores, and what is printed and drawn."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastbn import data, losses, nn, plots, training
from fastbn.labels import printable

from .common import aligned, need

__all__ = ["Classification", "Regression", "kind_of", "task_of"]

# Classes of a confusion matrix that fits into lines of a terminal, and of one whose picture shows anything.
PRINTED, DRAWN = 20, 200
COLUMNS = 100  # characters of such a line


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
        need({"sklearn": "precision and recall need"})
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

    def in_detail(self, model: nn.Sequential, dataset: data.Dataset) -> dict[str, Any]:
        """Class by class; None where there is nothing to divide by, and no matrix beyond 200 classes."""
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

        chosen = [model(dataset.X[i : i + 1024]).argmax(axis=1) for i in range(0, len(dataset.X), 1024)]
        compared = {"y_true": dataset.y, "y_pred": np.concatenate(chosen), "labels": np.arange(self.outputs)}
        precision, recall, _, examples = precision_recall_fscore_support(**compared, zero_division=np.nan)
        return {
            "classes": self.metadata["classes"],
            "precision": [None if math.isnan(value) else value for value in precision.tolist()],
            "recall": [None if math.isnan(value) else value for value in recall.tolist()],
            "examples": examples.tolist(),
            "confusion": confusion_matrix(**compared).tolist() if self.outputs <= DRAWN else None,
        }

    def tables(self, title: str, detail: dict[str, Any]) -> Iterator[str]:
        """Precision and recall; and the confusion matrix, or the sentence that stands for a large one."""
        names = [printable(label) for label in detail["classes"]]
        rates = [["-" if p is None else f"{p:.2%}" for p in detail[key]] for key in ("precision", "recall")]
        yield aligned(
            [(title, "precision", "recall", "examples"), *zip(names, *rates, map(str, detail["examples"]), strict=True)]
        )
        if len(names) > DRAWN:
            yield f"no confusion matrix, which is for {DRAWN} classes at most"
        elif len(names) > PRINTED:
            yield f"the confusion matrix of {len(names)} classes is in confusion.png and metrics.json"
        else:
            rows = [name[:PRINTED] for name in names]
            width = (COLUMNS - max(map(len, rows))) // len(rows) - 2
            cells = [["", *(name[:width] for name in names)]]
            cells += [[name, *map(str, row)] for name, row in zip(rows, detail["confusion"], strict=True)]
            yield f"confusion matrix: a row for each label, a column for each prediction\n{aligned(cells)}"

    def draw(
        self, epochs: Mapping[str, dict[str, list[float]]], detail: dict[str, Any], curves: Path, matrix: Path
    ) -> None:
        """The learning curves, and the confusion matrix."""
        plots.learning_curves({name: training.History(**lists) for name, lists in epochs.items()}, curves)
        if detail["confusion"] is None:
            matrix.unlink(missing_ok=True)  # of an earlier training
        else:
            plots.confusion(detail["confusion"], [printable(label) for label in detail["classes"]], matrix)


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

    def in_detail(self, model: nn.Sequential, dataset: data.Dataset) -> dict[str, Any]:
        """Nothing beside the scores."""
        return {}

    def tables(self, title: str, detail: dict[str, Any]) -> Iterator[str]:
        """There are none."""
        return iter(())

    def draw(
        self, epochs: Mapping[str, dict[str, list[float]]], detail: dict[str, Any], curves: Path, matrix: Path
    ) -> None:
        """The learning curves."""
        histories = {
            name: training.History(lists["rmse"], lists["r2"], lists["val_rmse"], lists["val_r2"])
            for name, lists in epochs.items()
        }
        plots.learning_curves(histories, curves, ("RMSE", "R2"))
        matrix.unlink(missing_ok=True)  # an earlier training's confusion matrix

    def _rmse(self, loss: float) -> float:
        return math.sqrt(loss) * self._std


def _r2(loss: float, target: Any) -> float | None:
    var = float(target.var(dtype=np.float64))
    return 1 - loss / var if var > 0 else None
