"""pytest-benchmark suite, a group for each shape: python -m pytest bench"""

import numpy as np
import pytest

import fastbn

SHAPES = [(32, 64), (256, 256), (1024, 1024), (100_000, 3), (32, 256, 14, 14)]


@pytest.fixture(params=SHAPES, ids=str)
def arrays(request, benchmark):
    benchmark.group = str(request.param)
    x = np.random.default_rng(0).standard_normal(request.param, dtype=np.float32)
    with fastbn.threads(1):
        yield x, np.empty_like(x), fastbn.BatchNorm(request.param[1])


def normalized(x):
    axes = tuple(i for i in range(x.ndim) if i != 1)
    x = x.astype(np.float64)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)


def test_numpy_copy(benchmark, arrays):
    x, y, _ = arrays
    benchmark(np.copyto, y, x)
    assert (y == x).all()


def test_numpy_add(benchmark, arrays):
    x, y, _ = arrays
    benchmark(np.add, x, x, out=y)
    assert (y == 2 * x).all()


def test_training(benchmark, arrays):
    x, y, layer = arrays
    benchmark(layer, x, out=y)
    np.testing.assert_allclose(y, normalized(x), atol=1e-5)


def test_inference(benchmark, arrays):
    x, y, layer = arrays
    layer.eval()
    benchmark(layer, x, out=y)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), atol=1e-5)


def test_backward(benchmark, arrays):
    x, dx, layer = arrays
    dy = np.ones_like(x)
    layer(x)
    benchmark(layer.backward, dy, out=dx)
    assert abs(dx).max() < 1e-5
