"""Data for the network: readers, the held-out split and seeded mini-batches.

Every reader hands back plain arrays, and every fault of a file is one ValueError that names the file and the fault.
"""

from __future__ import annotations

import csv
import gzip
import os
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Dataset", "load", "minibatches", "split"]

# The idx format's magic number: two zero bytes, the type (8: unsigned byte), the number of dimensions.
_IDX_IMAGES, _IDX_LABELS = 0x00000803, 0x00000801
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples, one a row, with their labels where there are any.

    Attributes
    ----------
    X : (N, features) float32 array
    y : (N,) int64 array of class numbers 0 .. K-1, or None
        None where the source holds no labels.
    classes : (K,) array or None
        The labels as the source writes them, sorted: `classes[y]` are the originals.
    name : str
        What the data are called, for tables and pictures.
    features : tuple of str, or None
        The names of the columns of X, where the source has names.
    held_out : Dataset or None
        The source's own test part, where it has one (t10k files).
    """

    X: np.ndarray
    y: np.ndarray | None
    classes: np.ndarray | None
    name: str
    features: tuple[str, ...] | None = None
    held_out: Dataset | None = None


def load(path: str | os.PathLike[str] | None = None, target: str | None = None) -> Dataset:
    """Read a data set.

    Parameters
    ----------
    path : path, or None
        - None: scikit-learn's digits, 1,797 images of 8 x 8 pixels, scaled from 0 .. 16 to 0 .. 1;
        - `.npz`: arrays `X` (N, features), or of more axes, which are flattened, and `y` (N,), which may be missing;
        - `.csv`: a header row, then numbers; the labels are the column called `target`;
        - a folder of idx files as MNIST has them: train-images-idx3-ubyte, train-labels-idx1-ubyte and t10k-...,
          gzipped (.gz) or not, scaled from 0 .. 255 to 0 .. 1. The labels may be missing.
    target : str, optional
        Name of the column of labels in a .csv. Without it all columns are features and there are no labels.

    Returns
    -------
    Dataset

    Raises
    ------
    FileNotFoundError
        There is no such file or folder.
    ValueError
        The source is damaged, empty, or holds something other than finite numbers: the message names file and fault.
    ImportError
        The digits were asked for and scikit-learn is not installed.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from fastbn import data
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "pets.csv"
    >>> _ = path.write_text("weight,height,pet\\n4.5,25,cat\\n30,60,dog\\n")
    >>> pets = data.load(path, target="pet")
    >>> pets.X.shape, pets.y, pets.classes.tolist()
    ((2, 2), array([0, 1]), ['cat', 'dog'])
    """
    source = None if path is None else Path(path)
    if target is not None and (source is None or source.suffix.lower() != ".csv"):
        raise ValueError(f"a target column is for .csv files, got target={target!r} with {source or 'the digits'}")
    if source is None:
        return _load_digits()
    if not source.exists():
        raise FileNotFoundError(f"no such file or folder: {source}")
    if source.is_dir():
        return _load_idx_folder(source)
    if source.suffix.lower() == ".npz":
        return _load_npz(source)
    if source.suffix.lower() == ".csv":
        return _load_csv(source, target)
    raise ValueError(f"{source}: expected a .npz file, a .csv file or a folder of idx files")


def split(dataset: Dataset, *, fraction: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split into a training and a held-out part: the source's own test part, or else a stratified draw.

    Parameters
    ----------
    dataset : Dataset
        With labels.
    fraction : float
        Part of every class that is held out, rounded, at least one example and never all. Unused where the source
        has its own test part.
    seed : int
        Seed of the draw.

    Returns
    -------
    (train, held_out) : pair of Dataset
        Rows in the order in which the source has them.

    Raises
    ------
    ValueError
        There are no labels, fewer than two classes, or a class with a single example.
    """
    if dataset.held_out is not None:
        return replace(dataset, held_out=None), dataset.held_out
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    if dataset.y is None or dataset.classes is None:
        raise ValueError(f"{dataset.name}: no labels to split by")
    counts = np.bincount(dataset.y, minlength=len(dataset.classes))
    if len(counts) < 2:
        raise ValueError(f"{dataset.name}: expected at least 2 classes, got {len(counts)}")
    if counts.min() < 2:
        label = dataset.classes[counts.argmin()]
        raise ValueError(f"{dataset.name}: expected at least 2 examples of every class, got 1 of class {label}")
    held = held_out_rows(dataset.y, fraction, seed)
    train, held_out = (replace(dataset, X=dataset.X[rows], y=dataset.y[rows]) for rows in (~held, held))
    return train, held_out


def held_out_rows(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A mask of that part of every class, rounded: at least one example and never all. (N,) bool for (N,) labels."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        take = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        held[rng.permutation(rows)[:take]] = True
    return held


def minibatches(n: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
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


def _dataset(name: str, X: np.ndarray, labels: np.ndarray | None, **more: Any) -> Dataset:
    if labels is None:
        return Dataset(X, None, None, name, **more)
    classes, y = np.unique(labels, return_inverse=True)
    return Dataset(X, y.astype(np.int64), classes, name, **more)


def _load_digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits data need scikit-learn: pip install "fastbn[train]"') from error
    pixels, labels = load_digits(return_X_y=True)
    return _dataset("digits", (pixels / 16).astype(np.float32), labels)


def _load_npz(path: Path) -> Dataset:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz file, or a damaged one")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key]) for key in ("X", "y") if key in file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if "X" not in arrays:
        raise ValueError(f"{path}: holds no array called X")
    X, labels = arrays["X"], arrays.get("y")
    if X.dtype.kind not in "biuf" or X.ndim < 2 or X.size == 0:
        raise ValueError(f"{path}: X must be a non-empty (N, features) array of numbers, got {X.dtype} {X.shape}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, and the check names it
        X = X.reshape(len(X), -1).astype(np.float32)
    finite = np.isfinite(X)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(f"{path}: X[{row}, {column}] is {X[row, column]} in float32")
    if labels is not None:
        if labels.dtype.kind not in "biufSU" or labels.size != len(X) or labels.shape[:1] != (len(X),):
            raise ValueError(f"{path}: expected y to be {len(X)} labels, got {labels.dtype} {labels.shape}")
        labels = labels.ravel()
        if labels.dtype.kind == "f":
            labels = labels.astype(np.float64)
            if not np.isfinite(labels).all():
                raise ValueError(f"{path}: y[{np.flatnonzero(~np.isfinite(labels))[0]}] is not finite")
        elif labels.dtype.kind == "S":
            labels = _text_labels([label.decode("utf-8", "replace") for label in labels.tolist()])
    return _dataset(path.name, X, labels)


def _load_csv(path: Path, target: str | None) -> Dataset:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return _parse_csv(path, csv.reader(file, skipinitialspace=True, strict=True), target)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a .csv text file in UTF-8 ({error})") from error


def _parse_csv(path: Path, reader: Any, target: str | None) -> Dataset:
    header = [name.strip() for name in next(reader, [])]
    if not header:
        raise ValueError(f"{path}: empty, expected a header row")
    if target is not None and header.count(target) != 1:
        raise ValueError(f"{path}: expected one column called {target!r}, got the columns {', '.join(header)}")
    at = None if target is None else header.index(target)
    features = header if at is None else header[:at] + header[at + 1 :]
    if not features:
        raise ValueError(f"{path}: no feature column beside {target!r}")
    numbers, labels = array("d"), []
    for cells in reader:
        if not cells:  # a blank line
            continue
        if len(cells) != len(header):
            raise ValueError(f"{path}: line {reader.line_num} has {len(cells)} cells, expected {len(header)}")
        if at is not None:
            labels.append(cells.pop(at).strip())
            if not labels[-1]:
                raise ValueError(f"{path}: line {reader.line_num}, column {target!r}: no label")
        if not _are_numbers(cells):
            column, cell = next((i, cell) for i, cell in enumerate(cells) if not _are_numbers([cell]))
            hint = "" if at is not None else " (a column of labels must be named as the target)"
            raise ValueError(
                f"{path}: line {reader.line_num}, column {features[column]!r}: expected a number, got {cell!r}{hint}"
            )
        numbers.extend(map(float, cells))
    if not numbers:
        raise ValueError(f"{path}: no rows below the header")
    X = np.array(numbers, dtype=np.float32).reshape(-1, len(features))
    return _dataset(path.name, X, None if at is None else _text_labels(labels), features=tuple(features))


def _are_numbers(cells: list[str]) -> bool:
    """Whether all are finite numbers in float32."""
    try:
        return all(-_FLOAT32_MAX <= number <= _FLOAT32_MAX for number in map(float, cells))
    except ValueError:
        return False


def _text_labels(labels: list[str]) -> np.ndarray:
    """Integers where all labels are written as integers are, so that 10 sorts behind 9; text otherwise."""
    try:
        integers = [int(label) for label in labels]
    except ValueError:
        return np.array(labels)
    if all(str(number) == label for number, label in zip(integers, labels, strict=True)):
        return np.array(integers)
    return np.array(labels)


def _load_idx_folder(folder: Path) -> Dataset:
    parts = {}
    for part in ("train", "t10k"):
        images = _find(folder / f"{part}-images-idx3-ubyte")
        if images is None:
            continue
        pixels = _read_idx(images, _IDX_IMAGES)
        if pixels.size == 0:
            raise ValueError(f"{images}: empty, got shape {pixels.shape}")
        file = _find(folder / f"{part}-labels-idx1-ubyte")
        labels = None if file is None else _read_idx(file, _IDX_LABELS)
        if labels is not None and len(labels) != len(pixels):
            raise ValueError(f"{file}: {len(labels)} labels for the {len(pixels)} images of {images.name}")
        X = pixels.reshape(len(pixels), -1).astype(np.float32)
        X /= 255
        parts[part] = X, labels
    if not parts:
        raise ValueError(f"{folder}: holds neither train-images-idx3-ubyte nor t10k-images-idx3-ubyte (.gz or not)")
    if len({X.shape[1] for X, _ in parts.values()}) > 1:
        raise ValueError(f"{folder}: the train and t10k images differ in size")
    known = [labels for _, labels in parts.values() if labels is not None]
    classes = np.unique(known[0]) if known else None
    if len(known) == 2 and (unseen := np.setdiff1d(known[1], known[0])).size:
        raise ValueError(f"{folder}: label {unseen[0]} of the t10k images does not occur among the train images")
    sets = [
        Dataset(X, None, classes, folder.resolve().name)
        if classes is None or labels is None
        else Dataset(X, np.searchsorted(classes, labels).astype(np.int64), classes, folder.resolve().name)
        for X, labels in parts.values()
    ]
    return sets[0] if len(sets) == 1 else replace(sets[0], held_out=sets[1])


def _find(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(path.name + ".gz")) if file.is_file()), None)


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """Read an idx file of unsigned bytes.

    Big-endian 32-bit words: the magic number, then one size for each dimension; then the bytes
    (the format's description stood at yann.lecun.com/exdb/mnist).
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated ({error})") from error
    ndim = magic & 0xFF
    start = 4 * (1 + ndim)
    if len(content) < start:
        raise ValueError(f"{path}: truncated, expected a header of {start} bytes, got {len(content)} bytes")
    found, *shape = (int(word) for word in np.frombuffer(content, ">u4", count=1 + ndim))
    if found != magic:
        raise ValueError(f"{path}: expected the magic number 0x{magic:08x}, got 0x{found:08x}")
    asked = int(np.prod(shape, dtype=object))
    if len(content) - start != asked:
        got = len(content) - start
        raise ValueError(f"{path}: damaged, shape {tuple(shape)} asks for {asked} bytes of data, got {got}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
