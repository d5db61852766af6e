"""Layers against twins in wider precision and finite differences; Sequential over any layer; states, copies, errors."""

import copy
import inspect
import json
import pickle

import numpy as np
import pytest

from fastbn import BatchNorm, RunningStats, nn

LD = np.longdouble
ELEMENTWISE = [
    nn.ReLU(),
    nn.LeakyReLU(),
    nn.LeakyReLU(0.3),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Dropout(0.4, seed=3),
    nn.Identity(),
]
TWINS = {  # y and dy/dx
    "ReLU": (lambda x: np.where(x > 0, x, 0), lambda x: np.where(x > 0, LD(1), 0)),
    "LeakyReLU": (lambda x: np.where(x > 0, x, LD(0.3) * x), lambda x: np.where(x > 0, LD(1), LD(0.3))),
    "Sigmoid": (lambda x: 1 / (1 + np.exp(-x)), lambda x: 1 / (2 + np.exp(-x) + np.exp(x))),
    "Tanh": (np.tanh, lambda x: 1 / np.cosh(x) ** 2),
}


def new(layer):
    return copy.deepcopy(layer)


def close(got, expected, units, floor=0.0):
    """Within so many roundoffs of the got dtype, relative to the expected value or to `floor`."""
    u = np.finfo(got.dtype).eps / 2
    assert (abs(got.astype(LD) - expected) <= units * u * np.maximum(abs(expected), floor)).all()


def network(dtype="float64", seed=0):
    return nn.Sequential(
        nn.Dense(5, 7, bias=False, dtype=dtype, seed=seed), BatchNorm(7, dtype=dtype), nn.Tanh(),
        nn.Dense(7, 6, dtype=dtype, seed=seed + 1), nn.LeakyReLU(0.2), nn.Dropout(0.3, seed=5).eval(),
        nn.Dense(6, 4, dtype=dtype, seed=seed + 2), nn.Sigmoid(),
    )  # fmt: skip


def central_differences(f, a):
    """df/da, by changing one value of a at a time."""
    d = np.empty(a.shape)
    for i in np.ndindex(a.shape):
        old, h = a[i], 1e-6
        a[i] = old + h
        up = f()
        a[i] = old - h
        d[i] = (up - f()) / (2 * h)
        a[i] = old
    return d


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dense(4, 3, dtype="float64", seed=0), (6, 4)),
        (nn.Dense(4, 3, bias=False, dtype="float64", seed=0), (6, 4)),
        (nn.Dense(4, 3, dtype="float64", seed=0), (4,)),
        (nn.Dense(4, 3, dtype="float64", seed=0), (2, 3, 4)),
        (nn.ReLU(), (5, 3)),
        (nn.LeakyReLU(0.3), (5, 3)),
        (nn.Sigmoid(), (5, 3)),
        (nn.Tanh(), (5, 3)),
        (nn.Softmax(), (5, 3)),
        (nn.Softmax(axis=1), (2, 3, 4)),
        (nn.Identity(), (5, 3)),
        (nn.Flatten(), (5, 3, 2)),
        (network(), (6, 5)),
        (nn.Sequential(network(), nn.Sequential(nn.Dense(4, 2, dtype="float64", seed=8), nn.Tanh())), (6, 5)),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, tuple) else None,
)
def test_gradients_are_the_finite_differences(layer, shape, training):
    layer = new(layer).train(training)
    if isinstance(layer, nn.Sequential):
        for inner in layer:
            for leaf in inner if isinstance(inner, nn.Sequential) else [inner]:
                if isinstance(leaf, nn.Dropout):
                    leaf.eval()
    rng = np.random.default_rng(1)
    x = rng.standard_normal(shape)
    for p in layer.params.values():
        p += 0.1 * rng.standard_normal(p.shape)
    weights = rng.standard_normal(layer(x).shape)

    def f():
        return float((weights * layer(x)).sum())

    expected = {"x": central_differences(f, x)} | {k: central_differences(f, p) for k, p in layer.params.items()}
    layer(x)
    dx = layer.backward(weights, input_grad=True) if isinstance(layer, nn.Sequential) else layer.backward(weights)
    for name, got in {"x": dx, **layer.grads}.items():
        assert got.shape == expected[name].shape
        np.testing.assert_allclose(got, expected[name], rtol=1e-6, atol=2e-8, err_msg=name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer_dtype", ["float32", "float64"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(20,), (1, 20), (33, 20), (2, 5, 20), (0, 20)])
def test_dense_is_its_twin(shape, dtype, layer_dtype, bias):
    rng = np.random.default_rng(0)
    layer = nn.Dense(20, 9, bias, dtype=layer_dtype, seed=4)
    x, dy = rng.standard_normal(shape).astype(dtype), rng.standard_normal((*shape[:-1], 9)).astype(dtype)
    kept = x.copy(), dy.copy()
    arrays = {k: (layer.params[k], layer.grads[k]) for k in layer.params}
    y, dx = layer(x), layer.backward(dy)
    assert (x == kept[0]).all()
    assert (dy == kept[1]).all()
    assert (y.dtype, dx.dtype, y.shape, dx.shape) == (dtype, dtype, dy.shape, x.shape)
    assert all(layer.params[k] is p and layer.grads[k] is g for k, (p, g) in arrays.items())
    assert {g.dtype.name for g in layer.grads.values()} == {layer_dtype}

    W, x2, dy2 = layer.params["weight"].astype(LD), x.astype(LD).reshape(-1, 20), dy.astype(LD).reshape(-1, 9)
    b = layer.params["bias"].astype(LD) if bias else 0
    close(y.reshape(-1, 9), x2 @ W.T + b, 25, floor=5)
    close(dx.reshape(-1, 20), dy2 @ W, 25, floor=5)
    wider = max(np.finfo(dtype).eps, np.finfo(layer_dtype).eps)
    np.testing.assert_allclose(layer.grads["weight"].astype(LD), dy2.T @ x2, rtol=0, atol=100 * wider)
    if bias:
        np.testing.assert_allclose(layer.grads["bias"].astype(LD), dy2.sum(0), rtol=0, atol=40 * wider)


@pytest.mark.parametrize("layout", ["strided", "fortran", "reversed", "readonly", "swapped"])
def test_layouts_change_nothing(layout):
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((4, 6, 5))
    x = {
        "strided": lambda: np.repeat(plain, 2, axis=2)[..., ::2],
        "fortran": lambda: np.asfortranarray(plain),
        "reversed": lambda: plain[::-1, ::-1].copy()[::-1, ::-1],
        "readonly": lambda: np.broadcast_to(plain, plain.shape),
        "swapped": lambda: plain.astype(plain.dtype.newbyteorder()),
    }[layout]()
    for layer in [nn.Dense(5, 3, dtype="float64", seed=0), *map(new, ELEMENTWISE)]:
        twin = new(layer)
        y, expected = layer(x), twin(plain)
        np.testing.assert_allclose(y, expected, rtol=1e-14, atol=1e-14)
        assert y.dtype == np.float64
        np.testing.assert_allclose(layer.backward(y), twin.backward(expected), rtol=1e-13, atol=1e-13)


def test_dense_starts_as_pytorchs_linear():
    layer = nn.Dense(25, 4000, seed=0)
    for p in layer.params.values():  # uniform within 1/5: a standard deviation of 0.2 / sqrt(3)
        assert 0.199 < abs(p).max() <= np.float32(0.2)
        assert abs(p.mean()) < 4 * 0.2 / np.sqrt(3 * p.size)
        assert p.std() == pytest.approx(0.2 / np.sqrt(3), rel=0.03)
    assert all(not g.any() for g in layer.grads.values())
    again, other, unseeded = nn.Dense(25, 4000, seed=0), nn.Dense(25, 4000, seed=1), nn.Dense(25, 4000)
    assert (again.params["weight"] == layer.params["weight"]).all()
    assert (other.params["weight"] != layer.params["weight"]).any()
    assert (unseeded.params["weight"] != nn.Dense(25, 4000).params["weight"]).any()
    assert layer.params["weight"].shape == (4000, 25)
    assert nn.Dense(3, 2, bias=False).params.keys() == {"weight"}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layer", [nn.ReLU(), nn.LeakyReLU(0.3), nn.Sigmoid(), nn.Tanh()], ids=repr)
def test_activations_are_their_twins(layer, dtype):
    layer = new(layer)
    x = np.concatenate([np.linspace(-80, 80, 1001), np.linspace(-2, 2, 501), [0.0]]).astype(dtype)
    dy = np.random.default_rng(0).standard_normal(x.shape).astype(dtype)
    kept = x.copy(), dy.copy()
    y, dx = layer(x), layer.backward(dy)
    assert (x == kept[0]).all()
    assert (dy == kept[1]).all()
    f, df = TWINS[type(layer).__name__]
    close(y, f(x.astype(LD)), 8)
    close(dx, dy * df(x.astype(LD)), 16, floor=1)
    assert y.dtype == dx.dtype == dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_take_any_number_without_a_warning(dtype):
    top = np.finfo(dtype).max
    x = np.array([-np.inf, -top, -1e4, 0, 1e4, top, np.inf, np.nan], dtype)
    ends = {"ReLU": 0.0, "LeakyReLU": None, "Sigmoid": 0.0, "Tanh": -1.0}
    with np.errstate(all="raise"):
        for layer in [nn.ReLU(), nn.LeakyReLU(), nn.Sigmoid(), nn.Tanh()]:
            name = type(layer).__name__
            y, dx = layer(x), layer.backward(np.ones_like(x))
            assert np.isnan(y[-1])
            assert (np.diff(y[:-1]) >= 0).all()
            if ends[name] is not None:
                assert (y[:3] == ends[name]).all()
            assert not np.isnan(dx[:-1]).any()
        assert (nn.Sigmoid()(x)[4:7] == 1).all()
        assert nn.Sigmoid()(np.array(-50, dtype)) == pytest.approx(np.exp(-50.0), rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("axis", "shape"), [(-1, (40, 10)), (1, (5, 7, 3)), (0, (9,))])
def test_softmax_is_its_twin(axis, shape, dtype):
    layer = nn.Softmax(axis)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape) * 8).astype(dtype), rng.standard_normal(shape).astype(dtype)
    kept = x.copy(), dy.copy()
    y, dx = layer(x), layer.backward(dy)
    assert (x == kept[0]).all()
    assert (dy == kept[1]).all()
    e = np.exp(x.astype(LD) - x.max(axis, keepdims=True))
    p = e / e.sum(axis, keepdims=True)
    units = 8 + float((x.max(axis, keepdims=True) - x).max())  # a rounding of exp's argument
    close(y, p, units)
    close(dx, p * (dy - (p * dy).sum(axis, keepdims=True)), 2 * units, floor=1)
    assert y.dtype == dx.dtype == dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_takes_any_number_without_a_warning(dtype):
    top = np.finfo(dtype).max
    with np.errstate(all="raise"):
        y = nn.Softmax()(np.array([[-top, 0, top], [-np.inf, 0, 0], [np.nan, 0, 0], [np.inf, 0, 0]], dtype))
        assert nn.Softmax()(np.empty((3, 0), dtype)).shape == (3, 0)
        assert nn.Softmax()(np.empty((0, 3), dtype)).shape == (0, 3)
    assert y[:2].tolist() == [[0, 0, 1], [0, 0.5, 0.5]]
    assert np.isnan(y[2:]).all()
    with pytest.raises(np.exceptions.AxisError):
        nn.Softmax(axis=2)(np.ones((2, 2), dtype))


def test_flatten_keeps_the_order_of_indices():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    layer = nn.Flatten()
    assert (layer(x) == x.reshape(2, 12)).all()
    assert layer(x.transpose(0, 2, 1)).tolist() == x.transpose(0, 2, 1).reshape(2, 12).tolist()
    assert layer(np.ones((0, 3, 4))).shape == (0, 12)
    assert layer(np.ones(5)).shape == (5, 1)
    dx = layer.backward(np.ones((5, 1)))
    assert dx.shape == (5,)
    with pytest.raises(ValueError, match="single number"):
        layer(3.0)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (7,), (2, 3, 4, 5)])
@pytest.mark.parametrize("layer", ELEMENTWISE, ids=repr)
def test_elementwise_layers_take_any_shape(layer, shape):
    layer = new(layer)
    x = np.full(shape, 2, np.float32)
    y = layer(x)
    dx = layer.backward(np.ones(shape))
    for a in (y, dx):
        assert isinstance(a, np.ndarray)
        assert (a.shape, a.dtype) == (shape, np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("p", [0, 0.1, 0.5, 0.9, 1])
def test_dropout(p, dtype):
    layer, x = nn.Dropout(p, seed=0), np.random.default_rng(1).uniform(1, 2, (300, 300)).astype(dtype)
    y, dx = layer(x), layer.backward(np.ones_like(x))
    kept = y != 0
    assert abs(kept.mean() - (1 - p)) <= 5 * np.sqrt(p * (1 - p) / x.size)
    scale = 1 / (1 - p) if p < 1 else 0
    np.testing.assert_allclose(y, np.where(kept, x * scale, 0), rtol=1e-6)
    np.testing.assert_allclose(dx, np.where(kept, scale, 0), rtol=1e-6)
    assert (kept != (layer(x) != 0)).any() == (0 < p < 1)  # a new mask for every forward
    assert (nn.Dropout(p, seed=0)(x) == y).all()
    for seed in (1, None):
        assert (nn.Dropout(p, seed=seed)(x) != y).any() == (0 < p < 1)
    layer.eval()
    assert (layer(x) == x).all()
    assert (layer.backward(y) == y).all()


@pytest.mark.parametrize(
    "dtype", ["float32,", ",", "2((", "(" * 1000, "f2", ">f4", int, object, 3, np.zeros(2), "nothing"]
)
@pytest.mark.parametrize(
    "layer", [lambda d: nn.Dense(2, 2, dtype=d), lambda d: nn.Standardize(2, dtype=d), lambda d: BatchNorm(2, dtype=d)]
)
def test_a_dtype_of_any_other_kind_is_one_type_error(layer, dtype):
    """A model file has it as a text, which NumPy parses as a program: a SyntaxError came through."""
    with pytest.raises(TypeError, match="expected dtype float32 or float64, got "):
        layer(dtype)


def test_integers_and_lists_become_float64():
    for layer in [nn.Dense(2, 2, seed=0), *map(new, ELEMENTWISE)]:
        for x in ([[1, 2], [3, 4]], np.array([[1, 2], [3, 4]], np.int8), np.array([[True, False]])):
            assert layer(x).dtype == np.float64
            assert layer.backward(np.ones(np.shape(x), int)).dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float16, np.longdouble, np.complex64, object, "datetime64[s]", "U1"])
@pytest.mark.parametrize("layer", [nn.Dense(2, 2, seed=0), *ELEMENTWISE], ids=repr)
def test_other_types_are_type_errors(layer, dtype):
    layer, x = new(layer), np.ones((3, 2))
    layer(x)
    bad = np.zeros((3, 2), dtype)
    for call in (layer, layer.backward):
        with pytest.raises(TypeError, match="float32"):
            call(bad)
    with pytest.raises(TypeError, match="mask"):
        layer(np.ma.masked_array(x))
    assert layer.backward(x).shape == x.shape  # of the good batch


@pytest.mark.parametrize("layer", [nn.Dense(2, 2, seed=0), *ELEMENTWISE, nn.Sequential(nn.ReLU())], ids=repr)
def test_backward_needs_a_forward_and_its_shape(layer):
    layer = new(layer)
    with pytest.raises(RuntimeError, match=r"backward needs a forward"):
        layer.backward(np.ones((3, 2)))
    layer(np.ones((3, 2)))
    layer.backward(np.ones((3, 2)))
    before = {k: g.copy() for k, g in layer.grads.items()}
    for shape in [(2, 3), (3,), (3, 1), (1, 3, 2)]:
        with pytest.raises(ValueError, match=r"expected dy of shape \(3, 2\), got \("):
            layer.backward(np.ones(shape))
    assert all((before[k] == g).all() for k, g in layer.grads.items())


def test_argument_errors():
    layer = nn.Dense(3, 2)
    for shape in [(3, 4), (), (2,)]:
        with pytest.raises(ValueError, match=r"Dense expected x of shape \(\.\.\., 3\), got"):
            layer(np.ones(shape))
    for n_in, n_out in [(0, 2), (2, 0), (-1, 2)]:
        with pytest.raises(ValueError, match="at least 1"):
            nn.Dense(n_in, n_out)
    for name, make in [
        ("n_in", lambda x: nn.Dense(x, 3)), ("n_out", lambda x: nn.Dense(3, x)),
        ("seed", lambda x: nn.Dense(2, 3, seed=x)), ("seed", lambda x: nn.Dropout(0.5, seed=x)),
        ("num_features", nn.Standardize), ("axis", lambda x: nn.Standardize(3, axis=x)),
        ("num_features", BatchNorm), ("num_features", RunningStats),
        ("axis", lambda x: BatchNorm(3, axis=x)), ("ghost_size", lambda x: BatchNorm(3, ghost_size=x)),
    ]:  # fmt: skip
        for x in (2.5, "2", (0, 1)):
            with pytest.raises(TypeError, match=f"^expected {name} as an integer, got {type(x).__name__}$"):
                make(x)
    with pytest.raises(TypeError, match="float16"):
        nn.Dense(2, 3, dtype="float16")
    for p in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"p within \[0, 1\]"):
            nn.Dropout(p)
        with pytest.raises(ValueError, match=r"negative_slope within \[0, 1\]"):
            nn.LeakyReLU(p)


def test_gradients_are_overwritten_and_backward_repeats():
    model, x = network(), np.random.default_rng(0).standard_normal((6, 5))
    assert not any(g.any() for g in model.grads.values())
    dy = np.ones_like(model(x))
    model.backward(dy)
    once = {k: g.copy() for k, g in model.grads.items()}
    model.backward(dy)
    assert all((once[k] == g).all() for k, g in model.grads.items())
    assert all(g.any() for g in model.grads.values())


def test_sequential_is_a_sequence_of_its_layers():
    model = network()
    layers = list(model)
    assert len(model) == len(layers) == 8
    assert model[1] is layers[1]
    assert model[-1] is layers[7]
    assert list(model[:-1]) == layers[:-1]
    with pytest.raises(IndexError):
        model[8]
    x = np.random.default_rng(0).standard_normal((6, 5))
    model.eval()
    assert (model[2:](model[:2](x)) == model(x)).all()
    assert (model.forward(x) == model(x)).all()
    assert nn.Sequential()(x) is x


def test_sequential_params_and_grads_are_the_layers_own():
    model = nn.Sequential(nn.Dense(2, 3), nn.Sequential(nn.ReLU(), BatchNorm(3)), nn.Dense(3, 1, bias=False))
    assert list(model.params) == list(model.grads) == ["0.weight", "0.bias", "1.1.weight", "1.1.bias", "2.weight"]
    for dicts in ("params", "grads"):
        whole = getattr(model, dicts)
        assert whole["0.bias"] is getattr(model[0], dicts)["bias"]
        assert whole["1.1.weight"] is getattr(model[1][1], dicts)["weight"]
    assert list(model.state_dict()) == [
        "0.weight", "0.bias", "1.1.weight", "1.1.bias", "1.1.running_mean", "1.1.running_var",
        "1.1.num_batches_tracked", "2.weight",
    ]  # fmt: skip


def test_train_and_eval_reach_every_layer():
    model = nn.Sequential(nn.Dense(2, 3), nn.Sequential(nn.Dropout(0.5), BatchNorm(3)))
    for training in (False, True):
        assert model.train(training) is model
        inside = [model, *model, *model[1]]
        assert [layer.training for layer in inside] == [training] * 5
    assert model.eval() is model
    assert not model[1][0].training
    assert nn.ReLU().eval().training is False


class Spy:
    """A layer of somebody's own: y = w x. It notes what backward is asked for."""

    def __init__(self):
        self.params, self.grads, self.training, self.asked = {"w": np.ones(1)}, {"w": np.zeros(1)}, True, []

    def __call__(self, x):
        self.x = x
        return x * self.params["w"]

    def backward(self, dy, **kwargs):
        self.asked.append(kwargs)
        self.grads["w"][0] = (self.x * dy).sum()
        return dy * self.params["w"]

    def train(self, mode=True):
        self.training = mode

    def state_dict(self):
        return {"w": self.params["w"].copy()}

    def load_state_dict(self, state):
        self.params["w"][...] = state["w"]


def test_sequential_takes_any_layer_with_the_protocol():
    spy = Spy()
    model = nn.Sequential(spy, nn.Dense(3, 2, seed=0), nn.ReLU())
    x = np.ones((4, 3))
    assert model.backward(model(x)) is None
    assert model.backward(model(x), input_grad=True).shape == (4, 3)
    assert spy.asked == [{}, {}]
    model.load_state_dict(model.state_dict() | {"0.w": [3.0]})
    assert spy.params["w"] == 3


def test_the_first_dense_computes_no_input_gradient_unless_asked(monkeypatch):
    asked = []
    real = nn.Dense.backward

    def spy(self, dy, input_grad):
        asked.append(input_grad)
        return real(self, dy, input_grad)

    monkeypatch.setattr(nn.Dense, "backward", spy)
    x = np.ones((4, 5))
    model = nn.Sequential(nn.Sequential(nn.Dense(5, 3), nn.Dense(3, 3)), nn.Dense(3, 2))
    dy = np.ones_like(model(x))
    assert model.backward(dy) is None
    assert asked == [True, True, False]
    assert model.backward(dy, input_grad=True).shape == x.shape
    assert asked[3:] == [True, True, True]
    assert real(model[0][0], np.ones((4, 3)), input_grad=False) is None


def test_sequential_refuses_what_cannot_work():
    relu = nn.ReLU()
    for layers in [(relu, relu), (relu, nn.Sequential(nn.Tanh(), relu)), (nn.Sequential(relu), nn.Sequential(relu))]:
        with pytest.raises(ValueError, match="twice"):
            nn.Sequential(*layers)
    for bad in (nn.ReLU, [nn.ReLU(), nn.Tanh()], None):
        with pytest.raises(TypeError, match="as layer 1"):
            nn.Sequential(nn.Tanh(), bad)


def test_state_travels():
    one, other = network(seed=0), network(seed=10)
    x = np.random.default_rng(0).standard_normal((6, 5))
    one(x)
    arrays = dict(other.params)
    other.load_state_dict(one.state_dict())
    assert all(other.params[k] is p for k, p in arrays.items())
    assert other[0].params["weight"] is arrays["0.weight"]
    assert (other.eval()(x) == one.eval()(x)).all()
    state = one.state_dict()
    for a in state.values():
        a[...] = 77  # copies
    assert (other(x) == one(x)).all()
    single = network(dtype="float32")
    single.load_state_dict({k: v.tolist() for k, v in one.state_dict().items()})
    assert (single.params["0.weight"] == one.params["0.weight"].astype(np.float32)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("6.bias"), "missing key '6.bias'"),
        (lambda s: s.update({"9.bias": 0}), "unexpected key '9.bias'"),
        (lambda s: s.update({"6.weight": np.zeros((6, 4))}), r"'6.weight': expected .*\(4, 6\), got .*\(6, 4\)"),
        (lambda s: s.update({"6.bias": np.zeros(4, complex)}), "'6.bias': expected float64 .* got complex128"),
        (lambda s: s.update({"1.num_batches_tracked": [0, 0]}), "'1.num_batches_tracked': expected"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    model = network()
    before = model.state_dict()
    state = {k: v + 1 for k, v in before.items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state)
    assert all((v == before[k]).all() for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="'bias': expected float32 of shape"):
        nn.Dense(2, 3).load_state_dict({"weight": np.zeros((3, 2)), "bias": np.zeros(2)})


@pytest.mark.parametrize(
    "layer",
    [*ELEMENTWISE, nn.Dense(3, 2, False, dtype="float64", seed=5), nn.Dense(3, 2), nn.Dropout(0.5)],
    ids=repr,
)
def test_config_and_repr_make_the_same_layer(layer):
    config = json.loads(json.dumps(layer.config()))
    assert config.keys() == inspect.signature(type(layer)).parameters.keys()
    for twin in (type(layer)(**config), eval(repr(layer), vars(nn))):
        assert twin.config() == layer.config()
        assert {k: (p.shape, p.dtype) for k, p in twin.params.items()} == {
            k: (p.shape, p.dtype) for k, p in layer.params.items()
        }
    assert repr(nn.Dense(3, 2)) == "Dense(n_in=3, n_out=2)"


def test_sequential_repr_evaluates():
    model = nn.Sequential(network(), nn.Sequential(), nn.ReLU())
    assert repr(eval(repr(model), {**vars(nn), "BatchNorm": BatchNorm})) == repr(model)
    assert repr(nn.Sequential(nn.ReLU(), nn.Tanh())) == "Sequential(\n    ReLU(),\n    Tanh(),\n)"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_share_nothing_and_hold_no_batch(copied):
    model, x = nn.Sequential(network(), nn.Dropout(0.5, seed=1)), np.ones((6, 5))
    y = model(x)
    model.eval()
    twin = copied(model)
    assert not twin.training
    assert not twin[0][1].training
    assert (twin(x) == model(x)).all()
    for what in (lambda m: m.params, lambda m: m.grads, lambda m: m.state_dict()):
        ours, theirs = what(twin), what(model)
        assert ours.keys() == theirs.keys()
        assert not any(np.shares_memory(ours[k], theirs[k]) for k in ours)
    twin.params["0.0.weight"][...] = 0  # the copy's dict must be of the copy's own layers
    assert not twin[0][0].params["weight"].any()
    assert model[0][0].params["weight"].any()
    for layer in [model, *model, *model[0]]:
        with pytest.raises(RuntimeError):
            copied(layer).backward(y)
    assert (copied(model).train()[1](x) == model.train()[1](x)).all()  # the random stream goes on alike


def test_backward_after_an_inference_forward():
    model, x = network(), np.random.default_rng(0).standard_normal((6, 5))
    model.eval()
    assert model(x[:1]).shape == (1, 4)
    assert model.backward(np.ones((1, 4)), input_grad=True).shape == (1, 5)
