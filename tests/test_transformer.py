import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import sklearn
from sklearn.preprocessing import StandardScaler

from fastbn import RunningStats, moments
from fastbn.estimators import BatchNormTransformer


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("offset", [0, 1e3])
def test_transformer_is_standard_scaler(dtype, offset):
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(500, 7)) * np.logspace(-3, 3, 7) + offset).astype(dtype)
    X[:, 3] = 0.1  # constant
    ours, theirs = BatchNormTransformer().fit(X), StandardScaler().fit(X.astype("f8"))
    Y = ours.transform(X)
    assert Y.dtype == dtype
    u = np.finfo(dtype).eps
    np.testing.assert_allclose(Y, theirs.transform(X.astype("f8")), rtol=8 * u, atol=1e-8 if offset else 8 * u)
    for name in ("mean_", "var_", "scale_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-9)
    assert ours.n_samples_seen_ == theirs.n_samples_seen_
    back = ours.inverse_transform(Y)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, X, rtol=4 * u, atol=4 * u * np.abs(X).max())
    np.testing.assert_array_equal(Y[:, 3], 0)
    np.testing.assert_array_equal(ours.transform(np.full((1, 7), 1.1))[:, 3], 1.1 - ours.mean_[3])


@pytest.mark.parametrize("sizes", [[500], [1] * 20 + [480], [100, 399, 1]])
def test_transformer_takes_a_stream_as_the_whole(sizes):
    X = np.random.default_rng(1).normal(3, 2, size=(500, 4))
    parts = np.split(X, np.cumsum(sizes)[:-1])
    scaler = BatchNormTransformer()
    for part in parts:
        scaler.partial_fit(part)
    whole = BatchNormTransformer().fit(X)
    assert scaler.n_samples_seen_ == whole.n_samples_seen_ == 500
    np.testing.assert_allclose(scaler.mean_, X.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(scaler.var_, X.var(axis=0), rtol=1e-13)
    np.testing.assert_allclose(scaler.transform(X), whole.transform(X), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(scaler.fit(X).mean_, whole.mean_)


def weighted(values, weights):
    """Mean and variance of values with weights, as fractions."""
    values, total = [Fraction(float(v)) for v in values], sum(weights)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    return mean, sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True)) / total


@pytest.mark.parametrize("sizes", [[1] * 12, [2] * 6, [5, 1, 1, 4, 1], [12]], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("offset", [0, 1e6, 1e12])
def test_transformer_with_momentum_has_the_exponentially_weighted_variance_of_the_stream(sizes, momentum, offset):
    """The definition: every sample of the stream, with its part's weight, between parts as within them."""
    X = np.random.default_rng(2).normal(size=(sum(sizes), 2)) + np.arange(sum(sizes))[:, np.newaxis] / 3 + offset
    scaler = BatchNormTransformer(momentum=momentum)
    a = Fraction(momentum)
    for k, end in enumerate(np.cumsum(sizes), 1):
        before = vars(scaler).copy()
        kept = {name: value.copy() for name, value in before.items() if isinstance(value, np.ndarray)}
        scaler.partial_fit(X[end - sizes[k - 1] : end])
        assert all((before[name] == value).all() for name, value in kept.items())  # who holds the arrays keeps them
        weights = [a * (1 - a) ** (k - 1 - i) / n for i, n in enumerate(sizes[:k]) for _ in range(n)]
        for c in range(2):
            mean, var = weighted(X[:end, c], weights)
            off = Fraction(scaler.mean_[c]) + Fraction(scaler.mean_low_[c]) - mean
            assert abs(off) <= 1e-15 * (float(var) ** 0.5 + (abs(mean) if end == 1 and not offset else 0))
            assert scaler.var_[c] == pytest.approx(float(var), rel=4e-15)
    assert scaler.n_samples_seen_ == len(X)
    assert (scaler.scale_ == np.where(scaler.var_ == 0, 1, np.sqrt(scaler.var_))).all()


@pytest.mark.parametrize("momentum", [None, 0.25])
@pytest.mark.parametrize("ratio", [1e6, 1e9, 1e12])
@pytest.mark.parametrize("sizes", [[60], [20, 40], [1, 59], [1] * 60], ids=lambda sizes: f"{len(sizes)} parts")
def test_transformer_far_from_zero_is_as_exact_as_near(sizes, ratio, momentum):
    """The mean in two parts: one float64 would be off by 6e-5 standard deviations at a ratio of 1e12."""
    X = np.random.default_rng(3).normal(size=(60, 1)) + ratio
    scaler = BatchNormTransformer(momentum=momentum)
    for part in np.split(X, np.cumsum(sizes)[:-1]):
        scaler.partial_fit(part)
    a = Fraction(momentum or 0)
    weights = [
        ((1 - a) ** (len(sizes) - 1 - i)) / (n if momentum else 1) for i, n in enumerate(sizes) for _ in range(n)
    ]
    mean, var = weighted(X[:, 0], weights)
    expected = [float(Fraction(float(x)) - mean) / float(var) ** 0.5 for x in X[:, 0]]
    for one in (scaler, pickle.loads(pickle.dumps(scaler)), copy.deepcopy(scaler)):
        Y = one.transform(X)
        np.testing.assert_allclose(Y[:, 0], expected, rtol=1e-14, atol=1e-15)
        np.testing.assert_array_equal(one.inverse_transform(Y), X)


def test_transformer_goes_on_from_a_pickle_and_from_one_of_0_1_0():
    X = np.random.default_rng(2).normal(1e6, 1, size=(60, 3))
    for momentum in (None, 0.3):
        scaler, whole = BatchNormTransformer(momentum), BatchNormTransformer(momentum)
        for part in np.split(X, 6):
            whole.partial_fit(part)
        for part in np.split(X[:30], 3):
            scaler.partial_fit(part)
        twin = pickle.loads(pickle.dumps(scaler))
        for part in np.split(X[30:], 3):
            twin.partial_fit(part)
        np.testing.assert_array_equal(twin.transform(X), whole.transform(X))
        # 0.1.0 kept a RunningStats, whose variance with momentum was that within parts.
        before = RunningStats(3, momentum, unbiased=False, debias=momentum is not None)
        for part in np.split(X[:30], 3):
            before.update(moments(part))
        names = ("momentum", "n_features_in_", "n_samples_seen_")
        state = {name: vars(scaler)[name] for name in names}
        state |= {"mean_": before.mean, "var_": before.var, "scale_": np.sqrt(before.var), "_stats": before}
        old = BatchNormTransformer.__new__(BatchNormTransformer)
        old.__setstate__(state | {"_sklearn_version": sklearn.__version__})
        np.testing.assert_allclose(old.transform(X), (X - before.mean) / np.sqrt(before.var), rtol=1e-9, atol=1e-9)
        old.partial_fit(X[30:40])
        weight = 1 / 4 if momentum is None else 0.3 / (1 - 0.7**4)
        delta = X[30:40].mean(0) - before.mean
        between = weight * (1 - weight) * delta**2
        np.testing.assert_allclose(old.mean_, before.mean + weight * delta, rtol=1e-14)
        np.testing.assert_allclose(old.var_, (1 - weight) * before.var + weight * X[30:40].var(0) + between, rtol=1e-8)
        assert old.n_samples_seen_ == 40


@pytest.mark.parametrize("momentum", [0, -0.1, 1.5])
def test_transformer_names_a_wrong_momentum(momentum):
    with pytest.raises(ValueError, match="momentum"):
        BatchNormTransformer(momentum=momentum).fit(np.eye(3))


def test_transformer_names_a_wrong_number_of_features():
    scaler = BatchNormTransformer().fit(np.eye(4))
    with pytest.raises(ValueError, match=r"^expected X with 4 features, got 3$"):
        scaler.inverse_transform(np.eye(3))


def test_a_momentum_that_is_no_weight_is_refused():
    for momentum in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match="momentum"):
            BatchNormTransformer(momentum).fit([[1.0], [2.0]])
