"""Pictures, drawn with matplotlib's Agg canvas through its object interface: no window, no global state."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Protocol

__all__ = ["learning_curves"]

# Two hues that stay apart for colour-blind eyes and in grey, then two more (Okabe and Ito's palette).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


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


def learning_curves(histories: Mapping[str, Curves], path: str | os.PathLike[str]) -> None:
    """Draw loss and accuracy, epoch by epoch, as a PNG.

    Training is dashed, held-out data are solid; every history has its colour.

    Parameters
    ----------
    histories : dict of name -> training.History
        At least one; the names go into the legend, an empty one is left out of it.
    path : path
        Written, or overwritten, as PNG whatever its suffix.

    Raises
    ------
    ValueError
        There is nothing to draw.
    ImportError
        matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter
    except ImportError as error:
        raise ImportError('learning curves need matplotlib: pip install "fastbn[train]"') from error
    panels = [("loss", "Loss (log scale)")]
    if any(history.accuracy for history in histories.values()):
        panels.append(("accuracy", "Accuracy"))
    if not any(history.loss for history in histories.values()):
        raise ValueError("no epochs to draw")

    figure = Figure(figsize=(4.8 * len(panels), 4.2), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, (quantity, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
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
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(histories), frameon=False)
    canvas.print_png(os.fspath(path))
