"""From measured seconds to ratios and a Markdown table. A row is one shape and operation:

    {"shape": [32, 64], "channels_last": False, "operation": "train", "preallocated": True,
     "seconds": {"fastbn": [...], "copy": [...], "PyTorch native": [...], ...}, "failed": {name: why}}

with the seconds of a call in each round; None in those that an entrant did not take part in. Entrants are fastbn, its
peers, passes over memory, and the loops of limit.c, such as "limit sums: eight rows, v3".
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bench.cases import Case, layout_name

Row = dict[str, Any]

# Peers that are no library with a batch normalization, but what people write who use NumPy.
WRITTEN = ("NumPy", "numba", "numexpr")
PASSES = ("copy", "read (np.dot)", "read (np.max)", "copy, one thread")
LOOP = "limit "  # the names of limit.c's loops begin with it, and what they are for follows
LOOPS_OF = {"train": ("sums", "y"), "infer": ("y",), "backward": ("gradients", "dx")}
# What is printed, in this order: operation, preallocated.
COLUMNS = {
    ("train", True): "training forward, preallocated, against the best peer",
    ("infer", True): "inference, preallocated, against the best peer",
    ("backward", True): "backward, preallocated, against the best peer",
    ("train", False): "training forward, new outputs, against PyTorch F.batch_norm",
}


class Summary(NamedTuple):
    seconds: float
    copies: float  # in multiples of np.copyto on the same array
    passes: float | None  # in multiples of its reads and writes, each at the speed of the best plain loop
    limit_seconds: float | None  # of the fastest loops that its passes can be made of
    limit: float | None  # in multiples of those
    peer: str | None
    peer_seconds: float | None
    ratio: float | None  # above 1, fastbn is faster
    library: str | None
    library_ratio: float | None

    @property
    def at_limit(self) -> bool:
        return self.limit_seconds is not None and self.seconds <= allowed(self.limit_seconds)


Rounds = Sequence[float | None]


def row(case: Case) -> Row:
    """A row without measurements."""
    about = {"shape": case.shape, "channels_last": case.channels_last}
    return about | {"operation": case.operation, "preallocated": case.preallocated, "seconds": {}, "failed": {}}


def add_rounds(row: Row, times: Mapping[str, Sequence[float]], failed: Mapping[str, str], rounds: int) -> None:
    """What one launch measured, in so many rounds."""
    before = max(map(len, row["seconds"].values()), default=0)
    for name in dict.fromkeys((*row["seconds"], *times)):
        now = times.get(name, ())
        row["seconds"].setdefault(name, [None] * before).extend([*now, *[None] * (rounds - len(now))])
    row["failed"] |= failed


def median(seconds: Rounds) -> float:
    return statistics.median(s for s in seconds if s is not None)


def ratio(above: Rounds, below: Rounds) -> float:
    """Median over the rounds that both took part in."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True) if a is not None and b is not None)


def passes_seconds(row: Row) -> list[float] | None:
    """Of each round: a read is the fastest plain read. None where no read was measured.

    Training reads x twice and writes y: a read and a copy. Inference: a copy. Backward reads x and dy for the sums, and
    again for dx: three reads and a copy.
    """
    seconds = row["seconds"]
    if "read (np.dot)" not in seconds:
        return None
    read = min((seconds["read (np.dot)"], seconds["read (np.max)"]), key=median)
    reads = {"train": 1, "infer": 0, "backward": 3}[row["operation"]]
    return [reads * r + c for r, c in zip(read, seconds["copy"], strict=True)]


def fastest_loops(row: Row) -> list[str]:
    """For each pass the loop that is the fastest on this machine; none where not all were measured."""
    chosen = []
    for task in LOOPS_OF[row["operation"]]:
        measured = {n: median(s) for n, s in row["seconds"].items() if n.startswith(f"{LOOP}{task}:")}
        if not measured:
            return []
        chosen.append(min(measured, key=measured.__getitem__))
    return chosen


def allowed(limit: float) -> float:
    """Seconds that a call at its limit may take: the loops' and some more, and the call itself."""
    return 1.15 * limit + 1.5e-6


def summary(row: Row) -> Summary:
    seconds = row["seconds"]
    ours = seconds["fastbn"]
    others = {name: s for name, s in seconds.items() if name not in ("fastbn", *PASSES) and not name.startswith(LOOP)}
    ratios = {name: ratio(theirs, ours) for name, theirs in others.items()}
    libraries = {name: value for name, value in ratios.items() if name not in WRITTEN}
    peer, library = (min(some, key=some.__getitem__, default=None) for some in (ratios, libraries))
    passes = passes_seconds(row)
    loops = [seconds[name] for name in fastest_loops(row)]
    limit = [None if None in together else sum(together) for together in zip(*loops, strict=True)]
    return Summary(
        median(ours),
        ratio(ours, seconds.get("copy, one thread", seconds["copy"])) if "copy" in seconds else math.nan,
        ratio(ours, passes) if passes else None,
        sum(map(median, loops)) if loops else None,
        ratio(ours, limit) if limit else None,
        peer,
        median(seconds[peer]) if peer else None,
        ratios[peer] if peer else None,
        library,
        libraries[library] if library else None,
    )


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def to_digits(value: Any, digits: int = 5) -> Any:
    """The same with shorter floats, however deep."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: to_digits(v, digits) for key, v in value.items()}
    return [to_digits(v, digits) for v in value] if isinstance(value, (list, tuple)) else value


def name(row: Row) -> str:
    return layout_name(row["shape"], row["channels_last"])


def of_column(rows: Iterable[Row], column: tuple[str, bool]) -> list[Row]:
    return [row for row in rows if (row["operation"], row["preallocated"]) == column]


def marked(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f}, slower**"


def mean_and_worst(ratios: Mapping[str, float]) -> str:
    worst = min(ratios, key=ratios.__getitem__)
    return f"geometric mean {geometric_mean(ratios.values()):.2f}, worst {ratios[worst]:.2f} at {worst}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line for each shape, those that lose marked, the geometric means and the worst below.

    There is a column for the limit where one was measured.
    """
    summaries = {name(row): summary(row) for row in rows}
    judged = [s for s in summaries.values() if s.limit is not None]
    head = ["shape", "us", "of a copy", *["of its limit"] * bool(judged), "of its passes"]
    lines = [
        f"| {' | '.join(head)} | best peer | us | ratio | best library | ratio |",
        f"|---|{'--:|' * (len(head) - 1)}---|--:|--:|---|--:|",
    ]
    for shape, s in summaries.items():
        cells = [shape, f"{s.seconds * 1e6:.1f}", f"{s.copies:.2f}"]
        if judged:
            cells += ["" if s.limit is None else f"{s.limit:.2f}{'' if s.at_limit else ', over'}"]
        cells += [f"{s.passes:.2f}" if s.passes else ""]
        cells += ["none", "", ""] if s.ratio is None else [s.peer, f"{s.peer_seconds * 1e6:.1f}", marked(s.ratio)]
        cells += ["none", ""] if s.library_ratio is None else [s.library, marked(s.library_ratio)]
        lines.append(f"| {' | '.join(cells)} |")
    for what, ratios in against(rows).items():
        if ratios:
            lines += ["", f"Against {what}: {mean_and_worst(ratios)}."]
    if judged:
        lines += ["", f"At its limit on {sum(s.at_limit for s in judged)} of {len(judged)} shapes."]
    failed = [f"{peer} at {name(row)}: {why}" for row in rows for peer, why in row["failed"].items()]
    return "\n".join(lines + [f"\nLeft out, {line}" for line in failed])


def against(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By shape, the two ratios that count."""
    summaries = {name(row): summary(row) for row in rows}
    return {
        "the best peer": {shape: s.ratio for shape, s in summaries.items() if s.ratio is not None},
        "the best library": {shape: s.library_ratio for shape, s in summaries.items() if s.library_ratio is not None},
    }


def short_table(rows: Sequence[Row], peers: Sequence[str]) -> str:
    """Markdown: one line for each shape and operation, fastbn beside the peers named."""
    lines = [
        f"| shape | operation | us | of a copy | {' | '.join(f'{peer} | ratio' for peer in peers)} |",
        f"|---|---|--:|--:|{'--:|--:|' * len(peers)}",
    ]
    for row in rows:
        seconds, s = row["seconds"], summary(row)
        cells = [name(row), row["operation"], f"{s.seconds * 1e6:.1f}", f"{s.copies:.2f}"]
        for peer in peers:
            both = peer in seconds
            cells += (
                [f"{median(seconds[peer]) * 1e6:.1f}", marked(ratio(seconds[peer], seconds["fastbn"]))]
                if both
                else ["", ""]
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
