"""What it takes to normalise an array that is larger than the memory that it may use: python -m bench.larger

Each recipe runs in a fresh process, on one and the same array in a file. The process may have half of the array's size
as memory of its own (RLIMIT_DATA). It says how long it took, without imports, and the most memory that it had at once,
pages of mapped files among it (VmHWM). The last two recipes are what one does without fastbn's, and have no limit. Then
the way through blocks in memory, by threads of dask and of the kernels. Needs dask and zarr; Linux only.
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
NPY, ZARR = 'x = da.from_array(Mapped("x.npy"), chunks=(BLOCK, -1))', 'x = da.from_zarr("x.zarr")'
LOOP = """
seen = fastbn.RunningStats(COLUMNS, momentum=None, unbiased=False)
parts = [slice(at, at + BLOCK) for at in range(0, x.shape[0], BLOCK)]
for part in parts:
    seen.update(fastbn.moments(x[part]))
np.lib.format.open_memmap("y.npy", "w+", x.dtype, x.shape)
for part in parts:
    fastbn.batch_norm(x[part], seen.mean, seen.var, out=np.load("y.npy", mmap_mode="r+")[part])
"""
RECIPES = {
    "moments, npy": (NPY, "moments(x).compute()"),
    "moments, Zarr": (ZARR, "moments(x).compute()"),
    "batch_norm, npy to npy stack": (NPY, 'da.to_npy_stack("y", batch_norm(x, training=True))'),
    "batch_norm, npy to Zarr": (NPY, 'batch_norm(x, training=True).to_zarr("y.zarr")'),
    "batch_norm, Zarr to Zarr": (ZARR, 'batch_norm(x, training=True).to_zarr("y.zarr")'),
    "BatchNormTransformer, Zarr to Zarr": (ZARR, 'BatchNormTransformer().fit(x).transform(x).to_zarr("y.zarr")'),
    "a loop without dask, npy to npy": ('x = Mapped("x.npy")', LOOP),
}
WITHOUT = {
    "dask's own (x - mean)/std, Zarr to Zarr": (ZARR, '((x - x.mean(0)) / x.std(0)).astype("f4").to_zarr("y.zarr")'),
    "in memory, npy to npy": ('x = np.load("x.npy")', 'np.save("y.npy", fastbn.batch_norm_forward(x, out=x)[0])'),
}
PROGRAM = """
import json, resource, time
import dask.array as da, numpy as np, zarr
import fastbn
from fastbn.estimators import BatchNormTransformer
from fastbn.interop.dask import batch_norm, moments

class Mapped:  # as docs/how-to/larger-than-memory.md has it
    def __init__(self, path):
        self.path, whole = path, np.load(path, mmap_mode="r")
        self.shape, self.dtype, self.ndim = whole.shape, whole.dtype, whole.ndim
    def __getitem__(self, index):
        return np.load(self.path, mmap_mode="r")[index]

BLOCK, COLUMNS, limit = {block}, {columns}, {limit}
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
start = time.perf_counter()
{opened}
{done}
seconds = time.perf_counter() - start
print(json.dumps([seconds, int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024]))
"""


def run(opened: str, done: str, limit: int, folder: Path) -> list[float]:
    """Seconds, and the most bytes."""
    program = PROGRAM.format(block=BLOCK, columns=COLUMNS, limit=limit, opened=opened, done=done)
    ran = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{done}: {ran.stderr.strip().splitlines()[-1]}")
    return json.loads(ran.stdout.splitlines()[-1])


def write_files(folder: Path, rows: int) -> None:
    """x.npy and x.zarr, of the same numbers, block by block."""
    rng = np.random.default_rng(0)
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (rows, COLUMNS))
    for at in range(0, rows, BLOCK):
        part = x[at : at + BLOCK]
        part[...] = rng.standard_normal(part.shape, dtype=np.float32)
        part += 5
    run(NPY, 'x.to_zarr("x.zarr")', 0, folder)


def measure(name: str, folder: Path, limit: int) -> list[float]:
    """A recipe in a folder of its own, in which the array's files are."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for file in ("x.npy", "x.zarr"):
            (Path(work) / file).symlink_to(folder / file)
        return run(*WITHOUT[name], 0, Path(work)) if name in WITHOUT else run(*RECIPES[name], limit, Path(work))


def table(megabytes: float, limit: int, rounds: int) -> str:
    """Markdown: a row for each recipe; medians of several rounds."""
    names = [*RECIPES, *WITHOUT]
    lines = ["| | seconds | peak memory, MB |", "|---|--:|--:|"]
    with tempfile.TemporaryDirectory() as made:
        write_files(Path(made), round(megabytes * 1e6) // (4 * COLUMNS))
        figures = [[measure(name, Path(made), limit) for name in names] for _ in range(rounds)]
    for name, measured in zip(names, zip(*figures, strict=True), strict=True):
        seconds, most = map(statistics.median, zip(*measured, strict=True))
        lines.append(f"| {name} | {seconds:.1f} | {most / 1e6:.0f} |")
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
    parser.add_argument("--megabytes", type=float, default=2000, help="size of the array (2000)")
    parser.add_argument("--quick", action="store_true", help="50 MB, one round; the figures mean nothing")
    options = parser.parse_args()
    megabytes, rounds = (50, 1) if options.quick else (options.megabytes, 3)
    limit = max(megabytes * 10**6 // 2, 800 * 10**6)  # what the imports and some blocks take, too
    print(machine.in_words(machine.describe()) + "\n", flush=True)
    size = BLOCK * COLUMNS * 4 / 1e6
    print(f"{megabytes:.0f} MB in blocks of {size:.0f} MB; limit {limit / 1e6:.0f} MB\n", flush=True)
    print(table(megabytes, int(limit), rounds) + "\n", flush=True)
    print(threads(BLOCK * (2 if options.quick else 32), 1 if options.quick else 15))


if __name__ == "__main__":
    main()
