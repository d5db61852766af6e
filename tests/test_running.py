"""RunningStats: exponentially weighted, zero-start corrected, and exact averages."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
import twin
from hypothesis import given
from hypothesis import strategies as st
from twin import within

import fastbn
from fastbn import batchstats


def batches(seed=0, sizes=(5, 40, 2, 13), c=3):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, c)) * (1 + k) + 10 * k for k, n in enumerate(sizes)]


def fed(parts, *args, **kwargs):
    running = fastbn.RunningStats(parts[0].shape[1], *args, **kwargs)
    for x in parts:
        running.update(fastbn.moments(x))
    return running


def test_starts_and_reset():
    running = fastbn.RunningStats(4)
    for _ in range(2):
        assert (running.mean == 0).all()
        assert (running.var == 1).all()
        assert running.mean.dtype == running.var.dtype == np.float64
        assert running.mean.shape == running.var.shape == (4,)
        assert running.count == 0
        assert running.num_batches == 0
        running.update(fastbn.moments(np.random.default_rng(0).standard_normal((5, 4))))
        assert running.count == 5
        assert running.num_batches == 1
        running.reset()


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0])
def test_exponentially_weighted(momentum, unbiased):
    mean, var = np.zeros(3), np.ones(3)
    running = fastbn.RunningStats(3, momentum, unbiased=unbiased)
    for t, x in enumerate(batches(), 1):
        running.update(fastbn.moments(x))
        mean = twin.averaged(mean, x.mean(0), momentum)
        var = twin.averaged(var, x.var(0, ddof=int(unbiased)), momentum)
        np.testing.assert_allclose(running.mean, mean.astype(float), rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(running.var, var.astype(float), rtol=1e-13)
        assert running.num_batches == t
    assert running.count == 60


@pytest.mark.parametrize("unbiased", [True, False])
def test_debiased_is_the_zero_start_average_over_its_weights(unbiased):
    momentum, parts = 0.2, batches()
    running = fastbn.RunningStats(3, momentum, unbiased=unbiased, debias=True)
    for t, x in enumerate(parts, 1):
        running.update(fastbn.moments(x))
        weights = momentum * (1 - momentum) ** np.arange(t)[::-1, None]
        total = 1 - (1 - momentum) ** t
        means = np.array([p.mean(0) for p in parts[:t]])
        variances = np.array([p.var(0, ddof=int(unbiased)) for p in parts[:t]])
        np.testing.assert_allclose(running.mean, (weights * means).sum(0) / total, rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(running.var, (weights * variances).sum(0) / total, rtol=1e-13)


def test_the_first_debiased_average_is_the_first_batch():
    x = batches()[1]
    running = fed([x], 0.01, debias=True)
    np.testing.assert_allclose(running.mean, x.mean(0), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(running.var, x.var(0, ddof=1), rtol=1e-13)


@pytest.mark.parametrize("unbiased", [True, False])
def test_momentum_none_is_exact(unbiased):
    parts = batches()
    running = fed(parts, momentum=None, unbiased=unbiased)
    whole = twin.statistics(np.concatenate(parts))
    within(running.mean, whole.mean, 1e-15 * (abs(whole.mean) + np.sqrt(whole.var)))
    within(running.var, twin.unbiased(whole) if unbiased else whole.var, 2e-15 * whole.var)
    assert running.count == 60
    assert running.num_batches == 4


def merged(x, sizes, how):
    parts = np.split(x, np.cumsum(sizes)[:-1])
    if how == "updates":
        return fed(parts, None, unbiased=False)
    if how == "at once":
        all_stats = [fastbn.moments(part) for part in parts]
        numbers = [[stats.mean, stats.mean_low, stats.var] for stats in all_stats]
        running = fastbn.RunningStats(1, None, unbiased=False)
        running.update(batchstats.merged(numbers, [stats.count for stats in all_stats]))
        return running
    left = [fed([part], None, unbiased=False) for part in parts]
    while len(left) > 1:
        for one, other in zip(left[::2], left[1::2], strict=False):
            one.merge(other)
        left = left[::2]
    return left[0]


@pytest.mark.parametrize("how", ["updates", "merges", "at once"])
@pytest.mark.parametrize("ratio", [0, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("sizes", [[300], [100, 200], [1, 299], [299, 1], [60] * 5, [1] * 300], ids=str)
def test_exact_statistics_in_parts_are_as_exact_as_in_one_call(sizes, ratio, how):
    """The mean in two parts: one float64 leaves errors of 1e-12 of the variance at mean/std 1e6, and 1e-6 at 1e12."""
    x = np.random.default_rng(1).standard_normal((300, 1)) + ratio
    x[0] += 30  # far from the others: the heavier part decides where the sums start from
    running = merged(x, sizes, how)
    values = [Fraction(float(v)) for v in x[:, 0]]
    mean = sum(values) / 300
    var = float(sum((v - mean) ** 2 for v in values) / 300)
    assert abs(Fraction(running.mean[0]) + Fraction(running.mean_low[0]) - mean) <= 1e-16 * var**0.5
    assert running.var[0] == pytest.approx(var, rel=2e-15)
    assert running.count == 300


def test_parts_merged_at_once_are_checked_and_one_alone_keeps_its_bits():
    numbers = np.random.default_rng(0).random((3, 3, 4))
    for counts, kept in (([0, 5, 0], 1), ([0, 0, 0], 0), ([0, 0, 2], 2)):
        stats = batchstats.merged(numbers, counts)
        assert np.stack([stats.mean, stats.mean_low, stats.var]).tobytes() == numbers[kept].tobytes()
        assert stats.count == sum(counts)
    assert batchstats.merged(numbers[:, :, :0], [1, 2, 3]).mean.shape == (0,)
    for wrong, counts in ((numbers[:, :2], [1, 2, 3]), (numbers, [1, 2]), (numbers[:0], [])):
        with pytest.raises(ValueError, match="expected statistics of shape"):
            batchstats.merged(wrong, counts)
    rows = np.zeros((3, 4)), np.zeros((3, 5))
    with pytest.raises(ValueError, match=r"expected statistics of 4 features, got \[4, 4, 4, 5, 5, 5\]"):
        batchstats.merge(rows[0], 1, rows[1], 1)


def test_whole_numbers_beyond_float64s_digits():
    """Sums that a mean in one part rounds: of 2^53, 2^53 + 2, 2^53 + 2, 2^53 + 4 the variance is 2."""
    b = 2.0**53
    for how in ("updates", "merges"):
        running = merged(np.array([[b], [b + 2], [b + 2], [b + 4]]), [2, 2], how)
        assert (running.var.tolist(), running.mean.tolist(), running.mean_low.tolist()) == ([2], [b + 2], [0])
        running = merged(np.array([[b], [b + 2]]), [2], how)
        assert Fraction(running.mean[0]) + Fraction(running.mean_low[0]) == Fraction(b) + 1
    copied = pickle.loads(pickle.dumps(running))
    assert copied.mean_low == running.mean_low != 0
    copied.mean_low[...] = 0  # a copy
    assert copied.mean_low == running.mean_low
    running.reset()
    assert running.mean_low == 0
    assert (fed(batches()).mean_low == 0).all()


def test_what_is_not_finite_stays_in_its_feature_and_says_nothing():
    parts = batches()
    clean = fed(parts, momentum=None)
    parts[1][3, 1], parts[3][0, 1] = np.inf, -np.inf
    running = fed(parts, momentum=None)
    assert (running.mean[::2] == clean.mean[::2]).all()
    assert (running.var[::2] == clean.var[::2]).all()
    assert np.isnan(running.var[1])


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.integers(0, 5), st.floats(-1e4, 1e4))
def test_parts_merged_equal_the_whole(sizes, cut, centre):
    parts = [x + centre for x in batches(7, sizes)]
    cut = min(cut, len(parts))
    left, right = (fastbn.RunningStats(3, momentum=None) for _ in range(2))
    for running, some in ((left, parts[:cut]), (right, parts[cut:])):
        for x in some:
            running.update(fastbn.moments(x))
    untouched = right.mean.copy(), right.var.copy(), right.count, right.num_batches
    left.merge(right)
    whole = twin.statistics(np.concatenate(parts))
    within(left.mean, whole.mean, 1e-14 * (abs(whole.mean) + np.sqrt(whole.var)))
    if whole.count > 1:
        within(left.var, twin.unbiased(whole), 1e-10 * whole.var + 1e-300)
    assert left.count == whole.count
    assert left.num_batches == len(parts)
    np.testing.assert_array_equal(right.mean, untouched[0])
    np.testing.assert_array_equal(right.var, untouched[1])
    assert (right.count, right.num_batches) == untouched[2:]


def test_merging_nothing_changes_nothing():
    full, nothing = fed(batches(), momentum=None), fastbn.RunningStats(3, momentum=None)
    mean, var = full.mean.copy(), full.var.copy()
    full.merge(nothing)
    assert (full.mean == mean).all()
    assert (full.var == var).all()
    assert full.count == 60
    nothing.merge(full)
    np.testing.assert_allclose(nothing.mean, mean, rtol=1e-15)
    np.testing.assert_allclose(nothing.var, var, rtol=1e-15)
    assert nothing.count == 60
    assert nothing.num_batches == 4


@pytest.mark.parametrize("options", [{"unbiased": False}, {"momentum": None}])
def test_updated_in_the_call_of_a_forward(options, case):
    """running= does what update with the returned statistics does, to the bit."""
    within_call, after_call = (fastbn.RunningStats(case.c, **options) for _ in range(2))
    for shift in (0, 1):
        x = case.x + np.asarray(shift, case.dtype)
        _, stats = fastbn.batch_norm_forward(x, running=within_call, axis=case.axis)
        after_call.update(stats)
    assert (within_call.mean == after_call.mean).all()
    assert (within_call.var == after_call.var).all()
    assert within_call.count == after_call.count == 2 * case.count
    assert within_call.num_batches == after_call.num_batches == 2


def test_an_empty_batch_is_no_batch():
    for options in ({}, {"momentum": None}, {"debias": True}):
        running = fed(batches(), **options)
        mean, var = running.mean.copy(), running.var.copy()
        running.update(fastbn.moments(np.empty((0, 3))))
        fastbn.batch_norm_forward(np.empty((0, 3)), running=running)
        assert (running.mean == mean).all()
        assert (running.var == var).all()
        assert running.count == 60
        assert running.num_batches == 4


def snapshot(running):
    return running.mean.tobytes(), running.var.tobytes(), running.count, running.num_batches


def test_errors_leave_the_statistics_as_they_were():
    running, exact = fed(batches()), fed(batches(), momentum=None)
    before = snapshot(running), snapshot(exact)
    with pytest.raises(ValueError, match=r"3.*4|4.*3"):
        running.update(fastbn.moments(np.ones((5, 4))))
    with pytest.raises(ValueError, match=r"3.*4|4.*3"):
        exact.merge(fed(batches(c=4), momentum=None))
    with pytest.raises(ValueError, match="momentum"):
        running.merge(fed(batches()))
    with pytest.raises(ValueError, match="momentum"):
        exact.merge(running)
    with pytest.raises(ValueError, match="momentum"):
        running.merge(exact)
    with pytest.raises(ValueError, match=r"3.*4|4.*3"):
        fastbn.batch_norm_forward(np.ones((5, 4)), running=running)
    with pytest.raises(TypeError):
        running.update(np.ones(3))
    assert (snapshot(running), snapshot(exact)) == before


@pytest.mark.parametrize("momentum", [np.nan, np.inf, -np.inf])
def test_momentum_is_finite(momentum):
    with pytest.raises(ValueError, match="momentum"):
        fastbn.RunningStats(3, momentum)


def test_exact_statistics_have_nothing_to_debias():
    with pytest.raises(ValueError, match="debias"):
        fastbn.RunningStats(3, None, debias=True)
