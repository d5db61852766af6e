"""From measured seconds to ratios and a Markdown table. A row is one shape and operation:

    {"shape": [32, 64], "channels_last": False, "operation": "train", "preallocated": True,
     "seconds": {"fastbn": [...], "copy": [...], "PyTorch native": [...], ...}, "failed": {name: why}}

with the seconds of a call in each round; None in those that an entrant did not take part in.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bench.cases import Case, layout_name

Row = dict[str, Any]

PASSES = ("copy", "read (np.dot)", "read (np.max)", "copy, one thread")
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
    peer: str | None
    peer_seconds: float | None
    ratio: float | None  # above 1, fastbn is faster
    allowed: float | None  # the ratio that its reads and writes at that speed would give


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


def summary(row: Row) -> Summary:
    seconds = row["seconds"]
    ours = seconds["fastbn"]
    ratios = {name: ratio(theirs, ours) for name, theirs in seconds.items() if name not in ("fastbn", *PASSES)}
    peer = min(ratios, key=ratios.__getitem__, default=None)
    passes = passes_seconds(row)
    return Summary(
        median(ours),
        ratio(ours, seconds.get("copy, one thread", seconds["copy"])),
        ratio(ours, passes) if passes else None,
        peer,
        median(seconds[peer]) if peer else None,
        ratios[peer] if peer else None,
        ratio(seconds[peer], passes) if peer and passes else None,
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


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line for each shape, those that lose marked, the geometric mean and the worst below."""
    lines = [
        "| shape | us | of a copy | of its passes | best peer | us | ratio | passes allow |",
        "|---|--:|--:|--:|---|--:|--:|--:|",
    ]
    ratios = {}
    for row in rows:
        s = summary(row)
        cells = [name(row), f"{s.seconds * 1e6:.1f}", f"{s.copies:.2f}", f"{s.passes:.2f}" if s.passes else ""]
        if s.ratio is None:
            cells += ["none", "", "", ""]
        else:
            ratios[name(row)] = s.ratio
            cells += [s.peer, f"{s.peer_seconds * 1e6:.1f}"]
            cells += [f"{s.ratio:.2f}" if s.ratio >= 1 else f"**{s.ratio:.2f}, slower**"]
            cells += [f"{s.allowed:.2f}" if s.allowed else ""]
        lines.append(f"| {' | '.join(cells)} |")
    if ratios:
        worst = min(ratios, key=ratios.__getitem__)
        lines += ["", f"Geometric mean {geometric_mean(ratios.values()):.2f}, worst {ratios[worst]:.2f} at {worst}."]
    failed = [f"{peer} at {name(row)}: {why}" for row in rows for peer, why in row["failed"].items()]
    return "\n".join(lines + [f"\nLeft out, {line}" for line in failed])
