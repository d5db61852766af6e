"""More than 2^31 elements. FASTBN_LARGE=1 asks for it: 20 GiB of memory, and some minutes."""

import os
from math import sqrt

import numpy as np
import pytest

import fastbn

pytestmark = pytest.mark.skipif(os.environ.get("FASTBN_LARGE") != "1", reason="FASTBN_LARGE=1 asks for it")
BEYOND = 2**31 + 2**16
# Beyond a C int: the number of rows, the length of a plane, and only all of them together.
SHAPES = {
    "rows": (BEYOND, 1),
    "planes": (2, 1, BEYOND // 2),
    "short rows": (BEYOND // 8, 8),
    "short planes": (BEYOND // 2**16, 8, 2**13),
    "wide rows": (256, BEYOND // 256),
}


@pytest.fixture(scope="module")
def numbers():
    """0, 1, 2, .. 250 again and again."""
    x = np.empty(BEYOND, "float32")
    block = (np.arange(251 * 2**14) % 251).astype("float32")
    for first in range(0, BEYOND, block.size):
        x[first : first + block.size] = block[: BEYOND - first]
    return x


@pytest.fixture(scope="module", params=list(SHAPES))
def large(numbers, request):
    shape = SHAPES[request.param]
    x = numbers[: np.prod(shape)].reshape(shape)
    return x, {c: exact(x, c) for c in (0, shape[1] - 1)}


def exact(x, c):
    """Mean and variance of a feature from how often it has each value, in whole numbers of any size."""
    counts = np.zeros(251, np.int64)
    for part in np.array_split(x[:, c].ravel(), 64):
        counts += np.bincount(part.astype(np.uint8), minlength=251)
    n, total, squares = (sum(int(count) * value**power for value, count in enumerate(counts)) for power in (0, 1, 2))
    return total / n, (squares * n - total**2) / n**2


@pytest.mark.parametrize("threads", [1, 2])
def test_more_elements_than_a_c_int_counts(large, threads):
    x, expected = large
    shape = x.shape
    # The parts that a wrong index would not reach, or would write twice.
    ends = np.unravel_index([0, 1, x.size // 2, 2**31 - 1, min(2**31, x.size - 1), x.size - 1], shape)
    weight, bias = np.linspace(1, 2, shape[1]), np.linspace(-1, 1, shape[1])
    with fastbn.threads(threads):
        y, stats = fastbn.batch_norm_forward(x, weight, bias, eps=1.0)
        for c, (mean, var) in expected.items():
            assert stats.mean[c] == pytest.approx(mean, rel=2**-51)
            assert stats.var[c] == pytest.approx(var, rel=2**-51)
        centred = x[ends] - stats.mean[ends[1]]
        scale = (weight / np.sqrt(stats.var + 1.0))[ends[1]]
        np.testing.assert_allclose(y[ends], centred * scale + bias[ends[1]], rtol=1e-6, atol=1e-6)
        del y
        # With dy = x: g - mean(g) - x_hat*mean(g*x_hat) = (x - mean)*eps/(var + eps).
        dx, dweight, dbias = fastbn.batch_norm_backward(x, x, stats, weight, bias, eps=1.0)
        np.testing.assert_allclose(dx[ends], centred * scale / (stats.var[ends[1]] + 1.0), rtol=1e-3)
        for c, (mean, var) in expected.items():
            n = x.size // shape[1]
            assert dbias[c] == pytest.approx(mean * n, rel=1e-12)
            # Terms of float32, whose errors do not cancel where x has 251 values.
            assert dweight[c] == pytest.approx(n * var / sqrt(var + 1.0), rel=8 * 2**-24)
