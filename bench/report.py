"""fastbn beside every peer on every shape: python -m bench.report

Writes speed.md, speed.png and speed.json into the processor family's folder of bench/results. About ten minutes for
each number of threads, on a machine that does nothing else; --quick tries the machinery, and its figures mean nothing.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench import limit, machine, pictures, results
from bench.cases import LAYOUTS, OPERATIONS, Case
from bench.peers import PEERS, Peer, prepare, prepare_pass
from bench.workers import Entrant, Worker, contest, environment

ALLOCATING = "PyTorch F.batch_norm"
LAUNCHES = 3
READ = 65536  # fewest elements that reads are measured on
WARM_UP = 2.0  # seconds before a launch's first call
QUICK = [LAYOUTS[0], LAYOUTS[2], LAYOUTS[-4]]

# What else is measured, on one thread, beside a few peers: how the case differs, and what its table says.
SETTINGS = {
    "float64": ({"dtype": "float64"}, "float64"),
    "aligned": ({"offset": 0}, "Arrays that start on a cache line, for all alike"),
    "cold": ({"cold": True}, "Arrays that are in no cache: others, of more than the last level, were touched before"),
}
SETTINGS_LAYOUTS = [
    (shape, False) for shape in ((256, 256), (1024, 1024), (4096, 1000), (64, 512, 7, 7), (32, 64, 56, 56))
]
SETTINGS_PEERS = ("numba", "PyTorch native")

INTRODUCTION = """# Speed

float32. A ratio above 1 says how many times faster fastbn is: than the fastest of all peers on that shape, and than the
fastest library, without what people who use NumPy write themselves (NumPy, numba, numexpr). Every library runs in a
process of its own, one at a time, in turn. Ratios are taken within a round, and their medians over the rounds of
{launches} are printed. Every result was checked against float64 before. fastbn, NumPy, numba and numexpr get their
arrays as NumPy makes them, the others get theirs at the start of a page; one that cannot write into a given array
allocates.

*of a copy*: in multiples of `np.copyto` on the same array, on one thread. *of its limit*: in multiples of the fastest
plain loops of C that its passes can be made of, on the same arrays, one thread; *over*: of more than 1.15 times that
and 1.5 us. {loops}
*of its passes*: in multiples of the time that its reads and its write take NumPy on the same arrays and as many threads
(training: two reads and a write; inference: one and one; backward: four and one), a read being the faster of `np.dot`
and `np.max`, a read with a write `np.copyto`.

`python -m bench.report` wrote this."""


def measure(threads: int, launches: int, quick: bool) -> list[results.Row]:
    """All rows, for this number of threads.

    Every launch starts the processes anew: where an array's pages happen to lie weighs as much as a fifth, and stays.
    """
    rounds, seconds = (3, 0.001) if quick else (5, 0.008)
    for peer in PEERS.values():
        if peer.missing:
            print(f"skipped: {peer.name} ({peer.missing})")
    cases = [
        Case(shape, channels_last, operation, preallocated=preallocated, threads=threads)
        for shape, channels_last in (QUICK if quick else LAYOUTS)
        for operation, preallocated in results.COLUMNS
    ]
    rows = [results.row(case) for case in cases]
    for number in range(launches):
        print(f"launch {number + 1} of {launches}", flush=True)
        workers = start(threads)
        for case, row in zip(cases, rows, strict=True):
            times, failed = contest(entrants(workers, case), rounds, seconds)
            results.add_rounds(row, times, failed, rounds)
            if "fastbn" in failed:
                raise AssertionError(f"fastbn, {case}: {failed['fastbn']}")
            s = results.summary(row)
            beside = f"{s.ratio:5.2f} x as fast as {s.peer}" if s.peer else "no peer"
            print(f"{case!s:<50} {s.seconds * 1e6:9.1f} us, {s.copies:5.2f} copies, {beside}", flush=True)
        close(workers)
    return rows


def start(threads: int) -> dict[str, Worker]:
    """A process for each library that there is, and the processor at the clock that it will keep."""
    flags = {peer.process: peer.xla_flags for peer in PEERS.values() if not peer.missing}
    workers = {process: Worker(threads, environment(threads, xla_flags)) for process, xla_flags in flags.items()}
    workers["fastbn"].ask("warm up", WARM_UP)
    workers["fastbn"].answer()
    return workers


def close(workers: Mapping[str, Worker]) -> None:
    for worker in workers.values():
        worker.close()


def measure_settings(launches: int, quick: bool) -> dict[str, list[results.Row]]:
    """A few shapes in each setting, beside a few peers."""
    rounds, seconds = (3, 0.001) if quick else (5, 0.008)
    cases = {
        setting: [
            Case(shape, last, operation, **changes)
            for shape, last in SETTINGS_LAYOUTS[: 1 if quick else None]
            for operation in OPERATIONS
        ]
        for setting, (changes, _) in SETTINGS.items()
    }
    rows = {setting: [results.row(case) for case in some] for setting, some in cases.items()}
    for number in range(launches):
        print(f"settings, launch {number + 1} of {launches}", flush=True)
        workers = start(1)
        for setting, some in cases.items():
            for case, row in zip(some, rows[setting], strict=True):
                running = {"fastbn": Entrant(workers["fastbn"], prepare, ("fastbn", case))}
                running["copy"] = Entrant(workers["fastbn"], prepare_pass, ("copy", case))
                for peer in map(PEERS.__getitem__, SETTINGS_PEERS):
                    if not peer.missing and (best := peer.at_its_best(beside(case, peer))):
                        running[peer.name] = Entrant(workers[peer.process], prepare, (peer.name, best))
                results.add_rounds(row, *contest(running, rounds, seconds), rounds)
        close(workers)
    return rows


def beside(case: Case, peer: Peer) -> Case:
    """The case on arrays that lie as the peer's users have them."""
    return case if case.offset is not None else replace(case, offset=peer.offset)


def entrants(workers: Mapping[str, Worker], case: Case) -> dict[str, Entrant]:
    """fastbn, the peers that can do it as they do it best, the passes over memory, and the loops that set the limit."""
    ours = workers["fastbn"]
    chosen = {"fastbn": Entrant(ours, prepare, ("fastbn", case))}
    for peer in PEERS.values():
        if peer.name == "fastbn" or peer.missing or not (case.preallocated or peer.name == ALLOCATING):
            continue
        if best := peer.at_its_best(beside(case, peer)):
            chosen[peer.name] = Entrant(workers[peer.process], prepare, (peer.name, best), leaves="peer")
    chosen |= passes(ours, case, machine.caches()["usable_bytes"])
    return chosen | (limit.entrants(ours, case) if case.threads == 1 and case.preallocated else {})


def passes(worker: Worker, case: Case, cache: int) -> dict[str, Entrant]:
    """A copy, and reads, on the arrays that fastbn works on.

    Beyond the cache they run on as many threads as fastbn; below it, starting those would cost more than they save, and
    only on one thread can reads be compared. Nor can they where a call of NumPy weighs as much as its work.
    """
    size = int(np.prod(case.shape))
    beyond = 4 * size >= cache
    alone = replace(case, threads=1)
    chosen = {"copy": Entrant(worker, prepare_pass, ("copy", case if beyond else alone))}
    if beyond or (case.threads == 1 and size >= READ):
        chosen |= {name: Entrant(worker, prepare_pass, (name, case)) for name in ("read (np.dot)", "read (np.max)")}
    if beyond and case.threads > 1:
        chosen["copy, one thread"] = Entrant(worker, prepare_pass, ("copy", alone))
    return chosen


def write(report: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(compact(report))
    launches = f"{report['launches']} launch{'es' * (report['launches'] > 1)}"
    variants = report.get("loops")
    loops = f"The loops were compiled for {' and '.join(variants)}." if variants else "Not measured: no C compiler."
    parts = [INTRODUCTION.format(launches=launches, loops=loops), machine.in_words(report["machine"])]
    for threads, rows in report["rows"].items():
        for column, title in results.COLUMNS.items():
            count = "one thread" if threads == "1" else f"{threads} threads"
            parts.append(
                f"## {title[0].upper()}{title[1:]}, {count}\n\n{results.table(results.of_column(rows, column))}"
            )
    for setting, rows in report.get("settings", {}).items():
        parts.append(f"## {SETTINGS[setting][1]}, one thread\n\n{results.short_table(rows, SETTINGS_PEERS)}")
    (folder / "speed.md").write_text("\n\n".join(parts) + "\n")
    pictures.ratios(report["rows"], folder / "speed.png")
    print(f"written: {folder / 'speed.md'}, speed.png, speed.json")


def compact(report: dict) -> str:
    """JSON with a line for each row."""
    parts = [json.dumps({key: value for key, value in report.items() if key not in ("rows", "settings")})[1:-1]]
    for key in ("rows", "settings"):
        tables = (
            f'"{name}": [\n' + ",\n".join(json.dumps(results.to_digits(row)) for row in rows) + "\n]"
            for name, rows in report.get(key, {}).items()
        )
        parts.append(f'"{key}": {{{", ".join(tables)}}}')
    return "{" + ",\n".join(parts) + "}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1, and 2 where there are as many processors")
    parser.add_argument("--quick", action="store_true", help="a few shapes and rounds")
    options, folder = machine.parsed(parser, "speed.json")
    if min(options.threads or [1]) < 1:
        parser.error(f"expected --threads of at least 1, got {min(options.threads)}")
    if options.redraw:
        write(json.loads((folder / "speed.json").read_text()), folder)
        return
    launches = 1 if options.quick else LAUNCHES
    variants = list(dict.fromkeys(loop.variant for loop in limit.loops()))
    report = {"machine": machine.describe(), "launches": launches, "loops": variants, "rows": {}}
    print(machine.in_words(report["machine"]), "" if variants else "No C compiler: limits are left out.", sep="\n")
    for threads in options.threads or range(1, min(2, machine.processors()) + 1):
        print(f"\n{threads} thread(s)")
        report["rows"][str(threads)] = measure(threads, launches, options.quick)
        write(report, folder)
    report["settings"] = measure_settings(launches, options.quick)
    write(report, folder)


if __name__ == "__main__":
    main()
