"""The pictures of the reports, drawn with matplotlib's Agg canvas: no window, no global state."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from bench import results

# Okabe and Ito's palette, which colour-blind eyes tell apart.
COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7")
MARKERS = "osD^"


def plain_log(axes: Axes, which: str) -> None:
    """A logarithmic axis, x or y, with numbers and not powers."""
    axes.set(**{f"{which}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def ratios(rows_of_threads: Mapping[str, Sequence[results.Row]], path: Path) -> None:
    """For each number of threads: ratio to the best peer, and multiple of a copy, shape by shape."""
    count = len({results.name(row) for rows in rows_of_threads.values() for row in rows})
    figure = Figure(figsize=(12, (1 + 0.3 * count) * len(rows_of_threads)), dpi=120, layout="constrained")
    panels = figure.subplots(len(rows_of_threads), 2, squeeze=False)
    for (threads, rows), (left, right) in zip(rows_of_threads.items(), panels, strict=True):
        names = list(dict.fromkeys(map(results.name, rows)))
        for i, (column, title) in enumerate(results.COLUMNS.items()):
            chosen = results.of_column(rows, column)
            places = [names.index(results.name(row)) + 0.15 * (i - 1.5) for row in chosen]
            summaries = [results.summary(row) for row in chosen]
            style = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": "", "markersize": 5}
            with_peer = [(s.ratio, p) for s, p in zip(summaries, places, strict=True) if s.ratio is not None]
            left.plot(*zip(*with_peer, strict=True) if with_peer else ([], []), label=title, **style)
            right.plot([s.copies for s in summaries], places, **style)
        count = "one thread" if threads == "1" else f"{threads} threads"
        left.set_xlabel(f"times faster than the best peer, {count}")
        right.set_xlabel(f"time in multiples of a copy, {count}")
        for axes in (left, right):
            axes.axvline(1, color="black", linewidth=1)
            plain_log(axes, "x")
            axes.set_yticks(range(len(names)), names if axes is left else [])
            axes.invert_yaxis()
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    FigureCanvasAgg(figure).print_png(path)


Series = Mapping[str, Mapping[str, Sequence[float]]]


def curves(sizes: Series, threads: Series, path: Path) -> None:
    """Nanoseconds per element ("ns") against the size of x ("bytes"), and "speed" against "threads"."""
    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for name, line in sizes.items():
        left.plot(line["bytes"], line["ns"], label=name, **line_style(name))
    ticks = max((line["bytes"] for line in sizes.values()), key=len)
    left.set_xscale("log", base=2)
    left.set_xticks(ticks, map(readable, ticks))
    left.set(xlabel="size of x, float32, rows of 256", ylabel="ns per element, one thread")
    plain_log(left, "y")
    for name, line in threads.items():
        right.plot(line["threads"], line["speed"], **line_style(name))
    ticks = max((line["threads"] for line in threads.values()), key=len)
    right.plot(ticks, ticks, color="black", linewidth=0.8)
    right.set(xlabel="threads", ylabel="times as fast as on one thread", xticks=ticks)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    FigureCanvasAgg(figure).print_png(path)


Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def scaling(
    panels: Mapping[str, Mapping[str, Lines]], measured: Mapping[str, Lines], examples: int, path: Path
) -> None:
    """Milliseconds of a step against ranks: a row for each kind of messages, a column for each network.

    A line's name is what its colour stands for, a comma, and what its dashes stand for. What was measured of a network
    stands in the first row, as points of these colours.
    """
    columns = max(map(len, panels.values()))
    figure = Figure(figsize=(4.2 * columns, 3.6 * len(panels) + 0.8), dpi=120, layout="constrained")
    rows = figure.subplots(len(panels), columns, squeeze=False)
    for i, (row, (messages, networks)) in enumerate(zip(rows, panels.items(), strict=True)):
        for axes, (network, named) in zip(row, networks.items(), strict=True):
            norms, ways = (list(dict.fromkeys(name.rpartition(", ")[i] for name in named)) for i in (0, 2))
            for name, (ranks, milliseconds) in named.items():
                norm, _, way = name.rpartition(", ")
                style = {"color": COLOURS[norms.index(norm)], "linestyle": ("-", "--")[ways.index(way)]}
                axes.plot(ranks, milliseconds, label=name, linewidth=1.5, **style)
            for norm, points in measured[network].items() if i == 0 else ():
                axes.plot(*points, color=COLOURS[norms.index(norm)], marker="o", markersize=5, linestyle="")
            plain_log(axes, "x")
            axes.set_xticks((1, 10, 100, 1000))
            plain_log(axes, "y")
            axes.set_title(f"{network}\n{messages}", fontsize=10)
            axes.set(xlabel=f"ranks, {examples} examples each", ylabel="ms per step")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    FigureCanvasAgg(figure).print_png(path)


def line_style(name: str) -> dict[str, object]:
    """A colour for each operation, fastbn solid, others dashed."""
    operation = name.split()[-1]
    colour = dict(zip(("train", "infer", "backward"), COLOURS, strict=False)).get(operation, "black")
    return {"color": colour, "linestyle": "-" if name.startswith("fastbn") else "--", "marker": ".", "linewidth": 1.5}


def readable(size: int) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1024:
            return f"{size} {unit}"
        size //= 1024
    return f"{size} GB"
