"""nn.Standardize against two passes in wider precision."""

import copy
import json
import pickle

import numpy as np
import pytest

from fastbn import BatchNorm, checkpoint, losses, nn, optim, training

LD = np.longdouble
U = {"float32": 2.0**-24, "float64": 2.0**-53}


def data(n=200, c=4, ratio=1.0, dtype="float64", seed=0):
    """Standard deviations from 1e-3 to 1e3, means of `ratio` of them."""
    rng = np.random.default_rng(seed)
    return ((rng.normal(size=(n, c)) + ratio) * 10.0 ** np.linspace(-3, 3, c)).astype(dtype)


def exactly(X, axes=0):
    wide = X.astype(LD)
    centred = wide - wide.mean(axis=axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=axes, keepdims=True))


@pytest.mark.parametrize("ratio", [0, 1, 1e4, 1e6])
@pytest.mark.parametrize("dtype", U)
@pytest.mark.parametrize("training", [True, False])
def test_it_is_its_twin(training, dtype, ratio, unchanged):
    X = data(ratio=ratio, dtype=dtype)
    unchanged(X)
    layer = nn.Standardize(4).train(training)
    assert layer.fit(X) is layer
    y, expected = layer(X), exactly(X)
    assert y.dtype == X.dtype
    # float64's statistics round too: a mean of 1e6 is read from 20 digits, of which the twin's longdouble holds 19
    assert (abs(y - expected) <= (5 * U[dtype] + 4e-19 * ratio) * (1 + abs(expected))).all()
    assert layer(X[:1]).tobytes() == y[:1].tobytes()
    assert layer.training == training
    np.testing.assert_allclose(layer.mean, X.astype(LD).mean(0).astype(float), rtol=1e-15, atol=1e-15)
    np.testing.assert_allclose(layer.var, X.astype(LD).var(0).astype(float), rtol=1e-12)
    assert layer.count == 200


@pytest.mark.parametrize("ratio", [1, 1e4, 1e8])
def test_float64_data_become_float32_after_the_mean_is_gone(ratio):
    X = data(ratio=ratio)
    layer = nn.Standardize(4, dtype="float32").fit(X)
    y, expected = layer(X), exactly(X)
    assert y.dtype == np.float32
    bound = U["float32"] * abs(expected) + (5 * U["float64"] + 4e-19 * ratio) * (1 + abs(expected)) * 1.01
    assert (abs(y - expected) <= bound).all()
    dy = np.random.default_rng(1).normal(size=X.shape)
    dx = layer.backward(dy)
    assert dx.dtype == np.float64
    np.testing.assert_allclose(dx, dy / X.std(axis=0), rtol=1e-9)


def test_dtype_of_the_output():
    X = data(dtype="float32")
    wide, narrow, same = (nn.Standardize(4, dtype=dtype).fit(X) for dtype in ("float64", np.float32, None))
    assert wide(X).tobytes() == same(X.astype(np.float64)).tobytes()
    assert narrow(X).tobytes() == same(X).tobytes()
    assert wide(X).dtype == np.float64
    assert wide.backward(wide(X)).dtype == np.float32
    assert np.isinf(narrow(np.full((1, 4), 1e300))).all()  # without a warning
    assert repr(narrow) == "Standardize(num_features=4, dtype='float32')"
    with pytest.raises(TypeError, match="expected dtype float32 or float64, got float16"):
        nn.Standardize(4, dtype="float16")


@pytest.mark.parametrize(("axis", "shape"), [(1, (6, 3, 5)), (-1, (6, 5, 3)), (0, (3, 20)), (1, (6, 3, 2, 4))])
def test_any_axis(axis, shape):
    X = np.random.default_rng(0).normal(3, 2, shape)
    axes = tuple(k for k in range(len(shape)) if k != axis % len(shape))
    layer = nn.Standardize(3, axis=axis).fit(X)
    np.testing.assert_allclose(layer(X), exactly(X, axes).astype(float), rtol=1e-14, atol=1e-14)
    dy = np.random.default_rng(1).normal(size=shape)
    std = X.std(axis=axes, keepdims=True)
    np.testing.assert_allclose(layer.backward(dy), dy / std, rtol=1e-13)
    assert layer.params == layer.grads == {}


@pytest.mark.parametrize("dtype", U)
def test_gradients_have_xs_dtype_and_need_a_forward(dtype):
    X = data(dtype=dtype)
    layer = nn.Standardize(4).fit(X)
    with pytest.raises(RuntimeError, match="backward needs a forward"):
        layer.backward(X)
    layer(X)
    assert layer.backward(X.astype(float)).dtype == X.dtype
    with pytest.raises(ValueError, match=r"expected dy of shape \(200, 4\), got \(3, 4\)"):
        layer.backward(X[:3])


@pytest.mark.parametrize("dtype", U)
@pytest.mark.parametrize("value", [0, 0.1, 1 / 3, 1e5 + 0.1, -7e30])
def test_a_constant_feature_is_only_centred(value, dtype):
    X = data(dtype=dtype)
    X[:, 2] = value
    layer = nn.Standardize(4).fit(X)
    assert layer.var[2] == 0
    assert (layer(X)[:, 2] == 0).all()
    assert (layer.backward(X)[:, 2] == X[:, 2]).all()
    x = X[:1] + X.dtype.type(abs(value) + 1)
    assert layer(x)[0, 2] == pytest.approx(float(x[0, 2]) - float(X[0, 2]), rel=1e-6)


@pytest.mark.parametrize("dtype", U)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_deviations_far_from_1(scale, dtype):
    X = (data(ratio=1, dtype="float64") * scale).astype(dtype)
    np.testing.assert_allclose(nn.Standardize(4).fit(X)(X), exactly(X).astype(dtype), rtol=1e-5, atol=1e-6)


def test_one_example_is_its_own_mean():
    assert (nn.Standardize(3).fit([[1, 2, 3]])([[1, 2, 4]]) == [[0, 0, 1]]).all()


def test_nan_stays_in_its_feature():
    X = data()
    X[3, 1] = np.nan
    y = nn.Standardize(4).fit(X)(X)
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, [0, 2, 3]]).all()


def test_errors_change_nothing():
    layer = nn.Standardize(4)
    with pytest.raises(RuntimeError, match=r"call fit\(X\) before"):
        layer(data())
    layer.fit(data())
    before = layer.state_dict()
    for X, error, match in [
        (data(c=3), ValueError, r"expected X with 4 features along axis 1, got \(200, 3\)"),
        (np.empty((0, 4)), ValueError, r"expected at least 1 value of each feature, got X of shape \(0, 4\)"),
        (np.ones(4), np.exceptions.AxisError, "axis 1"),
        (data().astype(np.float16), TypeError, "float16"),
        (np.ma.masked_array(data()), TypeError, "mask"),
    ]:
        with pytest.raises(error, match=match):
            layer.fit(X)
    assert all((a == before[k]).all() for k, a in layer.state_dict().items())
    with pytest.raises(ValueError, match="expected x with 4 features along axis 1"):
        layer(data(c=3))
    with pytest.raises(ValueError, match="num_features"):
        nn.Standardize(0)
    with pytest.raises(ValueError, match="count"):
        layer.load_state_dict(before | {"count": -1})
    assert layer.count == 200


def test_it_travels(tmp_path):
    pytest.importorskip("safetensors")
    X = data(ratio=1e6)
    layer = nn.Standardize(4, axis=-1, dtype="float64").fit(X)
    model = nn.Sequential(layer, nn.Dense(4, 2, dtype="float64", seed=0))
    assert eval(repr(layer), vars(nn)).config() == layer.config() == json.loads(json.dumps(layer.config()))
    checkpoint.save(tmp_path / "m.safetensors", model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), checkpoint.load(tmp_path / "m.safetensors")):
        assert twin(X).tobytes() == model(X).tobytes()
        assert not any(np.shares_memory(a, b) for a, b in [(twin[0].mean, layer.mean), (twin[0].var, layer.var)])
    unfitted = nn.Standardize(4)
    checkpoint.save(tmp_path / "m.safetensors", unfitted)
    with pytest.raises(RuntimeError, match="fit"):
        checkpoint.load(tmp_path / "m.safetensors")(X)


def test_before_a_network_it_is_data_that_were_standardized():
    X, y = data(n=64, ratio=1e4, dtype="float32"), np.arange(64) % 3

    def layers():
        return nn.Dense(4, 8, bias=False, seed=0), BatchNorm(8, activation="relu"), nn.Dense(8, 3, seed=1)

    layer = nn.Standardize(4).fit(X)
    histories = []
    for model, inputs in [(nn.Sequential(layer, *layers()), X), (nn.Sequential(*layers()), layer(X))]:
        options = {"epochs": 3, "batch_size": 16, "progress": False}
        history = training.fit(model, (inputs, y), losses.softmax_cross_entropy, optim.SGD(model, 0.1), **options)
        histories.append(history.loss)
    assert histories[0] == histories[1]


def test_no_gradient_goes_to_layers_that_have_nothing_to_learn(monkeypatch):
    asked = []
    real = nn.Dense.backward

    def spy(self, dy, input_grad):
        asked.append(input_grad)
        return real(self, dy, input_grad)

    monkeypatch.setattr(nn.Dense, "backward", spy)
    X = data()
    dense = nn.Dense(4, 3, dtype="float64", seed=0)
    model = nn.Sequential(nn.Standardize(4).fit(X), nn.Sequential(nn.Dropout(0.0), dense), nn.Dense(3, 2, seed=0))
    model.backward(np.ones_like(model(X)))
    assert asked == [True, False]
    np.testing.assert_allclose(dense.grads["weight"], np.tile((model[0](X)).sum(0), (3, 1)) * np.float64(
        model[2].params["weight"].sum(0))[:, np.newaxis], atol=1e-10)  # fmt: skip
    assert model.backward(np.ones((200, 2)), input_grad=True).shape == X.shape
    assert asked[2:] == [True, True]
