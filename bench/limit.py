"""fastbn beside the plain loops that a call is made of: python -m bench.limit

limit.c has the loops; a C compiler builds them with the best flags that the processor runs. The limit of a call is the
sum of its passes, each by the loop that is the fastest there: training sums and writes y, inference writes y, backward
sums the gradients and writes dx. A call is at its limit when it takes at most 1.15 times that, plus 1.5 us.
Prints every shape and operation, one thread, hot arrays at offsets 0 and 16 bytes. A few minutes; --quick tries it.
"""

import argparse
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from bench import machine, results
from bench.cases import LAYOUTS, OPERATIONS, Case, arrays, empty
from bench.peers import prepare
from bench.workers import Entrant, Worker, contest, environment

SOURCE = Path(__file__).with_name("limit.c")
FLAGS = {"v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "plain": []}
FEWEST_LANES = 64  # shorter rows are folded
LANES = 8  # partial sums of a feature, as in limit.c
OFFSETS = (0, 16)


class _Arrays(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dy", "out", "parameters", "sums")),
        *((name, ctypes.c_long) for name in ("rows", "features", "run", "pitch")),
    ]


@dataclass(frozen=True)
class Loop:
    """One loop of a compiled limit.c."""

    library: Path
    variant: str  # of FLAGS
    number: int
    layout: str  # rows or planes
    task: str  # sums, y, gradients or dx
    name: str

    def __str__(self) -> str:
        """What an entrant is called, and by what results.py knows it."""
        return f"{results.LOOP}{self.task}: {self.name}, {self.variant}"


def compiler() -> str | None:
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@cache
def _folder() -> tempfile.TemporaryDirectory:
    """Of the compiled loops, until the process ends."""
    return tempfile.TemporaryDirectory(prefix="fastbn-limit-")


@cache
def loops() -> tuple[Loop, ...]:
    """All that could be compiled; none without a compiler."""
    from fastbn import kernels

    variants = [variant for variant in ("v3", "v4") if variant in kernels.BUILDS] or ["plain"]
    found = [loop for variant in variants for loop in build(variant, Path(_folder().name))]
    return tuple(found or ([] if variants == ["plain"] else build("plain", Path(_folder().name))))


def build(variant: str, folder: Path) -> list[Loop]:
    """The loops of a variant; none where there is no compiler, or none that knows its flags."""
    program, library = compiler(), folder / f"limit-{variant}.so"
    if program is None:
        return []
    # Nothing is fused, as in fastbn, whose bits are the same on every machine.
    flags = ["-O3", "-ffp-contract=off", *FLAGS[variant], "-shared", "-fPIC"]
    if subprocess.run([program, *flags, str(SOURCE), "-o", str(library)], capture_output=True).returncode:
        return []
    c = _load(library)
    told = [
        [getattr(c, f"loop_{what}")(k).decode() for what in ("layout", "pass", "name")]
        for k in range(c.number_of_loops())
    ]
    return [Loop(library, variant, k, *words) for k, words in enumerate(told)]


@cache
def _load(library: Path) -> ctypes.CDLL:
    c = ctypes.CDLL(str(library))
    for what in ("layout", "pass", "name"):
        getattr(c, f"loop_{what}").restype = ctypes.c_char_p
    c.loop_seconds.restype = ctypes.c_double
    c.loop_seconds.argtypes = ctypes.c_int, ctypes.POINTER(_Arrays), ctypes.c_long
    return c


def view(case: Case) -> tuple[int, int, int]:
    """Rows, features and the length of a run; short rows folded into rows of 64 lanes or more, of as many elements."""
    n, features, *rest = case.shape
    run = int(np.prod(rest))
    if run > 1 and not case.channels_last:
        return n, features, run
    rows = n * run
    if features >= FEWEST_LANES:
        return rows, features, 1
    fewest = -(-FEWEST_LANES // features)
    ways = [k for k in range(fewest, min(rows, 16 * fewest) + 1) if rows % k == 0]
    k = next((k for k in ways if k * features % 16 == 0), ways[0] if ways else 1)
    return rows // k, k * features, 1


class Prepared:
    """A loop on the arrays of a case, which times itself."""

    def __init__(self, loop: Loop, case: Case) -> None:
        a = arrays(case)
        rows, features, run = view(case)
        pitch = (features // 16 + 2) * 16
        pitch += 16 * (pitch % 512 == 0)  # rows of parameters must not share the low bits of their addresses
        self.parameters = empty((5, pitch), "float32")
        self.parameters.fill(0.5)
        self.sums = empty((2, LANES * pitch), "float64")
        self.sums.fill(0)
        self.out = a.dx if loop.task == "dx" else a.y
        addresses = (array.ctypes.data for array in (a.x, a.dy, self.out, self.parameters, self.sums))
        self._arrays = _Arrays(*addresses, rows, features, run, pitch)
        self._kept = a
        self._loop = loop

    def __call__(self) -> None:
        self.seconds(1)

    def seconds(self, count: int) -> float:
        return _load(self._loop.library).loop_seconds(self._loop.number, self._arrays, count)


def entrants(worker: Worker, case: Case) -> dict[str, Entrant]:
    """The loops that a call's passes are made of, on fastbn's own arrays. There are none but for float32."""
    if case.dtype != "float32":
        return {}
    layout = "planes" if view(case)[2] > 1 else "rows"
    tasks = results.LOOPS_OF[case.operation]
    chosen = [loop for loop in loops() if loop.layout == layout and loop.task in tasks]
    return {str(loop): Entrant(worker, Prepared, (loop, case), leaves=loop.task) for loop in chosen}


def measure(worker: Worker, case: Case, rounds: int, seconds: float) -> results.Row:
    running = {"fastbn": Entrant(worker, prepare, ("fastbn", case))} | entrants(worker, case)
    row = results.row(case)
    results.add_rounds(row, *contest(running, rounds, seconds), rounds)
    return row


def line(row: results.Row, offset: int) -> str:
    """One line of the table: what fastbn takes, its limit, the loops that set it, and the verdict."""
    s = results.summary(row)
    fastest = [name.removeprefix(results.LOOP) for name in results.fastest_loops(row)]
    verdict = "at its limit" if s.at_limit else f"misses by {s.seconds / results.allowed(s.limit_seconds) - 1:.0%}"
    return (
        f"{results.name(row):<34}{row['operation']:<10}{offset:>6}{s.seconds * 1e6:11.1f}"
        f"{s.limit_seconds * 1e6:11.1f}{s.limit:7.2f}  {verdict:<16} {'; '.join(fastest)}"
    )


def table(cases: Sequence[Case], rounds: int, seconds: float) -> None:
    worker = Worker(1, environment(1))
    columns = f"{'shape':<34}{'operation':<10}{'offset':>6}{'us':>11}{'limit us':>11}{'ratio':>7}"
    print(f"{columns}  {'verdict':<16} fastest loops")
    at_limit = 0
    for case in cases:
        row = measure(worker, case, rounds, seconds)
        at_limit += results.summary(row).at_limit
        print(line(row, case.offset), flush=True)
    print(f"At the limit: {at_limit} of {len(cases)}.")
    worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small arrays and few rounds; the figures mean nothing")
    options = parser.parse_args()
    print(machine.in_words(machine.describe()))
    if not loops():
        parser.error("expected a C compiler for the loops of limit.c, found none that compiles them")
    print(f"loops compiled for: {', '.join(dict.fromkeys(loop.variant for loop in loops()))}")
    cases = [
        Case(shape, last, operation, offset=offset)
        for shape, last in LAYOUTS
        for offset in OFFSETS
        for operation in OPERATIONS
        if not options.quick or np.prod(shape) < 2**18
    ]
    table(cases, *((3, 0.001) if options.quick else (7, 0.008)))


if __name__ == "__main__":
    main()
