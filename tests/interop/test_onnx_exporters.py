"""fastbn.interop.onnx.load on what PyTorch, Keras and skl2onnx write, beside ONNX Runtime and these libraries."""

import logging
import os
import warnings
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
from onnx_graphs import U, ort, refused

from fastbn import nn
from fastbn.interop import onnx as interop

RNG = np.random.default_rng(0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


@pytest.fixture(autouse=True)
def quiet():
    """Exporters warn of what does not matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        yield
        logging.disable(before)


def same(path, x, ulps=40):
    """The network of a file, once it computes what ONNX Runtime does."""
    network = interop.load(path)
    y, expected = network(x), ort(path, x)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=0, atol=ulps * U[y.dtype.name] * max(1, abs(expected).max()))
    return network


# --- PyTorch


def mlp(torch, dtype="float32"):
    t = torch.nn
    torch.manual_seed(0)
    leaky = t.LeakyReLU(0.2) if dtype == "float32" else t.ReLU()  # ONNX Runtime has it for float32 alone
    module = t.Sequential(
        t.Flatten(), t.Linear(12, 8, bias=False), t.BatchNorm1d(8, eps=1e-3, momentum=0.3), t.ReLU(), t.Dropout(0.3),
        t.Sequential(t.Linear(8, 6), leaky, t.Identity(), t.BatchNorm1d(6, affine=False)), t.Tanh(),
        t.Linear(6, 4), t.Sigmoid(), t.BatchNorm1d(4), t.Softmax(1),
    ).to(getattr(torch, dtype))  # fmt: skip
    with torch.no_grad():
        module[2].weight.uniform_(0.5, 2)
        module[2].bias.normal_()
        for _ in range(5):
            module(3 * torch.randn(20, 3, 4, dtype=getattr(torch, dtype)) + 1)
    return module


def exported(torch, module, path, x, opset, dynamo, training=False):
    mode = torch.onnx.TrainingMode
    how = {"opset_version": opset, "training": mode.TRAINING if training else mode.EVAL}
    if dynamo:
        names = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
        torch.onnx.export(module, (x,), str(path), dynamo=True, **names, **how)
    else:
        names = {"dynamic_axes": {"x": {0: "N"}}, "input_names": ["x"]}
        torch.onnx.export(module, (x,), str(path), dynamo=False, **names, **how)


OPSETS = [9, 11, 12, 13, 14, 15, 17, 18]
# The exporter by dynamo takes ten seconds for each.
WAYS = [(opset, False, dtype) for opset in OPSETS for dtype in ("float32", "float64")] + [(18, True, "float32")]


@pytest.mark.parametrize(("opset", "dynamo", "dtype"), WAYS)
def test_pytorch_in_eval_mode(path, opset, dynamo, dtype):
    torch = pytest.importorskip("torch")
    module = mlp(torch, dtype).eval()
    x = 3 * torch.randn(33, 3, 4, dtype=getattr(torch, dtype)) + 1
    exported(torch, module, path, x[:4], opset, dynamo)
    network = same(path, x.numpy())
    assert not network.training
    y = module(x).detach().numpy()
    # An attribute is of float32, and so is epsilon; double networks feel it.
    tolerance = 1e-6 if dtype == "float32" else 1e-8
    np.testing.assert_allclose(network(x.numpy()), y, rtol=0, atol=tolerance)
    weights = [p.detach().numpy() for p in module.parameters() if p.ndim == 2]
    kept = [layer.params["weight"] for layer in network if isinstance(layer, nn.Dense)]
    exact = [(a == b).all() for a, b in zip(weights, kept, strict=True)]
    assert all(exact[1:])  # the first may have been folded with its batch normalization
    assert exact[0] or dynamo


@pytest.mark.parametrize("opset", OPSETS)
def test_pytorch_in_training_mode(path, opset):
    torch = pytest.importorskip("torch")
    module = mlp(torch)
    x = torch.randn(33, 3, 4)
    exported(torch, module, path, x[:4], opset, False, training=True)
    network = interop.load(path)
    modes = {type(layer).__name__: layer.training for layer in network}
    assert network.training
    assert modes["BatchNorm"]
    assert modes["Dropout"] == (opset >= 12)  # before that no file says it
    np.testing.assert_allclose(network.eval()(x.numpy()), module.eval()(x).detach().numpy(), rtol=0, atol=1e-6)
    assert [layer.momentum for layer in network if type(layer).__name__ == "BatchNorm"] == [0.3, 0.1, 0.1]
    theirs = [m.running_var.numpy() for m in module.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    ours = [layer.running_var for layer in network if type(layer).__name__ == "BatchNorm"]
    assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dynamo", [False, True])
def test_pytorch_modules_with_a_forward_of_their_own(path, dynamo):
    torch = pytest.importorskip("torch")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = torch.nn.BatchNorm2d(3), torch.nn.Linear(60, 5)

        def forward(self, x):
            x = self.norm(x)
            return torch.softmax(self.linear(x.view(x.size(0), -1)).relu() * 0.5 - 1, -1)

    module = Model().eval()
    module.norm.running_mean += torch.randn(3)
    x = torch.randn(7, 3, 4, 5)
    exported(torch, module, path, x, 17, dynamo)
    network = same(path, x.numpy())
    np.testing.assert_allclose(network(x.numpy()), module(x).detach().numpy(), rtol=0, atol=1e-6)


def test_a_linear_of_3_axes_and_what_is_refused(path):
    torch = pytest.importorskip("torch")
    exported(torch, torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()), path, torch.randn(2, 5, 3), 18, False)
    same(path, RNG.standard_normal((6, 5, 3)).astype(np.float32))

    class Residual(torch.nn.Module):
        def forward(self, x):
            return x + torch.relu(x)

    exported(torch, Residual(), path, torch.randn(2, 3), 18, False)
    refused(path, None, "(Add): expected a chain of nodes, got one where branches meet")
    exported(torch, torch.nn.Conv2d(1, 2, 3), path, torch.randn(2, 1, 5, 5), 18, False)
    refused(path, None, "(Conv): expected one of Gemm, MatMul,")


# --- Keras


KERAS = """
import sys
import numpy as np
import keras

keras.utils.set_random_seed(0)
L = keras.layers
rng = np.random.default_rng(0)
x = (rng.standard_normal((50, 3, 4)) * 3 + 1).astype("float32")
scaling = L.Normalization()
scaling.adapt(x)
model = keras.Sequential([
    keras.Input((3, 4)), scaling, L.Flatten(), L.Dense(8, use_bias=False), L.BatchNormalization(), L.ReLU(),
    L.Dropout(0.3), L.Dense(6, activation="relu"), L.LeakyReLU(negative_slope=0.2), L.BatchNormalization(scale=False),
    L.Dense(5, activation="tanh"), L.Dense(4, activation="sigmoid"), L.Dense(3, activation="softmax"),
])
model(x, training=True)
model.export(sys.argv[1] + "/model.onnx", format="onnx", verbose=False)
np.savez(sys.argv[1] + "/seen.npz", x=x, y=np.asarray(model.predict(x, verbose=0)))
"""


@pytest.mark.skipif(find_spec("keras") is None or find_spec("torch") is None, reason="needs keras on PyTorch")
def test_keras_own_export(path, python):
    done = python("-c", KERAS, str(path.parent), KERAS_BACKEND="torch", TF_CPP_MIN_LOG_LEVEL="3")
    assert path.exists(), done.stderr[-2000:]
    seen = np.load(path.parent / "seen.npz")
    network = same(path, seen["x"])
    np.testing.assert_allclose(network(seen["x"]), seen["y"], rtol=0, atol=1e-5)
    assert [type(layer).__name__ for layer in network] == [
        "Standardize", "Flatten", "Dense", "BatchNorm", "ReLU", "Dense", "ReLU", "LeakyReLU", "BatchNorm", "Dense",
        "Tanh", "Dense", "Sigmoid", "Dense", "Softmax",
    ]  # fmt: skip


# --- skl2onnx

X = RNG.standard_normal((60, 4)) * [1, 5, 0.1, 2] + [0, 3, -1, 100]
LABELS = np.arange(60) % 3
TARGETS = {
    "two classes": LABELS > 0,
    "three classes": LABELS,
    "named classes": np.array(["low", "mid", "high"])[LABELS],
    "labels": np.column_stack([LABELS > 0, LABELS == 2]).astype(int),
}


def to_onnx(estimator, x, path, **options):
    skl2onnx = pytest.importorskip("skl2onnx")
    path.write_bytes(skl2onnx.to_onnx(estimator, x[:1], **options).SerializeToString())
    return path


def estimators():
    pytest.importorskip("sklearn")
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return MLPClassifier, MLPRegressor, make_pipeline, StandardScaler


@pytest.mark.parametrize("opset", [9, 13, 18, None])
@pytest.mark.parametrize("activation", ["relu", "tanh", "logistic", "identity"])
@pytest.mark.parametrize("target", TARGETS)
def test_skl2onnx_classifiers(path, target, activation, opset):
    classifier, _, pipeline, scaler = estimators()
    zipmap, scaled = activation in ("relu", "logistic"), activation in ("relu", "tanh")
    if target == "labels":
        zipmap = False
    network = classifier((5, 3), activation=activation, max_iter=5, random_state=0)
    estimator = (pipeline(scaler(), network) if scaled else network).fit(X, TARGETS[target])
    x = X.astype(np.float32)
    options = {} if opset is None else {"target_opset": {"": opset, "ai.onnx.ml": 1}}
    to_onnx(estimator, x, path, options={"zipmap": zipmap}, **options)
    loaded = same(path, x)
    expected = estimator.predict_proba(x)
    if target == "labels":  # skl2onnx has 1 - p in front of them
        expected = np.hstack([1 - expected, expected])
    np.testing.assert_allclose(loaded(x), expected, rtol=0, atol=2e-5)
    assert isinstance(loaded[0], nn.Standardize) == scaled


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
@pytest.mark.parametrize("scaled", [False, True])
def test_skl2onnx_regressors(path, scaled, dtype):
    _, regressor, pipeline, scaler = estimators()
    network = regressor(hidden_layer_sizes=(5, 3), max_iter=5, random_state=0)
    x = np.round(X * 10).astype(dtype)
    estimator = (pipeline(scaler(), network) if scaled else network).fit(x, X.sum(1))
    loaded = same(to_onnx(estimator, x, path), x) if dtype != "int64" else interop.load(to_onnx(estimator, x, path))
    tolerance = 1e-10 if dtype == "float64" else 1e-4
    np.testing.assert_allclose(loaded(x)[:, 0], estimator.predict(x), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(loaded(x), ort(path, x), rtol=1e-5, atol=1e-5)


def test_skl2onnx_regressors_of_two_targets(path):
    """skl2onnx gives them a column of all values one after another, which no layer does."""
    _, regressor, _, _ = estimators()
    estimator = regressor(hidden_layer_sizes=(5,), max_iter=5, random_state=0).fit(X, X[:, :2])
    refused(to_onnx(estimator, X.astype(np.float32), path), None, "(Reshape): expected all axes but the first")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"with_mean": False}, {"with_std": False}])
def test_skl2onnx_scalers(path, options, dtype):
    scaler = estimators()[-1](**options).fit(X)
    x = X.astype(dtype)
    loaded = same(to_onnx(scaler, x, path), x)
    assert [type(layer) for layer in loaded] == [nn.Standardize]
    np.testing.assert_allclose(loaded(x), scaler.transform(X), rtol=1e-5, atol=1e-4)


def test_other_scalers_and_what_is_not_known(path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import MinMaxScaler, Normalizer, RobustScaler

    classifier, _, pipeline, _ = estimators()
    x = X.astype(np.float32)
    for scaler in (MinMaxScaler(), RobustScaler()):
        estimator = pipeline(scaler, classifier((5,), max_iter=5, random_state=0)).fit(x, LABELS)
        network = same(to_onnx(estimator, x, path), x)
        np.testing.assert_allclose(network(x), estimator.predict_proba(x), rtol=0, atol=1e-5)
    estimator = pipeline(Normalizer(), classifier((5,), max_iter=5, random_state=0)).fit(x, LABELS)
    refused(to_onnx(estimator, x, path), None, "(ai.onnx.ml.Normalizer): expected one of")
    refused(to_onnx(LogisticRegression().fit(x, LABELS), x, path), None, "(ai.onnx.ml.")


def test_a_column_for_each_class_is_refused(path):
    classifier = estimators()[0]
    estimator = classifier((5,), max_iter=5, random_state=0).fit(X, LABELS)
    to_onnx(estimator, X.astype(np.float32), path, options={"zipmap": "columns"})
    refused(path, None, "expected a graph with one output of floating numbers, got 4")


def test_files_of_this_machine_hold_no_path(path):
    """What is written says nothing of who wrote it."""
    interop.save(nn.Dense(2, 2), path)
    assert os.fsencode(path.parent) not in path.read_bytes()
    assert onnx.load(path).doc_string == ""
