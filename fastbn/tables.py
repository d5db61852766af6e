"""Tables in text files: .csv and its kin, whatever parts their cells, with a header row or without."""

from __future__ import annotations

import contextlib
import csv
import gzip
import itertools
import re
import shlex
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .labels import LARGEST, boolean, is_missing, number, shown

__all__ = ["SUFFIXES", "Table", "is_table", "read_table"]

SUFFIXES = (".csv", ".tsv", ".txt", ".data")
_DELIMITERS = ",;\t|"
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "'|'", " ": "spaces"}
_SAMPLE_LINES = 20
_LONG = 40
_PLAIN = re.compile(r"[0-9+\-.eE ]*")  # of such characters float() reads what number() does
_UNNAMED = ("", "Unnamed: 0")  # what pandas and R write above their row names, and pandas when it has read that


@dataclass(frozen=True)
class Table:
    """The features, (N, features) float64, with their names; the target's cells, or None; the line of every row."""

    X: np.ndarray
    features: tuple[str, ...] | None  # None without a header
    labels: list[str] | None
    lines: Sequence[int]
    notes: tuple[str, ...]


def is_table(path: Path) -> bool:
    """Whether the name is one of a table."""
    return path.name.lower().removesuffix(".gz").endswith(SUFFIXES)


def read_table(
    path: Path, target: str | None, columns: Sequence[str] | None, ignore: Sequence[str], header: bool | None
) -> Table:
    """The file's features and labels; ValueError with line and column for what is wrong. See `data.load`."""
    try:
        with _open(path) as file:
            tab_first = path.name.lower().removesuffix(".gz").endswith(".tsv")
            delimiter, lines, skipped, nameless = _delimited(file, tab_first=tab_first)
            reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
            return _Reading(path, reader, delimiter, skipped, nameless).table(target, columns, ignore, header)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error}): save it as UTF-8") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated ({error})") from error
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: not a row of a table ({error})") from error


def _open(path: Path) -> Any:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    return opened(path, "rt", newline="", encoding="utf-8-sig")


def _delimited(file: TextIO, *, tab_first: bool) -> tuple[str, Iterator[str], int, bool]:
    """What parts the cells, all lines but Excel's `sep=;`, the number of lines left out for that, and whether the first
    line has one cell fewer than the others, as R's write.table has it: no name above its row names."""
    sample = list(itertools.islice(file, _SAMPLE_LINES))
    if any("\0" in line for line in sample):
        raise ValueError(f"{file.name}: not a text file in UTF-8 (it holds zero bytes): save it as UTF-8")
    lines = itertools.chain(sample, file)
    if sample and (said := re.fullmatch(r'"?sep=(.)"?\s*', sample[0])):
        return said[1], itertools.islice(lines, 1, None), 1, False
    texts = [line for line in sample if line.strip()]
    delimiter = _delimiter(texts, "\t,;|" if tab_first else _DELIMITERS)
    texts = [*map(_one_space, texts)] if delimiter == " " else texts
    first, *others = [_width(line, delimiter) for line in texts] or [0]
    trailing = all(line.rstrip("\r\n").endswith(delimiter) for line in texts[1:])
    # Under a header of one cell, 1,5 may be a decimal comma.
    nameless = {*others} == {first + 1} and first > 1 and not trailing
    return delimiter, map(_one_space, lines) if delimiter == " " else lines, 0, nameless


def _one_space(line: str) -> str:
    return " ".join(line.split())


def _delimiter(lines: Sequence[str], candidates: str) -> str:
    """The first that parts all these lines into the same number of cells; else the first that parts the first one."""
    widths = {d: [_width(line, d) for line in lines] for d in candidates}
    parting = [d for d in candidates if lines and widths[d][0] > 1]
    if not parting:
        # A header such as "sepal length" above single cells is one name.
        spaced = bool(lines) and all(_width(_one_space(line), " ") > 1 for line in lines[:2])
        return " " if spaced else ","
    return next((d for d in parting if len(set(widths[d])) == 1), parting[0])


def _width(line: str, delimiter: str) -> int:
    with contextlib.suppress(csv.Error, StopIteration):  # a quoted cell may go on in the next line
        return len(next(csv.reader([line], delimiter=delimiter, skipinitialspace=True)))
    return 0


class _Reading:
    """One pass over the rows of a table."""

    def __init__(self, path: Path, reader: Any, delimiter: str, skipped: int, nameless: bool) -> None:
        self.path, self.reader, self.delimiter, self.skipped = path, reader, delimiter, skipped
        self.nameless = nameless  # the header has no cell above the first column
        self.parted = f"parted by {_NAMES.get(delimiter, repr(delimiter))}"

    def line(self) -> int:
        return int(self.reader.line_num) + self.skipped

    def table(
        self, target: str | None, columns: Sequence[str] | None, ignore: Sequence[str], header: bool | None
    ) -> Table:
        first = next((cells for cells in self.reader if cells), None)
        if first is None:
            raise ValueError(f"{self.path}: empty, expected a header row")
        if first[0].startswith("# "):  # NumPy's savetxt writes its header as a comment
            first[0] = first[0][2:]
        elif first[0] == "#" and self.delimiter == " ":
            del first[0]
        self.names = [name.strip() for name in first]
        rows: Iterator[list[str]] = self.reader
        if header is None:
            self._check_header()
        if header is False:
            rows, self.names = itertools.chain([first], rows), [str(i) for i in range(1, len(first) + 1)]
        elif self.nameless:
            self.names.insert(0, "")
        at, chosen = self._chosen(target, columns, ignore)
        # What pandas and R write first of every row, with no name above it, is no feature where it names the row.
        index = chosen.pop(0) if columns is None and chosen[0] == 0 and self.names[0] in _UNNAMED else None
        return self._read(rows, at, chosen, index, named=header is not False)

    def _chosen(
        self, target: str | None, columns: Sequence[str] | None, ignore: Sequence[str]
    ) -> tuple[int | None, list[int]]:
        """The places of the target and of the features."""
        others = [i for i, name in enumerate(self.names) if name != target]
        if columns is not None and list(columns) == [self.names[i] for i in others]:
            columns = None  # all of them: two may have one name
        for asked in (*([] if target is None else [target]), *(columns or ()), *ignore):
            if self.names.count(asked) != 1:
                there = f"the columns {', '.join(map(_short, self.names))} ({self.parted})"
                raise ValueError(f"{self.path}: expected one column called {asked!r}, got {there}")
        if columns is not None and target in columns:
            raise ValueError(f"{self.path}: expected {target!r} as the target or as a feature, not as both")
        chosen = [i for i in others if self.names[i] not in ignore]
        if columns is not None:
            chosen = [self.names.index(name) for name in columns]
        if not chosen:
            beside = "" if target is None else f" beside {target!r}"
            raise ValueError(f"{self.path}: no feature column{beside}")
        return None if target is None else self.names.index(target), chosen

    def _check_header(self) -> None:
        """ValueError where the first row may be an example: to eat one, or to make one of names, would go unseen."""
        known = next((name for name in self.names if number(name) is not None or boolean(name) is not None), None)
        if known is not None:
            raise ValueError(
                f"{self.path}: the first row holds {_short(known)}, so it may be an example or the columns' names: "
                "header=False (--no-header) reads it as an example and calls the columns 1, 2, 3 and so on, "
                "header=True (--header) as names"
            )

    def _read(
        self, rows: Iterator[list[str]], at: int | None, chosen: list[int], index: int | None, *, named: bool
    ) -> Table:
        """The rows; a column called `index` is one of features only where it does not name the rows."""
        values, labels, row_names, lines = array("d"), [], [], array("q")
        width, whole = len(self.names), chosen == list(range(len(self.names)))
        self.without_target = at is None
        for cells in rows:
            if not cells:  # a blank line
                continue
            if len(cells) != width:
                got = f"{len(cells)} cells {self.parted}"
                raise ValueError(f"{self.path}: line {self.line()} has {got}, expected {width}")
            lines.append(self.line())
            if at is not None:
                labels.append(cells[at])
            if index is not None:
                row_names.append(cells[index].strip())
            features = cells if whole else [cells[i] for i in chosen]
            if _PLAIN.fullmatch("".join(features)):
                with contextlib.suppress(ValueError):
                    values.extend([float(cell) for cell in features])
                    continue
            values.extend(self._number(cells[i], i, lines[-1]) for i in chosen)
        if not lines:
            raise ValueError(f"{self.path}: no rows below the header")
        X = np.array(values, dtype=np.float64).reshape(len(lines), len(chosen))
        notes = []
        if index is not None and _are_row_names(row_names):
            notes.append("left out the first column, which has no name and another cell in every row")
        elif index is not None and self.nameless:
            got = "cells that are there twice, or numbers with a fraction"
            raise ValueError(f"{self.path}: the header has no name for the first column, expected row names, got {got}")
        elif index is not None:
            column = [self._number(cell, index, line) for cell, line in zip(row_names, lines, strict=True)]
            X, chosen = np.column_stack([column, X]), [index, *chosen]
            notes.append(
                f"the first column has no name, and is a feature: {_ignoring(self.names[index])} leaves it out"
            )
        if not chosen:
            raise ValueError(f"{self.path}: no feature column beside the row names")
        self._check_size(X, chosen, lines)
        if len(chosen) > 1:
            notes += [self._counting(i) for i, x in zip(chosen, X.T, strict=True) if _counts(x)]
        names = [self.names[i] for i in chosen]
        counted = Counter(names).items()
        notes += [f"{n} columns are called {_short(name)}, and all are features" for name, n in counted if n > 1]
        features_named = tuple(names) if named else None
        return Table(X, features_named, None if at is None else labels, lines, tuple(notes))

    def _check_size(self, X: np.ndarray, chosen: Sequence[int], lines: Sequence[int]) -> None:
        wrong = np.argwhere(~(np.abs(X) < LARGEST))
        if len(wrong):
            row, column = wrong[0]
            place, value = self._place(lines[row], chosen[column]), X[row, column]
            raise ValueError(f"{place}: expected less than {LARGEST:g}, got {value:g}")

    def _counting(self, column: int) -> str:
        name = self.names[column]
        return f"column {_short(name)} counts the rows: {_ignoring(name)} leaves it out"

    def _place(self, line: int, column: int) -> str:
        return f"{self.path}: line {line}, column {shown(self.names[column])}"

    def _number(self, text: str, column: int, line: int) -> float:
        cell = text.strip()
        if (found := number(cell)) is not None:
            return found
        if (truth := boolean(cell)) is not None:
            return float(truth)
        place = self._place(line, column)
        raise ValueError(f"{place}: expected a number, got {shown(cell)} ({self._way_on(cell, column)})")

    def _way_on(self, cell: str, column: int) -> str:
        leave_out = f"{_ignoring(self.names[column])} leaves the column out"
        if any(delimiter in cell for delimiter in _DELIMITERS):
            return f"cells are {self.parted}; decimals are written with a point, thousands without a mark"
        if is_missing(cell):
            return f"fill in what is missing, or {leave_out}"
        if cell.lower().lstrip("+-") in ("inf", "infinity"):
            return leave_out
        if self.without_target:
            return f"{_taking(self.names[column])} takes the column as labels, {leave_out}"
        return f"{leave_out}; text becomes numbers with scikit-learn's OneHotEncoder"


def _are_row_names(cells: list[str]) -> bool:
    """Whether all differ and none is a number with a fraction."""
    found = [number(cell) for cell in cells]
    return len(set(cells)) == len(cells) and all(x is None or x.is_integer() for x in found)


def _counts(x: np.ndarray) -> bool:
    """Whether each value is one more than the one before."""
    return len(x) > 2 and bool((np.diff(x[:3]) == 1).all() and (np.diff(x) == 1).all())


def _taking(name: str) -> str:
    """What makes a column the target: the argument of `data.load`, and the option as a shell takes it."""
    return "target (--target)" if len(name) >= _LONG else f"target={name!r} (--target {shlex.quote(name)})"


def _ignoring(name: str) -> str:
    """What leaves a column out: the argument of `data.load`, and the option as a shell takes it."""
    if len(name) >= _LONG:
        return "ignore (--ignore)"
    quoted = f'"{name}"' if "," in name else name
    return f"ignore=[{name!r}] (--ignore {shlex.quote(quoted)})"


def _short(name: str) -> str:
    return name if len(name) < _LONG else shown(name)
