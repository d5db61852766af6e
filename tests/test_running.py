"""RunningStats: exponentially weighted, zero-start corrected, and exact averages."""

import numpy as np
import pytest
import twin
from hypothesis import given
from hypothesis import strategies as st
from twin import within

import fastbn


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


def test_exact_statistics_hold_far_from_zero():
    """Chan's rule, not sums of squares: at mean/std 1e6 the naive rule keeps no more than four digits."""
    rng = np.random.default_rng(1)
    parts = [rng.standard_normal((100, 2)) + 1e6 for _ in range(30)]
    running = fed(parts, momentum=None)
    whole = twin.statistics(np.concatenate(parts))
    within(running.var, twin.unbiased(whole), 1e-12 * whole.var)


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
