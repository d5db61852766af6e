"""Batch normalization as a NumPy user writes it who finds NumPy slow: twenty plain lines of numba.

Sums of x and x*x in float64 in one pass, then x*a + c: faster than an exact form, and exact enough for most data.
"""

from functools import cache
from typing import Any

import numpy as np

from bench.calls import Timed
from bench.cases import EPS, MOMENTUM, Arrays, Case

FAST = {"fastmath": True, "nogil": True}


def rows_sums(x, s, q):
    s[:] = 0
    q[:] = 0
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            v = np.float64(x[i, j])
            s[j] += v
            q[j] += v * v


def planes_sums(x, s, q):
    s[:] = 0
    q[:] = 0
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            a = b = 0.0
            for k in range(x.shape[2]):
                v = np.float64(x[i, j, k])
                a += v
                b += v * v
            s[j] += a
            q[j] += b


def rows_output(x, a, c, y):
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = x[i, j] * a[j] + c[j]


def planes_output(x, a, c, y):
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            p, r = a[j], c[j]
            for k in range(x.shape[2]):
                y[i, j, k] = x[i, j, k] * p + r


def rows_gradients(x, dy, mean, invstd, s, q):
    s[:] = 0
    q[:] = 0
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            d = np.float64(dy[i, j])
            s[j] += d
            q[j] += d * (x[i, j] - mean[j]) * invstd[j]


def planes_gradients(x, dy, mean, invstd, s, q):
    s[:] = 0
    q[:] = 0
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            a = b = 0.0
            m, v = mean[j], invstd[j]
            for k in range(x.shape[2]):
                d = np.float64(dy[i, j, k])
                a += d
                b += d * ((x[i, j, k] - m) * v)
            s[j] += a
            q[j] += b


def rows_dx(x, dy, a, p, r, dx):
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            dx[i, j] = dy[i, j] * a[j] + x[i, j] * p[j] + r[j]


def planes_dx(x, dy, a, p, r, dx):
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            aa, pp, rr = a[j], p[j], r[j]
            for k in range(x.shape[2]):
                dx[i, j, k] = dy[i, j, k] * aa + x[i, j, k] * pp + rr


def finish(s, q, count, weight, bias, mean, var, a, c):
    """Running averages, and what x is multiplied by and added to."""
    for j in range(s.size):
        m = s[j] / count
        v = q[j] / count - m * m
        mean[j] = (1 - MOMENTUM) * mean[j] + MOMENTUM * m
        var[j] = (1 - MOMENTUM) * var[j] + MOMENTUM * v * count / (count - 1)
        a[j] = weight[j] / np.sqrt(v + EPS)
        c[j] = bias[j] - m * a[j]


ROWS = rows_sums, rows_output, rows_gradients, rows_dx
PLANES = planes_sums, planes_output, planes_gradients, planes_dx


@cache
def compiled(*functions: Any) -> tuple[Any, ...]:
    """For one thread."""
    from numba import njit

    return tuple(njit(cache=True, **FAST)(function) for function in functions)


@cache
def on_threads(layout: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same four, each thread on its part of the first axis; sums are added up in the first row of (threads, C)."""
    from numba import njit, prange

    sums, output, gradients, dx = compiled(*layout)

    @njit(parallel=True, **FAST)
    def sums_parts(x, s, q):
        for t in prange(len(s)):
            sums(x[t * len(x) // len(s) : (t + 1) * len(x) // len(s)], s[t], q[t])
        for t in range(1, len(s)):
            s[0] += s[t]
            q[0] += q[t]

    @njit(parallel=True, **FAST)
    def output_parts(x, a, c, y, threads):
        for t in prange(threads):
            start, stop = t * len(x) // threads, (t + 1) * len(x) // threads
            output(x[start:stop], a, c, y[start:stop])

    @njit(parallel=True, **FAST)
    def gradients_parts(x, dy, mean, invstd, s, q):
        for t in prange(len(s)):
            start, stop = t * len(x) // len(s), (t + 1) * len(x) // len(s)
            gradients(x[start:stop], dy[start:stop], mean, invstd, s[t], q[t])
        for t in range(1, len(s)):
            s[0] += s[t]
            q[0] += q[t]

    @njit(parallel=True, **FAST)
    def dx_parts(x, dy, a, p, r, dx_out, threads):
        for t in prange(threads):
            start, stop = t * len(x) // threads, (t + 1) * len(x) // threads
            dx(x[start:stop], dy[start:stop], a, p, r, dx_out[start:stop])

    return sums_parts, output_parts, gradients_parts, dx_parts


def loops(case: Case, a: Arrays) -> Timed:
    """Into given arrays. Channels-last arrays as rows."""
    import numba

    threads, layout = case.threads, ROWS if case.channels_last or len(case.shape) == 2 else PLANES
    numba.set_num_threads(threads)
    x, dy, y, dx = (a.rows(array) for array in (a.x, a.dy, a.y, a.dx))
    if layout is PLANES:
        x, dy, y, dx = (array.reshape(*x.shape[:2], -1) for array in (x, dy, y, dx))
    features, count = x.shape[1], x.size // x.shape[1]
    sums, output, gradients, backward = compiled(*layout) if threads == 1 else on_threads(layout)
    s, q = np.zeros((2, threads, features))
    parts, more = ((s[0], q[0]), ()) if threads == 1 else ((s, q), (threads,))
    (finished,) = compiled(finish)

    def convert(result: np.ndarray) -> tuple[np.ndarray, ...]:
        first = result.reshape(a.x.shape)
        return (first, q[0], s[0]) if case.operation == "backward" else (first,)

    def train() -> np.ndarray:
        sums(x, *parts)
        finished(s[0], q[0], count, a.weight, a.bias, running_mean, running_var, scale, shift)
        output(x, scale, shift, y, *more)
        return y

    def infer() -> np.ndarray:
        output(x, scale, shift, y, *more)
        return y

    def back() -> np.ndarray:
        gradients(x, dy, mean, invstd, *parts)
        p[:] = -scale * invstd * (q[0] / count)
        r[:] = -scale * (s[0] / count) - p * mean
        backward(x, dy, scale, p, r, dx, *more)
        return dx

    mean, var = a.moments() if case.operation == "backward" else (a.mean, a.var)
    running_mean, running_var = a.mean.astype(np.float64), a.var.astype(np.float64)
    invstd = 1 / np.sqrt(var + a.x.dtype.type(EPS))
    scale, p, r = a.weight * invstd, np.empty_like(mean), np.empty_like(mean)
    shift = a.bias - mean * scale
    return {"train": train, "infer": infer, "backward": back}[case.operation], convert
