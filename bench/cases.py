"""What is measured: shapes, operations, their arrays, and what the right results are."""

from dataclasses import dataclass

import numpy as np

EPS = 1e-5
MOMENTUM = 0.1
OPERATIONS = ("train", "infer", "backward")
SHAPES = [
    (32, 64),
    (64, 100),
    (256, 256),
    (777, 333),
    (1024, 1024),
    (4096, 1000),
    (8192, 1024),
    (65536, 256),
    (1_000_000, 32),
    (100_000, 3),
    (64, 512, 7, 7),
    (16, 128, 1000),
    (32, 256, 14, 14),
    (8, 3, 224, 224),
    (32, 64, 56, 56),
    (128, 64, 56, 56),
]
ALSO_CHANNELS_LAST = SHAPES[-4:]
# (shape, channels_last)
LAYOUTS = [(shape, False) for shape in SHAPES] + [(shape, True) for shape in ALSO_CHANNELS_LAST]

# Far above what rounding does to any of them, far below what a wrong formula does.
TOLERANCE = {"float32": 5e-4, "float64": 1e-9}
# A check looks at as many features as hold about this many elements.
CHECKED = 500_000
PAGE = 4096


@dataclass(frozen=True)
class Case:
    """One operation on one array. `shape` is always (N, C, ...), also where the array lies channels-last."""

    shape: tuple[int, ...]
    channels_last: bool = False
    operation: str = "train"
    dtype: str = "float32"
    preallocated: bool = True
    offset: int | None = None  # bytes from a page's start to the arrays'; None: as NumPy makes them
    threads: int = 1
    cold: bool = False

    def __str__(self) -> str:
        words = [layout_name(self.shape, self.channels_last), self.operation]
        words += [self.dtype] * (self.dtype != "float32") + ["allocating"] * (not self.preallocated)
        words += [] if self.offset is None else [f"offset {self.offset}"]
        words += [f"{self.threads} threads"] * (self.threads > 1) + ["cold"] * self.cold
        return " ".join(words)


def layout_name(shape: tuple[int, ...], channels_last: bool) -> str:
    return f"{tuple(shape)}{' channels-last' if channels_last else ''}"


def empty(shape: tuple[int, ...], dtype: str, offset: int | None = 0) -> np.ndarray:
    """An array as NumPy gives it (large ones then begin 16 bytes behind a page's start), or one where told."""
    if offset is None:
        return np.empty(shape, dtype)
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(nbytes + PAGE + offset, np.uint8)
    start = -buffer.ctypes.data % PAGE + offset
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


class Arrays:
    """The arrays of a case. Those called x, dy, y and dx lie channels-last where the case says so, with C as last axis.

    x is (N, C, ...) or (N, ..., C), and so are dy and the outputs y and dx; weight, bias and the running mean and var
    are (C,). Nothing but y and dx may be written.
    """

    def __init__(self, shape: tuple[int, ...], channels_last: bool, dtype: str, offset: int | None) -> None:
        rng = np.random.default_rng(sum(shape))
        features = shape[1]
        self.axis = -1 if channels_last else 1
        lies = (shape[0], *shape[2:], features) if channels_last else shape
        self.x, self.dy, self.y, self.dx = (empty(lies, dtype, offset) for _ in range(4))
        rng.standard_normal(out=self.x, dtype=dtype)
        rng.standard_normal(out=self.dy, dtype=dtype)
        self.x += 1
        self.weight = rng.uniform(0.5, 1.5, features).astype(dtype)
        self.bias = rng.normal(0, 1, features).astype(dtype)
        self.mean = rng.normal(0, 1, features).astype(dtype)
        self.var = rng.uniform(0.5, 1.5, features).astype(dtype)
        some = max(1, min(features, CHECKED * features // self.x.size))
        self.some_features = np.unique(np.linspace(0, features - 1, some).astype(int))
        self._expected: dict[str, tuple[np.ndarray, ...]] = {}

    def rows(self, array: np.ndarray) -> np.ndarray:
        """Channels-last arrays as (M, C), for libraries that know no other such layout; the others as they are."""
        return array.reshape(-1, array.shape[-1]) if self.axis == -1 else array

    def columns(self, array: np.ndarray) -> np.ndarray:
        """Some features, float64, of shape (features, values of each)."""
        some = np.moveaxis(array, self.axis, 0)[self.some_features]
        return some.reshape(len(some), -1).astype(np.float64)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and 1/m variance of x, of shape (C,) and x's dtype, for what starts a backward of its own."""
        axes = tuple(i for i in range(self.x.ndim) if i != self.axis % self.x.ndim)
        return tuple(f(self.x, axes, dtype=np.float64).astype(self.x.dtype) for f in (np.mean, np.var))

    def expected(self, operation: str) -> tuple[np.ndarray, ...]:
        """Some columns of y, or of dx, dweight and dbias, in float64."""
        if operation not in self._expected:
            self._expected[operation] = self._in_float64(operation)
        return self._expected[operation]

    def _in_float64(self, operation: str) -> tuple[np.ndarray, ...]:
        x = self.columns(self.x)
        weight, bias, mean, var = (
            p[self.some_features, None].astype(np.float64) for p in (self.weight, self.bias, self.mean, self.var)
        )
        if operation != "infer":
            mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
        xhat = (x - mean) / np.sqrt(var + EPS)
        if operation != "backward":
            return (weight * xhat + bias,)
        dy = self.columns(self.dy)
        dx = weight / np.sqrt(var + EPS)
        dx = dx * (dy - dy.mean(1, keepdims=True) - xhat * (dy * xhat).mean(1, keepdims=True))
        return dx, (dy * xhat).sum(1), dy.sum(1)

    def check(self, operation: str, got: tuple[np.ndarray, ...]) -> None:
        """Raises AssertionError where (y,) or (dx, dweight, dbias) is not what float64 gives."""
        expected = self.expected(operation)
        tolerance = TOLERANCE[self.x.dtype.name]
        assert got[0].dtype == self.x.dtype, f"expected {self.x.dtype}, got {got[0].dtype}"
        assert got[0].shape == self.x.shape, f"expected shape {self.x.shape}, got {got[0].shape}"
        np.testing.assert_allclose(self.columns(got[0]), expected[0], tolerance, tolerance)
        assert len(got) == len(expected), f"expected {len(expected)} arrays, got {len(got)}"
        for sums, right in zip(got[1:], expected[1:], strict=True):  # of as many terms as a feature has values
            np.testing.assert_allclose(np.ravel(sums)[self.some_features], right, 0, tolerance * expected[0].shape[1])


_latest: dict[tuple, Arrays] = {}


def arrays(case: Case) -> Arrays:
    """The arrays of a case; made once for cases that follow each other on the same ones, and only those are kept."""
    key = (case.shape, case.channels_last, case.dtype, case.offset)
    if key not in _latest:
        _latest.clear()
        _latest[key] = Arrays(*key)
    return _latest[key]
