"""A call in halves, as statistics and gradients need that are summed over several arrays (over processes, say)."""

import numpy as np
import pytest
import twin
from test_exactness import GRADIENT
from twin import within

import fastbn
from fastbn import calls

SHAPES = [(40, 3), (300, 64), (33, 1000), (700, 333), (6, 70, 7), (12, 20, 49), (10, 30, 196), (2, 3, 50_000)]


def batch(shape, dtype):
    rng = np.random.default_rng(2)
    x, dy = (rng.standard_normal((2, *shape)) + 1).astype(dtype)
    weight, bias = rng.uniform(0.5, 1.5, (2, shape[1]))
    return x, dy, weight, bias


def constants(weight, bias, activation):
    return calls.Constants(len(weight), weight, bias, activation=activation)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_halves_of_one_array_have_the_bits_of_the_whole(shape, dtype, activation):
    x, dy, weight, bias = batch(shape, dtype)
    y, stats = fastbn.batch_norm_forward(x, weight, bias, activation=activation)
    dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, stats, weight, bias, activation=activation)
    by = constants(weight, bias, activation)
    assert calls.normalize(by, x, stats, None).tobytes() == y.tobytes()
    sums = calls.gradients(by, dy, x, stats)
    assert [s.tobytes() for s in sums] == [dweight.tobytes(), dbias.tobytes()]
    assert calls.input_gradient(by, dy, x, stats, *sums, None).tobytes() == dx.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_halves_of_two_arrays_are_those_of_both_together(shape, dtype):
    x, dy, weight, bias = batch(shape, dtype)
    cut = shape[0] // 3 + 1
    parts = [slice(0, cut), slice(cut, None)]
    stats = fastbn.moments(x)
    by, u = constants(weight, bias, "relu"), twin.unit(dtype)
    y = np.concatenate([calls.normalize(by, x[part], stats, None) for part in parts])
    expected, size = twin.forward(x, twin.statistics(x), weight, bias, activation="relu")
    within(y, expected, 5 * u * size)
    each = [calls.gradients(by, dy[part], x[part], stats) for part in parts]
    dweight, dbias = (sum(sums) for sums in zip(*each, strict=True))
    dx = np.concatenate([calls.input_gradient(by, dy[part], x[part], stats, dweight, dbias, None) for part in parts])
    results, sizes = twin.backward(dy, x, twin.statistics(x), weight, activation="relu", y=y)
    for got, true, size in zip((dx, dweight, dbias), results, sizes, strict=True):
        within(got, true, GRADIENT[dtype] * u * size)


def test_a_half_that_does_not_fit_is_refused():
    x, dy, weight, bias = batch((40, 3), "float32")
    stats, by = fastbn.moments(x), constants(weight, bias, None)
    with pytest.raises(ValueError, match=r"expected statistics of shape \(3,\), got \(2,\)"):
        calls.normalize(by, x, fastbn.moments(x[:, :2]), None)
    with pytest.raises(ValueError, match="expected dy of x's shape"):
        calls.gradients(by, dy[:5], x, stats)
    with pytest.raises(ValueError, match=r"expected dweight of shape \(3,\), got \(2,\)"):
        calls.input_gradient(by, dy, x, stats, weight[:2], bias, None)
