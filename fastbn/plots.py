"""Pictures, drawn with matplotlib's Agg canvas through its object interface: no window, no global state."""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .files import write_whole

__all__ = ["Curve", "Panel", "confusion", "learning_curves", "panels"]

# Two hues that stay apart for colour-blind eyes and in grey, then three more (Okabe and Ito's palette).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
_LEGIBLE = 20  # labels beside a matrix, and characters of each


@contextlib.contextmanager
def _matplotlib_for(use: str) -> Iterator[None]:
    """Imports of matplotlib stand within: if it is missing, the error says what needs it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{use} need matplotlib: pip install "fastbn[train]"') from error


class Curves(Protocol):
    """What is drawn of a training.History; an empty list is left out."""

    @property
    def loss(self) -> Sequence[float]: ...
    @property
    def accuracy(self) -> Sequence[float]: ...
    @property
    def val_loss(self) -> Sequence[float]: ...
    @property
    def val_accuracy(self) -> Sequence[float]: ...


def learning_curves(
    histories: Mapping[str, Curves],
    path: str | os.PathLike[str] | None = None,
    labels: tuple[str, str] = ("Loss", "Accuracy"),
) -> Any:
    """Draw loss and accuracy, epoch by epoch.

    Training is dashed, held-out data are solid; every history has its colour.

    Parameters
    ----------
    histories : dict of name -> training.History
        At least one; the names go into the legend, an empty one is left out of it.
    path : path, optional
        Written, or overwritten, as PNG whatever its suffix.
    labels : pair of str
        What stands in the histories as loss and accuracy: a regression's are RMSE and R2.

    Returns
    -------
    matplotlib.figure.Figure or None
        The picture where there is no path: a notebook shows it.

    Raises
    ------
    ValueError
        There is nothing to draw.
    ImportError
        matplotlib is not installed.
    """
    with _matplotlib_for("learning curves"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter
    losses = [loss for history in histories.values() for loss in (*history.loss, *history.val_loss)]
    log = min(losses, default=0) > 0  # a likelihood's can be negative
    quantities = [("loss", f"{labels[0]} (log scale)" if log else labels[0])]
    if any(history.accuracy or history.val_accuracy for history in histories.values()):
        quantities.append(("accuracy", labels[1]))
    if not any(history.loss for history in histories.values()):
        raise ValueError("no epochs to draw")

    class Shown(Figure):
        """A figure that notebooks show: they ask the object, or pyplot, which is not used here."""

        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            canvas.print_png(picture)
            return picture.getvalue()

    figure = Shown(figsize=(4.8 * len(quantities), 4.2), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, (quantity, label) in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
        for i, (name, history) in enumerate(histories.items()):
            for part, style, prefix in (("held-out", "-", "val_"), ("training", "--", "")):
                values = getattr(history, prefix + quantity)
                if values:
                    axes.plot(
                        range(1, len(values) + 1), values, style, color=_COLOURS[i % len(_COLOURS)],
                        linewidth=2 if style == "-" else 1.2, marker="o" if len(values) == 1 else None,
                        label=f"{name}, {part}" if name else part,
                    )  # fmt: skip
        axes.set_xlabel("Epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if quantity == "loss":
            axes.set_yscale("log" if log else "linear")
        elif label == "Accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(histories), frameon=False)
    if path is None:
        return figure
    _write(canvas, path)
    return None


def confusion(counts: Sequence[Sequence[int]], labels: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Draw a confusion matrix: labels from top to bottom, predictions from left to right.

    Parameters
    ----------
    counts : K sequences of K int
        Number of examples of each label (row) for which each label (column) was predicted. With 20 classes or fewer,
        those above 0 are written into the cells. The colour of a cell shows its share of the row.
    labels : sequence of K str
        Names of rows and columns. If there are more than 20, only every second one is shown, or every third, and so
        on.
    path : path
        Written, or overwritten, as PNG whatever its suffix.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    with _matplotlib_for("pictures"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    matrix = np.asarray(counts)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.4 + 0.4 * max(min(len(labels), _LEGIBLE), 6)
    figure = Figure(figsize=(side + 0.8, side), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, format=PercentFormatter(1.0), label="Part of the label's examples", shrink=0.8)
    shown = range(0, len(labels), math.ceil(len(labels) / _LEGIBLE))
    names = [labels[k] if len(labels[k]) <= _LEGIBLE else labels[k][: _LEGIBLE - 1] + "\u2026" for k in shown]
    upright = max(map(len, names)) > 3
    # No label is read as a formula: one with two $ would be.
    axes.set_xticks(shown, names, rotation=90 if upright else 0, fontsize="small", parse_math=False)
    axes.set_yticks(shown, names, fontsize="small", parse_math=False)
    axes.set(xlabel="Prediction", ylabel="Label")
    if len(labels) <= _LEGIBLE:
        for row, column in np.argwhere(matrix):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", fontsize="small", color=colour)
    with warnings.catch_warnings():  # a letter that its font lacks is drawn as a box
        warnings.simplefilter("ignore")
        _write(canvas, path, pil_kwargs={"optimize": True})


@dataclass
class Curve:
    """A line through the points (x, y), with a range from low to high: bars where the points are marked, else a band.

    y may hold None: such a point is a cross at the panel's upper edge; so may high: its bar ends at ylim's upper end.
    x may be texts: evenly spaced, and the curves a little beside each other, so that all bars are seen. Curves of one
    name have one colour in all panels of a picture: `colour`, or where that is None, one by their order.
    """

    name: str
    x: Sequence[Any]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    style: str = "o-"  # matplotlib's: "-", "--", "o" for points alone
    colour: str | None = None


@dataclass
class Panel:
    """Curves in one pair of axes; `missing` says what a cross means. The limits are found where ylim is None."""

    title: str
    xlabel: str
    ylabel: str
    curves: Sequence[Curve]
    xscale: str = "linear"
    yscale: str = "linear"
    percent: bool = False
    ylim: tuple[float, float] | None = None
    missing: str = ""


def panels(drawn: Sequence[Panel], path: str | os.PathLike[str]) -> None:
    """Draw panels beside each other, with one legend below them, as a PNG; more than three are drawn in two rows.

    Parameters
    ----------
    drawn : sequence of Panel
        At least one.
    path : path
        Written, or overwritten, as PNG whatever its suffix.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    _write(_canvas(drawn), path, pil_kwargs={"optimize": True})


def _write(canvas: Any, path: str | os.PathLike[str], **options: Any) -> None:
    picture = io.BytesIO()
    canvas.print_png(picture, **options)
    write_whole(path, picture.getvalue())


def _canvas(drawn: Sequence[Panel]) -> Any:
    """The panels on a canvas."""
    with _matplotlib_for("pictures"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import PercentFormatter
    own = {curve.name: curve.colour for panel in drawn for curve in panel.curves}
    colours = {name: colour or _COLOURS[i % len(_COLOURS)] for i, (name, colour) in enumerate(own.items())}
    handles: dict[str, Any] = {}

    rows = 1 if len(drawn) <= 3 else 2
    columns = math.ceil(len(drawn) / rows)
    spaced = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)  # inches
    figure = Figure(figsize=(4.8 * columns, 4.2 if rows == 1 else 7.2), dpi=100, layout=spaced)
    canvas = FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, drawn, strict=True):
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        axes.set(xscale=panel.xscale, yscale=panel.yscale)
        if panel.ylim:
            axes.set_ylim(panel.ylim)
        top = panel.ylim[1] if panel.ylim else math.nan
        texts = list(dict.fromkeys(x for curve in panel.curves for x in curve.x if isinstance(x, str)))
        if texts:
            axes.set_xticks(range(len(texts)), texts, fontsize="small")
        for i, curve in enumerate(panel.curves):
            colour = colours[curve.name]
            beside = 0.05 * (i - (len(panel.curves) - 1) / 2)
            places = [texts.index(x) + beside for x in curve.x] if texts else list(curve.x)
            (line,) = axes.plot(places, _floats(curve.y), curve.style, color=colour, markersize=5)
            handles.setdefault(curve.name, line)
            if curve.low is not None and curve.high is not None:
                low, high = _floats(curve.low), _floats(curve.high, top)
                if "o" in curve.style:
                    axes.vlines(places, low, high, color=colour, linewidth=1)
                else:
                    axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
            gone = [x for x, y in zip(places, curve.y, strict=True) if y is None]
            if gone:  # one below the other, so that all are seen
                axes.plot(gone, [0.97 - 0.04 * i] * len(gone), "x", color=colour, transform=axes.get_xaxis_transform())
        if any(y is None for curve in panel.curves for y in curve.y):
            handles[panel.missing] = axes.plot([], [], "x", color="grey")[0]
        if panel.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    # Below the panels, where it covers nothing; an entry is up to 2.4 inches wide.
    across = min(len(handles), int(figure.get_figwidth() / 2.4))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=across, frameon=False, fontsize="small"
    )
    return canvas


def _floats(values: Sequence[float | None], missing: float = math.nan) -> list[float]:
    return [missing if value is None else value for value in values]
