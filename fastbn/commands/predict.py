"""`fastbn predict`: a label for every example."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fastbn import checkpoint, data

from .common import SOURCE, load


def add_to(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add_parser("predict", help="print a label for every example, by a model of train's")
    parser.add_argument("model", metavar="MODEL", type=Path, help="the model.safetensors that train wrote")
    parser.add_argument("data", metavar="DATA", help=SOURCE + "; of a folder the t10k part, where it has one")
    parser.add_argument("--target", help="the column of labels in a .csv; accuracy then goes to standard error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the labels, and the accuracy where there are labels to compare with."""
    model = checkpoint.load(args.model).eval()
    trained = checkpoint.read_metadata(args.model)
    if not {"classes", "inputs", "columns", "data"} <= trained.keys():
        raise ValueError(f"{args.model}: its metadata hold no labels: expected a model that fastbn train wrote")
    outputs = model(np.zeros((1, trained["inputs"]), np.float32)).shape[1]
    if not isinstance(trained["classes"], list) or len(trained["classes"]) != outputs:
        raise ValueError(
            f"{args.model}: expected a label for each of its {outputs} outputs, got {trained['classes']!r}"
        )
    if not isinstance(trained["columns"], list | None):
        raise ValueError(f"{args.model}: expected names of columns or none, got {trained['columns']!r}")
    dataset = load(args)
    is_test_part = dataset.held_out is not None
    dataset = dataset.held_out or dataset
    _check_columns(args, dataset, trained)
    if dataset.y is not None and dataset.classes is not None:
        there = dataset.classes[np.unique(dataset.y)].tolist()
        if unseen := [label for label in there if not any(_same(label, known) for known in trained["classes"])]:
            known = ", ".join(map(str, trained["classes"]))
            raise ValueError(f"{args.data}: label {unseen[0]!r} was not seen in training, expected one of {known}")
    chosen = np.concatenate([model(dataset.X[i : i + 1024]).argmax(axis=1) for i in range(0, len(dataset.X), 1024)])
    labels = [trained["classes"][k] for k in chosen]
    sys.stdout.write("".join(f"{label}\n" for label in labels))
    if dataset.y is not None and dataset.classes is not None:
        right = sum(map(_same, labels, dataset.classes[dataset.y].tolist()))
        seen = dataset.name == trained["data"] and not is_test_part
        known = ", examples it was trained on among them" if seen else ""
        print(f"accuracy {right / len(labels):.2%}, {right} of {len(labels)}{known}", file=sys.stderr)


def _same(label: Any, other: Any) -> bool:
    """Whether they are one label: a file's are numbers where all of them look like numbers, and texts elsewhere."""
    return bool(label == other) or str(label) == str(other)


def _check_columns(args: argparse.Namespace, dataset: data.Dataset, trained: dict[str, Any]) -> None:
    got, expected = dataset.X.shape[1], trained["inputs"]
    if got != expected:
        hint = " (--target names a column of labels)" if dataset.features and args.target is None else ""
        raise ValueError(f"{args.data}: expected {expected} features, as in {trained['data']}, got {got}{hint}")
    for i, (name, known) in enumerate(zip(dataset.features or (), trained["columns"] or (), strict=False), 1):
        if name != known:
            raise ValueError(f"{args.data}: expected {known!r} as feature {i}, as in {trained['data']}, got {name!r}")
