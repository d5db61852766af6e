"""Dense(activation=...) against Dense and a layer of its own; gradients that are no numbers behind a closed ReLU."""

import copy
import json

import numpy as np
import pytest

from fastbn import checkpoint, nn

LAYERS = {"relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.01)}


def pair(activation, dtype="float32", **options):
    fused = nn.Dense(7, 9, activation=activation, dtype=dtype, seed=0, **options)
    return fused, nn.Sequential(nn.Dense(7, 9, dtype=dtype, seed=0, **options), copy.deepcopy(LAYERS[activation]))


@pytest.mark.parametrize("activation", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer_dtype", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (33, 7), (2, 5, 7), (0, 7)])
def test_it_is_dense_and_the_layer(shape, dtype, layer_dtype, bias, activation, unchanged):
    rng = np.random.default_rng(0)
    fused, apart = pair(activation, layer_dtype, bias=bias)
    x, dy = rng.standard_normal(shape).astype(dtype), rng.standard_normal((*shape[:-1], 9)).astype(dtype)
    unchanged(x, dy)
    assert fused(x).tobytes() == apart(x).tobytes()
    for _ in range(2):
        dx = fused.backward(dy)
        assert dx.tobytes() == apart.backward(dy, input_grad=True).tobytes()
        for name, grad in fused.grads.items():
            np.testing.assert_allclose(grad, apart.grads[f"0.{name}"], rtol=0, atol=1e-5 if "bias" in name else 0)
    assert fused.backward(dy, input_grad=False) is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_no_gradient_where_relu_is_closed_whatever_dy_is(bad, dtype):
    x = np.array([-2, -0.0, 0, 3, 4], dtype)
    for dy, expected in [([bad, bad, bad, 5, -6], [0, 0, 0, 5, -6]), ([1, 1, 1, bad, 1], [0, 0, 0, bad, 1])]:
        layer = nn.ReLU()
        layer(x)
        np.testing.assert_array_equal(layer.backward(dy), expected)
        one = nn.Dense(1, 5, activation="relu", dtype=dtype)
        one.params.update(weight=x[:, np.newaxis], bias=0)
        one(np.ones((1, 1), dtype))
        one.backward([dy], input_grad=False)
        np.testing.assert_array_equal(one.grads["bias"], expected)


@pytest.mark.parametrize("layout", [lambda a: a[::2], lambda a: a[::-1], np.asfortranarray])
def test_gradients_of_any_layout(layout):
    rng = np.random.default_rng(0)
    x, dy = layout(rng.standard_normal((6, 4))), layout(rng.standard_normal((6, 4)))
    layer = nn.ReLU()
    layer(x)
    np.testing.assert_array_equal(layer.backward(dy), np.where(x > 0, dy, 0))


def test_what_it_is():
    layer = nn.Dense(3, 2, activation="relu", seed=1)
    assert repr(layer) == "Dense(n_in=3, n_out=2, activation='relu', seed=1)"
    assert eval(repr(layer), vars(nn)).config() == layer.config() == json.loads(json.dumps(layer.config()))
    for bad in ("gelu", "ReLU", "", nn.ReLU(), ["relu"]):
        with pytest.raises(ValueError, match="expected activation None, 'relu' or 'leaky_relu', got"):
            nn.Dense(3, 2, activation=bad)
    layer(np.ones((2, 3)))
    with pytest.raises(RuntimeError):
        copy.deepcopy(layer).backward(np.ones((2, 2)))


def test_files_of_before_are_still_loaded(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    config = nn.Dense.config
    monkeypatch.setattr(nn.Dense, "config", lambda self: {k: v for k, v in config(self).items() if k != "activation"})
    layer = nn.Dense(3, 2, seed=1)
    checkpoint.save(tmp_path / "m.safetensors", layer)
    monkeypatch.undo()
    back = checkpoint.load(tmp_path / "m.safetensors")
    assert back.config() == layer.config()
    x = np.ones((2, 3))
    np.testing.assert_array_equal(back(x), layer(x))
