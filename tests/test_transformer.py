import pickle

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

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


def test_transformer_follows_a_drifting_stream():
    rng = np.random.default_rng(2)
    parts = [rng.normal(k, 1 + k, size=(50, 3)) for k in range(10)]
    scaler = BatchNormTransformer(momentum=0.3)
    for k, part in enumerate(parts):
        scaler.partial_fit(part)
        weights = 0.3 * 0.7 ** np.arange(k, -1, -1)
        for average, statistic in ((scaler.mean_, np.mean), (scaler.var_, np.var)):
            expected = (
                sum(w * statistic(p, axis=0) for w, p in zip(weights, parts[: k + 1], strict=True)) / weights.sum()
            )
            np.testing.assert_allclose(average, expected, rtol=1e-12)
    expected = (parts[0] - scaler.mean_) / np.sqrt(scaler.var_)
    np.testing.assert_allclose(scaler.transform(parts[0]), expected, rtol=1e-12)
    np.testing.assert_allclose(scaler.inverse_transform(expected), parts[0], rtol=1e-12)
    twin = pickle.loads(pickle.dumps(scaler)).partial_fit(parts[0])
    np.testing.assert_array_equal(twin.mean_, scaler.partial_fit(parts[0]).mean_)


@pytest.mark.parametrize("momentum", [0, -0.1, 1.5])
def test_transformer_names_a_wrong_momentum(momentum):
    with pytest.raises(ValueError, match="momentum"):
        BatchNormTransformer(momentum=momentum).fit(np.eye(3))


def test_transformer_names_a_wrong_number_of_features():
    scaler = BatchNormTransformer().fit(np.eye(4))
    with pytest.raises(ValueError, match=r"^expected X with 4 features, got 3$"):
        scaler.inverse_transform(np.eye(3))
