"""Losses against the textbook formulas in long double, finite differences, and what bad input gets."""

import inspect

import numpy as np
import pytest

from fastbn import losses

LD = np.longdouble
ALL = [losses.softmax_cross_entropy, losses.mse, losses.sigmoid_cross_entropy]


def cross_entropy(z, t):
    z = z.astype(LD)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    onehot = np.eye(z.shape[1], dtype=LD)[t]
    return -np.log((p * onehot).sum(1)).mean(), (p - onehot) / len(z)


def squared_error(y, t):
    d = y.astype(LD) - t.astype(LD)
    return (d * d).mean(), 2 * d / d.size


def binary_cross_entropy(z, t):
    s, t = 1 / (1 + np.exp(-z.astype(LD))), t.astype(LD)
    return -(t * np.log(s) + (1 - t) * np.log(1 - s)).mean(), (s - t) / s.size


TWINS = dict(zip(ALL, [cross_entropy, squared_error, binary_cross_entropy], strict=True))


def example(loss, shape, dtype, scale=3.0):
    rng = np.random.default_rng(sum(shape))
    z = (scale * rng.standard_normal(shape)).astype(dtype)
    if loss is losses.softmax_cross_entropy:
        return z, rng.integers(0, shape[1], shape[0])
    return z, rng.random(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (60, 10), (1000, 3), (5, 2000)])
@pytest.mark.parametrize("loss", ALL, ids=lambda f: f.__name__)
def test_value_and_gradient_are_the_twins(loss, shape, dtype):
    z, t = example(loss, shape, dtype)
    kept = z.copy(), t.copy()
    value, gradient = loss(z, t)
    assert (z == kept[0]).all()
    assert (t == kept[1]).all()
    assert type(value) is float
    assert (gradient.shape, gradient.dtype) == (shape, dtype)
    expected, slope = TWINS[loss](z, t)
    u = np.finfo(dtype).eps / 2
    assert abs(value - expected) <= 16 * u * (1 + abs(expected))
    count = shape[0] if loss is losses.softmax_cross_entropy else z.size
    assert abs(gradient - slope).max() <= 16 * u * max(1, count * abs(slope).max()) / count


@pytest.mark.parametrize("loss", ALL, ids=lambda f: f.__name__)
def test_gradients_are_the_finite_differences(loss):
    z, t = example(loss, (6, 4), np.float64, scale=1.0)
    _, gradient = loss(z, t)
    for i in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[i] += 1e-6
        down[i] -= 1e-6
        assert gradient[i] == pytest.approx((loss(up, t)[0] - loss(down, t)[0]) / 2e-6, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_logits(dtype):
    top = np.finfo(dtype).max
    z = np.array([[1e4, 0, -1e4], [-1e30, 1e30, 0], [top, -top, 0]], dtype)
    with np.errstate(all="raise"):
        value, gradient = losses.softmax_cross_entropy(z, [0, 1, 0])
        assert value == 0
        assert not gradient.any()
        value, gradient = losses.softmax_cross_entropy(z[:1], [2])
        assert value == 2e4
        assert (gradient == [[1, 0, -1]]).all()
        value, gradient = losses.sigmoid_cross_entropy(z[:1], [[1, 0.5, 0]])
        assert value == pytest.approx(np.log(2) / 3)
        assert not gradient.any()
        value, gradient = losses.sigmoid_cross_entropy(z[:1], [[0, 0.5, 1]])
        assert value == pytest.approx((2e4 + np.log(2)) / 3)
        np.testing.assert_allclose(gradient, [[1 / 3, 0, -1 / 3]], rtol=1e-6)
    losses.mse(z, -z)  # no warning though it overflows


def test_small_losses_keep_their_digits():
    value, _ = losses.sigmoid_cross_entropy(np.array([40.0]), [1])
    assert value == pytest.approx(np.exp(-40.0), rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("loss", ALL, ids=lambda f: f.__name__)
def test_nan_and_inf_pass_without_a_warning(loss, dtype):
    with np.errstate(all="raise"):
        for odd in (np.nan, np.inf, -np.inf):
            z, t = example(loss, (4, 3), dtype)
            z[2, 1] = odd
            value, gradient = loss(z, t)
            assert not np.isnan(gradient[[0, 1, 3]]).any()
            assert not np.isfinite(value) or odd == -np.inf
            assert np.isnan(value) or not np.isnan(odd)


@pytest.mark.parametrize("loss", ALL, ids=lambda f: f.__name__)
def test_the_mean_of_many_float32_values_is_better_than_float32(loss):
    for n in (40_000, 50_000, 60_000):
        z, t = example(loss, (n, 2), np.float32, scale=1.0)
        assert loss(z, t)[0] == pytest.approx(float(TWINS[loss](z, t)[0]), rel=5e-9)
    assert losses.mse(np.array([1e25], np.float32), [0])[0] == pytest.approx(1e50)


def test_integers_and_other_dtypes():
    for t in ([0, 2], np.array([0, 2], np.uint8), np.array([0, 2], np.int16), np.array([0, 2], np.uint64)):
        value, gradient = losses.softmax_cross_entropy([[1, 2, 3], [3, 2, 1]], t)
        assert value == pytest.approx(np.log(np.exp([0, -1, -2]).sum()) + 2)
        assert gradient.dtype == np.float64
    assert losses.mse([1, 2], [0, 0])[1].dtype == np.float64
    z = np.ones((2, 3), np.float32)
    for loss in (losses.mse, losses.sigmoid_cross_entropy):
        for t in (np.zeros((2, 3)), np.zeros((2, 3), int), np.zeros((2, 3), bool)):
            assert loss(z, t)[1].dtype == np.float32
    assert losses.mse(np.float64(3), np.float64(1))[0] == 4


def test_any_memory_order():
    for loss in ALL:
        z, t = example(loss, (6, 4), np.float64)
        expected, slope = loss(z, t)
        for other in (np.asfortranarray(z), np.repeat(z, 2, 1)[:, ::2], np.broadcast_to(z, z.shape)):
            value, gradient = loss(other, t)
            assert value == pytest.approx(expected, rel=1e-14)
            np.testing.assert_allclose(gradient, slope, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("label", [-1, 3, 200])
def test_labels_out_of_range(label):
    with pytest.raises(ValueError, match=rf"0 to 2 for K = 3 classes, got {label}"):
        losses.softmax_cross_entropy(np.zeros((2, 3)), np.array([0, label]))


def test_bad_arguments():
    z = np.zeros((2, 3))
    for t in ([0, 1, 2], [[0], [1]], 0, np.eye(3, dtype=int)[:2]):
        with pytest.raises(ValueError, match=r"labels \(N,\), got \(2, 3\) and"):
            losses.softmax_cross_entropy(z, t)
    with pytest.raises(ValueError, match=r"prediction \(N, K\)"):
        losses.softmax_cross_entropy(np.zeros(3), [0, 0, 0])
    for t in ([0.0, 1.0], [True, False], ["a", "b"]):
        with pytest.raises(TypeError, match="integer labels, got"):
            losses.softmax_cross_entropy(z, t)
    for loss in (losses.mse, losses.sigmoid_cross_entropy):
        for shape in [(3,), (2, 1), (1, 2, 3)]:
            with pytest.raises(ValueError, match=r"shape \(2, 3\), got \("):
                loss(z, np.zeros(shape))
        with pytest.raises(TypeError, match="complex"):
            loss(z, np.zeros((2, 3), complex))
    for t in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"targets within \[0, 1\], got"):
            losses.sigmoid_cross_entropy([0.0], [t])


@pytest.mark.parametrize("loss", ALL, ids=lambda f: f.__name__)
def test_empty_batch_and_wrong_type(loss):
    empty = (np.zeros((0, 3)), np.zeros(0, int) if loss is losses.softmax_cross_entropy else np.zeros((0, 3)))
    with pytest.raises(ValueError, match="empty batch"):
        loss(*empty)
    for dtype in (np.float16, complex, object):
        with pytest.raises(TypeError, match="float32"):
            loss(np.zeros((2, 3), dtype), [0, 0])
    assert list(inspect.signature(loss).parameters) == ["prediction", "target", "sample_weight"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (60, 10), (300, 3)])
@pytest.mark.parametrize("loss", ALL, ids=lambda f: f.__name__)
def test_weights_that_are_counts_are_repeated_rows(loss, shape, dtype):
    z, t = example(loss, shape, dtype)
    counts = np.random.default_rng(0).integers(1, 4, shape[0])
    counts[1:3] = 0
    value, gradient = loss(z, t, counts)
    expected, slope = TWINS[loss](z.repeat(counts, axis=0), t.repeat(counts, axis=0))
    share = counts.sum() / shape[0]  # the mean is over the rows, not over the counts
    u = float(np.finfo(dtype).eps / 2)
    assert value == pytest.approx(float(expected * share), rel=32 * u)
    assert gradient.dtype == dtype
    first = np.cumsum(counts) - counts  # each row's first repetition
    for i in range(shape[0]):
        row = slope[first[i]] * counts[i] * share if counts[i] else np.zeros(shape[1])
        np.testing.assert_allclose(gradient[i], row.astype(dtype), rtol=64 * u, atol=64 * u / z.size)


@pytest.mark.parametrize("loss", ALL, ids=lambda f: f.__name__)
def test_weights_leave_what_they_do_not_change(loss):
    for dtype in (np.float32, np.float64):
        z, t = example(loss, (60, 10), dtype)
        value, gradient = loss(z, t)
        for ones in ([1] * 60, np.ones(60, np.float32), np.ones(60, bool)):
            assert loss(z, t, ones)[0] == value
            np.testing.assert_array_equal(loss(z, t, ones)[1], gradient)
        value, gradient = loss(z, t, np.zeros(60))
        assert value == 0 == np.count_nonzero(gradient)


@pytest.mark.parametrize("loss", ALL, ids=lambda f: f.__name__)
def test_weights_that_do_not_fit(loss):
    z, t = example(loss, (2, 3), np.float64)
    for wrong in (1.0, [1.0], [[1.0], [1.0]], np.ones((2, 3))):
        with pytest.raises(ValueError, match=r"^expected sample_weight of shape \(2,\), got \("):
            loss(z, t, wrong)
    for wrong in ([1, -1e-9], [1, np.nan], [np.inf, 1]):
        with pytest.raises(ValueError, match=r"^expected weights of at least 0 that are finite in float\d+, got "):
            loss(z, t, wrong)
    with pytest.raises(ValueError, match=r"finite in float32, got 1\.0 to 1e\+39"):
        loss(*example(loss, (2, 3), np.float32), [1, 1e39])
    with pytest.raises(TypeError, match="sample_weight"):
        loss(z, t, ["a", "b"])
