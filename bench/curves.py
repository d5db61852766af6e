"""Time per element from 16 KB to 1 GB, and speed against threads: python -m bench.curves

Writes curves.png and curves.json into the processor family's folder of bench/results. A few minutes. Sizes that memory
does not hold are left out.
"""

import argparse
import json
import os
import statistics
from dataclasses import replace

import numpy as np

from bench import machine, pictures, results
from bench.cases import OPERATIONS, Case
from bench.peers import PEERS, prepare, prepare_pass
from bench.workers import Entrant, Worker, contest, environment

FEATURES = 256
SIZES = [2**k for k in range(14, 31, 2)]  # bytes of x
AGAINST_THREADS = (128, 64, 56, 56)
# x, dy, y and dx in two processes, and room for what making and checking them needs.
ARRAYS = 10
NAMES = ("fastbn", "PyTorch native")


def start(threads: int) -> dict[str, Worker]:
    return {name: Worker(threads, environment(threads)) for name in NAMES if not PEERS[name].missing}


def entrants(workers: dict[str, Worker], case: Case) -> dict[str, Entrant]:
    return {
        name: Entrant(worker, prepare, (name, replace(case, offset=0 if name != "fastbn" else None)))
        for name, worker in workers.items()
    }


def close(workers: dict[str, Worker]) -> None:
    for worker in workers.values():
        worker.close()


def memory() -> float:
    """Bytes free now, where the system says."""
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return np.inf
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def against_size(sizes: list[int], rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Nanoseconds per element of each size, on one thread."""
    series: dict[str, dict[str, list[float]]] = {}
    workers = start(1)
    for size in sizes:
        if ARRAYS * size > memory():
            print(f"left out: {pictures.readable(size)}, for want of memory")
            continue
        for operation in OPERATIONS:
            case = Case((size // 4 // FEATURES, FEATURES), operation=operation)
            running = entrants(workers, case)
            if operation == OPERATIONS[0]:
                running["np.copyto"] = Entrant(workers["fastbn"], prepare_pass, ("copy", case))
            times, failed = contest(running, rounds, seconds)
            assert not failed, failed
            for name, values in times.items():
                line = series.setdefault(
                    name if name == "np.copyto" else f"{name} {operation}", {"bytes": [], "ns": []}
                )
                line["bytes"].append(size)
                line["ns"].append(statistics.median(values) / (size // 4) * 1e9)
        print(pictures.readable(size), *(f"{name} {line['ns'][-1]:.3f} ns" for name, line in series.items()), sep=", ")
    close(workers)
    return series


def against_threads(counts: list[int], rounds: int, seconds: float) -> dict[str, dict[str, list]]:
    """For each number of threads, how many times as fast as on one thread, both measured in the same rounds."""
    alone = start(1)
    series = {f"{name} {operation}": {"threads": [1], "speed": [1.0]} for operation in OPERATIONS for name in alone}
    for count in counts:
        together = start(count)
        for operation in OPERATIONS:
            case = Case(AGAINST_THREADS, operation=operation)
            running = {f"{name} alone": entrant for name, entrant in entrants(alone, case).items()}
            running |= entrants(together, replace(case, threads=count))
            times, failed = contest(running, rounds, seconds)
            assert not failed, failed
            for name in together:
                line = series[f"{name} {operation}"]
                line["threads"].append(count)
                line["speed"].append(results.ratio(times[f"{name} alone"], times[name]))
        close(together)
        print(f"{count} threads", *(f"{name} {line['speed'][-1]:.2f}" for name, line in series.items()), sep=", ")
    close(alone)
    return series


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds; the figures mean nothing")
    options, folder = machine.parsed(parser)
    described = machine.describe()
    rounds, seconds = (3, 0.001) if options.quick else (7, 0.008)
    series = against_size(SIZES[:4] if options.quick else SIZES, rounds, seconds)
    most = machine.processors()
    counts = sorted({most, *(2**k for k in range(1, most.bit_length()))} - {1})
    threads = against_threads(counts, rounds, seconds)
    folder.mkdir(parents=True, exist_ok=True)
    written = results.to_digits({"machine": described, "sizes": series, "threads": threads})
    (folder / "curves.json").write_text(json.dumps(written) + "\n")
    pictures.curves(series, threads, folder / "curves.png")


if __name__ == "__main__":
    main()
