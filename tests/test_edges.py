"""Nothing outside the arrays is read or written: here they end or begin where a page begins that nobody may touch.

As a script it makes the calls, and ends with a fault at the first such access: `python tests/test_edges.py`, on one
thread and on three; with a number behind it, on so many.
"""

import ctypes
import mmap
import sys

import numpy as np
import pytest

import fastbn
from fastbn import calls
from fastbn.kernels import machine

# Folded rows with and without a rest, rows of several blocks, short and long planes, a plane in pieces; lines, steps
# of lanes, and groups of four and of eight rows, that the shape fills, and that it misses by one element.
SHAPES = [(2, 1), (9, 1), (513, 1), (11, 3), (300, 5), (513, 7), (9, 16), (4, 63), (5, 64), (13, 65), (8, 129)]
SHAPES += [(257, 33), (5, 1009), (8, 1024), (9, 1041), (5, 2049), (2, 4097), (7, 3, 2), (9, 5, 15), (5, 70, 17)]
SHAPES += [(3, 9, 33), (4, 2, 49), (9, 33, 63), (3, 5, 64), (4, 3, 65), (2, 9, 127), (4, 5, 527), (3, 2, 1025)]
SHAPES += [(1, 2, 16_385), (2, 1, 16_399)]
# What is asked of the processor's family, at its ends: each way to write y, each distance at which lines are asked for.
SETTINGS = [
    {"stream_from_bytes": sys.maxsize, "stream_inference_from_bytes": sys.maxsize, "rows_at_once": 1},
    {
        "stream_from_bytes": 0,
        "stream_inference_from_bytes": 0,
        "read_ahead_bytes": 64,
        "read_ahead_in_planes_bytes": 64,
    },
    {"stream_from_bytes": 0, "stream_inference_from_bytes": 0, "batched_runs_below_elements": sys.maxsize},
    {
        "stream_from_bytes": sys.maxsize,
        "stream_inference_from_bytes": sys.maxsize,
        "rows_at_once": 4,
        "rows_at_once_to_bytes": sys.maxsize,
        "read_ahead_bytes": 1 << 20,
        "read_ahead_in_planes_bytes": 1 << 10,
        "write_ahead_bytes": 1 << 20,
        "write_ahead_to_bytes": sys.maxsize,
    },
]


def between_guards(a, at_end):
    """A copy of a that ends with its last page, or begins with its first; the pages around are protected."""
    page = mmap.PAGESIZE
    room = -(-a.nbytes // page) * page
    pages = mmap.mmap(-1, room + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for guard in (start, start + page + room):
        assert protect(guard, page, 0) == 0, ctypes.get_errno()
    offset = page + (room - a.nbytes if at_end else 0)
    placed = np.frombuffer(pages, a.dtype, a.size, offset).reshape(a.shape)
    placed[...] = a
    return placed


def results(x, dy, activation, threads, place):
    """What every kernel makes of one batch, with and without an array of its own for the output."""
    c = x.shape[1]
    weight, bias, mean, var = np.linspace(0.5, 2, 4 * c).reshape(4, c)
    layer = calls.Constants(c, weight, bias, mean=mean, var=var, activation=activation, num_threads=threads)
    given = calls.Constants(c, weight, bias, activation=activation, num_threads=threads)

    def out():
        return place(np.zeros_like(x))

    stats = calls.moments(given, place(x))
    dweight, dbias = calls.gradients(given, place(dy), place(x), stats)
    found = [stats.mean, stats.var, dweight, dbias]
    for y in (out(), None):
        a, da = place(x), place(dy)
        found += [calls.infer(layer, a, a if y is None else y)[0].copy()]
        a = place(x)
        found += [calls.forward(given, a, a if y is None else y, 0.1)[0].copy()]
        a = place(x)
        found += [calls.input_gradient(given, da, a, stats, dweight, dbias, out())]
        for training in (True, False):
            da = place(dy)
            found += calls.backward(given, da, a, stats, training, da if y is None else out())
    return [np.ascontiguousarray(a).tobytes() for a in found]


def check(threads=None):
    rng = np.random.default_rng(0)
    for i, (shape, dtype) in enumerate((shape, dtype) for shape in SHAPES for dtype in ("float32", "float64")):
        x, dy = rng.standard_normal((2, *shape)).astype(dtype)
        activation, count = [None, "relu", "leaky_relu"][i % 3], threads or 1 + i // 2 % 2 * 2
        expected = results(x, dy, activation, 1, np.copy)
        for numbers in SETTINGS:
            before = machine.set_settings(parallel_from_elements=0, read_ahead_from_bytes=0, **numbers)
            for at_end in (True, False):
                found = results(x, dy, activation, count, lambda a, at_end=at_end: between_guards(a, at_end))
                assert found == expected, (shape, dtype, activation, numbers, at_end)
            machine.set_settings(**before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows protects pages by another call")
@pytest.mark.parametrize("build", fastbn.kernels.BUILDS)
def test_nothing_outside_the_arrays_is_touched(build, python):
    done = python("-X", "faulthandler", __file__, FASTBN_ISA=build)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    check(*map(int, sys.argv[1:]))
