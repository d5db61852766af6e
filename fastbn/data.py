"""Data for the network: a source's examples with their targets, the held-out split, seeded mini-batches.

Every fault of a file is one ValueError that names the file and the fault.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import labels
from .arrays import Part, read_idx_folder, read_npz
from .tables import SUFFIXES, is_table, read_table

__all__ = ["Dataset", "Labelled", "load", "minibatches", "split"]

Task = Literal["auto", "classification", "regression"]
# Whole numbers of which more are there, and of which one has fewer examples in the mean, are measured and not counted.
_MOST_CLASSES, _LEAST_EXAMPLES = 20, 10


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples, one a row, with their targets where there are any.

    Attributes
    ----------
    X : (N, features) array of float32 or float64
        With the digits that the source has: float32 where it holds them, as it does bytes and float32 itself; whole
        numbers beyond 2**53 are rounded to float64.
    y : (N,) int64 array of class numbers 0 .. K-1, or float64 array of numbers, or None
        None where the source holds no labels.
    classes : (K,) array or None
        The labels of a classification, sorted: `classes[y]` are the originals. None for a regression.
    name : str
        What the data are called, for tables and pictures.
    features : tuple of str, or None
        The names of the columns of X, where the source has names.
    held_out : Dataset or None
        The source's own test part, where it has one (t10k files, x_test).
    images : bool
        Whether the features are the pixels of images, which are to be scaled as one: of digits, of idx files, and in
        an .npz of more than two axes that hold bytes, or numbers from 0 to 1.
    notes : tuple of str
        What a reader decided: arrays and columns that were taken, or left out.
    """

    X: np.ndarray
    y: np.ndarray | None
    classes: np.ndarray | None
    name: str
    features: tuple[str, ...] | None = None
    held_out: Dataset | None = None
    images: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Labelled(Dataset):
    """A `Dataset` that has targets, as both parts of a split do."""

    y: np.ndarray


def load(
    path: str | os.PathLike[str] | None = None,
    target: str | None = None,
    *,
    task: Task = "classification",
    columns: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    header: bool | None = None,
) -> Dataset:
    """Read a data set.

    Parameters
    ----------
    path : path, or None
        Source of the data. Its name decides how it is read:

        - None: scikit-learn's digits, 1,797 images of 8 x 8 pixels, scaled from 0 .. 16 to 0 .. 1.
        - ``.npz``: arrays ``X`` (N, features) and ``y`` (N,). y may be missing. More axes of X are flattened. Images of
          bytes (of three axes or more) are scaled from 0 .. 255 to 0 .. 1. Other usual names are known as well:
          ``images`` and ``labels``, ``data`` and ``target``, ``x_train``, ``y_train``, ``x_test`` and ``y_test``.
        - ``.csv``, ``.tsv``, ``.txt`` or ``.data``, also with ``.gz`` behind it: a table in UTF-8, a header row, then
          numbers or True and False. Commas, semicolons, tabs, bars or spaces part the cells.
        - a folder: idx files as MNIST has them, train-images-idx3-ubyte, train-labels-idx1-ubyte and t10k-..., gzipped
          (.gz) or not, scaled from 0 .. 255 to 0 .. 1. The labels may be missing.
    target : str, optional
        Name of the column of labels in a table. Without it all columns are features and there are no labels.
    task : {"classification", "regression", "auto"}
        Whether labels are classes or numbers. "auto": numbers where one has a fraction, or where there are more than
        20 different whole numbers with fewer than 10 examples each in the mean; else classes. Text among that many
        numbers is refused where most labels are numbers.
    columns : sequence of str, optional
        The features of a table, in this order; without it all columns but the target.
    ignore : sequence of str
        Columns of a table that are left out.
    header : bool, optional
        Whether a table's first row is a header. False: the columns are called "1", "2", and so on. Without it
        there is one, unless its first row holds a number, which is refused: it may be an example.

    Returns
    -------
    Dataset

    Raises
    ------
    FileNotFoundError
        There is no such file or folder.
    ValueError
        The source is damaged, empty, lacks a label, or holds something other than finite numbers below 1e150: the
        message names file and place.
    ImportError
        The digits were asked for and scikit-learn is not installed.

    Notes
    -----
    Labels have one meaning in every format. 5, +5 and 5.0 are one label, 5 and 05 are not; whole numbers may have any
    size. A label is missing where it is empty, NaN, NA, N/A, null, NULL, None, NaT, ?, or another of pandas' or a
    spreadsheet's names for that.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from fastbn import data
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "pets.csv"
    >>> _ = path.write_text("weight;height;pet\\n4.5;25;cat\\n30;60;dog\\n")
    >>> pets = data.load(path, target="pet")
    >>> pets.X.shape, pets.y, pets.classes.tolist()
    ((2, 2), array([0, 1]), ['cat', 'dog'])
    >>> data.load(path, target="weight", ignore=["pet"], task="regression").y
    array([ 4.5, 30. ])
    """
    if task not in ("auto", "classification", "regression"):
        raise ValueError(f"expected task to be auto, classification or regression, got {task!r}")
    if path is not None and not os.fspath(path):  # Path would make the current folder of it
        raise ValueError("expected a path, got ''")
    source = None if path is None else Path(path)
    chosen = target is not None or columns is not None or ignore or header is not None
    if source is not None and source.exists() and not (source.is_dir() or is_table(source) or _is_npz(source)):
        raise ValueError(f"{source}: expected a folder of idx files, an .npz file or a table: {', '.join(SUFFIXES)}")
    if chosen and (source is None or not is_table(source)):
        given = "a target column" if target is not None else "a choice of columns" if columns or ignore else "a header"
        raise ValueError(f"{given} is for tables such as .csv files, got {source or 'the digits'}")
    if isinstance(columns, str) or isinstance(ignore, str):
        raise TypeError(f"expected columns and ignore to be sequences of names, got {columns if columns else ignore!r}")
    if columns is not None and ignore:
        raise ValueError(f"expected columns or ignore, got both: {list(columns)!r} and {list(ignore)!r}")
    if source is None:
        return _load_digits(task)
    if not source.exists():
        raise FileNotFoundError(f"no such file or folder: {source}")
    if source.is_dir():
        return _of_parts(source.resolve().name, *read_idx_folder(source), task)
    if is_table(source):
        table = read_table(source, target, columns, ignore, header)

        def where(row: int) -> str:
            return f"{source}: line {table.lines[row]}, column {labels.shown(target)}"

        y, classes = (None, None) if table.labels is None else _targets(table.labels, where, task)
        return Dataset(table.X, y, classes, source.name, table.features, notes=table.notes)
    return _of_parts(source.name, *read_npz(source), task)


def _is_npz(source: Path) -> bool:
    return source.suffix.lower() == ".npz"


def split(dataset: Dataset, *, fraction: float = 0.2, seed: int = 0) -> tuple[Labelled, Labelled]:
    """Split into a training and a held-out part: the source's own labelled test part, or else a draw.

    Parameters
    ----------
    dataset : Dataset
        With labels.
    fraction : float
        Part of every class that is held out, rounded, at least one example and never all; of all examples in a
        regression. Unused where the source has its own test part.
    seed : int
        Seed of the draw.

    Returns
    -------
    (train, held_out) : pair of Labelled
        Rows in the order in which the source has them.

    Raises
    ------
    ValueError
        There are no labels, fewer than two classes, or a class with a single example.
    """
    if dataset.y is None:
        raise ValueError(f"{dataset.name}: no labels to split by")
    if dataset.held_out is not None and dataset.held_out.y is not None:
        part = dataset.held_out
        return _labelled(dataset, held_out=None), part if isinstance(part, Labelled) else _labelled(part)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    if dataset.classes is None:
        if len(dataset.y) < 2:
            raise ValueError(f"{dataset.name}: expected at least 2 examples, got 1")
        held = held_out_rows(np.zeros(len(dataset.y)), fraction, seed)
    else:
        counts = np.bincount(dataset.y, minlength=len(dataset.classes))
        if len(counts) < 2:
            raise ValueError(f"{dataset.name}: expected at least 2 classes, got {len(counts)}")
        if counts.min() < 2:
            label = dataset.classes[counts.argmin()]
            hint = "" if dataset.classes.dtype.kind not in "iuf" else " (task regression takes labels as numbers)"
            raise ValueError(
                f"{dataset.name}: expected at least 2 examples of every class, got 1 of class {label}{hint}"
            )
        held = held_out_rows(dataset.y, fraction, seed)
    train, rest = (_labelled(dataset, X=dataset.X[rows], y=dataset.y[rows], held_out=None) for rows in (~held, held))
    return train, rest


def _labelled(dataset: Dataset, **changes: Any) -> Labelled:
    """The same as a `Labelled`, but for these attributes."""
    return Labelled(**(vars(dataset) | changes))


def held_out_rows(labels: np.ndarray, fraction: float, seed: int) -> NDArray[np.bool_]:
    """A mask of that part of every class, rounded: at least one example and never all. (N,) bool for (N,) labels."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        take = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        held[rng.permutation(rows)[:take]] = True
    return held


def minibatches(n: int, batch_size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Indices of one epoch's mini-batches, in a fresh random order.

    The last short mini-batch is kept, and dropped where it would hold a single example: that one has no variance.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import data
    >>> [len(rows) for rows in data.minibatches(8, 3, np.random.default_rng(0))]
    [3, 3, 2]
    >>> [len(rows) for rows in data.minibatches(7, 3, np.random.default_rng(0))]
    [3, 3]
    """
    order = rng.permutation(n)
    for start in range(0, n, batch_size):
        rows = order[start : start + batch_size]
        if len(rows) > 1:
            yield rows


def _load_digits(task: Task) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits data need scikit-learn: pip install "fastbn[train]"') from error
    pixels, digits = load_digits(return_X_y=True)
    part = Part((pixels / 16).astype(np.float32), True, digits, "digits: label")
    return _of_parts("digits", part, None, (), task)


def _of_parts(name: str, train: Part, test: Part | None, notes: tuple[str, ...], task: Task) -> Dataset:
    """A Dataset of one part, or of two that share their classes."""
    y = classes = test_y = None
    if train.labels is not None:
        y, classes = _targets(train.labels, _row_of(train), task)
    if test is not None and test.labels is not None:
        if y is None:
            test_y, classes = _targets(test.labels, _row_of(test), task)
        elif classes is None:
            test_y = labels.numbers(test.labels, _row_of(test))
        else:
            test_classes, test_y = labels.encode(test.labels, _row_of(test))
            test_y = _numbered(classes, test_classes, test, test_y)[test_y]
    dataset = Dataset(train.X, y, classes, name, images=train.images, notes=notes)
    if test is None:
        return dataset
    made = replace if test_y is None else _labelled
    return replace(dataset, held_out=made(dataset, X=test.X, y=test_y))


def _row_of(part: Part) -> Callable[[int], str]:
    return lambda row: f"{part.place}[{row}]"


def _numbered(classes: np.ndarray, test_classes: np.ndarray, test: Part, y: np.ndarray) -> np.ndarray:
    """The numbers that the training part gives to the test part's classes."""
    numbers = {labels.key(label): i for i, label in enumerate(classes.tolist())}
    for i, label in enumerate(test_classes.tolist()):
        if labels.key(label) not in numbers:
            place = _row_of(test)(int((y == i).argmax()))
            raise ValueError(f"{place}: the test label {labels.shown(label)} does not occur in the training part")
    return np.array([numbers[labels.key(label)] for label in test_classes.tolist()], dtype=np.int64)


def _targets(
    given: Sequence[str] | np.ndarray, where: Callable[[int], str], task: Task
) -> tuple[np.ndarray, np.ndarray | None]:
    """y and, of a classification, its classes."""
    if task == "regression":
        return labels.numbers(given, where), None
    classes, y = labels.encode(given, where)
    if task == "classification":
        return y, classes
    keys = [labels.key(known) for known in classes.tolist()]
    numeric = [isinstance(k, int | float) and not isinstance(k, bool) for k in keys]
    is_number = np.array(numeric, bool)[y]
    examples = int(np.count_nonzero(is_number))
    many = sum(numeric) > _MOST_CLASSES and sum(numeric) * _LEAST_EXAMPLES > examples
    if is_number.all() and (many or any(isinstance(k, float) for k in keys)):
        return labels.numbers(given, where), None
    if many and 2 * examples > len(y):
        row = int(is_number.argmin())
        raise ValueError(
            f"{where(row)}: expected a number, as most targets are, got {labels.shown(keys[y[row]])}: "
            'task="classification" (--task classification) takes each as a class'
        )
    return y, classes
