"""`fastbn predict`: a label, or the number of a regression, for every example."""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastbn import checkpoint, data, labels, nn
from fastbn.tables import is_table

from .common import SOURCE, add_columns, load, say


def add_to(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add_parser("predict", help="print a label for every example, by a model of train's")
    add: Any = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="the model.safetensors that train wrote").complete = "file"
    add("data", metavar="DATA", help=SOURCE + "; its test part, where it has one").complete = "file"
    add_columns(parser, "the column of labels in a table; how well they are met then goes to standard error")
    add("--proba", action="store_true",
        help="print the probability of every class instead, as a .csv with the labels in its first line")  # fmt: skip
    parser.set_defaults(run=run, output_is_all=True)


def run(args: argparse.Namespace) -> None:
    """Print labels, probabilities or numbers; and how right they are where there are labels to compare with."""
    model = checkpoint.load(args.model).eval()
    trained = checkpoint.read_metadata(args.model)
    _check_model(args.model, model, trained)
    regression = trained["classes"] is None
    if regression and args.proba:
        raise ValueError(f"{args.model}: --proba is for classes, and this model predicts numbers")
    dataset = _load(args, trained, "regression" if regression else "classification")
    is_test_part = dataset.held_out is not None
    dataset = dataset.held_out or dataset
    for note in dataset.notes:
        say(note)
    _check_columns(args, dataset, trained)
    seen = dataset.name == trained["data"] and not is_test_part
    known = ", examples it was trained on among them" if seen else ""
    if regression:
        target = trained["target"]
        outputs = _outputs(args, model, dataset)[:, 0].astype(np.float64)
        predicted = target["mean"] + (target["mean_low"] + target["std"] * outputs)
        _print(map(repr, predicted.tolist()))
        if dataset.y is not None:
            rest, var = np.mean(np.square(dataset.y - predicted)), dataset.y.var()
            r2 = f"{1 - rest / var:.4f}" if var > 0 else "-"
            say(f"RMSE {math.sqrt(rest):.5g}, R2 {r2}, {len(predicted)} examples{known}")
        return
    classes = {labels.key(label): k for k, label in enumerate(trained["classes"])}
    right_classes = None
    if dataset.y is not None and dataset.classes is not None:
        there = [dataset.classes[k].item() for k in range(len(dataset.classes))]
        if unseen := [there[k] for k in np.unique(dataset.y) if labels.key(there[k]) not in classes]:
            expected = ", ".join(map(str, trained["classes"]))
            raise ValueError(f"{args.data}: label {unseen[0]!r} was not seen in training, expected one of {expected}")
        right_classes = np.array([classes.get(labels.key(label), -1) for label in there])[dataset.y]
    outputs = _outputs(args, model, dataset)
    chosen = outputs.argmax(axis=1)
    if args.proba:
        _print(_table(trained["classes"], outputs))
    else:
        _print(trained["classes"][k] for k in chosen)
    if right_classes is not None:
        right = int(np.count_nonzero(chosen == right_classes))
        say(f"accuracy {right / len(chosen):.2%}, {right} of {len(chosen)}{known}")


def _print(lines: Iterable[Any]) -> None:
    sys.stdout.write("".join(f"{labels.printable(line)}\n" for line in lines))
    sys.stdout.flush()  # before anything is said of them


def _table(classes: list[Any], outputs: np.ndarray) -> Iterable[str]:
    """A .csv of probabilities, in the nine digits that tell any two numbers of float32 apart."""
    head = io.StringIO()
    csv.writer(head, lineterminator="").writerow(map(labels.printable, classes))
    yield head.getvalue()
    e = np.exp(outputs - outputs.max(axis=1, keepdims=True), dtype=np.float64)
    for row in (e / e.sum(axis=1, keepdims=True)).tolist():
        yield ",".join(f"{p:.9g}" for p in row)


def _check_model(path: Path, model: Any, trained: dict[str, Any]) -> None:
    """ValueError unless the metadata are those that train writes for such a model."""
    if not {"classes", "inputs", "columns", "data"} <= trained.keys():
        raise ValueError(f"{path}: its metadata hold no labels: expected a model that fastbn train wrote")
    dense = [layer for layer in model if isinstance(layer, nn.Dense)] if isinstance(model, nn.Sequential) else []
    if not dense or trained["inputs"] != dense[0].n_in or type(trained["inputs"]) is not int:
        raise ValueError(f"{path}: expected a network for {labels.shown(trained['inputs'])} features")
    classes, target, outputs = trained["classes"], trained.get("target"), dense[-1].n_out
    if classes is None:
        keys = ("mean", "mean_low", "std")
        numbers = [target.get(key) for key in keys] if isinstance(target, dict) else [None]
        if outputs != 1 or not all(type(x) is float and abs(x) < labels.LARGEST for x in numbers):
            raise ValueError(f"{path}: expected labels, or mean and std of the target, got {labels.shown(target)}")
    elif not isinstance(classes, list) or len(classes) != outputs or {*map(type, classes)} - {str, int, float, bool}:
        raise ValueError(f"{path}: expected a label for each of its {outputs} outputs, got {labels.shown(classes)}")
    try:
        model(np.zeros((1, trained["inputs"]), np.float32))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: cannot be used: {error}") from error
    columns = trained["columns"]
    if not isinstance(columns, list | None) or not all(isinstance(name, str) for name in columns or ()):
        raise ValueError(f"{path}: expected names of columns or none, got {labels.shown(columns)}")


def _load(args: argparse.Namespace, trained: dict[str, Any], task: data.Task) -> data.Dataset:
    """The data, with the columns that the model was trained on where it knows their names."""
    options: dict[str, Any] = {"task": task}
    by_name = args.columns is None and not args.ignore and args.header is not False
    if trained["columns"] and by_name and is_table(Path(args.data)):
        options["columns"] = trained["columns"]
    return load(args, **options)


def _outputs(args: argparse.Namespace, model: Any, dataset: data.Dataset) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        outputs = np.concatenate([model(dataset.X[i : i + 1024]) for i in range(0, len(dataset.X), 1024)])
    wrong = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if len(wrong):
        raise ValueError(f"{args.data}: example {wrong[0] + 1} is too far from the training data for float32")
    return outputs


def _check_columns(args: argparse.Namespace, dataset: data.Dataset, trained: dict[str, Any]) -> None:
    got, expected = dataset.X.shape[1], trained["inputs"]
    if got != expected:
        hint = " (--target names a column of labels)" if dataset.features and args.target is None else ""
        raise ValueError(f"{args.data}: expected {expected} features, as in {trained['data']}, got {got}{hint}")
    for i, (name, known) in enumerate(zip(dataset.features or (), trained["columns"] or (), strict=False), 1):
        if name != known:
            raise ValueError(f"{args.data}: expected {known!r} as feature {i}, as in {trained['data']}, got {name!r}")
