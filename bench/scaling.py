"""What a training step takes on several ranks, measured on few and modelled for many: python -m bench.scaling

It starts mpiexec itself, with 4 ranks of one thread each (bench.ranks), which needs mpi4py and an MPI. Writes
scaling.md, scaling.png and scaling.json into the processor family's folder of bench/results. Four minutes, on a machine
that does nothing else.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import machine, pictures, results
from bench.ranks import APART, GHOST, GHOSTS, NETWORKS, NONE, PART, SYNC, WHOLE
from bench.workers import environment
from fastbn.parallel import ROOM
from fastbn.ranks import HEADER, SLICED_FROM

MOST = 1000  # ranks
LARGE = 8192  # examples of all ranks, where more ranks have fewer each
RANKS = [*dict.fromkeys(np.geomspace(1, MOST, 61).round().astype(int).tolist())]
# More ranks than processors, bound to none of them, by root.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "PRTE_MCA_hwloc_default_binding_policy": "none",
}  # fmt: skip


# --- the model


class Wire(NamedTuple):
    """What messages take."""

    latency: float  # seconds of a short one between two ranks
    per_byte: float  # seconds for each byte that a rank receives

    def allgather(self, ranks: int, nbytes: float) -> float:
        """Seconds until every rank has so many bytes from each; the ranks meet in log2(ranks) rounds."""
        return self.latency * math.log2(ranks) + self.per_byte * nbytes * (ranks - 1)

    def alltoall(self, ranks: int, nbytes: float) -> float:
        """Seconds until every rank has sent so many bytes to each, one rank after the other."""
        return (self.latency + self.per_byte * nbytes) * (ranks - 1)

    def seconds(self, ranks: int, sent: Sequence["Sent"], in_slices: bool) -> float:
        total = 0.0
        for numbers, merged in sent:
            if merged and is_sliced(ranks, numbers, in_slices):
                part = 8 * math.ceil(numbers / ranks)
                total += self.alltoall(ranks, part) + self.allgather(ranks, part)
            else:
                total += self.allgather(ranks, 8 * numbers)
        return total


class Work(NamedTuple):
    """Seconds that NumPy and Python take around an exchange, on each rank."""

    fixed: float
    per_number: float  # that this rank brings
    per_rank: float
    per_rank_and_number: float

    def seconds(self, ranks: float, numbers: float, exchanges: int = 1, sliced: bool = False) -> float:
        """Of so many exchanges, which bring so many numbers together. In slices, a rank merges as many as it brings."""
        each = self.fixed + ranks * self.per_rank
        merged = 1 if sliced else ranks
        return exchanges * each + numbers * (self.per_number + merged * self.per_rank_and_number)


class Sent(NamedTuple):
    """What each rank brings to an exchange."""

    numbers: int  # of float64
    merged: bool  # on each rank alike, or by each rank a slice


def is_sliced(ranks: int, numbers: int, in_slices: bool) -> bool:
    return in_slices and ranks * numbers >= SLICED_FROM


class Compute(NamedTuple):
    """What a step takes without exchanges, while another rank computes beside it."""

    fixed: float
    per_example: float
    spread: float  # standard deviation of a step, as a part of it

    def seconds(self, examples: float) -> float:
        return self.fixed + self.per_example * examples


CLUSTER = Wire(2e-6, 1e-10)  # assumed: 2 us and 10 GB/s


@dataclass(frozen=True)
class Costs:
    compute: Mapping[tuple[str, str], Compute]  # by network and normalization
    work: Mapping[str, Work]  # by what is exchanged: "header", SYNC, GHOSTS, "gradients"


def parameters(widths: Sequence[int], norm: str) -> int:
    """Those whose gradients are exchanged: SyncBatchNorm's are already sums over all ranks."""
    weights = sum(a * b for a, b in pairwise(widths))
    return weights + widths[-1] + {SYNC: 0, GHOSTS: 2, APART: 2, NONE: 1}[norm] * sum(widths[1:-1])


def ghosts(examples: int) -> int:
    """Ghost batches of so many examples, of which a last one alone joins those before it."""
    return max(1, math.ceil(examples / GHOST) - (examples % GHOST == 1))


def exchanged(widths: Sequence[int], norm: str, ranks: int, examples: int, in_slices: bool) -> dict[str, list[Sent]]:
    """What each rank brings to the exchanges of a step."""
    header = Sent(HEADER, False)
    layers: dict[str, Any] = {
        SYNC: lambda c: [header, Sent(3 * c, True), header, Sent(2 * c, True)],
        GHOSTS: lambda c: [header, header, Sent(3 * c * ghosts(examples), False)],
    }
    of_layers = [sent for c in widths[1:-1] for sent in layers.get(norm, lambda c: [])(c)]
    count, most = math.ceil(parameters(widths, norm) / 2), ROOM if in_slices else ROOM // ranks  # two of float32 in one
    parts = [min(most, count - start) for start in range(0, count, most)]
    gradients = [sent for part in parts for sent in (header, Sent(part, True))]
    return {"statistics": of_layers, "gradients": gradients, "loss and end": [header, header]}


def step(
    network: str,
    norm: str,
    ranks: int,
    examples: int,
    costs: Costs,
    wire: Wire,
    *,
    in_slices: bool = True,
    shared: float = 1.0,
) -> dict[str, float]:
    """Seconds of the parts of a step with so many examples on each of the ranks.

    in_slices: each rank merges a slice of many numbers for all others, as fastbn does. Else all merge all of them.
    shared: how many ranks share a processor.
    """
    widths = NETWORKS[network]
    compute = costs.compute[network, norm]
    alone = compute.seconds(examples) * shared
    if ranks == 1:
        return {"compute": alone}
    sent = exchanged(widths, norm, ranks, examples, in_slices)
    messages = {what: wire.seconds(ranks, of_what, in_slices) for what, of_what in sent.items()}
    of_layers = []
    for c in widths[1:-1] if norm in (SYNC, GHOSTS) else ():
        # The statistics of each ghost batch are taken in as those of a rank are.
        merged = ranks * ghosts(examples) if norm == GHOSTS else ranks
        of_layers.append(
            costs.work[norm].seconds(merged, c, sliced=norm == SYNC and is_sliced(ranks, 3 * c, in_slices))
        )
    count = parameters(widths, norm)
    work = {
        "statistics": sum(of_layers),
        "gradients": costs.work["gradients"].seconds(
            ranks, count, len(sent["gradients"]) // 2, is_sliced(ranks, min(count // 2, ROOM), in_slices)
        ),
        "loss and end": 2 * costs.work["header"].seconds(ranks, 0),
    }
    # The largest of so many Gaussian numbers is about so far above their mean.
    lag = alone * compute.spread * math.sqrt(2 * math.log(ranks))
    return {"compute": alone, "slowest rank": lag, **{what: messages[what] + shared * work[what] for what in work}}


def total(*arguments: Any, **options: Any) -> float:
    return sum(step(*arguments, **options).values())


# --- its constants, from what bench.ranks measured


def fitted(seconds: Iterable[float], terms: Iterable[Sequence[float]]) -> list[float]:
    """What each term costs, at least 0: by least squares of relative errors."""
    from scipy.optimize import nnls

    t, matrix = np.array([*seconds]), np.array([*terms], float)
    scale = np.maximum(matrix.max(axis=0), 1e-300)
    return (nnls(matrix / scale / t[:, None], np.ones(len(t)))[0] / scale).tolist()


def wire_of(measured: Mapping[str, Any], ranks: int) -> Wire:
    rows = [row for row in measured["wire"] if row["ranks"] == ranks]
    terms = [(math.log2(ranks), row["bytes"] * (ranks - 1)) for row in rows]
    return Wire(*fitted((statistics.median(row["seconds"]) for row in rows), terms))


def costs_of(measured: Mapping[str, Any]) -> Costs:
    compute, work = {}, {}
    steps = [row for row in measured["steps"] if row["ranks"] == measured["beside"] and not row["together"]]
    for network, norm in dict.fromkeys((row["network"], row["norm"]) for row in steps):
        rows = [row for row in steps if (row["network"], row["norm"]) == (network, norm)]
        line = fitted((statistics.median(row["seconds"]) for row in rows), [(1, row["examples"]) for row in rows])
        spread = [statistics.median(row["spread"]) for row in rows if row["examples"] == PART]
        compute[network, norm] = Compute(*line, *spread)
    for what in ("header", SYNC, GHOSTS, "gradients"):
        rows = [row for row in measured["work"] if row["what"] == what]
        alone = {row["numbers"]: statistics.median(row["seconds"]) for row in rows if not row["ranks"]}
        rows = [row for row in rows if row["ranks"]]
        seconds = [statistics.median(row["seconds"]) - alone.get(row["numbers"], 0) for row in rows]
        k = [row["ranks"] * (ghosts(PART) if what == GHOSTS else 1) for row in rows]
        n = [0 if what == "header" else row["numbers"] for row in rows]
        work[what] = Work(*fitted(seconds, [(1, b, a, a * b) for a, b in zip(k, n, strict=True)]))
    return Costs(compute, work)


# --- the report

INTRODUCTION = """# Scaling

Steps of `training.fit` (forward, backward, exchange, optimizer), float32, SGD, one thread for each rank. *Ghost
batches* have {ghost} examples. *Nothing exchanged*: ghost batches of layers without running averages, which leave
nothing to exchange but gradients. Times are those of the slowest rank, medians over steps and rounds. All cases were
measured in turn, round after round, and ratios were taken within a round.

The networks: {networks}.

`python -m bench.scaling` wrote this."""
WIRES = "messages of this machine", "messages of a cluster (assumed)"
WAYS = {"merged in slices": True, "merged by all": False}  # of gradients and statistics


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def described(widths: Sequence[int]) -> str:
    """As "64, 16 of 32, 10"."""
    runs = ((len([*run]), width) for width, run in groupby(widths))
    return ", ".join(f"{width}" if count == 1 else f"{count} of {width}" for count, width in runs)


def lines(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 2) -> str:
    """A Markdown table, whose first columns are words and the others numbers."""
    rule = "|---" * words + "|--:" * (len(head) - words) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


class Report:
    """The measurements, and the model that they give."""

    def __init__(self, measured: Mapping[str, Any]) -> None:
        self.measured, self.costs = measured, costs_of(measured)
        self.wires = dict(zip(WIRES, (wire_of(measured, 2), CLUSTER), strict=True))
        self.pairs = [*self.costs.compute]  # of network and normalization
        self.networks = [*dict.fromkeys(network for network, _ in self.pairs)]
        self._steps = {
            (row["network"], row["norm"], row["ranks"], row["examples"], row["together"]): row["seconds"]
            for row in measured["steps"]
        }

    def seconds(self, network: str, norm: str, ranks: int, examples: int) -> list[float]:
        """What a step took in each round."""
        return self._steps[network, norm, ranks, examples, ranks > 1]

    def modelled(self, network: str, norm: str, ranks: int, examples: int) -> float:
        """What it should have taken here, where ranks may share processors."""
        shared = max(1.0, ranks / self.measured["machine"]["processors"])
        return total(network, norm, ranks, examples, self.costs, wire_of(self.measured, ranks), shared=shared)

    def steps(self) -> str:
        sizes = self.measured["sizes"]
        head = ["network", "normalization", f"1 rank, {PART}", *(f"{k} ranks, {PART} each" for k in sizes)]
        head += [f"1 rank, {WHOLE}", *(f"{k} ranks, {WHOLE // k} each" for k in sizes)]
        rows = []
        for pair in self.pairs:
            row = [*pair]
            for first, parts in ((PART, [PART] * len(sizes)), (WHOLE, [WHOLE // k for k in sizes])):
                alone = self.seconds(*pair, 1, first)
                row.append(ms(statistics.median(alone)))
                for k, n in zip(sizes, parts, strict=True):
                    taken = self.seconds(*pair, k, n)
                    row.append(f"{ms(statistics.median(taken))} ({results.ratio(taken, alone):.2f})")
            rows.append(row)
        return lines(head, rows)

    def constants(self) -> str:
        wires = {f"{k} ranks here": wire_of(self.measured, k) for k in self.measured["sizes"]}
        wires["assumed of a cluster"] = CLUSTER
        rows = [[name, f"{w.latency * 1e6:.3g}", f"{w.per_byte * 1e9:.3g}"] for name, w in wires.items()]
        tables = [lines(["messages", "latency, us", "ns a byte received"], rows, 1)]
        names = {"header": "a header", SYNC: f"{SYNC}: a layer", GHOSTS: f"{GHOSTS}: a layer", "gradients": "gradients"}
        rows = [
            [names[what], f"{w.fixed * 1e6:.3g}", f"{w.per_rank * 1e6:.3g}", f"{w.per_number * 1e9:.3g}",
             f"{w.per_rank_and_number * 1e9:.3g}"]
            for what, w in self.costs.work.items()
        ]  # fmt: skip
        tables.append(
            lines(["Python and NumPy", "us", "us a rank", "ns a number or feature", "ns of each rank's"], rows, 1)
        )
        rows = [
            [*pair, ms(c.fixed), f"{c.per_example * 1e6:.3g}", f"{c.spread:.1%}"]
            for pair, c in self.costs.compute.items()
        ]
        tables.append(lines(["network", "normalization", "compute, ms", "us an example", "spread"], rows))
        return "\n\n".join(tables)

    def check(self) -> str:
        """The model beside what was measured, and its errors."""
        places = [*dict.fromkeys((k, n) for k in self.measured["sizes"] for n in (PART, WHOLE // k))]
        errors: dict[int, list[float]] = {}
        rows = []
        for pair in self.pairs:
            row = [*pair]
            for place in places:
                was, model = statistics.median(self.seconds(*pair, *place)), self.modelled(*pair, *place)
                errors.setdefault(place[0], []).append(model / was - 1)
                row.append(f"{ms(was)}, {ms(model)} ({model / was - 1:+.0%})")
            rows.append(row)
        parts = [lines(["network", "normalization", *(f"{k} ranks, {n} each" for k, n in places)], rows)]
        for k, values in errors.items():
            middle, worst = statistics.median(map(abs, values)), max(values, key=abs)
            parts.append(f"With {k} ranks the model is off by {middle:.0%} in the median, and by {worst:+.0%} at most.")
        return "\n\n".join(parts)

    def parts(self) -> str:
        """What a step consists of, on many ranks."""
        rows = []
        for network in self.networks:
            for k in (16, 128, MOST):
                by = {norm: step(network, norm, k, PART, self.costs, CLUSTER) for norm in (SYNC, GHOSTS, APART)}
                by_all = step(network, APART, k, PART, self.costs, CLUSTER, in_slices=False)
                parts = [by[APART]["compute"] + by[APART]["slowest rank"], by[SYNC]["statistics"]]
                parts += [by[GHOSTS]["statistics"], by[APART]["gradients"], by_all["gradients"]]
                rows.append([network, f"{k:,}", *map(ms, [*parts, by[APART]["loss and end"]])])
        head = ["network", "ranks", "compute, slowest rank", SYNC, GHOSTS, "gradients", "gradients merged by all"]
        return lines([*head, "loss and end"], rows, 1)

    def crossings(self) -> str:
        """Where SyncBatchNorm, and the averages of ghost batches, come to weigh."""
        rows = []
        for network in self.networks:
            for name, wire in self.wires.items():
                for way, in_slices in WAYS.items():
                    given = {"costs": self.costs, "wire": wire, "in_slices": in_slices}
                    row = [network, name, way]
                    for norm, factor in ((SYNC, 1.1), (SYNC, 2), (GHOSTS, 1.1), (GHOSTS, 2)):
                        row.append(first_ranks(network, norm, factor, **given))
                    row += [least_examples(network, 64, 1.1, **given)]
                    rows.append(row)
        head = ["network", "messages", "numbers", f"{SYNC} + 10 %", "twice", f"{GHOSTS} + 10 %", "twice"]
        return lines([*head, f"examples a rank for {SYNC} below + 10 % on 64 ranks"], rows, 3)

    def strong(self) -> str:
        """The number of ranks that is the fastest for a large batch, and how many times as fast as one rank."""
        rows = []
        for network in self.networks:
            for name, wire in self.wires.items():
                for way, in_slices in WAYS.items():
                    row = [network, name, way]
                    for norm in (SYNC, GHOSTS, APART):
                        taken = {
                            k: total(network, norm, k, math.ceil(LARGE / k), self.costs, wire, in_slices=in_slices)
                            for k in RANKS
                        }
                        best = min(taken, key=taken.__getitem__)
                        row.append(f"{best:,} ({taken[1] / taken[best]:.1f})")
                    rows.append(row)
        return lines(["network", "messages", "numbers", SYNC, GHOSTS, APART], rows, 3)

    def drawn(self) -> dict[str, dict[str, dict[str, tuple[list[int], list[float]]]]]:
        """By messages and network: what each line is of, ranks and milliseconds."""
        return {
            name: {
                network: {
                    f"{norm}, {way}": (RANKS, [
                        1e3 * total(network, norm, k, PART, self.costs, wire, in_slices=in_slices) for k in RANKS
                    ])
                    for way, in_slices in WAYS.items() for norm in (SYNC, GHOSTS, APART)
                }
                for network in self.networks
            }
            for name, wire in self.wires.items()
        }  # fmt: skip

    def points(self) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
        """By network and normalization: what was measured where each rank has a processor."""
        ranks = [1, *(k for k in self.measured["sizes"] if k <= self.measured["machine"]["processors"])]
        return {
            network: {
                norm: (ranks, [1e3 * statistics.median(self.seconds(network, norm, k, PART)) for k in ranks])
                for norm in (SYNC, GHOSTS, APART)
            }
            for network in self.networks
        }

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scaling.json").write_text(json.dumps(results.to_digits(self.measured)) + "\n")
        sections = {
            "Measured": f"Milliseconds of a step, and in brackets how many times those of one rank.\n\n{self.steps()}",
            "Constants of the model": self.constants(),
            "The model beside the measurement": f"Milliseconds: measured, modelled, error.\n\n{self.check()}",
            "Parts of a step": f"Milliseconds, {PART} examples each, messages of a cluster.\n\n{self.parts()}",
            "Where it stops paying": "Number of ranks from which a step takes so much longer than with ghost batches "
            f"and nothing exchanged, {PART} examples each.\n\n{self.crossings()}",
            f"A batch of {LARGE:,} examples": "The number of ranks with which a step is the fastest, and how many "
            f"times as fast as on one rank it is then.\n\n{self.strong()}",
        }
        networks = (f"*{name}*: {described(NETWORKS[name])}" for name in self.networks)
        text = [
            INTRODUCTION.format(ghost=GHOST, networks="; ".join(networks)),
            machine.in_words(self.measured["machine"]),
        ]
        text += [f"## {title}\n\n{section}" for title, section in sections.items()]
        (folder / "scaling.md").write_text("\n\n".join(text) + "\n")
        pictures.scaling(self.drawn(), self.points(), PART, folder / "scaling.png")
        print("\n\n".join(text), f"\nwritten: {folder / 'scaling.md'}, scaling.png, scaling.json")


def first_ranks(network: str, norm: str, factor: float, **given: Any) -> str:
    """The fewest ranks with which a step takes so many times that of ghost batches that exchange nothing."""
    for k in range(2, MOST + 1):
        if total(network, norm, k, PART, **given) > factor * total(network, APART, k, PART, **given):
            return f"{k:,}"
    return f"none to {MOST:,}"


def least_examples(network: str, ranks: int, factor: float, **given: Any) -> str:
    """The fewest examples of each rank, a power of two, with which SyncBatchNorm stays below such a factor."""
    for n in (2**i for i in range(1, 21)):
        if total(network, SYNC, ranks, n, **given) <= factor * total(network, APART, ranks, n, **given):
            return f"{n:,}"
    return "more than a million"


def measure(quick: bool) -> dict[str, Any]:
    beside_python = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    mpiexec = shutil.which("mpiexec", path=beside_python)
    if mpiexec is None:
        raise SystemExit('expected mpiexec: python -m pip install "fastbn[mpi]" mpich')
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        program = ["-m", "mpi4py", "-m", "bench.ranks", str(file), *["--quick"] * quick]
        command = [mpiexec, "-n", "2" if quick else "4", sys.executable, *program]
        subprocess.run(command, env=os.environ | environment(1) | OPEN_MPI, check=True)
        return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 ranks, one network; the figures mean nothing")
    options, folder = machine.parsed(parser, "scaling.json")
    if options.redraw:
        Report(json.loads((folder / "scaling.json").read_text())).write(folder)
    else:
        Report({"machine": machine.describe(), **measure(options.quick)}).write(folder)


if __name__ == "__main__":
    main()
