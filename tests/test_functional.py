"""moments, batch_norm, batch_norm_forward, batch_norm_backward against the twin, over every pair of settings."""

import gc
import re
import sys

import conftest
import numpy as np
import pytest
import twin
from twin import within

import fastbn

STD_RTOL = {"float32": 1e-7, "float64": 8 * 2.0**-53}  # the contract's for float32; for float64 it has none but y's


def check_stats(stats, x, axis, dtype):
    """BatchStats against the twin, as the numerics contract has it."""
    truth = twin.statistics(x, axis)
    std = np.sqrt(truth.var)
    assert stats.mean.dtype == stats.mean_low.dtype == stats.var.dtype == np.float64
    assert np.all(stats.count == truth.count)
    # mean + mean_low is wider than longdouble where the pivot is large, so the pivot comes off first.
    mean = (stats.mean - truth.pivot) + stats.mean_low
    within(mean.astype(np.float64), truth.shift.astype(np.float64), STD_RTOL[dtype] * std)
    within(np.sqrt(stats.var), std, STD_RTOL[dtype] * std)
    return truth


def test_every_possible_pair_of_settings_has_a_case():
    assert set(conftest.IMPOSSIBLE) == {
        (("layout", "readonly"), ("out", "in_place")),
        (("layout", "swapped"), ("out", "in_place")),
        (("c", 1000), ("s", 3136)),
        (("s", 1), ("m", 1)),
        (("s", 3136), ("m", 1000)),
    }


def test_moments(case, unchanged):
    unchanged(case.x)
    stats = fastbn.moments(case.x, case.axis)
    check_stats(stats, case.x, case.axis, case.dtype)


def test_masked_moments_are_those_of_the_positions_that_count(case, unchanged):
    rng = np.random.default_rng(0)
    shape = np.delete(case.x.shape, case.axis)
    mask = rng.random(shape) < 0.7
    mask.flat[:2] = True
    unchanged(case.x, mask)
    stats = fastbn.moments(case.x, case.axis, mask=mask)
    chosen = np.moveaxis(case.x, case.axis, 0)[:, mask]
    assert np.all(stats.count == mask.sum())
    check_stats(stats, chosen, 0, case.dtype)


def test_masks():
    x = np.arange(12.0).reshape(6, 2)
    nothing = fastbn.moments(x, mask=np.zeros(6, bool))
    assert np.all(nothing.count == 0)
    assert np.isnan(nothing.mean).all()
    one = fastbn.moments(x, mask=[False, False, True, False, False, False])
    assert (one.mean == x[2]).all()
    assert (one.var == 0).all()
    whole, plain = fastbn.moments(x, mask=np.ones(6, bool)), fastbn.moments(x)
    assert (whole.mean == plain.mean).all()
    assert (whole.var == plain.var).all()
    x[3] = np.nan
    assert np.isfinite(fastbn.moments(x, mask=np.arange(6) != 3).var).all()
    for wrong in (np.ones(5, bool), np.ones((6, 2), bool), np.ones(2, bool), True):
        with pytest.raises(ValueError, match=r"mask.*\(6,\)"):
            fastbn.moments(x, mask=wrong)
    for wrong in (np.ones(6), np.arange(6)):
        with pytest.raises(TypeError, match=r"mask.*bool"):
            fastbn.moments(x, mask=wrong)


def test_moments_are_immutable():
    stats = fastbn.moments(np.arange(6.0).reshape(3, 2))
    for name in ("mean", "mean_low", "var", "count"):
        with pytest.raises(AttributeError):
            setattr(stats, name, 0)
    for array in (stats.mean, stats.mean_low, stats.var):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_moments_share_no_memory_with_later_ones():
    x = np.arange(6.0).reshape(3, 2)
    first = fastbn.moments(x)
    kept = first.mean.copy()
    fastbn.moments(x + 1)
    assert (first.mean == kept).all()


def test_batch_norm_forward(case, unchanged):
    original, x = case.x, case.fresh_x()
    unchanged(case.weight, case.bias, None if case.out == "in_place" else x)
    out = case.where_to(x)
    y, stats = fastbn.batch_norm_forward(x, case.weight, case.bias, **case.options, out=out)
    case.check_result(y, out, case.x)
    truth = check_stats(stats, original, case.axis, case.dtype)
    within(y, *bounded(5 * case.u, twin.forward(original, truth, case.weight, case.bias, **case.options)))


def bounded(u, result):
    expected, measure = result
    return expected, u * measure


@pytest.mark.parametrize("unbiased", [True, False])
def test_batch_norm_training(case, unbiased, unchanged):
    x = case.fresh_x()
    unchanged(case.weight, case.bias, None if case.out == "in_place" else x)
    mean, var = np.linspace(-2, 3, case.c), np.linspace(0.5, 2, case.c)
    old_mean, old_var = mean.copy(), var.copy()
    out = case.where_to(x)
    y = fastbn.batch_norm(
        x, mean, var, case.weight, case.bias, True, 0.3, 1e-3, **case.options, unbiased=unbiased, out=out
    )
    case.check_result(y, out, case.x)
    truth = twin.statistics(case.x, case.axis)
    within(y, *bounded(5 * case.u, twin.forward(case.x, truth, case.weight, case.bias, 1e-3, **case.options)))
    batch_var = twin.unbiased(truth) if unbiased else truth.var
    rounding = 4 * 2.0**-53
    rtol = STD_RTOL[case.dtype]
    mean_bound = rtol * np.sqrt(truth.var) + rounding * (abs(old_mean) + abs(truth.mean))
    var_bound = 2 * rtol * batch_var + rounding * (old_var + batch_var)
    within(mean, twin.averaged(old_mean, truth.mean, 0.3), mean_bound)
    within(var, twin.averaged(old_var, batch_var, 0.3), var_bound)


def test_batch_norm_inference(case, unchanged):
    rng = np.random.default_rng(5)
    mean, var = rng.normal(0, 20, case.c), rng.uniform(0.1, 9, case.c)
    x = case.fresh_x()
    unchanged(mean, var, case.weight, case.bias, None if case.out == "in_place" else x)
    out = case.where_to(x)
    y = fastbn.batch_norm(x, mean, var, case.weight, case.bias, **case.options, out=out)
    case.check_result(y, out, case.x)
    stats = twin.given(mean, var)
    within(y, *bounded(5 * case.u, twin.forward(case.x, stats, case.weight, case.bias, **case.options)))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_backward(case, training, unchanged):
    y, stats = fastbn.batch_norm_forward(case.x, case.weight, case.bias, **case.options)
    # In place means into dy; dy then lies in memory as it likes, not as x does.
    dy = case.dy.copy()
    in_place = case.out == "in_place"
    unchanged(case.x, case.weight, case.bias, None if in_place else dy)
    out = dy if in_place else case.where_to(case.x)
    dx, dweight, dbias = fastbn.batch_norm_backward(
        dy, case.x, stats, case.weight, case.bias, training=training, **case.options, out=out
    )
    assert dx.dtype == np.dtype(case.dtype)
    assert dx.shape == case.x.shape
    assert out is None or dx is out
    truth = twin.statistics(case.x, case.axis)
    (dx_true, dw_true, db_true), (dx_size, dw_size, db_size) = twin.backward(
        case.dy, case.x, truth, case.weight, y=y, training=training, **case.options
    )
    within(dx, dx_true, 8 * case.u * dx_size)
    assert dweight.dtype == dbias.dtype == np.float64
    within(dweight, dw_true, 8 * case.u * dw_size)
    within(dbias, db_true, 8 * case.u * db_size)


@pytest.mark.parametrize(("activation", "slope"), [(None, 1), ("relu", 0), ("leaky_relu", 0.01)])
def test_the_gradient_at_zero_is_the_one_below_it(activation, slope):
    """As PyTorch's: where the output before the activation is exactly 0, the activation is off."""
    x, dy = np.random.default_rng(0).standard_normal((2, 40, 3))
    y, stats = fastbn.batch_norm_forward(x, np.zeros(3), np.zeros(3), activation=activation)
    assert (y == 0).all()
    options = {"weight": np.zeros(3), "bias": np.zeros(3), "activation": activation}
    for training in (True, False):
        _, _, dbias = fastbn.batch_norm_backward(dy, x, stats, **options, training=training)
        np.testing.assert_allclose(dbias, slope * dy.sum(0), rtol=1e-13)


def test_float64_weights_do_not_widen_a_float32_result():
    x = np.random.default_rng(0).standard_normal((20, 3)).astype("float32")
    y, _ = fastbn.batch_norm_forward(x, np.ones(3), np.zeros(3))
    assert y.dtype == np.float32


def test_empty_batches(empty_case):
    case = empty_case
    mean, var = np.linspace(-2, 3, case.c), np.linspace(0.5, 2, case.c)
    before = mean.copy(), var.copy()
    running = fastbn.RunningStats(case.c)
    for training in (True, False):
        out = case.where_to(case.x)
        y = fastbn.batch_norm(case.x, mean, var, case.weight, case.bias, training, **case.options, out=out)
        case.check_result(y, out, case.x)
    out = case.where_to(case.x)
    y, _ = fastbn.batch_norm_forward(case.x, case.weight, case.bias, running=running, **case.options, out=out)
    case.check_result(y, out, case.x)
    assert (mean == before[0]).all()
    assert (var == before[1]).all()
    assert running.num_batches == 0
    assert running.count == 0
    assert (running.mean == 0).all()
    assert (running.var == 1).all()
    stats = fastbn.moments(case.x, case.axis)
    assert np.all(stats.count == 0)
    assert stats.mean.shape == stats.var.shape == (case.c,)
    dx, dweight, dbias = fastbn.batch_norm_backward(
        case.dy, case.x, stats, case.weight, case.bias, **case.options, out=case.where_to(case.x)
    )
    case.check_result(dx, None, case.x)
    assert (dweight == 0).all()
    assert dweight.shape == (case.c,)
    assert (dbias == 0).all()
    assert dbias.shape == (case.c,)


@pytest.mark.parametrize("shape", [(0, 0), (5, 0), (2, 0, 3)])
def test_no_features(shape):
    x = np.empty(shape, np.float32)
    y, stats = fastbn.batch_norm_forward(x)
    assert y.shape == shape
    assert stats.mean.shape == (0,)
    assert fastbn.batch_norm(x, np.empty(0), np.empty(0)).shape == shape


def test_single_values_are_refused_in_training_and_taken_in_inference(single_case):
    case = single_case
    mean, var = np.linspace(-2, 3, case.c), np.linspace(0.5, 2, case.c)
    before = mean.copy(), var.copy()
    size = str(tuple(int(n) for n in case.x.shape))
    sentence = f"Expected more than 1 value per channel when training, got input size {size}"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        fastbn.batch_norm(case.x, mean, var, case.weight, case.bias, True, **case.options)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fastbn.batch_norm_forward(case.x, case.weight, case.bias, **case.options)
    assert (mean == before[0]).all()
    assert (var == before[1]).all()
    stats = fastbn.moments(case.x, case.axis)
    assert (stats.var == 0).all()
    assert np.all(stats.count == 1)
    assert (stats.mean == np.asarray(case.x, np.float64).ravel()).all()
    out = case.where_to(case.x)
    y = fastbn.batch_norm(case.x, mean, var, case.weight, case.bias, **case.options, out=out)
    case.check_result(y, out, case.x)
    stats = twin.given(mean, var)
    within(y, *bounded(5 * case.u, twin.forward(case.x, stats, case.weight, case.bias, **case.options)))


@pytest.mark.parametrize(
    "kind", [[[1, 2], [3, 5], [2, 2]], np.array([[1, 2], [3, 5], [2, 2]], np.int8), np.eye(3, 2) > 0]
)
def test_array_likes_integers_and_bools_become_float64(kind):
    y, stats = fastbn.batch_norm_forward(kind)
    x = np.asarray(kind).astype(np.float64)
    assert y.dtype == np.float64
    within(y, *bounded(5 * twin.unit("float64"), twin.forward(x, twin.statistics(x))))
    dx, _, _ = fastbn.batch_norm_backward(np.ones((3, 2), int), kind, stats)
    assert dx.dtype == np.float64
    assert fastbn.batch_norm(kind, [0, 0], [1, 1]).dtype == np.float64


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -4])
def test_every_axis(axis):
    x = np.random.default_rng(1).standard_normal((2, 3, 4, 5))
    y, stats = fastbn.batch_norm_forward(x, axis=axis)
    truth = check_stats(stats, x, axis, "float64")
    within(y, *bounded(5 * twin.unit("float64"), twin.forward(x, truth, axis=axis)))


def test_one_feature_axis_is_the_same_whichever_way_it_is_named():
    x = np.random.default_rng(1).standard_normal((2, 3, 4)).astype("float32")
    assert (fastbn.batch_norm_forward(x, axis=1)[0] == fastbn.batch_norm_forward(x, axis=-2)[0]).all()


def test_one_arithmetic_behind_every_name():
    """The functions and the layer give the very same bits."""
    rng = np.random.default_rng(2)
    for shape in ((40, 3), (64, 100), (4, 16, 7, 7), (2, 3, 3136)):
        x, dy = rng.standard_normal((2, *shape)).astype("float32")
        bn = fastbn.BatchNorm(shape[1], activation="relu")
        bn.weight[...], bn.bias[...] = rng.standard_normal((2, shape[1]))
        y, stats = fastbn.batch_norm_forward(x, bn.weight, bn.bias, activation="relu")
        mean, var = np.zeros(shape[1]), np.ones(shape[1])
        assert (fastbn.batch_norm(x, mean, var, bn.weight, bn.bias, True, activation="relu") == y).all()
        assert (bn(x) == y).all()
        assert (bn.running_mean == mean).all()
        assert (bn.running_var == var).all()
        moments = fastbn.moments(x)
        assert (moments.mean == stats.mean).all()
        assert (moments.mean_low == stats.mean_low).all()
        assert (moments.var == stats.var).all()
        dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, stats, bn.weight, bn.bias, activation="relu")
        assert (bn.backward(dy) == dx).all()
        assert (bn.grads["weight"] == dweight.astype("float32")).all()
        assert (bn.grads["bias"] == dbias.astype("float32")).all()
        bn.eval()
        assert (bn(x) == fastbn.batch_norm(x, mean, var, bn.weight, bn.bias, activation="relu")).all()


def test_training_without_running_statistics_uses_the_batch():
    x = np.random.default_rng(3).standard_normal((30, 4)).astype("float32")
    assert (fastbn.batch_norm(x, training=True) == fastbn.batch_norm_forward(x)[0]).all()


@pytest.mark.parametrize("momentum", [0.0, 1.0, 1.5, -0.25])
def test_any_finite_momentum_is_taken(momentum):
    x = np.random.default_rng(4).standard_normal((30, 4))
    mean, var = np.full(4, 2.0), np.full(4, 3.0)
    fastbn.batch_norm(x, mean, var, training=True, momentum=momentum)
    truth = twin.statistics(x)
    within(mean, twin.averaged(2, truth.mean, momentum), 1e-15 * 4)
    within(var, twin.averaged(3, twin.unbiased(truth), momentum), 1e-15 * 8)


@pytest.mark.parametrize("kind", ["float32", "strided", "swapped"])
def test_running_statistics_of_every_kind_are_updated(kind):
    x = np.random.default_rng(5).standard_normal((30, 4))
    expected = np.full(4, 2.0), np.full(4, 3.0)
    fastbn.batch_norm(x, *expected, training=True)
    make = {
        "float32": lambda a: a.astype("float32"),
        "strided": lambda a: np.repeat(a, 2)[::2],
        "swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    }[kind]
    mean, var = make(np.full(4, 2.0)), make(np.full(4, 3.0))
    fastbn.batch_norm(x, mean, var, training=True)
    for got, wide in zip((mean, var), expected, strict=True):
        assert (got == wide.astype(got.dtype)).all()


def test_out_may_be_another_array_on_the_memory_of_x():
    x = np.random.default_rng(6).standard_normal((30, 4)).astype("float32")
    expected, _ = fastbn.batch_norm_forward(x)
    out = x[...]
    y, _ = fastbn.batch_norm_forward(x, out=out)
    assert y is out
    assert (x == expected).all()


def test_no_reference_is_kept_or_lost():
    x, out = np.ones((2, 30, 4), "float32")
    weight = np.ones(4, "float32")
    running = fastbn.RunningStats(4)
    _, stats = fastbn.batch_norm_forward(x)
    held = x, out, weight, running, stats

    def calls():
        fastbn.batch_norm_forward(x, weight, weight, running=running, out=out)
        fastbn.batch_norm_backward(x, x, stats, weight, weight, out=out)
        fastbn.batch_norm(x, running.mean, running.var, weight, weight, out=out)
        fastbn.moments(x)
        with pytest.raises(ValueError, match="overlap"):
            fastbn.batch_norm_forward(x, weight, weight, running=running, out=x[::-1])
        with pytest.raises(ValueError, match="shape"):
            fastbn.batch_norm_backward(x, x, stats, weight, weight, out=out[1:])

    calls()
    before = [sys.getrefcount(a) for a in held]
    for _ in range(10):
        calls()
    gc.collect()
    assert [sys.getrefcount(a) for a in held] == before


def test_results_survive_what_made_them():
    """Outputs may come from a pool: a block is not handed out again while an array or a view on it lives."""
    x = np.random.default_rng(7).standard_normal((512, 256)).astype("float32")
    y, _ = fastbn.batch_norm_forward(x)
    view = y[3:9, ::2].T[1:]
    kept = view.copy()
    del y
    for shift in range(20):
        fastbn.batch_norm_forward(x + shift)[0][...] = -1
    assert (view == kept).all()
