"""The cases that the tests of functions and layers share: every pair of settings occurs in one of them.

A test that takes the fixture `case` runs on each. Layouts are named for how x lies in memory.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import twin
from hypothesis import settings

import fastbn

# A shell that starts the tests in the background has Ctrl-C ignored, by them and by every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Modules that begin with an import of what fastbn itself does without.
NEEDS = {
    "bench": "matplotlib",
    "estimators": "sklearn",
    "estimators_training": "sklearn",
    "estimators_weights": "sklearn",
    "onnx": "onnx",
    "state": "joblib",
    "transformer": "sklearn",
}
collect_ignore = [f"test_{name}.py" for name, package in NEEDS.items() if find_spec(package) is None]
# Modules about a source tree, which an installed wheel is tried without.
if not Path(__file__).parents[1].joinpath("README.md").exists():
    collect_ignore += ["test_house.py", "test_docs.py"]

# They try what a process has one of: a number of threads, a pool, signals. pytest-run-parallel runs them one by one.
PROCESS_WIDE = {"test_leaks", "test_memory", "test_signals", "test_soak", "test_threads"}


# The default suite takes less than three minutes; with FASTBN_LONG=1, as in `.ci/run`, tests marked `long` run too.
LONG = os.environ.get("FASTBN_LONG") == "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "long: only with FASTBN_LONG=1")
    config.addinivalue_line("markers", "thread_unsafe(reason): never in several threads at once")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("long") and not LONG:
            item.add_marker(pytest.mark.skip(reason="FASTBN_LONG=1 asks for it"))
        if item.path.stem in PROCESS_WIDE:
            item.add_marker(pytest.mark.thread_unsafe(reason="it tries what the process has one of"))


settings.register_profile("fastbn", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("fastbn")

SPATIAL = {0: (0,), 1: (), 2: (2,), 7: (7,), 49: (7, 7), 3136: (56, 56)}


def _permuted(a, order):
    """a, with its axes lying in memory in this order."""
    return np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))


def _off_by(a, nbytes):
    buffer = np.empty(a.nbytes + 128, np.uint8)
    start = (-buffer.ctypes.data) % 64 + nbytes
    placed = buffer[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    placed[...] = a
    return placed


def _strided(a):
    big = np.full([2 * n + 1 for n in a.shape[:1]] + [n + 1 for n in a.shape[1:]], 7, a.dtype)
    x = big[(slice(1, None, 2), *[slice(1, None)] * (a.ndim - 1))]
    x[...] = a
    return x


def _negative(a):
    flip = (slice(None, None, -1),) * a.ndim
    return a[flip].copy()[flip]


def _readonly(a):
    a = a.copy()
    a.flags.writeable = False
    return a


# layout: (axis, function of an (M, C, ...) array)
LAYOUTS = {
    "c": (1, np.copy),
    "fortran": (1, np.asfortranarray),
    "channels_last": (1, lambda a: _permuted(a, [0, *range(2, a.ndim), 1])),
    "mixed": (1, lambda a: _permuted(a, [a.ndim - 1, *range(a.ndim - 1)])),
    "axis_last": (-1, lambda a: np.ascontiguousarray(np.moveaxis(a, 1, -1))),
    "axis_first": (0, lambda a: np.ascontiguousarray(np.moveaxis(a, 1, 0))),
    "strided": (1, _strided),
    "negative": (1, _negative),
    "swapped": (1, lambda a: a.astype(a.dtype.newbyteorder())),
    "readonly": (1, _readonly),
    "off_one": (1, lambda a: _off_by(a, a.itemsize)),
    "unaligned": (1, lambda a: _off_by(a, 1)),
}

FACTORS = {
    "dtype": ["float32", "float64"],
    "layout": list(LAYOUTS),
    "c": [1, 3, 16, 100, 1000],
    "s": [1, 2, 7, 49, 3136],
    "m": [1, 2, 33, 1000],
    "affine": ["none", "weight", "bias", "both"],
    "param_dtype": ["float32", "float64"],
    "activation": [None, "relu", "leaky_relu"],
    "out": ["fresh", "given", "given_strided", "in_place"],
}


def possible(row):
    """Rows with 2 values or more of each feature: the others have cases of their own, with nothing to compute."""
    sized = row["m"] * row["s"] > 1 and row["c"] * row["s"] * row["m"] <= 2**20
    return sized and not (row["out"] == "in_place" and row["layout"] in ("readonly", "swapped"))


def pairwise(factors, allowed):
    """Rows that hold every pair of settings that an allowed row can hold, and the pairs that none can (greedy)."""
    rng = random.Random(1)
    names = list(factors)

    def pairs(row):
        return set(itertools.combinations(((k, row[k]) for k in names), 2))

    every = itertools.combinations([(k, v) for k in names for v in factors[k]], 2)
    todo = {(a, b): None for a, b in every if a[0] != b[0]}  # a dict keeps the order that a set has not
    rows, impossible = [], []
    while todo:
        fixed = dict(next(iter(todo)))
        tries = [{k: fixed.get(k, rng.choice(v)) for k, v in factors.items()} for _ in range(100)]
        tries = [row for row in tries if allowed(row)]
        if not tries:
            impossible.append(tuple(fixed.items()))
            del todo[impossible[-1]]
            continue
        # Many new pairs first, then few numbers.
        rows.append(max(tries, key=lambda row: (sum(p in todo for p in pairs(row)), -row["c"] * row["s"] * row["m"])))
        for p in pairs(rows[-1]):
            todo.pop(p, None)
    return rows, impossible


ROWS, IMPOSSIBLE = pairwise(FACTORS, possible)
# No value, or a single one, of each feature.
FEW = FACTORS | {"c": [1, 3, 100], "s": [0, 1, 2], "m": [0, 1, 2], "affine": ["both"], "out": ["fresh", "given"]}
EMPTY_ROWS, _ = pairwise(FEW, lambda row: row["m"] * row["s"] == 0)
SINGLE_ROWS, _ = pairwise(FEW, lambda row: row["m"] == row["s"] == 1)


def label(row):
    return "-".join(str(v) for v in row.values())


class Case(SimpleNamespace):
    """One row of settings with its arrays: x, dy, weight, bias."""

    def __init__(self, row):
        super().__init__(**row)
        rng = np.random.default_rng(zlib.crc32(label(row).encode()))
        shape = (self.m, self.c, *SPATIAL[self.s])
        feature = (1, self.c) + (1,) * (len(shape) - 2)
        spread, centre = rng.uniform(0.5, 3, feature), rng.normal(0, 20, feature)
        x = rng.standard_normal(shape) * spread + centre
        self.axis, lay = LAYOUTS[self.layout]
        self.x = lay(x.astype(self.dtype))
        # dy need not lie in memory as x does.
        self.dy = np.moveaxis(rng.standard_normal(shape).astype(self.dtype), 1, self.axis)
        self.weight = rng.normal(1, 0.7, self.c).astype(self.param_dtype) if self.affine in ("weight", "both") else None
        self.bias = rng.normal(0, 1, self.c).astype(self.param_dtype) if self.affine in ("bias", "both") else None
        self.u = twin.unit(self.dtype)
        self.count = self.m * self.s
        self.options = {"axis": self.axis, "activation": self.activation}

    def where_to(self, x):
        """The `out=` of this case for an argument x."""
        if self.out == "given":
            return np.full(x.shape, np.nan, self.dtype)
        if self.out == "given_strided":
            return np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, self.dtype)[..., ::2]
        return x if self.out == "in_place" else None

    def fresh_x(self):
        """A copy of x that lies as x does, so that a call may overwrite it."""
        return LAYOUTS[self.layout][1](np.moveaxis(self.x, self.axis, 1).astype(self.dtype))

    def check_result(self, y, out, like):
        """What every result array owes: dtype, shape, `out=` itself or else the memory order of `like`."""
        assert y.dtype == np.dtype(self.dtype)
        assert y.shape == like.shape
        if out is not None:
            assert y is out
        elif y.size:
            order = np.empty_like(like, dtype=self.dtype)
            lies = [(a, b) for a, b, n in zip(y.strides, order.strides, y.shape, strict=True) if n > 1]
            assert all(a == b for a, b in lies), lies


CASES = {"case": ROWS, "empty_case": EMPTY_ROWS, "single_case": SINGLE_ROWS}


def pytest_generate_tests(metafunc):
    for name in CASES.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, CASES[name], indirect=True, ids=label)


@pytest.fixture
def case(request):
    return Case(request.param)


@pytest.fixture
def empty_case(request):
    return Case(request.param)


@pytest.fixture
def single_case(request):
    return Case(request.param)


@pytest.fixture(scope="session")
def python():
    """Runs another Python on the package that this one tests; gives what it did."""
    path = os.pathsep.join(filter(None, [str(Path(fastbn.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    inherited = {
        k: v
        for k, v in os.environ.items()
        if k not in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "FASTBN_ISA", "FASTBN_FAMILY")
    }

    def run(*args, **environment):
        env = {**inherited, "PYTHONPATH": path, **environment}
        return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def unchanged():
    """Checks, when the test ends, that these arrays hold the bytes that they held."""
    kept = []

    def keep(*arrays):
        kept.extend((a, a.tobytes()) for a in arrays if a is not None)

    yield keep
    assert all(a.tobytes() == before for a, before in kept), "an input was changed"
