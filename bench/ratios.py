"""What a layer costs in multiples of NumPy's own passes over the same array. usage: python -m bench.ratios [THREADS]"""

import sys

import numpy as np

import fastbn
from bench.timing import interleaved

SHAPES = [
    (32, 64),
    (64, 100),
    (256, 256),
    (1024, 1024),
    (8192, 1024),
    (100_000, 3),
    (32, 64, 56, 56),
    (32, 256, 14, 14),
]


def main() -> None:
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    fastbn.set_num_threads(threads)
    fastbn.show_config()
    print(f"\nfloat32, preallocated outputs, {threads} thread(s); medians, interleaved\n")
    heads = ("add us", "copy us", "train us", "train/add", "train/copy", "infer/copy", "backward/copy")
    print(f"{'shape':<20}" + "".join(f"{head:>14}" for head in heads))
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
        figures = [t["add"] * 1e6, t["copy"] * 1e6, t["train"] * 1e6, t["train"] / t["add"]]
        figures += [t[name] / t["copy"] for name in ("train", "infer", "backward")]
        print(f"{shape!s:<20}" + "".join(f"{figure:14.2f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
