"""fastbn.interop.onnx.save beside ONNX Runtime: a graph computes what its network does."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_graphs import U, ort, refused, session

from fastbn import BatchNorm, nn
from fastbn.interop import onnx as interop
from fastbn.interop import onnx_file

RNG = np.random.default_rng(0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


def saved(model, path, **options):
    interop.save(model, path, **options)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def trained(*layers, n_in=6, dtype="float32"):
    """A network whose statistics have seen some batches, and a batch."""
    model = nn.Sequential(*layers)
    rng = np.random.default_rng(3)
    for layer in nn.walk([model]):
        if isinstance(layer, BatchNorm):
            layer.params.update({k: rng.uniform(0.5, 2, p.shape) for k, p in layer.params.items()})
        if isinstance(layer, nn.Standardize):
            layer.fit(rng.standard_normal((50, layer.num_features)) * 3 + 7)
    for _ in range(5):
        model((rng.standard_normal((40, n_in)) * 3 + 7).astype(dtype))
    return model, (rng.standard_normal((33, n_in)) * 3 + 7).astype(dtype)


def networks(dtype):
    d, n = {"dtype": dtype}, {"bias": False, "dtype": dtype}
    return {
        "plain": (nn.Dense(6, 8, **n), BatchNorm(8, **d), nn.ReLU(), nn.Dropout(0.3), nn.Dense(8, 3, **d)),
        "fused": (
            nn.Dense(6, 8, activation="relu", **d),
            BatchNorm(8, activation="leaky_relu", eps=0.3, momentum=None, **d),
            nn.Sequential(nn.Dense(8, 5, activation="leaky_relu", **d), nn.Identity(), nn.Sequential(nn.Tanh())),
        ),
        "scaled": (nn.Standardize(6), nn.Dense(6, 5, **d), nn.LeakyReLU(0.3), nn.Dense(5, 4, **d), nn.Softmax()),
        "last axis": (nn.Flatten(), BatchNorm(6, axis=-1, affine=False, eps=1e-7, **d), nn.Sigmoid(), nn.Softmax(1)),
        "frozen": (BatchNorm(6, **d).freeze(), nn.Softmax(0)),
        "nothing": (nn.Dropout(0.5), nn.Identity()),
        "functions": (nn.ReLU(), nn.Tanh()),
    }


@pytest.mark.parametrize("folded", [False, True], ids=["whole", "folded"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", networks("float32"))
def test_runtime_computes_what_the_network_does(path, name, dtype, training, folded):
    model, x = trained(*networks(dtype)[name], dtype=dtype)
    model.train(training)
    double = dtype == "float64" and any(p.dtype == np.float64 for p in model.params.values())
    saved(model, path, folded=folded)
    x = x if double else x.astype(np.float32)
    running = session(path)
    assert running.get_inputs()[0].type == ("tensor(double)" if double else "tensor(float)")
    assert running.get_inputs()[0].shape[0] == "N"
    for rows in (1, 2, 33):
        y = model.eval()(x[:rows])
        np.testing.assert_allclose(ort(path, x[:rows]), y, rtol=0, atol=60 * U[y.dtype.name] * max(1, abs(y).max()))
        again = interop.load(path)(x[:rows])
        assert again.dtype == y.dtype
        np.testing.assert_allclose(again, y, rtol=0, atol=60 * U[y.dtype.name] * max(1, abs(y).max()))


@given(
    n_in=st.integers(1, 300), n_out=st.integers(1, 40), bias=st.booleans(), seed=st.integers(0, 999),
    dtype=st.sampled_from(["float32", "float64"]), scale=st.sampled_from([1e-3, 1.0, 1e4]),
)  # fmt: skip
def test_a_dense_is_within_rounding(tmp_path_factory, n_in, n_out, bias, seed, dtype, scale):
    layer = nn.Dense(n_in, n_out, bias, seed=seed, dtype=dtype)
    x = (np.random.default_rng(seed).standard_normal((9, n_in)) * scale).astype(dtype)
    file = saved(layer, tmp_path_factory.mktemp("d") / "d.onnx")
    weight, b = layer.params["weight"], layer.params.get("bias", np.zeros(n_out))
    bound = (n_in + 2) * U[dtype] * (abs(x) @ abs(weight).T + abs(b))
    assert (abs(ort(file, x).astype(np.float64) - layer(x)) <= 2 * bound).all()
    loaded = interop.load(file)[0]
    assert loaded.config() == layer.config() | {"seed": None}
    assert all((loaded.params[k].tobytes() == p.tobytes()) for k, p in layer.params.items())


@given(
    c=st.integers(1, 40), seed=st.integers(0, 999), dtype=st.sampled_from(["float32", "float64"]),
    ratio=st.sampled_from([0.0, 1.0, 100.0]), eps=st.sampled_from([1e-12, 1e-5, 1e-3, 0.7]),
)  # fmt: skip
def test_a_batch_norm_is_within_rounding(tmp_path_factory, c, seed, dtype, ratio, eps):
    """5u(|weight|(1 + |x*|) + |bias|), and what rounding the mean to the graph's type comes to."""
    rng = np.random.default_rng(seed)
    layer = BatchNorm(c, eps, dtype=dtype)
    std = rng.uniform(0.5, 2, c)
    layer.running_mean, layer.running_var = std * ratio * rng.standard_normal(c), std**2
    layer.weight, layer.bias = rng.standard_normal((2, c))
    x = (rng.standard_normal((9, c)) * std + layer.running_mean).astype(dtype)
    y = layer.eval()(x)
    theirs = ort(saved(layer, tmp_path_factory.mktemp("b") / "b.onnx"), x)
    size = 1 + (abs(x - layer.running_mean) + 2 * abs(layer.running_mean)) / std
    assert (abs(theirs.astype(np.float64) - y) <= 10 * U[dtype] * (abs(layer.weight) * size + abs(layer.bias))).all()


@pytest.mark.parametrize("dtype", [None, "float32", "float64"])
@pytest.mark.parametrize("axis", [1, -1])
def test_standardize_loses_no_digits(path, axis, dtype):
    X = RNG.standard_normal((500, 3)) * [1, 20, 0] + [1.7e9, -3, 5]
    layer = nn.Standardize(3, axis=axis, dtype=dtype).fit(X)
    layer.mean_low[0] = 1e-8
    model = nn.Sequential(layer, nn.Dense(3, 3, dtype=dtype or "float64"))
    exact = (X - layer.mean - layer.mean_low) / np.sqrt(np.where(layer.var == 0, 1, layer.var))
    y = ort(saved(layer if dtype else model, path), X)
    if dtype:
        assert y.dtype == np.dtype(dtype)
        assert (abs(y - exact) <= 2 * U[dtype] * (1 + abs(exact))).all()
    loaded = interop.load(path)
    assert loaded[0].dtype == (None if dtype != "float32" else np.dtype(dtype))
    np.testing.assert_allclose(loaded(X), y, rtol=0, atol=60 * U[y.dtype.name])


def test_float32_data_keeps_float32s_digits(path):
    """Between Casts: the mean is subtracted in double, and what comes is rounded once."""
    X = (RNG.standard_normal((500, 2)) + 1e4).astype(np.float32)
    layer = nn.Standardize(2).fit(X)
    y = ort(saved(layer, path), X)
    assert y.dtype == np.float32
    exact = (X.astype(np.float64) - layer.mean) / np.sqrt(layer.var)
    assert (abs(y - exact) <= 1.01 * U["float32"] * abs(exact)).all()
    loaded = interop.load(path)
    assert loaded[0].dtype is None
    assert (abs(loaded(X) - exact) <= 5 * U["float32"] * (1 + abs(exact))).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_there_and_back_makes_the_same_bytes(path, tmp_path, dtype):
    d = {"dtype": dtype}
    scaling = nn.Standardize(6, axis=-1, dtype=None if dtype == "float64" else "float32")
    layers = nn.Dense(6, 8, False, **d), BatchNorm(8, eps=1e-3, momentum=0.3, **d), nn.ReLU(), nn.Dense(8, 3, **d)
    model, _ = trained(scaling, *layers, nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Tanh(), nn.Flatten(), nn.Softmax(1))
    interop.save(model, path)
    loaded = interop.load(path)
    interop.save(loaded, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()
    for name, p in model.params.items():
        assert loaded.params[name].tobytes() == p.tobytes(), name
    assert not loaded.training
    if dtype == "float32":
        assert repr(loaded[2]) == "BatchNorm(8, eps=0.001, momentum=0.3, unbiased=False)"
        assert repr(loaded[5]) == "LeakyReLU(negative_slope=0.1)"
        assert (loaded[2].running_var == model[2].running_var.astype(np.float32)).all()


def test_the_same_model_makes_the_same_bytes(path, tmp_path):
    for name, layers in networks("float32").items():
        model, _ = trained(*layers)
        interop.save(model, path)
        interop.save(model.eval(), tmp_path / "second")
        assert (tmp_path / "second").read_bytes() == path.read_bytes(), name
    file = onnx.load(path)
    assert file.producer_name == "fastbn"
    assert (file.ir_version, file.opset_import[0].version) == (8, 17)


def test_parameters_have_their_names(path):
    model, _ = trained(nn.Dense(6, 8, activation="relu"), nn.Sequential(BatchNorm(8)))
    file = onnx.load(saved(model, path))
    assert [t.name for t in file.graph.initializer] == [
        "0.weight", "0.bias", "1.0.weight", "1.0.bias", "1.0.running_mean", "1.0.running_var",
    ]  # fmt: skip
    assert [node.name for node in file.graph.node] == ["0.Gemm", "0.Relu", "1.0.BatchNormalization"]


def test_a_network_is_written_as_it_is_for_rows(path):
    """A graph has x of (N, C), so that a Flatten at the start finds x flat."""
    model = nn.Sequential(nn.Flatten(), nn.Dense(12, 2, seed=0))
    x = RNG.standard_normal((5, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(ort(saved(model, path), x.reshape(5, 12)), model(x), rtol=0, atol=1e-6)


class Own(nn.ReLU):
    pass


SAVE_REFUSALS = [
    (lambda: nn.Sequential(nn.ReLU(), nn.Sequential(Own())), TypeError, r"layer '1\.0' \(Own\)"),
    (lambda: Own(), TypeError, r"the layer \(Own\)"),
    (lambda: nn.Sequential(BatchNorm(3, axis=0)), ValueError, r"layer '0' \(BatchNorm\): .*got axis=0"),
    (lambda: BatchNorm(3, axis=2), ValueError, "got axis=2"),
    (lambda: nn.Standardize(3, axis=0).fit(np.ones((3, 2))), ValueError, r"\(Standardize\): .*got axis=0"),
    (lambda: BatchNorm(3, track_running_stats=False), ValueError, "expected running statistics"),
    (lambda: nn.Standardize(3), ValueError, "call fit"),
    (lambda: nn.Softmax(2), ValueError, "got axis=2"),
    (lambda: nn.Sequential(nn.Dense(3, 4), nn.ReLU(), BatchNorm(5)), ValueError, r"'2' \(BatchNorm\): it takes 5 feat"),
    (
        lambda: nn.Sequential(nn.Standardize(3, dtype="float32").fit(np.ones((2, 3))), nn.Dense(3, 1, dtype="float64")),
        ValueError,
        r"layer '1' \(Dense\): expected parameters of float32 .*, got float64",
    ),
]


@pytest.mark.parametrize(("make", "error", "words"), SAVE_REFUSALS, ids=[str(i) for i in range(len(SAVE_REFUSALS))])
def test_what_cannot_be_written_is_named_and_nothing_is_written(path, make, error, words):
    path.write_bytes(b"before")
    for options in ({}, {"folded": True}):
        with pytest.raises(error, match=words):
            interop.save(make(), path, **options)
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_out_of_range_are_refused(path, name):
    layer = BatchNorm(2)
    setattr(layer, name, [1.0, 1e39])
    with pytest.raises(ValueError, match="range of float32"):
        interop.save(layer, path)
    tiny = BatchNorm(2, eps=1e-60)
    tiny.running_var = [1.0, 1e-50]
    with pytest.raises(ValueError, match="range of float32"):
        interop.save(tiny, path)
    assert not path.exists()


def test_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        interop.save(nn.ReLU(), tmp_path / "no" / "m.onnx")
    with pytest.raises(IsADirectoryError, match="expected a file or nothing there"):
        interop.save(nn.ReLU(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        interop.load(tmp_path / "m.onnx")
    with pytest.raises(IsADirectoryError, match="got a folder"):
        interop.load(tmp_path)


def test_two_gibibytes_are_too_many(path, monkeypatch):
    monkeypatch.setattr(interop, "_MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"layer '1' \(Dense\): .* ONNX file holds less than 2 GiB"):
        interop.save(nn.Sequential(nn.Dense(9, 10), nn.Dense(10, 90)), path)
    interop.save(nn.ReLU(), path)
    monkeypatch.setattr(onnx_file, "_MOST_BYTES", 10)
    refused(path, None, "bytes, and an ONNX file holds at most")


@given(seed=st.integers(0, 10**6))
def test_networks_at_random(tmp_path_factory, seed):
    """Any layers in any order: as the network itself, and the same bytes again."""
    rng = np.random.default_rng(seed)
    dtype, width, layers = str(rng.choice(["float32", "float64"])), int(rng.integers(1, 9)), []
    first, d = width, {"dtype": dtype}
    for kind in rng.choice(["dense", "norm", "leaky", "scaling", "other"], rng.integers(1, 9)):
        activation = [None, "relu", "leaky_relu"][rng.integers(3)]
        if kind == "dense":
            n_in, width = width, int(rng.integers(1, 9))
            layers.append(nn.Dense(n_in, width, bool(rng.integers(2)), activation=activation, seed=seed, **d))
        elif kind == "norm":
            layers.append(BatchNorm(width, axis=int(rng.choice([1, -1])), activation=activation, **d))
        elif kind == "leaky":
            layers.append(nn.LeakyReLU(float(rng.choice([0, 0.01, 0.3, 1]))))
        elif kind == "scaling":
            layers.append(nn.Standardize(width))
        else:
            layers.append([nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Softmax, nn.Flatten][rng.integers(5)]())
    model, x = trained(*layers, n_in=first, dtype=dtype)
    if not any(isinstance(layer, nn.Dense | BatchNorm) for layer in model):
        x = x.astype(np.float32)
    double = any(p.dtype == np.float64 for p in model.params.values())
    x = x if double else x.astype(np.float32)
    file = saved(model, tmp_path_factory.mktemp("r") / "r.onnx", folded=bool(rng.integers(2)))
    y, theirs, loaded = model.eval()(x), ort(file, x), interop.load(file)
    tolerance = 3000 * U[y.dtype.name] * max(1, abs(y).max())
    np.testing.assert_allclose(theirs, y, rtol=0, atol=tolerance)
    np.testing.assert_allclose(loaded(x), y, rtol=0, atol=tolerance)
