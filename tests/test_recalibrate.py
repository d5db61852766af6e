"""training.recalibrate against one training forward of all data with momentum 1."""

import copy

import numpy as np
import pytest

import fastbn
from fastbn import BatchNorm, losses, nn, optim, training


def network(dtype="float64", **options):
    """Layers of every kind, nested; the BatchNorms have averages that are nobody's."""
    model = nn.Sequential(
        nn.Standardize(5), nn.Dense(5, 9, bias=False, dtype=dtype, seed=0),
        BatchNorm(9, dtype=dtype, activation="relu", **options), nn.Dropout(0.5, seed=3),
        nn.Sequential(nn.Dense(9, 8, seed=1, dtype=dtype), nn.Sequential(BatchNorm(8, dtype=dtype, **options))),
        nn.Tanh(),
        nn.Dense(8, 6, dtype=dtype, seed=2), BatchNorm(6, dtype=dtype, axis=-1, **options), nn.LeakyReLU(0.2),
        nn.Dense(6, 3, dtype=dtype, seed=4), BatchNorm(3, affine=False, dtype=dtype, **options),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for bn in norms(model):
        bn.running_mean, bn.running_var = rng.normal(size=bn.num_features), rng.uniform(1, 2, bn.num_features)
        if bn.weight is not None:
            bn.weight, bn.bias = rng.normal(size=(2, bn.num_features))
    return model


def norms(model):
    return [layer for layer in nn.walk([model]) if isinstance(layer, BatchNorm)]


def data(n=50, dtype="float64"):
    X = np.random.default_rng(7).normal(2, 3, (n, 5)).astype(dtype)
    return X


def forwarded(model, X):
    """A copy of the model, whose momentum is 1, after a training forward of all of X without Dropout."""
    twin = copy.deepcopy(model).train()
    for layer in nn.walk(twin):
        if isinstance(layer, nn.Dropout):
            layer.eval()
    twin(X)
    return twin


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("float32", 2e-5)])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 49, 50, 1024])
def test_averages_are_those_of_one_forward_of_everything(batch_size, unbiased, dtype, tolerance, unchanged):
    X = data(dtype=dtype)
    unchanged(X)
    model = network(dtype, unbiased=unbiased, momentum=1.0)
    model[0].fit(X)
    expected = norms(forwarded(model, X))
    assert training.recalibrate(model, X, batch_size) is model
    for bn, twin in zip(norms(model), expected, strict=True):
        np.testing.assert_allclose(bn.running_mean, twin.running_mean, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(bn.running_var, twin.running_var, rtol=tolerance)
        assert bn.num_batches_tracked == -(-50 // batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize(("axis", "shape"), [(1, (20, 4)), (-1, (20, 6, 4)), (1, (20, 4, 3, 2))])
def test_a_lone_layer_has_the_mean_and_variance_of_x(axis, shape, batch_size):
    x = 1e4 + np.random.default_rng(0).normal(size=shape)
    bn = BatchNorm(4, axis=axis, momentum=None)
    flat = np.moveaxis(x, axis, -1).reshape(-1, 4).astype(np.longdouble)
    training.recalibrate(bn, x, batch_size)
    np.testing.assert_allclose(bn.running_mean, flat.mean(0).astype(float), rtol=1e-15)
    np.testing.assert_allclose(bn.running_var, flat.var(0, ddof=1).astype(float), rtol=1e-12)
    assert bn.momentum is None


@pytest.mark.parametrize("mode", [True, False])
def test_nothing_else_changes(mode):
    model, X = network().train(mode), data()
    model[0].fit(X)
    model[2].train(not mode)
    y = model(X)
    model.backward(np.ones_like(y))
    twin = copy.deepcopy(model)
    grads = {k: g.copy() for k, g in model.grads.items()}
    arrays = [(bn, bn.running_mean, bn.running_var) for bn in norms(model)]
    modes = [layer.training for layer in nn.walk([model])]
    training.recalibrate(model, X, 16)
    assert [layer.training for layer in nn.walk([model])] == modes
    assert all(bn.running_mean is mean and bn.running_var is var for bn, mean, var in arrays)
    averages = ("running_mean", "running_var", "num_batches_tracked")
    before, after = twin.state_dict(), model.state_dict()
    assert all((before[k] == after[k]).all() for k in before if not k.endswith(averages))
    assert not any((before[k] == after[k]).any() for k in before if k.endswith(averages))
    model.backward(np.ones_like(y))  # of the forward before, not of recalibrate's
    assert all((grads[k] == g).all() for k, g in model.grads.items())
    assert (model.train()[3](X) == twin.train()[3](X)).all()  # Dropout's random stream goes on alike


def test_it_brings_averages_that_lag_to_where_they_belong():
    X, y = data(200, "float32"), np.arange(200) % 3
    model = nn.Sequential(nn.Dense(5, 30, bias=False, seed=0), BatchNorm(30, momentum=1e-3), nn.Dense(30, 3, seed=1))
    options = {"epochs": 5, "batch_size": 50, "progress": False}
    training.fit(model, (X, y), losses.softmax_cross_entropy, optim.Adam(model, 0.01), **options)
    lagging, _ = training.evaluate(model, (X, y), losses.softmax_cross_entropy)
    training.recalibrate(model, X)
    loss, _ = training.evaluate(model, (X, y), losses.softmax_cross_entropy)
    at_once, _ = losses.softmax_cross_entropy(model.train()(X), y)
    assert abs(loss - at_once) < 0.01 < abs(lagging - at_once)


def test_layers_without_averages_are_passed_by():
    X = data()
    bare = BatchNorm(5, track_running_stats=False)
    model = nn.Sequential(bare, nn.Dense(5, 4, seed=0), BatchNorm(4, momentum=1.0))
    expected = forwarded(model, X)[2]
    training.recalibrate(model, X)
    np.testing.assert_allclose(model[2].running_var, expected.running_var, rtol=1e-6)
    assert bare.running_mean is None


def with_value(value):
    X = data()
    X[30, 2] = value
    return X


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda: {"X": data()[:, :4]}, ValueError, "4"),
        (lambda: {"X": with_value(np.nan)}, ValueError, r"features \[0, 1, 2, 3, 4\] of BatchNorm\(9.* not finite"),
        (lambda: {"X": with_value(np.inf)}, ValueError, "not finite"),
        (lambda: {"X": with_value(1e300)}, ValueError, "not finite"),
        (lambda: {"X": data()[:0]}, ValueError, r"at least 1 example, got shape \(0, 5\)"),
        (lambda: {"X": 3.0}, ValueError, r"at least 1 example, got shape \(\)"),
        (lambda: {"X": data()[:1]}, ValueError, r"more than 1 value per feature, got X of shape \(1, 5\)"),
        (lambda: {"X": data().astype(complex)}, TypeError, "complex"),
        (lambda: {"X": np.ma.masked_array(data())}, TypeError, "mask"),
        (lambda: {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (lambda: {"batch_size": 2.5}, TypeError, "integer"),
    ],
)
def test_errors_change_nothing(change, error, match):
    model = network()
    model[0].fit(data())
    before = {k: a.tobytes() for k, a in model.state_dict().items()}
    with pytest.raises(error, match=match):
        training.recalibrate(model, **({"X": data(), "batch_size": 8} | change()))
    assert {k: a.tobytes() for k, a in model.state_dict().items()} == before
    assert all(layer.training for layer in nn.walk([model]))


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def test_a_forward_of_ones_own():
    X = data()
    model = nn.Sequential(Residual(nn.Dense(5, 5, seed=0)), BatchNorm(5))
    expected = fastbn.moments(model[0](X)).mean
    np.testing.assert_allclose(training.recalibrate(model, X)[1].running_mean, expected, rtol=1e-12)
    inside = Residual(nn.Dense(5, 5), BatchNorm(5))
    with pytest.raises(ValueError, match="forward of one's own, got one in Residual"):
        training.recalibrate(nn.Sequential(inside, BatchNorm(5)), X)


@pytest.mark.parametrize(
    "model", [nn.Sequential(), nn.Sequential(nn.Dense(5, 2)), BatchNorm(5, track_running_stats=False), nn.ReLU()]
)
def test_a_model_without_averages_is_an_error(model):
    with pytest.raises(ValueError, match="expected a model with a BatchNorm that has running averages"):
        training.recalibrate(model, data())


def test_an_interruption_changes_nothing(monkeypatch):
    model, X = network(), data()
    model[0].fit(X)
    before = {k: a.tobytes() for k, a in model.state_dict().items()}
    calls = []

    def tanh(self, x):
        calls.append(x)
        if len(calls) == 9:  # in the pass for the third BatchNorm
            raise KeyboardInterrupt
        return np.tanh(x)

    monkeypatch.setattr(nn.Tanh, "forward", tanh)
    with pytest.raises(KeyboardInterrupt):
        training.recalibrate(model, X, 10)
    assert {k: a.tobytes() for k, a in model.state_dict().items()} == before
