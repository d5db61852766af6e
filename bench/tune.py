"""Settings for the processor at hand, tried one after the other: python -m bench.tune

Prints how each candidate did, and this processor's entry for fastbn/kernels/families.py. Under ten minutes, on a
machine that does nothing else. One process, and one thread but for the last setting. Candidates take turns within each
round, and one is taken only where it wins in more than three quarters of the rounds and by more than the noise: by how
much the first candidate, measured twice in each round, differs from itself. Settings change no result. --quick tries
the machinery; its figures mean nothing.
"""

import argparse
import datetime
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import machine as described
from bench.calls import layer
from bench.cases import Arrays, Case
from bench.peers import prepare
from bench.workers import Entrant, Worker, burst, contest, environment, repeats
from fastbn import kernels
from fastbn.kernels import families, machine

KIB, MIB, HUGE = 2**10, 2**20, 2**60
SIZES = [32 * KIB << k for k in range(12)]  # to 64 MB
FEATURES = 256
NOISE = 0.02  # the least that counts
BUILD_SHAPES = [(32, 64), (200, 300), (256, 256), (3000, 2048), (100_000, 200), (64, 480, 7, 7)]
# So many arrays of x's size does an operation read or write, by what a threshold counts.
OUTPUT = {"train": 1, "infer": 1, "backward": 1}
SUMMED = {"train": 1, "backward": 2}
ALL_OF_AN_OUTPUT = {"infer": 2, "backward": 3}
READ = {"train": 2, "infer": 1, "backward": 4}


@dataclass(frozen=True)
class Effort:
    """Rounds, and seconds of a burst."""

    rounds: int
    seconds: float
    sizes: Sequence[int]


# Short bursts and many rounds: what else the machine does then weighs on single rounds, which the median leaves out.
FULL, QUICK = Effort(15, 0.005, SIZES), Effort(2, 0.0005, SIZES[:3])


# --- measuring --------------------------------------------------------------------------------------------------------


def ratios(call: Callable[[], Any], candidates: Sequence[Mapping[str, int]], effort: Effort) -> list[float]:
    """Each candidate's time over the first one's; 1 where the difference is no more than noise."""
    count = repeats(call, effort.seconds)
    entries = [*candidates, candidates[0]]
    times: list[list[float]] = [[] for _ in entries]
    order = random.Random(0)
    for _ in range(effort.rounds):
        for k in order.sample(range(len(entries)), len(entries)):
            before = machine.set_settings(**entries[k])
            try:
                times[k].append(burst(call, count))
            finally:
                machine.set_settings(**before)
    first = times[0]
    noise = max(NOISE, statistics.median(abs(a / b - 1) for a, b in zip(times.pop(), first, strict=True)))
    return [beyond([a / b for a, b in zip(those, first, strict=True)], noise) for those in times]


def beyond(rounds: Sequence[float], noise: float) -> float:
    """The median of ratios; 1 where it is within the noise of 1, or where a quarter of the rounds say the opposite."""
    middle = statistics.median(rounds)
    agree = sum((ratio < 1) == (middle < 1) for ratio in rounds)
    return middle if abs(middle - 1) > noise and agree > 0.75 * len(rounds) else 1.0


def prepared(operation: str, nbytes: int, threads: int = 1, features: int = FEATURES) -> Callable[[], Any]:
    """A call on an x of so many bytes."""
    case = Case((max(2, nbytes // (4 * features)), features), operation=operation, threads=threads)
    return layer(case, Arrays(case.shape, False, case.dtype, None))[0]


def by_size(
    name: str,
    off: Mapping[str, int],
    on: Mapping[str, int],
    arrays: Mapping[str, int],
    effort: Effort,
    threads: int = 1,
) -> list[float]:
    """Logarithms of the time with `on` over that with `off`, summed over the operations, for each size of `arrays`."""
    scores = []
    for size in effort.sizes:
        each = {
            operation: ratios(prepared(operation, size // count, threads), [off, on], effort)[1]
            for operation, count in arrays.items()
        }
        scores.append(math.fsum(map(math.log, each.values())))
        words = ", ".join(f"{operation} {ratio:.2f}" for operation, ratio in each.items())
        print(f"  {name}, {size // KIB:6} KB: {words} of the time without", flush=True)
    return scores


def best_distance(name: str, settings: Mapping[str, int], arrays: Mapping[str, int], effort: Effort) -> int:
    """The distance at which asking ahead pays most in large arrays; 0 where it pays at none."""
    distances = [0, *(512 << k for k in range(8))]
    scores = [0.0] * len(distances)
    sizes = effort.sizes[-3:]
    for size in sizes:
        for operation, count in arrays.items():
            candidates = [{**settings, name: distance} for distance in distances]
            found = ratios(prepared(operation, size // count), candidates, effort)
            scores = [score + math.log(ratio) for score, ratio in zip(scores, found, strict=True)]
    each = [math.exp(score / len(sizes) / len(arrays)) for score in scores]
    print(f"  {name}: " + ", ".join(f"{d} {ratio:.2f}" for d, ratio in zip(distances, each, strict=True)), flush=True)
    best = min(range(len(distances)), key=each.__getitem__)
    return distances[best] if each[best] < 1 - NOISE / 2 else 0


def best_run(scores: Sequence[float], begins: Sequence[int], ends: Sequence[int]) -> tuple[int, int]:
    """(begin, end) of the run with the smallest sum, the shortest of them; an empty one has the sum zero."""
    runs = [(math.fsum(scores[i:j]), j - i, i, j) for i in begins for j in ends if i <= j]
    return min(runs)[2:]


# --- the settings, in the order in which they are tried ---------------------------------------------------------------


@dataclass
class Entry:
    """What was found: values, and what was measured, by setting."""

    values: dict[str, int]
    measured: dict[str, str]

    def set(self, measured: str, **values: int) -> None:
        self.values |= values
        self.measured |= dict.fromkeys(values, measured)
        machine.set_settings(**values)
        print(", ".join(f"{name} = {in_units(value)}" for name, value in values.items()), flush=True)


def gain(scores: Sequence[float], operations: Mapping[str, int]) -> str:
    """The mean time of a run over that without, in words."""
    return (
        f"{math.exp(statistics.fmean(scores) / len(operations)):.2f} of the time without" if scores else "never faster"
    )


def tune_rows(entry: Entry, effort: Effort) -> None:
    on = {"rows_at_once": 4, "rows_at_once_to_bytes": HUGE}
    scores = by_size("four rows at once", {"rows_at_once": 1}, on, ALL_OF_AN_OUTPUT, effort)
    _, end = best_run(scores, [0], range(len(scores) + 1))
    to = effort.sizes[end - 1] if end else 0
    entry.set(gain(scores[:end], ALL_OF_AN_OUTPUT), rows_at_once=4 if end else 1, rows_at_once_to_bytes=to)


def tune_reads(entry: Entry, effort: Effort) -> None:
    name = "read_ahead_bytes"
    distance = best_distance(name, {"read_ahead_from_bytes": 0}, SUMMED, effort)
    begin, scores = len(effort.sizes), []
    if distance:
        on = {name: distance, "read_ahead_from_bytes": 0}
        scores = by_size("asking ahead for reads", {name: 0}, on, SUMMED, effort)
        begin, _ = best_run(scores, range(len(scores) + 1), [len(scores)])
    never = begin == len(effort.sizes)
    from_bytes = 0 if never else effort.sizes[begin]
    entry.set(gain(scores[begin:], SUMMED), read_ahead_bytes=0 if never else distance, read_ahead_from_bytes=from_bytes)


def tune_writes(entry: Entry, effort: Effort) -> None:
    name, sizes = "write_ahead_bytes", effort.sizes
    everywhere = {"write_ahead_from_bytes": 0, "write_ahead_to_bytes": HUGE}
    distance = best_distance(name, everywhere, OUTPUT, effort)
    begin, end, scores = 0, 0, []
    if distance:
        scores = by_size("asking ahead for writes", {name: 0}, {name: distance, **everywhere}, OUTPUT, effort)
        begin, end = best_run(scores, range(len(scores) + 1), range(len(scores) + 1))
    if begin == end:
        entry.set("never faster", write_ahead_bytes=0, write_ahead_from_bytes=0, write_ahead_to_bytes=0)
        return
    # A run that ends with the largest size goes on beyond it.
    to = families.NEVER_BYTES if end == len(sizes) else sizes[end - 1]
    found = {"write_ahead_from_bytes": sizes[begin], "write_ahead_to_bytes": to}
    entry.set(gain(scores[begin:end], OUTPUT), write_ahead_bytes=distance, **found)


def tune_streams(entry: Entry, effort: Effort) -> None:
    for name, operations in (
        ("stream_from_bytes", ("train", "backward")),
        ("stream_inference_from_bytes", ("infer",)),
    ):
        arrays = {operation: OUTPUT[operation] for operation in operations}
        scores = by_size("streaming", {name: HUGE}, {name: 0}, arrays, effort)
        begin, _ = best_run(scores, range(len(scores) + 1), [len(scores)])
        never = begin == len(scores)
        entry.set(gain(scores[begin:], arrays), **{name: families.NEVER_BYTES if never else effort.sizes[begin]})


def tune_threads(entry: Entry, effort: Effort) -> None:
    threads, name = described.processors(), "parallel_from_elements"
    if threads < 2:
        print(f"{name} is kept: this process may run on one processor only")
        return
    few = Effort(effort.rounds, effort.seconds, [4 * (32 * KIB << k) for k in range(8)][: len(effort.sizes)])
    scores = by_size(f"{threads} threads", {name: HUGE}, {name: 0}, READ, few, threads)
    begin, _ = best_run(scores, range(len(scores) + 1), [len(scores)])
    elements = (few.sizes[begin] if begin < len(scores) else 2 * few.sizes[-1]) // 4
    entry.set(f"{threads} threads: {gain(scores[begin:], READ)}", **{name: elements})


def tuned(effort: Effort) -> Entry:
    """Best settings, found one after the other with those before in force; they are not left in force."""
    before = machine.get_settings()
    entry = Entry(dict(before), {})
    try:
        # Streams are tried last, against the best that can be done without.
        machine.set_settings(stream_from_bytes=HUGE, stream_inference_from_bytes=HUGE)
        for tune in (tune_rows, tune_reads, tune_writes, tune_streams, tune_threads):
            tune(entry, effort)
    finally:
        machine.set_settings(**before)
    return entry


def builds(rounds: int, seconds: float) -> dict[str, float]:
    """Each build's time over that of the one in use, the geometric mean over shapes and operations."""
    workers = {build: Worker(1, environment(1) | {"FASTBN_ISA": build}) for build in kernels.BUILDS}
    logs: dict[str, list[float]] = {build: [] for build in workers}
    for shape in BUILD_SHAPES:
        for operation in READ:
            case = Case(shape, operation=operation)
            entrants = {build: Entrant(worker, prepare, ("fastbn", case)) for build, worker in workers.items()}
            times, failed = contest(entrants, rounds, seconds)
            if failed:
                raise AssertionError(f"{case}: {failed}")
            for build, values in times.items():
                rounds_of_both = zip(values, times[kernels.BUILD], strict=True)
                logs[build].append(math.log(beyond([a / b for a, b in rounds_of_both], 2 * NOISE)))
    for worker in workers.values():
        worker.close()
    return {build: math.exp(statistics.fmean(those)) for build, those in logs.items()}


# --- printing ---------------------------------------------------------------------------------------------------------


def in_units(number: int) -> str:
    """A number of bytes or elements as families.py writes it."""
    if number == families.NEVER_BYTES:
        return "NEVER_BYTES"
    for unit, name in ((MIB, "MIB"), (KIB, "KIB")):
        if number and number % unit == 0:
            return f"{number // unit} * {name}"
    return str(number)


def in_words(entry: Entry, build: str, date: str) -> str:
    """The family's entry, ready to paste."""
    family = families.FAMILIES[kernels.FAMILY]
    models = " ".join(f'("{v}", {f:#04x}, {first:#04x}, {last:#04x}),' for v, f, first, last in family.models)
    vendor, number, model = machine.processor()
    lines = [
        f"# bench.tune, {date}, build {kernels.BUILD}, on {vendor} family {number:#x} model {model:#x};",
        "# figures are the mean over the sizes where a setting holds.",
        f"{family.name.upper().replace('-', '_')} = Family(",
        f'    name="{family.name}",',
        f"    models=({models}),",
        f'    build="{build}",',
        f"    l3_ceiling_bytes={in_units(family.l3_ceiling_bytes)},  # not tried",
    ]
    for name in families.SETTINGS:
        value = in_units(entry.values[name]) if name.endswith("_bytes") else str(entry.values[name])
        lines.append(f"    {name}={value},  # {entry.measured.get(name, 'not tried')}")
    return "\n".join([*lines, ")"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few sizes and rounds")
    effort = QUICK if parser.parse_args(arguments).quick else FULL
    print(described.in_words(described.describe()))
    warm = prepared("train", MIB)
    end = time.perf_counter() + 400 * effort.seconds
    while time.perf_counter() < end:
        warm()
    entry = tuned(effort)
    beside = builds(effort.rounds, effort.seconds)
    best = min(beside, key=beside.__getitem__)
    best = best if beside[best] < 1 - NOISE else kernels.BUILD
    print("builds: " + ", ".join(f"{build} {ratio:.2f}" for build, ratio in beside.items()))
    if best != kernels.BUILD:
        print(f"{best} is the faster build: run this again with FASTBN_ISA={best}")
    print(f"\n{in_words(entry, best, datetime.date.today().isoformat())}")


if __name__ == "__main__":
    main()
