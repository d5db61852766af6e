"""What the experiments share: a Result that prints, saves and draws itself; seeds in parallel; the data.

# Design: an experiment is a file with one public function,

    run(dataset=None, *, seeds=5, quick=False, progress=True) -> Result

It splits the data (`prepare`), trains one network for each setting and seed (`in_parallel`, a function of the module
that takes plain arguments and returns plain numbers), and puts what came out into rows and panels. It prints nothing,
writes nothing and draws nothing: Result does. `quick` is the same code on fewer seeds, settings and steps, for tests.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import signal
import statistics
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import fastbn
from fastbn import data, losses, nn, plots, training
from fastbn.files import write_whole

__all__ = [
    "Pair",
    "Result",
    "about",
    "accuracy",
    "check_pixels",
    "count_classes",
    "curve",
    "in_parallel",
    "prepare",
    "spread",
]

Pair = tuple[np.ndarray, np.ndarray]  # X, y
COLUMNS = 100  # characters of a line of a table
# One colour for one network in all pictures, those of `fastbn train` too (Okabe and Ito's palette, then Tol's).
COLOURS = {
    "batch normalization": "#0072B2", "with batch normalization": "#0072B2",
    "neither": "#D55E00", "without batch normalization": "#D55E00",
    "inputs normalised": "#009E73", "inputs normalised, He's start": "#000000",
    "with jitter": "#CC79A7", "dropout": "#999933", "both": "#882255", "ghost batches": "#56B4E9",
}  # fmt: skip


@dataclass
class Result:
    """Findings of an experiment: a table, a picture, and the settings.

    Attributes
    ----------
    name : str
        Name of the experiment and of its files, such as "speed".
    title : str
        Title in one line.
    settings : dict
        All that is needed to repeat it, "data" and "seeds" among them. JSON can hold it.
    columns : dict of heading -> format
        Columns of the table. The format, such as ".1%", is that of the numbers in the column.
    rows : list of lists
        Rows of the table. A cell is text, a number, None, or a list with one number (or None) for each seed, which is
        printed as median and range.
    panels : list of plots.Panel
        Panels of the picture.
    remarks : list of str
        Sentences printed below the table.
    missing : str
        Text that is printed for None.
    """

    name: str
    title: str
    settings: dict[str, Any]
    columns: dict[str, str]
    rows: list[list[Any]]
    panels: list[plots.Panel]
    remarks: list[str] = field(default_factory=list)
    missing: str = "-"

    def table(self) -> str:
        """Title, rows, remarks and settings as text, in lines of at most 100 characters.

        A table that is wider goes on below, after its first columns once more: those of one value, not one a seed.
        """
        formats = [*self.columns.values()]
        cells = [[*self.columns], *([*map(self._text, row, formats)] for row in self.rows)]
        columns = [[cell.ljust(max(map(len, column))) for cell in column] for column in zip(*cells, strict=True)]
        first = next((i for i in range(len(columns)) if any(isinstance(row[i], list) for row in self.rows)), 1)
        blocks = [columns[:first]]
        for column in columns[first:]:
            if sum(len(c[0]) + 2 for c in blocks[-1]) + len(column[0]) > COLUMNS:
                blocks.append(columns[:first])
            blocks[-1] = [*blocks[-1], column]
        lines = [textwrap.fill(self.title, COLUMNS), ""]
        for block in blocks:
            head, *rows = ["  ".join(row).rstrip() for row in zip(*block, strict=True)]
            lines += [head, "-" * max(map(len, (head, *rows))), *rows, ""]
        if self.settings.get("seeds", 1) > 1:
            lines.append("Median of the seeds (lowest to highest).")
        settings = ", ".join(f"{key} {_short(value)}" for key, value in self.settings.items())
        sentences = [*self.remarks, f"Settings: {settings}."]
        return "\n".join([*lines, *(textwrap.fill(text, COLUMNS, subsequent_indent="  ") for text in sentences)])

    def _text(self, cell: Any, form: str) -> str:
        if cell is None or isinstance(cell, str):
            return self.missing if cell is None else cell
        if not isinstance(cell, list):
            return format(cell, form)
        low, median, high = (self._text(value, form) for value in spread(cell))
        return median if low == high else f"{median} ({low} to {high})"

    def save(self, folder: Path) -> list[Path]:
        """Write NAME.json and NAME.png into the folder, made where there is none; returns the two paths."""
        content = {"experiment": self.name, "versions": _versions(), **asdict(self)}
        text = json.dumps(content, indent=1, allow_nan=False, default=lambda a: a.tolist())  # numpy's numbers
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.json", folder / f"{self.name}.png"]
        self.plot(paths[1])
        write_whole(paths[0], f"{text}\n".encode())
        return paths

    def plot(self, path: Path) -> None:
        """Draw the panels as a PNG."""
        plots.panels(self.panels, path)


def spread(values: Iterable[float | None]) -> tuple[float | None, float | None, float | None]:
    """Lowest, median and highest; None counts as worse (higher) than any number.

    Examples
    --------
    >>> spread([30, 10, 20]), spread([30, None, 10]), spread([None, None, 10])
    ((10, 20, 30), (10, 30, None), (10, None, None))
    """
    ordered = sorted(math.inf if value is None else value for value in values)
    low, median, high = (None if math.isinf(v) else v for v in (ordered[0], statistics.median(ordered), ordered[-1]))
    return low, median, high


def curve(name: str, x: Sequence[Any], cells: Iterable[Iterable[float | None]], **style: Any) -> plots.Curve:
    """The medians of a row of cells, one for each x, with the range over the seeds as a band."""
    low, median, high = zip(*map(spread, cells), strict=True)
    style = {"colour": COLOURS.get(name), **style}
    return plots.Curve(name, list(x), list(median), list(low), list(high), **style)


def in_parallel(task: Callable[..., Any], calls: Iterable[tuple[Any, ...]], *, progress: bool = True) -> list[Any]:
    """[task(*arguments) for arguments in calls], in one process a core and at least two, of one thread each.

    So every run's numbers are those of one thread of BLAS and OpenMP, however many cores there are. Ctrl-C ends the
    processes.

    Parameters
    ----------
    task : function of a module
    calls : tuples of arguments
        Arrays are shared with the processes, read-only.
    progress : bool
        Show a bar of calls done, where standard error is a terminal.
    """
    try:
        from joblib import Parallel, cpu_count, delayed, parallel_config
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('experiments need joblib and tqdm: pip install "fastbn[train]"') from error
    calls = list(calls)
    with parallel_config("loky", inner_max_num_threads=1):
        with _deaf_to_ctrl_c():  # the processes stay so, and this one ends them: one line instead of a traceback each
            # A single one joblib would run in this process, on all of its threads.
            parallel = Parallel(n_jobs=max(2, min(cpu_count(), len(calls))), return_as="generator")
            done = parallel(delayed(task)(*arguments) for arguments in calls)
        return list(tqdm(done, total=len(calls), unit=" runs", leave=False, disable=None if progress else True))


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where Python cannot set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def prepare(
    dataset: data.Dataset | None, seed: int = 0, *, train: int | None = None, held_out: int | None = None
) -> tuple[Pair, Pair]:
    """The two pairs (X, y), training and held-out, by `data.split`; at most so many examples of each, drawn by seed."""
    train_part, held_out_part = data.split(data.load() if dataset is None else dataset, seed=seed)
    return _drawn(train_part, train, seed), _drawn(held_out_part, held_out, seed)


def _drawn(part: data.Dataset, most: int | None, seed: int) -> Pair:
    if part.y is None:
        raise ValueError(f"{part.name}: no labels for the held-out examples")
    X = _float32(part)  # layers hand on the dtype of X
    if most is None or most >= len(part.y):
        return X, part.y
    rows = np.sort(np.random.default_rng(seed).permutation(len(part.y))[:most])
    return X[rows], part.y[rows]


def _float32(part: data.Dataset) -> np.ndarray:
    """X; ValueError for a column that float32 does not hold, such as seconds since 1970."""
    with np.errstate(over="ignore"):
        X = part.X.astype(np.float32, copy=False)
    if X is not part.X:
        rounded, varies = np.abs(X - part.X).max(axis=0), np.ptp(part.X, axis=0) > 0
        lost = ~np.isfinite(rounded) | (varies & (rounded > 0.01 * part.X.std(axis=0)))
        if lost.any():
            column = int(lost.argmax())
            called = repr(part.features[column]) if part.features else f"number {column + 1}"
            raise ValueError(
                f"{part.name}: column {called} loses its digits in float32: move it near 0, or leave it out"
            )
    return X


def about(dataset: data.Dataset | None, pairs: Sequence[tuple[Pair, Pair]]) -> dict[str, Any]:
    """The settings that every experiment has: its data, and the seeds, which are as many as pairs."""
    (X, _), (held_out, _) = pairs[0]
    name = "digits" if dataset is None else dataset.name
    return {"data": name, "training examples": len(X), "held-out examples": len(held_out), "seeds": len(pairs)}


def accuracy(model: nn.Sequential, pair: Pair) -> float:
    """Part of the examples that are right, with the running averages."""
    right = training.evaluate(model, pair, losses.softmax_cross_entropy)[1]
    assert right is not None
    return right


def count_classes(*pairs: Pair) -> int:
    """How many outputs a network for these labels needs."""
    return 1 + max(int(y.max()) for _, y in pairs)


def check_pixels(X: np.ndarray, name: str = "X") -> None:
    """ValueError unless X is from 0 to 1."""
    if X.min() < 0 or X.max() > 1:
        raise ValueError(f"{name}: this experiment expects pixels from 0 to 1, got {X.min():g} to {X.max():g}")


def _versions() -> dict[str, str]:
    return {"fastbn": fastbn.__version__, "numpy": np.__version__, "python": platform.python_version()}


def _short(value: Any) -> str:
    return ", ".join(map(_short, value)) if isinstance(value, list | tuple) else format(value)
