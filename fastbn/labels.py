"""What a cell and a label mean, the same in every reader: numbers as people write them, what is missing, one label."""

from __future__ import annotations

import math
import re
import reprlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST", "MISSING", "boolean", "encode", "is_missing", "key", "number", "numbers", "printable", "shown"]

LARGEST = 1e150  # the square of more leaves float64

# pandas' names of a missing value, then those of Weka and UCI, of SQL dumps, and the errors of spreadsheets. "nan" is
# one in any spelling. "None" is in pandas' list, "none" is not: it is a class in many tables, as "-", "Na" and "." are.
MISSING = frozenset({
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "1.#IND", "-1.#QNAN", "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "None",
    "n/a", "null", "Null", "NaT", "?", "\\N", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!", "#REF!", "#VALUE!",
})  # fmt: skip
_NAN = re.compile(r"[+-]?nan", re.IGNORECASE)
_INFINITY = re.compile(r"[+-]?inf(inity)?", re.IGNORECASE)
# float() also reads underscores, and the digits of all scripts: nobody means a number by these.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# A code such as 007 is not a number.
_LABEL = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"([+-]?[0-9]{1,4000})(\.0*)?")  # int() reads 4,300 digits at most
_TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_BOOLEANS = {"true": True, "false": False}


def shown(value: object) -> str:
    """Its repr, cut where it is long: for the sentence of an error."""
    return reprlib.repr(value)


def printable(text: object) -> str:
    """Its text in one line that does nothing to a terminal: controls, of lines and directions too, as escapes."""
    return "".join(c.encode("unicode_escape").decode() if _acts(c) else c for c in str(text))


def _acts(c: str) -> bool:
    """Control characters, halves of a pair, ends of lines and paragraphs, and what turns the direction of text."""
    return unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _TURNS


def is_missing(text: str) -> bool:
    return text in MISSING or _NAN.fullmatch(text) is not None


def boolean(text: str) -> bool | None:
    """True or False as Python, R, JSON and spreadsheets write them; None for any other text."""
    return _BOOLEANS.get(text.lower())


def number(text: str) -> float | None:
    """A number as a person writes it, in the digits 0 to 9; None for any other text."""
    return float(text) if _NUMBER.fullmatch(text) else None


def key(label: Any) -> Any:
    """What a label means, whatever reader it comes from: labels are the same if and only if their keys are equal.

    Whole numbers are ints of any size, so `5`, `+5` and `5.0` are one label; other numbers are floats; `True` is
    `true`, and 1. All else is text.
    """
    if isinstance(label, str):
        text = label.strip()
        if (truth := boolean(text)) is not None:
            return truth
        if not _LABEL.fullmatch(text):
            return float(text) if _INFINITY.fullmatch(text) else text
        if whole := _WHOLE.fullmatch(text):
            return int(whole[1])
        label = float(text)
    if isinstance(label, float) and label.is_integer() and abs(label) <= 2**53:
        return int(label)
    return label


def encode(labels: Sequence[str] | np.ndarray, where: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray]:
    """The classes, sorted, and the number of each example's class.

    Parameters
    ----------
    labels : (N,) sequence of text, or array of booleans, integers, floats, text or UTF-8 bytes
    where : callable
        where(row) is the place of a label, for the sentence of an error.

    Returns
    -------
    classes : (K,) array
        Numbers where all labels are: int64, uint64 or float64; else text as the first label of the class is spelt.
        Whole numbers that uint64 cannot hold are text, sorted as numbers.
    y : (N,) int64 array

    Raises
    ------
    ValueError
        A label is missing, is not finite where the others are numbers, or is not UTF-8.
    """
    values, rows, inverse = _distinct(labels, where)
    keys = list(map(key, values))
    spelt: dict[Any, Any] = {}
    for k, value in zip(keys, values, strict=True):
        spelt.setdefault(k, value)
    numeric = all(isinstance(k, int | float) and not isinstance(k, bool) for k in spelt)
    # A text among the others may well begin as "inf" does.
    infinite = [row for k, row in zip(keys, rows, strict=True) if isinstance(k, float) and math.isinf(k)]
    if infinite and all(isinstance(k, int | float) for k in spelt):
        raise ValueError(f"{where(min(infinite))}: expected a label that is finite, got an infinity")
    order = sorted(spelt) if numeric else sorted(spelt, key=lambda k: spelt[k])
    classes = _array(order) if numeric else np.array([spelt[k] for k in order])
    at = {k: i for i, k in enumerate(order)}
    return classes, np.array([at[k] for k in keys], dtype=np.int64)[inverse]


def numbers(labels: Sequence[str] | np.ndarray, where: Callable[[int], str]) -> NDArray[np.float64]:
    """The targets of a regression, (N,) float64; ValueError where one is missing or no number below 1e150."""
    values, rows, inverse = _distinct(labels, where)
    found = []
    for value, row in zip(values, rows, strict=True):
        x = value if not isinstance(value, str) else number(value) if boolean(value) is None else boolean(value)
        if x is None or not abs(x) < LARGEST:
            raise ValueError(
                f"{where(row)}: expected a number below {LARGEST:g} as the target of a regression, got {shown(value)}"
            )
        found.append(float(x))
    targets: NDArray[np.float64] = np.array(found)[inverse]
    return targets


def _distinct(
    labels: Sequence[str] | np.ndarray, where: Callable[[int], str]
) -> tuple[list[Any], Iterable[int], np.ndarray]:
    """The different labels as bool, int, float or text, the first row of each, and which of them every row has."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "biuf":
        values, rows, inverse = np.unique(labels, return_index=True, return_inverse=True)
        if values.dtype.kind == "f" and np.isnan(values).any():
            raise ValueError(f"{where(int(np.isnan(labels).argmax()))}: the label is missing, expected one, got nan")
        if values.dtype.itemsize < 8 and values.dtype.kind == "f":
            # As it is written: 0.1 of float32 is the label 0.1, not 0.10000000149.
            return [float(str(value)) for value in values], rows.tolist(), inverse
        return (values.astype(np.float64) if values.dtype.kind == "f" else values).tolist(), rows.tolist(), inverse
    first: dict[str, int] = {}
    numbered: list[int] = []
    positions: dict[str, int] = {}
    for row, label in enumerate(labels.tolist() if isinstance(labels, np.ndarray) else labels):
        try:
            text = (label.decode("utf-8") if isinstance(label, bytes) else label).strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where(row)}: expected a label in UTF-8, got {shown(label)}") from error
        if text not in first:
            if is_missing(text):
                called = f", or another name where {shown(text)} is a class" * bool(text)
                raise ValueError(f"{where(row)}: the label is missing, expected one{called}")
            first[text], positions[text] = row, len(positions)
        numbered.append(positions[text])
    return list(first), first.values(), np.array(numbered, dtype=np.intp)


def _array(keys: list[int | float]) -> np.ndarray:
    """Sorted numbers in an array that keeps their digits: numpy's own choice for -1 and 2**63 is float64."""
    if any(isinstance(k, float) for k in keys):
        if all(isinstance(k, float) or abs(k) <= 2**53 for k in keys):
            return np.array(keys, dtype=np.float64)
    elif keys:
        for dtype in (np.int64, np.uint64):
            if np.iinfo(dtype).min <= keys[0] and keys[-1] <= np.iinfo(dtype).max:
                return np.array(keys, dtype=dtype)
    return np.array(list(map(str, keys)))
