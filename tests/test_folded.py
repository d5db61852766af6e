"""Sequential.folded: Dense + BatchNorm (+ activation) as one Dense, against the unfolded layers in 80 digits."""

import copy
import decimal
import itertools
import pickle

import numpy as np
import pytest

from fastbn import BatchNorm, checkpoint, nn, optim

U = {"float32": 2.0**-24, "float64": 2.0**-53}
DIGITS = np.vectorize(decimal.Decimal, otypes=[object])

# what becomes of the statistics and parameters of a BatchNorm, drawn around 0 and 1, and of the bias before it
CASES = {
    "plain": lambda bn, b: None,
    "tiny variance": lambda bn, b: np.multiply(bn.running_var, 1e-30, out=bn.running_var),
    "no variance": lambda bn, b: bn.running_var.fill(0),
    "large variance": lambda bn, b: np.multiply(bn.running_var, 1e40, out=bn.running_var),
    "mean / std 1e4": lambda bn, b: np.multiply(bn.running_mean, 1e4, out=bn.running_mean),
    "weight zero": lambda bn, b: bn.weight.fill(0),
    "weight negative": lambda bn, b: np.negative(abs(bn.weight), out=bn.weight),
    "bias far from 0, and the mean with it": lambda bn, b: (
        np.add(b, 1e6, out=b), np.copyto(bn.running_mean, b), np.add(bn.running_mean, 1e-3, out=bn.running_mean),
    ),
    "all but cancelled": lambda bn, b: np.copyto(
        bn.bias, (bn.running_mean - b) * bn.weight / np.sqrt(bn.running_var + bn.eps)
    ),
}  # fmt: skip


def pair(n_in, n_out, dtype, extreme="plain", seed=0, **options):
    """A Dense and a BatchNorm that has seen something."""
    rng = np.random.default_rng(seed)
    dense = nn.Dense(n_in, n_out, dtype=dtype, seed=seed)
    bn = BatchNorm(n_out, dtype=dtype, **options)
    bn.running_mean, bn.running_var = rng.normal(size=n_out), rng.uniform(0.5, 2, n_out)
    if bn.weight is not None:
        bn.weight, bn.bias = rng.normal(size=(2, n_out))
    CASES[extreme](bn, dense.params["bias"])
    return dense, bn


def exactly(dense, bn, x):
    """norm(dense(x)) in 80 digits, and sum |W'x| + |b'|, the scale of its bound."""
    with decimal.localcontext(decimal.Context(prec=80)):
        W, x = DIGITS(dense.params["weight"].astype(float)), DIGITS(x.astype(float))
        b = DIGITS(dense.params["bias"].astype(float)) if dense.bias else 0
        mean, var = DIGITS(bn.running_mean), DIGITS(bn.running_var)
        gamma, beta = (1, 0) if bn.weight is None else (DIGITS(a.astype(float)) for a in (bn.weight, bn.bias))
        invstd = 1 / np.sqrt(var + decimal.Decimal(bn.eps))
        y = (x @ W.T + b - mean) * invstd * gamma + beta
        size = abs(x) @ abs(W * (invstd * gamma)[:, np.newaxis]).T + abs((b - mean) * invstd * gamma + beta)
    return y, size


def rows(n, n_in, dtype, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, n_in)) * 10.0 ** np.arange(-3, n - 3)[:, np.newaxis]
    x[0] = 0
    return x.astype(dtype)


@pytest.mark.parametrize("extreme", CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_in", [1, 4, 50])
def test_an_output_is_within_its_bound(n_in, dtype, extreme):
    for seed in range(10):
        dense, bn = pair(n_in, 6, dtype, extreme, seed)
        (one,) = nn.Sequential(dense, bn).folded()
        x = rows(7, n_in, dtype, seed)
        y, size = exactly(dense, bn, x)
        assert (abs(DIGITS(one(x).astype(float)) - y) <= DIGITS(4 * n_in * U[dtype]) * size).all(), seed


@pytest.mark.parametrize("options", [{"affine": False}, {"axis": -1}, {"eps": 1e-3, "momentum": None}])
def test_any_kind_of_layer(options):
    dense, bn = pair(5, 6, "float64", **options)
    dense = copy.deepcopy(dense)
    x = rows(7, 5, "float64")
    (one,) = nn.Sequential(dense, bn).folded()
    y, size = exactly(dense, bn, x)
    assert (abs(DIGITS(one(x)) - y) <= DIGITS(20 * U["float64"]) * size).all()
    unbiased = nn.Dense(5, 6, bias=False, dtype="float64", seed=0)
    (one,) = nn.Sequential(unbiased, bn).folded()
    y, size = exactly(unbiased, bn, x)
    assert (abs(DIGITS(one(x)) - y) <= DIGITS(20 * U["float64"]) * size).all()
    if options.get("axis") == -1:
        deep = rows(6, 5, "float64").reshape(2, 3, 5)
        np.testing.assert_allclose(one(deep), bn.eval()(unbiased(deep)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("x_dtype", "dtype"), list(itertools.permutations(U)))
def test_x_of_the_other_dtype(x_dtype, dtype):
    dense, bn = pair(5, 6, dtype)
    x = rows(7, 5, x_dtype)
    (one,) = nn.Sequential(dense, bn).folded()
    y, size = exactly(dense, bn, x)
    assert one(x).dtype == x_dtype
    assert (abs(DIGITS(one(x).astype(float)) - y) <= DIGITS(20 * U["float32"]) * size).all()


def network(dtype="float64"):
    """Every activation, behind a BatchNorm and fused; a BatchNorm first; nested; Dropout."""
    return nn.Sequential(
        BatchNorm(5, dtype=dtype),
        *pair(5, 9, dtype, activation="relu"), nn.Dropout(0.5),
        *pair(9, 8, dtype), nn.Dropout(0.5), nn.ReLU(),
        nn.Sequential(*pair(8, 9, dtype, activation="leaky_relu"), nn.Sequential(*pair(9, 7, dtype))), nn.LeakyReLU(),
        *pair(7, 7, dtype), nn.LeakyReLU(0.3),
        *pair(7, 6, dtype), nn.Sigmoid(),
        nn.Dense(6, 6, dtype=dtype), nn.ReLU(), nn.Dense(6, 3, bias=False, dtype=dtype),
    )  # fmt: skip


FOLDED = """Sequential(
    BatchNorm(5, dtype='float64'),
    FoldedDense(n_in=5, n_out=9, activation='relu', dtype='float64'),
    FoldedDense(n_in=9, n_out=8, activation='relu', dtype='float64'),
    FoldedDense(n_in=8, n_out=9, activation='leaky_relu', dtype='float64'),
    FoldedDense(n_in=9, n_out=7, activation='leaky_relu', dtype='float64'),
    FoldedDense(n_in=7, n_out=7, dtype='float64'),
    LeakyReLU(negative_slope=0.3),
    FoldedDense(n_in=7, n_out=6, dtype='float64'),
    Sigmoid(),
    Dense(n_in=6, n_out=6, activation='relu', dtype='float64'),
    Dense(n_in=6, n_out=3, bias=False, dtype='float64'),
)"""


@pytest.mark.parametrize("dtype", U)
@pytest.mark.parametrize("training", [True, False])
def test_a_network_and_its_folded_one(training, dtype):
    model = network(dtype).train(training)
    x = np.random.default_rng(1).normal(size=(20, 5)).astype(dtype)
    folded = model.folded()
    assert repr(folded).replace("float32", "float64") == FOLDED or dtype == "float32"
    assert not any(layer.training for layer in [folded, *folded])
    expected = copy.deepcopy(model).eval()(x)
    np.testing.assert_allclose(folded(x), expected, rtol=1e-12 if dtype == "float64" else 2e-4, atol=1e3 * U[dtype])
    assert folded(x[:1]).shape == (1, 3)
    assert repr(folded.folded()) == repr(folded)


def test_the_model_stays_as_it_was():
    model = network()
    model[1].eval()
    x = np.random.default_rng(1).normal(size=(20, 5))
    y = model(x)
    before = {k: a.tobytes() for k, a in model.state_dict().items()}
    text, modes = repr(model), [layer.training for layer in nn.walk(model)]
    folded = model.folded()
    assert {k: a.tobytes() for k, a in model.state_dict().items()} == before
    assert repr(model) == text
    assert [layer.training for layer in nn.walk(model)] == modes
    model.backward(np.ones_like(y))  # the last forward is still there

    def arrays(model):
        for layer in nn.walk(model):
            yield from (*layer.params.values(), *layer.grads.values())
            yield from (a for a in vars(layer).values() if isinstance(a, np.ndarray))

    assert not any(np.shares_memory(a, b) for a in arrays(folded) for b in arrays(model))


class Doubled(nn.Dense):
    def forward(self, x):
        return 2 * super().forward(x)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Block(nn.Sequential):
    """Only made otherwise."""

    def __init__(self, n):
        super().__init__(nn.Dense(n, n), BatchNorm(n))


def test_a_forward_of_ones_own_stays_what_it_is():
    x = np.random.default_rng(0).normal(size=(7, 4))
    residual = Residual(nn.Dense(4, 4, bias=False, seed=0), BatchNorm(4))
    for model in (nn.Sequential(nn.Dense(4, 4), nn.Sequential(residual), nn.ReLU(), *Block(4)), residual):
        folded = model.folded()
        np.testing.assert_allclose(folded(x), model.eval()(x), rtol=1e-6, atol=1e-6)
        assert not any(layer.training for layer in nn.walk(folded))
        assert residual not in [*folded]


@pytest.mark.parametrize(
    ("layers", "classes"),
    [
        ([BatchNorm(4), nn.Dense(4, 4)], ["BatchNorm", "Dense"]),
        ([nn.Dense(4, 4), BatchNorm(4, track_running_stats=False)], ["Dense", "BatchNorm"]),
        ([nn.Dense(4, 4), BatchNorm(4, axis=0)], ["Dense", "BatchNorm"]),
        ([nn.Dense(4, 4), BatchNorm(4, axis=2)], ["Dense", "BatchNorm"]),
        ([nn.Dense(4, 4), BatchNorm(3)], ["Dense", "BatchNorm"]),  # (N, 3, 4)
        ([nn.Dense(4, 4, activation="relu"), BatchNorm(4)], ["Dense", "BatchNorm"]),
        ([nn.Dense(4, 4), nn.Tanh(), BatchNorm(4)], ["Dense", "Tanh", "BatchNorm"]),
        ([Doubled(4, 4), BatchNorm(4)], ["Doubled", "BatchNorm"]),
        (
            [nn.Dense(4, 4), BatchNorm(4), BatchNorm(4)],
            ["FoldedDense", "BatchNorm"],
        ),  # the second would be a second rounding
        ([nn.Dense(4, 4), BatchNorm(4), nn.Dense(4, 4), BatchNorm(4, axis=-1)], ["FoldedDense", "Dense"]),
        ([nn.Standardize(4), nn.Dense(4, 4), BatchNorm(4)], ["Standardize", "FoldedDense"]),
        ([Block(4), nn.ReLU()], ["FoldedDense"]),
        ([], []),
    ],
)
def test_what_cannot_be_folded_stays(layers, classes):
    folded = nn.Sequential(*layers).folded()
    assert [type(layer).__name__ for layer in folded] == classes
    assert not any(layer.training for layer in folded)
    assert not {id(layer) for layer in folded} & {id(layer) for layer in layers}


@pytest.mark.parametrize(
    ("mean", "var", "eps"), [(0, 0, 1e-90), (1e60, 1, 1e-5), (0, 1e80, 1e-5), (0, np.nan, 1e-5), (0, -1, 1e-5)]
)
def test_weights_that_float32_cannot_hold_are_not_folded(mean, var, eps):
    bn = BatchNorm(2, eps=eps)
    bn.running_mean, bn.running_var = [0, mean], [1, var]
    dense = nn.Dense(3, 2, bias=False, seed=0)
    assert len(nn.Sequential(dense, bn).folded()) == 2
    wide = nn.Dense(3, 2, seed=0, dtype="float64")
    assert len(nn.Sequential(wide, bn).folded()) == (1 if var >= 0 else 2)


def outcome(model, x):
    """y, or the type and the sentence of the error."""
    try:
        return model(x)
    except (ValueError, IndexError) as error:  # an AxisError is both
        return type(error), str(error)


@pytest.mark.parametrize("axis", [1, -1, 0, 2, -2])
@pytest.mark.parametrize("behind", [[], ["relu"], [nn.ReLU()], [nn.Dropout(0.5), nn.LeakyReLU()], [nn.Tanh()]], ids=str)
def test_whatever_comes_goes_through_as_through_the_layers(axis, behind):
    """Axis 1 is Dense's last axis in (N, C) alone; where x does not fit, the error is the unfolded network's."""
    activation = "relu" if behind == ["relu"] else None
    model = nn.Sequential(
        *pair(5, 5, "float64", axis=axis, activation=activation), *([] if activation else behind),
        nn.Dense(5, 5, activation="relu", dtype="float64"), pair(5, 5, "float64", seed=1, axis=axis)[1],
        *pair(5, 5, "float64", seed=2),
    ).eval()  # fmt: skip
    folded = model.folded()
    copies = folded, folded.folded(), pickle.loads(pickle.dumps(folded)), copy.deepcopy(folded)
    for shape in [(4, 5), (6, 5, 5), (2, 5, 5, 5), (6, 3, 5), (2, 3, 5, 5), (5,), (0, 5), (0, 5, 5), (5, 6, 5)]:
        x = np.random.default_rng(0).normal(size=shape)
        expected = outcome(model, x)
        for one in copies:
            y = outcome(one, x)
            if isinstance(expected, tuple):
                assert y == expected
            elif axis != -1 and len(shape) != 2:
                np.testing.assert_array_equal(y, expected)
            else:
                np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_array_equal(outcome(folded, x.tolist() if x.size else x), outcome(folded, x))


class Images(nn.ReLU):
    """A layer of one's own that reshapes: what comes to a Dense is not known from what comes to the network."""

    def forward(self, x):
        return super().forward(x).reshape(-1, 5, 5)


def test_a_layer_of_ones_own_that_reshapes():
    model = nn.Sequential(*pair(5, 25, "float64"), Images(), *pair(5, 5, "float64")).eval()
    x = np.random.default_rng(0).normal(size=(4, 5))
    folded = model.folded()
    np.testing.assert_allclose(folded(x), model(x), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(folded[2](x), model[3:](x), rtol=1e-10, atol=1e-10)


def test_a_folded_layer_keeps_in_a_file_what_it_was_made_of(tmp_path):
    pytest.importorskip("safetensors")
    model = nn.Sequential(*pair(5, 5, "float32", activation="relu"), nn.Sequential(*pair(5, 5, "float32"), nn.ReLU()))
    rows, images = (np.random.default_rng(0).normal(size=shape) for shape in ((4, 5), (4, 5, 5)))
    folded = model.folded()
    checkpoint.save(tmp_path / "m", folded)
    back, other = checkpoint.load(tmp_path / "m"), model.folded()
    for layer in other:
        layer.params["weight"] += 1
    other.load_state_dict(folded.state_dict())
    for one in (back, other):
        np.testing.assert_array_equal(one(images), model.eval()(images))
        np.testing.assert_array_equal(one(rows), folded(rows))
        with pytest.raises(ValueError, match=r"missing key '0\.layers\.1\.running_mean'"):
            one.load_state_dict({k: v for k, v in folded.state_dict().items() if k != "0.layers.1.running_mean"})


def test_a_folded_layer_that_was_trained_is_for_rows():
    """What other shapes go through has not been trained with it: an error, not another network's numbers."""
    folded = nn.Sequential(*pair(5, 5, "float32")).folded()
    images, rows = np.ones((4, 5, 5)), np.eye(5)
    folded(images)
    with pytest.raises(RuntimeError, match=r"FoldedDense\.backward needs a forward .* 2 dimensions"):
        folded.backward(images)
    folded(rows)
    folded.backward(rows)
    optim.SGD(folded, 0.1).step()
    assert folded(rows).shape == (5, 5)
    for one in (folded, pickle.loads(pickle.dumps(folded)), nn.Sequential(nn.FoldedDense(5, 5))):
        with pytest.raises(RuntimeError, match=r"expected x of shape \(N, 5\), got \(4, 5, 5\)"):
            one(images)


def test_a_folded_network_is_saved_and_trains(tmp_path):
    pytest.importorskip("safetensors")
    folded = network().folded()
    checkpoint.save(tmp_path / "m.safetensors", folded)
    back = checkpoint.load(tmp_path / "m.safetensors")
    assert repr(back) == repr(folded)
    x = np.random.default_rng(1).normal(size=(20, 5))
    np.testing.assert_array_equal(back(x), folded(x))
    assert not back.training
    assert back.backward(np.ones((20, 3)), input_grad=True).shape == x.shape
