"""What a layer costs in multiples of NumPy's own passes over the same array. usage: python -m bench.ratios [THREADS]"""

import os
import sys

THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 1
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(THREADS)

import numpy as np

import fastbn
from bench.timing import interleaved

SHAPES = [(32, 64), (64, 100), (256, 256), (1024, 1024), (8192, 1024), (100_000, 3), (32, 64, 56, 56), (32, 256, 14, 14)]


def main() -> None:
    fastbn.set_num_threads(THREADS)
    fastbn.show_config()
    print(f"\nfloat32, preallocated outputs, {THREADS} thread(s); medians, interleaved\n")
    print(f"{'shape':<20}{'add us':>9}{'copy us':>9}{'train us':>10}  {'train/add':>9}{'train/copy':>11}{'infer/copy':>11}{'backward/copy':>14}")
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        x, dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
        y, dx = np.empty_like(x), np.empty_like(x)
        train, infer, back = (fastbn.BatchNorm(shape[1]) for _ in range(3))
        infer.eval()
        back(x)
        t = interleaved(
            {
                "add": lambda x=x, y=y: np.add(x, x, out=y),
                "copy": lambda x=x, y=y: np.copyto(y, x),
                "train": lambda x=x, y=y, layer=train: layer(x, out=y),
                "infer": lambda x=x, y=y, layer=infer: layer(x, out=y),
                "backward": lambda dy=dy, dx=dx, layer=back: layer.backward(dy, out=dx),
            }
        )
        print(
            f"{shape!s:<20}{t['add'] * 1e6:9.2f}{t['copy'] * 1e6:9.2f}{t['train'] * 1e6:10.2f}  {t['train'] / t['add']:9.2f}"
            f"{t['train'] / t['copy']:11.2f}{t['infer'] / t['copy']:11.2f}{t['backward'] / t['copy']:14.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
