"""What the commands share: their data, their folder, their packages."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from fastbn import data

SOURCE = "an .npz (X, y), a .csv, a folder of MNIST-style idx files, or digits, the one in scikit-learn"


def add_data(parser: argparse.ArgumentParser) -> None:
    """--data and --target."""
    parser.add_argument("--data", default="digits", help=SOURCE + " (default: digits)")
    parser.add_argument("--target", help="the column of labels in a .csv")


def folder(text: str) -> Path:
    """What --out names. Of an empty text, as from a variable that is not set, Path makes the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got ''")
    return Path(text)


def load(args: argparse.Namespace) -> data.Dataset:
    """What --data and --target name."""
    digits = args.data == "digits" and not Path(args.data).exists()
    return data.load(None if digits else args.data, args.target)


def need(uses: dict[str, str]) -> None:
    """ImportError with the first package that is missing and its use: better now than after the training."""
    for package, use in uses.items():
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'{use} {package}: pip install "fastbn[train]"')


def check_out(out: Path, names: Sequence[Path]) -> None:
    """ValueError, before any work, where these files could not be written in the end."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if folder := next((name for name in names if name.is_dir()), None):
        raise ValueError(f"--out {out}: {folder} is a folder, expected a file or nothing there")
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {out}: {there} is not a folder that can be written to")
