"""What the commands share: their data, their folder, their packages, and what an option may be."""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastbn import data
from fastbn.labels import number, printable

SOURCE = (
    "a table (.csv, .tsv, .txt, .data, with .gz behind it or not), an .npz (X, y, or x_train, y_train and so on), a "
    "folder of MNIST-style idx files, or digits, the one in scikit-learn"
)


def add_data(parser: argparse.ArgumentParser) -> None:
    """--data, and what is read of it."""
    add: Any = parser.add_argument  # Any: what it returns is given `complete`, which shtab reads
    add("--data", default="digits", help=SOURCE + " (default: digits)").complete = "file"
    add_columns(parser, "the column of labels in a table")


def add_columns(parser: argparse.ArgumentParser, target: str) -> None:
    """--target, --columns, --ignore, --header."""
    parser.add_argument("--target", help=target)
    features = parser.add_mutually_exclusive_group()
    features.add_argument("--columns", type=names, help="the columns that are features, such as a,b,c (default: all)")
    features.add_argument("--ignore", type=names, default=(), help="columns to leave out, such as id,date")
    parser.add_argument("--header", action=argparse.BooleanOptionalAction,
        help="whether the first row of a table has the columns' names; without, they are called 1, 2, 3 and so on "
        "(default: it has, and a first row with numbers is refused)")  # fmt: skip


def names(text: str) -> list[str]:
    """Names of columns, parted by commas; one that holds a comma is quoted, as in a .csv."""
    return next(csv.reader([text], skipinitialspace=True), []) or [""]


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an option."""

    def read(text: str) -> int:
        # int() also reads underscores and the digits of all scripts
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return read


def real_number(expected: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """The type of an option; `expected` says in words what fits."""

    def read(text: str) -> float:
        value = number(text)
        if value is None or not math.isfinite(value) or not fits(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return read


def folder(text: str) -> Path:
    """What --out names. Of an empty text, as from a variable that is not set, Path makes the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got ''")
    return Path(text)


def load(args: argparse.Namespace, **options: Any) -> data.Dataset:
    """What --data and the options about columns name."""
    digits = args.data == "digits" and not Path(args.data).exists()
    options = {"columns": args.columns, "ignore": args.ignore, "header": args.header} | options
    return data.load(None if digits else args.data, args.target, **options)


def need(uses: dict[str, str], extra: str = "train") -> None:
    """ImportError with the first package that is missing and its use: better now than after the training."""
    for package, use in uses.items():
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'{use} {package}: pip install "fastbn[{extra}]"')


@functools.cache
def processes() -> Any:
    """mpi4py's communicator of all processes, of which the first one alone prints from here on, errors too."""
    need({"mpi4py": "--mpi needs"}, "mpi")
    try:
        from mpi4py import MPI
    except RuntimeError as error:  # mpi4py without a library of MPI
        raise ImportError(f"--mpi needs MPI: pip install mpich ({str(error).partition(chr(10))[0]})") from error
    if MPI.COMM_WORLD.Get_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return MPI.COMM_WORLD


def say(message: str) -> None:
    """Print on standard error: standard output has results alone, which another program may read."""
    print(printable(message), file=sys.stderr, flush=True)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


@contextlib.contextmanager
def making(out: Path, files: Sequence[Path]) -> Iterator[None]:
    """Make the folder for these files; afterwards the folders that were made go if they are empty.

    ValueError, before any work, where the files could not be written in the end.
    """
    made: list[Path] = []
    try:
        try:
            above = (out, *out.absolute().parents)
            there = next(path for path in above if path.exists())
            if occupied := next((file for file in files if file.is_dir()), None):
                raise ValueError(f"--out {out}: {occupied} is a folder, expected a file or nothing there")
            if not there.is_dir() or not os.access(there, os.W_OK):
                raise ValueError(f"--out {out}: {there} is not a folder that can be written to")
            for path in reversed(above[: above.index(there)]):
                path.mkdir(exist_ok=True)
                made.insert(0, path)
        except OSError as error:
            raise ValueError(f"--out {out}: cannot be made: {error.strerror}") from error
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


@contextlib.contextmanager
def naming(out: Path) -> Iterator[None]:
    """A full disk is an OSError without a name: it gets that of the folder that is written into."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(out)
        raise
