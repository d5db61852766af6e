"""What it takes to normalise an array that is larger than the memory that it may use: python -m bench.larger

Each recipe runs in a fresh process that may have so much memory of its own (RLIMIT_DATA; files that are mapped do not
count), on one and the same array in a file. The process says how long it took, without imports; the most memory of its
own that it had at once (RssAnon, looked at every few milliseconds); and the most memory at all, in which the mapped
pages of files are, which the system takes back when it needs them (VmHWM). Then the way through blocks in memory, by
threads of dask and of the kernels. Needs dask and zarr; Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench import machine

COLUMNS = 64
BLOCK = 65_536  # rows: 16 MiB of float32
OPEN = {
    "npy": 'x = da.from_array(np.load("x.npy", mmap_mode="r"), chunks=(BLOCK, -1))',
    "Zarr": 'x = da.from_zarr("x.zarr")',
}
# What each does, and whether it is held to the limit: the last two are what one does without.
RECIPES = {
    "moments, npy": (OPEN["npy"], "moments(x).compute()", True),
    "moments, Zarr": (OPEN["Zarr"], "moments(x).compute()", True),
    "batch_norm, npy to npy stack": (OPEN["npy"], 'da.to_npy_stack("y", batch_norm(x, training=True))', True),
    "batch_norm, npy to Zarr": (OPEN["npy"], 'batch_norm(x, training=True).to_zarr("y.zarr")', True),
    "batch_norm, Zarr to Zarr": (OPEN["Zarr"], 'batch_norm(x, training=True).to_zarr("y.zarr")', True),
    "BatchNormTransformer, Zarr to Zarr": (
        OPEN["Zarr"], 'BatchNormTransformer().fit(x).transform(x).to_zarr("y.zarr")', True,
    ),
    "a loop without dask, npy to npy": ('x = np.load("x.npy", mmap_mode="r")', """
seen = fastbn.RunningStats(COLUMNS, momentum=None, unbiased=False)
parts = [slice(at, at + BLOCK) for at in range(0, len(x), BLOCK)]
for part in parts:
    seen.update(fastbn.moments(x[part]))
y = np.lib.format.open_memmap("y.npy", "w+", x.dtype, x.shape)
for part in parts:
    fastbn.batch_norm(x[part], seen.mean, seen.var, out=y[part])
""", True),
    "dask's own (x - mean)/std, Zarr to Zarr": (
        OPEN["Zarr"], '((x - x.mean(0)) / x.std(0)).astype("f4").to_zarr("y.zarr")', False,
    ),
    "the whole array in memory, npy to npy": (
        'x = np.load("x.npy")', 'np.save("y.npy", fastbn.batch_norm_forward(x, out=x)[0])', False,
    ),
}  # fmt: skip
PROGRAM = """
import json, resource, threading, time
import dask, dask.array as da, numpy as np, zarr
import fastbn
from fastbn.estimators import BatchNormTransformer
from fastbn.interop.dask import batch_norm, moments

BLOCK, COLUMNS, limit = {block}, {columns}, {limit}
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
def kilobytes(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0])
most = kilobytes("RssAnon")
def watch():
    global most
    while True:
        most = max(most, kilobytes("RssAnon"))
        time.sleep(0.003)
threading.Thread(target=watch, daemon=True).start()
open("/proc/self/clear_refs", "w").write("5")  # VmHWM from here on
start = time.perf_counter()
{opened}
{done}
print(json.dumps([time.perf_counter() - start, most * 1024, kilobytes("VmHWM") * 1024]))
"""


def write_files(folder: Path, rows: int) -> None:
    """x.npy and x.zarr, of the same numbers, block by block."""
    import dask.array as da

    rng = np.random.default_rng(0)
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (rows, COLUMNS))
    for at in range(0, rows, BLOCK):
        part = x[at : at + BLOCK]
        part[...] = rng.standard_normal(part.shape, dtype=np.float32)
        part += 5
    da.from_array(x, chunks=(BLOCK, -1)).to_zarr(folder / "x.zarr")


def measure(name: str, folder: Path, limit: int) -> tuple[float, int, int]:
    """Seconds, and the most bytes: of its own, and with the pages of files."""
    opened, done, limited = RECIPES[name]
    program = PROGRAM.format(block=BLOCK, columns=COLUMNS, limit=limit * limited, opened=opened, done=done)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for file in ("x.npy", "x.zarr"):
            (Path(work) / file).symlink_to(folder / file)
        ran = subprocess.run([sys.executable, "-c", program], cwd=work, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{name}: {ran.stderr.strip().splitlines()[-1]}")
    return tuple(json.loads(ran.stdout.splitlines()[-1]))


def table(gigabytes: float, limit: int, rounds: int) -> str:
    """Markdown: a row for each recipe."""
    rows = round(gigabytes * 1e9) // (4 * COLUMNS)
    lines = ["| | seconds | own memory, MB | with pages of files, MB |", "|---|--:|--:|--:|"]
    with tempfile.TemporaryDirectory() as made:
        write_files(Path(made), rows)
        for name in RECIPES:
            figures = zip(*(measure(name, Path(made), limit) for _ in range(rounds)), strict=True)
            seconds, own, most = map(statistics.median, figures)
            lines.append(f"| {name} | {seconds:.1f} | {own / 1e6:.0f} | {most / 1e6:.0f} |")
    return "\n".join(lines)


def threads(rows: int, rounds: int) -> str:
    """Markdown: milliseconds of statistics and of outputs, block by block, by threads of dask and of the kernels."""
    import dask.array as da

    import fastbn
    from fastbn.calls import Constants
    from fastbn.calls import moments as moments_of

    a = np.random.default_rng(0).standard_normal((rows, COLUMNS), dtype=np.float32)
    x = da.from_array(a, chunks=(BLOCK, -1))
    mean, var = np.zeros(COLUMNS), np.ones(COLUMNS)

    def statistics_of(block, count):
        return moments_of(Constants(num_threads=count), block).mean[np.newaxis]

    def output_of(block, count):
        return fastbn.batch_norm(block, mean, var, num_threads=count)[:1]

    def milliseconds(function, workers, count):
        lazy = x.map_blocks(function, count, chunks=(1, COLUMNS), dtype=float)
        start = time.perf_counter()
        lazy.compute(scheduler="threads", num_workers=workers)
        return (time.perf_counter() - start) * 1e3

    lines = ["| threads of dask | of a kernel | statistics, ms | outputs, ms |", "|--:|--:|--:|--:|"]
    cases = [(workers, count) for workers in (1, 2) for count in (1, 2)]
    figures = {case: [] for case in cases}
    for _ in range(1 + rounds):
        for case in cases:
            figures[case].append([milliseconds(function, *case) for function in (statistics_of, output_of)])
    for case, measured in figures.items():
        cells = [*case, *(f"{statistics.median(column):.0f}" for column in zip(*measured[1:], strict=True))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the array (2)")
    parser.add_argument("--limit", type=int, default=600, help="memory of its own that a recipe may have, in MB (600)")
    parser.add_argument("--quick", action="store_true", help="20 MB, one round; the figures mean nothing")
    options = parser.parse_args()
    gigabytes, rounds = (0.02, 1) if options.quick else (options.gigabytes, 3)
    print(machine.in_words(machine.describe()) + "\n", flush=True)
    print(
        f"{gigabytes * 1e3:.0f} MB in blocks of {BLOCK * COLUMNS * 4 / 1e6:.0f} MB, limit {options.limit} MB\n",
        flush=True,
    )
    print(table(gigabytes, options.limit * 10**6, rounds) + "\n", flush=True)
    print(threads(BLOCK * (2 if options.quick else 32), 1 if options.quick else 15))


if __name__ == "__main__":
    main()
