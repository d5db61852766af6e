"""The numerics contract on hard data, and the twin itself against rational arithmetic and finite differences."""

from fractions import Fraction

import numpy as np
import pytest
import twin
from hypothesis import given
from hypothesis import strategies as st
from test_exactness import GRADIENT
from test_functional import bounded, check_stats
from twin import within

import fastbn

DTYPES = ["float32", "float64"]
# shape of (n values of C features), by the view that it takes
VIEWS = {
    "one lane": (1, lambda n: (n, 1)),
    "folded rows": (3, lambda n: (n, 3)),
    "rows": (16, lambda n: (n, 16)),
    "wide rows": (70, lambda n: (n, 70)),
    "planes": (5, lambda n: (1, 5, n)),
    "short planes": (3, lambda n: (n // 2, 3, 2)),
}


def test_longdouble_is_wider_than_float64():
    """Where it is not (Windows, macOS on arm64), the twin is no oracle for float64 data."""
    if np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        pytest.skip("a longdouble wider than float64 is missing on this platform")
    assert np.finfo(np.longdouble).eps < 2.0**-60


def test_twin_against_rational_arithmetic():
    rng = np.random.default_rng(0)
    column = rng.standard_normal(60) + 1e6
    column[0] = 1e9
    exact = [Fraction(v) for v in column]
    mean = sum(exact) / 60
    var = sum((v - mean) ** 2 for v in exact) / 60
    stats = twin.statistics(column[:, None])
    std = float(var) ** 0.5
    high = float(stats.pivot[0])
    low = float(stats.pivot[0] - high)
    assert abs(Fraction(high) + Fraction(low) + Fraction(float(stats.shift[0])) - mean) < 1e-18 * std
    assert abs(Fraction(float(stats.var[0])) / var - 1) < 3e-16
    y, _ = twin.forward(column[:, None], stats)
    for k in range(60):
        truth = float((exact[k] - mean) / Fraction((float(var) + 1e-5) ** 0.5))
        assert abs(float(y[k, 0]) - truth) < 1e-15 * (1 + abs(truth))


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("training", [True, False])
def test_twin_gradients_against_finite_differences(activation, training):
    rng = np.random.default_rng(1)
    x, dy, direction = rng.standard_normal((3, 6, 4, 5)).astype(np.longdouble)
    weight, bias, dweight, dbias = rng.standard_normal((4, 4)).astype(np.longdouble)
    fixed = twin.statistics(x)

    def loss(t):
        moved = x + t * direction
        stats = twin.statistics(moved) if training else fixed
        y, _ = twin.forward(moved, stats, weight + t * dweight, bias + t * dbias, activation=activation)
        return (y * dy).sum()

    h = np.longdouble(1e-6)
    slope = (loss(h) - loss(-h)) / (2 * h)
    y, _ = twin.forward(x, fixed, weight, bias, activation=activation)
    (dx, dw, db), _ = twin.backward(dy, x, fixed, weight, activation=activation, y=y, training=training)
    expected = (dx * direction).sum() + (dw * dweight).sum() + (db * dbias).sum()
    assert abs(slope - expected) < 1e-9 * abs(expected)


def gradient_by_differences(f, x, dy, h):
    """d/dx of sum(f(x) * dy), one element at a time."""
    slopes = np.empty(x.shape)
    for k in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[k] += h
        down[k] -= h
        slopes[k] = ((f(up) - f(down)) * dy).sum() / (up[k] - down[k])
    return slopes


@pytest.mark.parametrize("shape", [(7, 3), (3, 4, 5)])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_gradients_against_finite_differences(shape, activation):
    rng = np.random.default_rng(2)
    x, dy = rng.standard_normal((2, *shape))
    weight, bias = rng.standard_normal((2, shape[1]))
    mean, var = rng.standard_normal(shape[1]), rng.uniform(1, 2, shape[1])

    def forward(x, weight=weight, bias=bias):
        return fastbn.batch_norm_forward(x, weight, bias, activation=activation)[0]

    def inference(x):
        return fastbn.batch_norm(x, mean, var, weight, bias, activation=activation)

    dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, fastbn.moments(x), weight, bias, activation=activation)
    close = {"rtol": 0, "atol": 2e-8}
    np.testing.assert_allclose(dx, gradient_by_differences(forward, x, dy, 1e-6), **close)
    np.testing.assert_allclose(dweight, by_vector(lambda w: forward(x, weight=w), weight, dy), **close)
    np.testing.assert_allclose(dbias, by_vector(lambda b: forward(x, bias=b), bias, dy), **close)

    bn = fastbn.BatchNorm(shape[1], dtype="float64", activation=activation).eval()
    bn.running_mean[...], bn.running_var[...], bn.weight[...], bn.bias[...] = mean, var, weight, bias
    assert (bn(x) == inference(x)).all()
    np.testing.assert_allclose(bn.backward(dy), gradient_by_differences(inference, x, dy, 1e-6), **close)


def by_vector(f, v, dy):
    h = 1e-6 * np.eye(len(v))
    return [((f(v + e) - f(v - e)) * dy).sum() / 2e-6 for e in h]


def columns():
    """name -> function of (rng, n, C) to (n, C) float64: data on which careless arithmetic fails."""

    def first_rows(rng, n, c, k, size):
        x = rng.standard_normal((n, c))
        x[:k] = size
        return x

    def last_row(rng, n, c):
        x = rng.standard_normal((n, c))
        x[-1] = -1e6
        return x

    def one_other(rng, n, c):
        x = np.full((n, c), 1e6)
        x[n // 2] += 1
        return x

    def far(mean):
        return lambda rng, n, c: rng.standard_normal((n, c)) + mean

    data = {f"mean/std {mean:g}": far(mean) for mean in (0, 1, -30, 1e3, -1e4, 1e5, 1e6)}
    return data | {
        "mean/std 1e6, small": lambda rng, n, c: (rng.standard_normal((n, c)) + 1e6) * 1e-9,
        "outlier first": lambda rng, n, c: first_rows(rng, n, c, 1, 1e6),
        "huge outlier first": lambda rng, n, c: first_rows(rng, n, c, 1, 1e12),
        "outlier first, far": lambda rng, n, c: first_rows(rng, n, c, 1, -1e6) + 1e4,
        "8 outliers first": lambda rng, n, c: first_rows(rng, n, c, min(8, n - 1), 1e6),
        "64 outliers first": lambda rng, n, c: first_rows(rng, n, c, min(64, n - 1), 1e6),
        "outlier last": last_row,
        "one other": one_other,
        "sorted": lambda rng, n, c: np.sort(rng.standard_normal((n, c)), 0),
        "sorted, far": lambda rng, n, c: np.sort(rng.standard_normal((n, c)), 0) + 5e4,
        "sorted down": lambda rng, n, c: -np.sort(rng.exponential(1, (n, c)), 0),
        "two values": lambda rng, n, c: np.where(rng.random((n, c)) < 0.8, 0.3, 0),
        "two values, rare": lambda rng, n, c: np.where(rng.random((n, c)) < 1e-3, 1e3, 0.1),
        "skewed": lambda rng, n, c: np.exp(3 * rng.standard_normal((n, c))),
        "1e-15": lambda rng, n, c: rng.standard_normal((n, c)) * 1e-15,
        "1e-25": lambda rng, n, c: rng.standard_normal((n, c)) * 1e-25,
        "1e15": lambda rng, n, c: rng.standard_normal((n, c)) * 1e15,
        "1e30": lambda rng, n, c: rng.standard_normal((n, c)) * 1e30,
        "9.9e36": lambda rng, n, c: rng.uniform(-9.9e36, 9.9e36, (n, c)),
        "9.9e36 far": lambda rng, n, c: rng.uniform(9.8e36, 9.9e36, (n, c)),
        "1e150": lambda rng, n, c: rng.uniform(-9.9e149, 9.9e149, (n, c)),
        "mixed scales": lambda rng, n, c: rng.standard_normal((n, c)) * 10.0 ** np.linspace(-12, 12, c) + 1,
    }


DATA = columns()


def check_contract(x, weight, bias):
    """Forward 5u, statistics, gradient 8u."""
    dtype, u = x.dtype.name, twin.unit(x.dtype)
    y, stats = fastbn.batch_norm_forward(x, weight, bias)
    truth = check_stats(stats, x, 1, dtype)
    within(y, *bounded(5 * u, twin.forward(x, truth, weight, bias)))
    dy = np.random.default_rng(9).standard_normal(x.shape).astype(dtype)
    dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, stats, weight, bias)
    results, sizes = twin.backward(dy, x, truth, weight)
    for got, true, size in zip((dx, dweight, dbias), results, sizes, strict=True):
        within(got, true, GRADIENT[dtype] * u * size)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_on_hard_data(dtype, name, view):
    if (dtype, name) == ("float32", "1e150"):
        dtype, name = "float64", "1e30"  # out of the range of float32
    rng = np.random.default_rng(3)
    c, shape = VIEWS[view]
    n = 2000 if c < 20 else 300
    x = DATA[name](rng, n, c).astype(dtype)
    if view == "planes":
        x = np.ascontiguousarray(x.T).reshape(shape(n))
    elif view == "short planes":
        x = np.ascontiguousarray(x.reshape(n // 2, 2, c).swapaxes(1, 2))
    assert x.shape == shape(n)
    check_contract(x, None, None)
    weight, bias = np.resize([1.7, -1e-3, 0, 30], c), np.resize([-0.3, 0, 0.7, 1e-2, 5], c)
    check_contract(x, weight.astype(dtype), bias.astype(dtype))


def periodic(period):
    """Rows that repeat: where sums are cut at a multiple of the period, rounding errors repeat and do not cancel."""
    return lambda rng, n, c: np.resize(rng.standard_normal((period, c)), (n, c))


FEW_VALUES = {
    "two values": lambda rng, n, c: np.where(rng.random((n, c)) < rng.random(c), rng.random(c), rng.random(c)),
    "a step": lambda rng, n, c: np.where(np.arange(n)[:, None] < n * rng.random(c), rng.random(c), rng.random(c)),
    "pixels": lambda rng, n, c: np.round(rng.random((n, c)) ** 4 * 255) / 255,
    **{f"period {period}": periodic(period) for period in (2, 3, 4, 8, 16)},
}


@pytest.mark.parametrize("n", [8, 16, 64, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", FEW_VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_on_few_values_in_many_features(dtype, name, n):
    """Many features at once, since the worst of a thousand is far from the usual one."""
    x = FEW_VALUES[name](np.random.default_rng(5), n, 1000).astype(dtype)
    x = np.ascontiguousarray(x[:, (x != x[0]).any(0)])
    check_contract(x, None, None)
    check_contract(np.ascontiguousarray(x.T)[None], None, None)


@pytest.mark.parametrize(("n", "c"), [(8, 1000), (64, 1000), (4000, 250)])
@pytest.mark.parametrize("outlier", ["dy", "x and dy", "sparse dy", "large mean of dy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_uneven_dy(dtype, outlier, n, c):
    """The terms of dx have very different sizes here, and x* is mostly small where mean|dy x*| is large."""
    rng = np.random.default_rng(6)
    x, dy = rng.standard_normal((2, n, c))
    if outlier == "sparse dy":
        dy *= rng.random((n, c)) < 3 / n
    elif outlier == "large mean of dy":
        dy += 1e3
    else:
        dy[0] *= 1e4
        x[0] = 1e3 if "x" in outlier else x[0]
    x, dy = x.astype(dtype), dy.astype(dtype)
    stats, u = fastbn.moments(x), twin.unit(dtype)
    results, sizes = twin.backward(dy, x, twin.statistics(x))
    for got, true, size in zip(fastbn.batch_norm_backward(dy, x, stats), results, sizes, strict=True):
        within(got, true, GRADIENT[dtype] * u * size)


@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 33, 100_000])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_at_every_batch_size(dtype, view, n):
    c, shape = VIEWS[view]
    if c * n > 2**20:
        n = 2**20 // c
    n += n % 2 if view == "short planes" else 0
    x = np.random.default_rng(n).standard_normal(shape(n)) * 2 + 1e4
    check_contract(x.astype(dtype), np.linspace(-2, 2, c).astype(dtype), np.ones(c, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2**20, 1), (1, 4, 2**18)])
def test_contract_at_a_million_values(dtype, shape):
    x = np.random.default_rng(4).exponential(1, shape) + 1e3
    check_contract(x.astype(dtype), None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("n", [2, 10, 50, 1000, 4098])
def test_a_constant_feature_gives_exactly_its_bias(dtype, view, n):
    c, shape = VIEWS[view]
    values = [0.1, -1 / 3, 1e6 + 0.1, -3e-20, 7e30, 9.99e36, 0, 1e-40] + ([1e149] if dtype == "float64" else [])
    bias = np.linspace(-2.3, 2.9, c).astype(dtype)
    for value in values:
        x = np.full(shape(n), value, dtype)
        y, stats = fastbn.batch_norm_forward(x, np.full(c, 3.3, dtype), bias)
        assert (np.moveaxis(y, 1, -1) == bias).all(), value
        assert (stats.var == 0).all(), value
        assert (stats.mean == x.flat[0]).all(), value
        assert (stats.mean_low == 0).all(), value
        assert (fastbn.batch_norm(x, stats.mean, stats.var, None, bias) == y).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_features_among_others(dtype):
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((500, 40)) * 10 + 3).astype(dtype)
    x[:, ::3] = rng.standard_normal(14).astype(dtype)
    y, stats = fastbn.batch_norm_forward(x, None, np.full(40, 0.7, dtype))
    assert (y[:, ::3] == np.asarray(0.7, dtype)).all()
    assert (stats.var[::3] == 0).all()
    assert (stats.var[1::3] > 1).all()


@pytest.mark.parametrize(("dtype", "value"), [("float32", 9.9e36), ("float64", 9.9e149)])
@pytest.mark.parametrize("shape", [(64, 4), (4096, 3), (2, 4, 5000)])
def test_nothing_overflows_within_the_range(dtype, value, shape):
    x = np.random.default_rng(6).choice([-value, value], shape).astype(dtype)
    bn = fastbn.BatchNorm(shape[1], dtype=dtype)
    with np.errstate(all="raise"):
        assert np.isfinite(bn(x)).all()
        assert np.isfinite(bn.backward(np.ones_like(x))).all()
    assert np.isfinite(bn.running_mean).all()
    assert np.isfinite(bn.running_var).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0, 1, 1e3, 1e6, -1e6])
def test_inference_far_from_zero(dtype, ratio):
    rng = np.random.default_rng(7)
    mean, var = ratio + rng.uniform(0, 1, 20), rng.uniform(0.5, 2, 20)
    x = (mean + rng.standard_normal((100, 20))).astype(dtype)
    weight, bias = rng.standard_normal((2, 20)).astype(dtype)
    expected, measure = twin.forward(x, twin.given(mean, var), weight, bias)
    y = fastbn.batch_norm(x, mean, var, weight, bias)
    within(y, expected, 5 * twin.unit(dtype) * measure)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0, 1e3])
def test_eps_stands_beside_the_variance(eps):
    x = (np.random.default_rng(8).standard_normal((50, 3)) * 1e-3).astype("float32")
    y, stats = fastbn.batch_norm_forward(x, eps=eps)
    truth = twin.statistics(x)
    within(y, *bounded(5 * twin.unit("float32"), twin.forward(x, truth, eps=eps)))
    (dx, dw, _), (dx_size, dw_size, _) = twin.backward(y, x, truth, eps=eps)
    got, got_weight, _ = fastbn.batch_norm_backward(y, x, stats, eps=eps)
    within(got, dx, 8 * twin.unit("float32") * dx_size)
    within(got_weight, dw, 8 * twin.unit("float32") * dw_size)


finite = {
    "float32": st.floats(-(2.0**119), 2.0**119, width=32, allow_subnormal=False),
    "float64": st.floats(-1e149, 1e149, allow_subnormal=False),
}


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_contract_on_generated_data(dtype, data):
    c, n = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 12))
    column = st.lists(finite[dtype], min_size=n, max_size=n)
    x = np.array(data.draw(st.lists(column, min_size=c, max_size=c)), dtype).T
    centre = data.draw(st.sampled_from([0, 1, -1e3, 1e6]))
    if centre:
        # Values from tiny to huge give ratios of about 1; a common centre gives the large ones.
        x = (np.sign(x) * np.minimum(abs(x), 3) + centre).astype(dtype)
    if data.draw(st.booleans()):
        x = np.ascontiguousarray(x.T)[None]
    y, stats = fastbn.batch_norm_forward(x)
    truth = check_stats(stats, x, 1, dtype)
    within(y, *bounded(5 * twin.unit(dtype), twin.forward(x, truth)))


def all_results(x, dy, mean, var, activation):
    """Everything that these statistics are used for, features last, by name."""
    found = {"y": np.moveaxis(fastbn.batch_norm(x, mean, var, activation=activation), 1, -1)}
    for training in (True, False):
        stats = fastbn.BatchStats(mean, var, x.size // x.shape[1])
        dx, *sums = fastbn.batch_norm_backward(dy, x, stats, training=training, activation=activation)
        found |= {f"dx {training}": np.moveaxis(dx, 1, -1), f"sums {training}": np.array(sums)}
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 300), (5, 6), (3, 20, 7), (2, 9, 500), (700, 900)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("bad", [-1e-5, -1.0, np.nan])
def test_a_feature_without_a_scale_harms_itself_alone(dtype, shape, activation, bad, capfd):
    """Where var + eps is no positive number, y and dx of that feature are infinities and NaN; the others stay."""
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    mean, var = rng.standard_normal(shape[1]), rng.uniform(0.5, 2, shape[1])
    expected = all_results(x, dy, mean, var, activation)
    var[3] = bad
    found = all_results(x, dy, mean, var, activation)
    others = np.arange(shape[1]) != 3
    for name, value in found.items():
        size = abs(expected[name]).max()
        np.testing.assert_allclose(
            value[..., others], expected[name][..., others], 0, 20 * twin.unit(dtype) * size, err_msg=name
        )
    assert not np.isfinite(found["dx True"][..., 3]).any()
    assert activation == "relu" or not np.isfinite(found["y"][..., 3]).any()
    assert capfd.readouterr().err == ""
