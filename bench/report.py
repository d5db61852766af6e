"""fastbn beside every peer on every shape: python -m bench.report

Writes speed.md, speed.png and speed.json into bench/results. About ten minutes for each number of threads, on a machine
that does nothing else; --quick tries the machinery, and its figures mean nothing.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench import machine, pictures, results
from bench.cases import LAYOUTS, Case
from bench.peers import PEERS, prepare, prepare_pass
from bench.workers import Entrant, Worker, contest, environment

HERE = Path(__file__).parent / "results"
ALLOCATING = "PyTorch F.batch_norm"
LAUNCHES = 3
READ = 65536  # fewest elements that reads are measured on
QUICK = [LAYOUTS[0], LAYOUTS[2], LAYOUTS[-4]]

INTRODUCTION = """# Speed

float32. A ratio above 1 says how many times faster fastbn is than the fastest other library on that shape. Every
library runs in a process of its own, one at a time, in turn. Ratios are taken within a round, and their medians over
the rounds of {launches} are printed. Every result was checked against float64 before. fastbn gets its arrays
as NumPy makes them, the others get theirs aligned to 64 bytes; one that cannot write into a given array allocates.

*of a copy*: in multiples of `np.copyto` on the same array, on one thread. *of its passes*: in multiples of the time
that its reads and its write take NumPy on the same arrays and as many threads (training: two reads and a write;
inference: one and one; backward: four and one), a read being the faster of `np.dot` and `np.max`, a read with a write
`np.copyto`. *passes allow*: the ratio to the best peer that fastbn would have if it took exactly that time.

`python -m bench.report` wrote this."""


def measure(threads: int, launches: int, quick: bool) -> list[results.Row]:
    """All rows, for this number of threads.

    Every launch starts the processes anew: where an array's pages happen to lie weighs as much as a fifth, and stays.
    """
    rounds, seconds = (3, 0.001) if quick else (5, 0.008)
    for peer in PEERS.values():
        if not peer.installed:
            print(f"skipped: {peer.name} ({' or '.join(peer.modules)} is not installed)")
    cases = [
        Case(shape, channels_last, operation, preallocated=preallocated, threads=threads)
        for shape, channels_last in (QUICK if quick else LAYOUTS)
        for operation, preallocated in results.COLUMNS
    ]
    rows = [results.row(case) for case in cases]
    for number in range(launches):
        print(f"launch {number + 1} of {launches}", flush=True)
        libraries = dict.fromkeys(peer.library for peer in PEERS.values() if peer.installed)
        workers = {library: Worker(threads, environment(threads)) for library in libraries}
        for case, row in zip(cases, rows, strict=True):
            times, failed = contest(entrants(workers, case), rounds, seconds)
            results.add_rounds(row, times, failed, rounds)
            if "fastbn" in failed:
                raise AssertionError(f"fastbn, {case}: {failed['fastbn']}")
            s = results.summary(row)
            beside = f"{s.ratio:5.2f} x as fast as {s.peer}" if s.peer else "no peer"
            print(f"{case!s:<50} {s.seconds * 1e6:9.1f} us, {s.copies:5.2f} copies, {beside}", flush=True)
        for worker in workers.values():
            worker.close()
    return rows


def entrants(workers: Mapping[str, Worker], case: Case) -> dict[str, Entrant]:
    """fastbn, the peers that can do it as they do it best, and the passes over memory."""
    chosen = {"fastbn": Entrant(workers["fastbn"], prepare, ("fastbn", case))}
    for peer in PEERS.values():
        if peer.name == "fastbn" or not peer.installed or not (case.preallocated or peer.name == ALLOCATING):
            continue
        if best := peer.at_its_best(replace(case, aligned=True)):
            chosen[peer.name] = Entrant(workers[peer.library], prepare, (peer.name, best), may_leave=True)
    return chosen | passes(workers["fastbn"], case, machine.last_level_cache())


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
    parts = [INTRODUCTION.format(launches=launches), machine.in_words(report["machine"])]
    for threads, rows in report["rows"].items():
        for column, title in results.COLUMNS.items():
            count = "one thread" if threads == "1" else f"{threads} threads"
            parts.append(
                f"## {title[0].upper()}{title[1:]}, {count}\n\n{results.table(results.of_column(rows, column))}"
            )
    (folder / "speed.md").write_text("\n\n".join(parts) + "\n")
    pictures.ratios(report["rows"], folder / "speed.png")
    print(f"written: {folder / 'speed.md'}, speed.png, speed.json")


def compact(report: dict) -> str:
    """JSON with a line for each row."""
    rows = (
        f'"{threads}": [\n' + ",\n".join(json.dumps(results.to_digits(row)) for row in rows) + "\n]"
        for threads, rows in report["rows"].items()
    )
    about = json.dumps({key: value for key, value in report.items() if key != "rows"})
    return f'{about[:-1]},\n"rows": {{{", ".join(rows)}}}}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1, and 2 where there are as many processors")
    parser.add_argument("--quick", action="store_true", help="a few shapes and rounds")
    parser.add_argument("--output", type=Path, default=HERE, metavar="DIR")
    parser.add_argument("--redraw", action="store_true", help="from the speed.json there, without measuring")
    options = parser.parse_args()
    if options.quick and options.output == HERE:
        parser.error("expected --output with --quick, whose figures must not replace the measured ones")
    if min(options.threads or [1]) < 1:
        parser.error(f"expected --threads of at least 1, got {min(options.threads)}")
    if options.redraw:
        measured = options.output / "speed.json"
        if not measured.is_file():
            parser.error(f"expected a report to draw again, got no {measured}")
        write(json.loads(measured.read_text()), options.output)
        return
    launches = 1 if options.quick else LAUNCHES
    report = {"machine": machine.describe(), "launches": launches, "rows": {}}
    print(machine.in_words(report["machine"]))
    for threads in options.threads or range(1, min(2, machine.processors()) + 1):
        print(f"\n{threads} thread(s)")
        report["rows"][str(threads)] = measure(threads, launches, options.quick)
        write(report, options.output)


if __name__ == "__main__":
    main()
