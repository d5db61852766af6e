"""fastbn.interop.onnx.load beside ONNX Runtime: each operator becomes its layer, and all else is named."""

import math
import os

import numpy as np
import onnx
import pytest
from onnx_graphs import (
    BN,
    DOUBLE,
    FLOAT,
    STATS,
    TYPES,
    B,
    U,
    V,
    W,
    changed,
    graph,
    node,
    op,
    ort,
    refused,
    value,
    written,
)

from fastbn import checkpoint, nn
from fastbn.interop import onnx as interop

RNG = np.random.default_rng(0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


# nodes, arrays, options of graph(), and the layers that come
OPERATORS = {
    "gemm": (op("Gemm", "w", "b"), {"w": W, "b": B}, {}, "Dense"),
    "gemm transB": (op("Gemm", "w", "b", transB=1), {"w": W.T.copy(), "b": B}, {}, "Dense"),
    "gemm alpha beta": (op("Gemm", "w", "b", alpha=0.3, beta=-2.0), {"w": W, "b": B}, {}, "Dense"),
    "gemm without C": (op("Gemm", "w"), {"w": W}, {}, "Dense"),
    "gemm with C of one": (op("Gemm", "w", "b"), {"w": W, "b": np.float32(3)}, {}, "Dense"),
    "gemm with a row": (op("Gemm", "w", "b"), {"w": W, "b": B[None]}, {}, "Dense"),
    "gemm of opset 9": (op("Gemm", "w", "b"), {"w": W, "b": B}, {"opset": 9}, "Dense"),
    "gemm of doubles": (
        op("Gemm", "w", "b", alpha=0.3),
        {"w": W.astype("f8"), "b": B.astype("f8")},
        {"dtype": "float64"},
        "Dense",
    ),
    "matmul": (op("MatMul", "w"), {"w": W}, {}, "Dense"),
    "matmul add": ([op("MatMul", "w"), op("Add", "b")], {"w": W, "b": B}, {}, "Dense"),
    "matmul add, swapped": (
        [op("MatMul", "w"), node("Add", ["b", "x"], ["y"])],
        {"w": W, "b": B[None]},
        {},
        "Dense",
    ),
    "matmul add add": ([op("MatMul", "w"), op("Add", "b"), op("Add", "b")], {"w": W, "b": B}, {}, "Dense BatchNorm"),
    "matmul add one": ([op("MatMul", "w"), op("Add", "b")], {"w": W, "b": B[:1]}, {}, "Dense"),
    "matmul of 3 axes": ([op("MatMul", "w"), op("Add", "b")], {"w": W, "b": B}, {"shape": ("N", 4, 3)}, "Dense"),
    "batch norm": (op("BatchNormalization", *BN), STATS, {}, "BatchNorm"),
    "batch norm of 4 axes": (op("BatchNormalization", *BN), STATS, {"shape": ("N", 3, 2, 5)}, "BatchNorm"),
    "batch norm 7": (op("BatchNormalization", *BN, epsilon=0.1, momentum=0.7), STATS, {"opset": 7}, "BatchNorm"),
    "batch norm 9": (op("BatchNormalization", *BN), STATS, {"opset": 9}, "BatchNorm"),
    "batch norm 14": (op("BatchNormalization", *BN, training_mode=0), STATS, {"opset": 14}, "BatchNorm"),
    "batch norm of no epsilon": (op("BatchNormalization", *BN, epsilon=0.0), STATS, {}, "BatchNorm"),
    "batch norm of doubles": (
        op("BatchNormalization", *BN),
        {k: v.astype("f8") for k, v in STATS.items()},
        {"dtype": "float64"},
        "BatchNorm",
    ),
    "relu": (op("Relu"), {}, {}, "ReLU"),
    "leaky": (op("LeakyRelu", alpha=0.3), {}, {}, "LeakyReLU"),
    "leaky by default": (op("LeakyRelu"), {}, {}, "LeakyReLU"),
    "leaky of doubles": (op("LeakyRelu", alpha=0.3), {}, {"dtype": "float64"}, "LeakyReLU"),
    "prelu": (op("PRelu", "a"), {"a": np.float32([0.2])}, {}, "LeakyReLU"),
    "sigmoid": (op("Sigmoid"), {}, {}, "Sigmoid"),
    "tanh": (op("Tanh"), {}, {}, "Tanh"),
    "softmax": (op("Softmax"), {}, {"shape": ("N", 4, 3)}, "Softmax"),
    "softmax of axis 1": (op("Softmax", axis=1), {}, {"shape": ("N", 4, 3)}, "Softmax"),
    "softmax 11": (op("Softmax"), {}, {"opset": 11}, "Softmax"),
    "softmax 11 of the last axis": (op("Softmax", axis=2), {}, {"shape": ("N", 4, 3), "opset": 11}, "Softmax"),
    "flatten": (op("Flatten"), {}, {"shape": ("N", 4, 3)}, "Flatten"),
    "flatten of axis -2": (op("Flatten", axis=-2), {}, {"shape": ("N", 4, 3)}, "Flatten"),
    "reshape 0 -1": (op("Reshape", "n"), {"n": np.array([0, -1])}, {"shape": ("N", 4, 3)}, "Flatten"),
    "reshape 0 12": (op("Reshape", "n"), {"n": np.array([0, 12])}, {"shape": ("N", "a", "b")}, "Flatten"),
    "reshape -1 12": (op("Reshape", "n"), {"n": np.array([-1, 12])}, {"shape": ("N", 4, 3)}, "Flatten"),
    "reshape 7 -1": (op("Reshape", "n"), {"n": np.array([7, -1])}, {"shape": (7, 4, 3)}, "Flatten"),
    "reshape to the same": (op("Reshape", "n"), {"n": np.array([-1, 3])}, {}, ""),
    "reshape, allowzero": (
        op("Reshape", "n", allowzero=1), {"n": np.array([-1, 12])}, {"shape": ("N", 4, 3)}, "Flatten",
    ),
    "reshape by x's shape": (
        [
            node("Shape", ["x"], ["shape"]), node("Gather", ["shape", "zero"], ["n"]),
            node("Unsqueeze", ["n", "axes"], ["n1"]),
            node("Concat", ["n1", "rest"], ["to"], axis=0), op("Reshape", "to"),
        ],
        {"zero": np.array(0), "axes": np.array([0]), "rest": np.array([-1])}, {"shape": ("N", 4, 3)}, "Flatten",
    ),
    "reshape by a slice of x's shape": (
        [
            node("Shape", ["x"], ["shape"]),
            node("Slice", ["shape", "zero", "one", "zero"], ["n"]),
            node("Concat", ["n", "rest"], ["to"], axis=0), op("Reshape", "to"),
        ],
        {"zero": np.array([0]), "one": np.array([1]), "rest": np.array([12])}, {"shape": ("N", 4, 3)}, "Flatten",
    ),
    "dropout 7": (op("Dropout", ratio=0.3), {}, {"opset": 7}, "Dropout"),
    "dropout 13": (op("Dropout", "p"), {"p": np.float32(0.3)}, {}, "Dropout"),
    "dropout of no training": (op("Dropout", "p", "t"), {"p": np.float32(0.3), "t": np.array(False)}, {}, "Dropout"),
    "identity": (op("Identity"), {}, {}, ""),
    "transposed weight": (
        [node("Transpose", ["w"], ["wt"], perm=[1, 0]), op("MatMul", "wt")],
        {"w": W.T.copy()}, {}, "Dense",
    ),
    "constants": (
        [
            node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(W)),
            node("Constant", [], ["c"], value_floats=[0.5, -1.0]),
            node("Identity", ["c"], ["b"]), op("Gemm", "w", "b"),
            node("Constant", [], ["two"], value_float=2.0), op("Mul", "two"),
        ],
        {}, {}, "Dense BatchNorm",
    ),
    "cast to the same": ([op("Cast", to=FLOAT), op("Relu"), op("Cast", to=FLOAT)], {}, {}, "ReLU"),
    "add": (op("Add", "c"), {"c": V}, {}, "BatchNorm"),
    "sub": (op("Sub", "c"), {"c": V}, {}, "Standardize"),
    "c - x": (node("Sub", ["c", "x"], ["y"]), {"c": V}, {}, "BatchNorm"),
    "mul": (op("Mul", "c"), {"c": V}, {}, "BatchNorm"),
    "div": (op("Div", "c"), {"c": V}, {}, "Standardize"),
    "div by negatives": (op("Div", "c"), {"c": -V}, {}, "BatchNorm"),
    "div by zero": (op("Div", "c"), {"c": V * 0}, {}, "BatchNorm"),
    "mul add": ([op("Mul", "c"), op("Add", "d")], {"c": V, "d": V[None]}, {}, "BatchNorm"),
    "one value": ([op("Mul", "c"), op("Add", "d")], {"c": np.float32(3), "d": np.float32([[2]])}, {}, "BatchNorm"),
    "one value for 3 axes": (op("Mul", "c"), {"c": np.float32(3)}, {"shape": ("N", 4, 3)}, "BatchNorm"),
    "sub mul add": ([op("Sub", "c"), op("Mul", "c"), op("Add", "c")], {"c": V}, {}, "BatchNorm"),
    "sub sub div": ([op("Sub", "c"), op("Sub", "d"), op("Div", "c")], {"c": V, "d": V * 1e-9}, {}, "Standardize"),
    "sub div mul add": ([op("Sub", "c"), op("Div", "c"), op("Mul", "d"), op("Add", "c")], {"c": V, "d": -V}, {},
        "BatchNorm"),
    "mul sub": ([op("Mul", "c"), op("Sub", "c")], {"c": V}, {}, "BatchNorm"),
    "add mul": ([op("Add", "c"), op("Mul", "c")], {"c": V}, {}, "BatchNorm BatchNorm"),
    "mul mul": ([op("Mul", "c"), op("Mul", "c")], {"c": V}, {}, "BatchNorm BatchNorm"),
    "sub add": ([op("Sub", "c"), op("Add", "c")], {"c": V}, {}, "BatchNorm"),
    "along axis 1": (
        [op("Sub", "c"), op("Mul", "d")], {"c": V[:, None, None], "d": V.reshape(1, 3, 1, 1)},
        {"shape": ("N", 3, 2, 4)}, "BatchNorm",
    ),
    "along two axes": (
        [op("Mul", "c"), op("Add", "d")], {"c": V[:, None], "d": np.float32([1, 2, 3, 4])}, {"shape": ("N", 3, 4)},
        "BatchNorm BatchNorm",
    ),
    "tf2onnx's batch norm": (
        [op("MatMul", "w"), op("Add", "b"), op("Mul", "a"), op("Add", "c"), op("Relu")],
        {"w": W, "b": B, "a": B + 3, "c": B}, {}, "Dense BatchNorm ReLU",
    ),
    "scaler": (op("Scaler", domain="ai.onnx.ml", offset=V.tolist(), scale=(V + 1).tolist()), {}, {}, "Standardize"),
    "scaler of one": (op("Scaler", domain="ai.onnx.ml", offset=[2.0], scale=[3.0]), {}, {}, "Standardize"),
    "scaler of doubles": (
        [op("Scaler", domain="ai.onnx.ml", offset=V.tolist(), scale=V.tolist()), op("Relu")], {},
        {"dtype": "float64", "output": "float32"}, "Standardize ReLU",
    ),
    "scaler of integers": (
        op("Scaler", domain="ai.onnx.ml", offset=V.tolist(), scale=V.tolist()), {},
        {"dtype": "int64", "output": "float32"}, "Standardize",
    ),
    "cast from integers": (
        [op("Cast", to=DOUBLE), op("Mul", "c")], {"c": V.astype("f8")}, {"dtype": "int64", "output": "float64"},
        "BatchNorm",
    ),
    "doubles between casts": (
        [op("Cast", to=DOUBLE), op("Sub", "c"), op("Div", "c"), op("Cast", to=FLOAT), op("Gemm", "w")],
        {"c": V.astype("f8"), "w": W}, {}, "Standardize Dense",
    ),
    "doubles before a cast": (
        [op("Sub", "c"), op("Div", "c"), op("Cast", to=FLOAT), op("Gemm", "w")],
        {"c": V.astype("f8"), "w": W}, {"dtype": "float64", "output": "float32"}, "Standardize Dense",
    ),
    "doubles behind a cast": (
        [op("Cast", to=DOUBLE), op("Sub", "c"), op("Gemm", "w")],
        {"c": V.astype("f8"), "w": W.astype("f8")}, {"output": "float64"}, "Standardize Dense",
    ),
    "1 - p and p": (
        [
            op("Gemm", "w", "b"), op("Sigmoid", y="p"), node("Sub", ["one", "p"], ["q"]),
            node("Concat", ["q", "p"], ["y"], axis=1),
        ],
        {"w": W[:, :1].copy(), "b": B[:1], "one": np.float32(1)}, {}, "Dense Softmax",
    ),
    "1 - p and p of two labels": (
        [
            op("Gemm", "w", "b"), op("Sigmoid", y="p"), node("Sub", ["one", "p"], ["q"]),
            node("Concat", ["q", "p"], ["y"], axis=1),
        ],
        {"w": W, "b": B, "one": np.float32(1)}, {}, "Dense Sigmoid",
    ),
    "zip map": (
        [op("Softmax"), op("ZipMap", domain="ai.onnx.ml", classlabels_strings=["a", "b", "c"])], {},
        {"output": "zipped"}, "Softmax",
    ),
}  # fmt: skip


def by_hand(nodes, arrays, options):
    if options.get("output") != "zipped":
        return graph(nodes, arrays, **options)
    model = graph(nodes, arrays, **options | {"output": "float32"})
    mapped = onnx.helper.make_map_type_proto(onnx.TensorProto.STRING, onnx.helper.make_tensor_type_proto(FLOAT, []))
    model.graph.output[0].type.CopyFrom(onnx.helper.make_sequence_type_proto(mapped))
    return model


def example(model):
    """A batch for the graph's input."""
    described = model.graph.input[0].type.tensor_type
    named = {"N": 7, "a": 4, "b": 3}
    shape = [dim.dim_value or named[dim.dim_param] for dim in described.shape.dim]
    x = np.random.default_rng(1).standard_normal(shape) * 3
    return x.astype(next(name for name, number in TYPES.items() if number == described.elem_type))


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_becomes_a_layer(path, name):
    nodes, arrays, options, layers = OPERATORS[name]
    model = by_hand(nodes, arrays, options)
    network = interop.load(written(path, model))
    assert [type(layer).__name__ for layer in network] == layers.split()
    assert not network.training
    assert not any(layer.training for layer in network)
    x = example(model)
    with np.errstate(all="ignore"):
        y = network(x)
    expected = ort(path, x)
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype or name in ("cast from integers", "zip map")
    np.testing.assert_allclose(y, expected, rtol=8 * U[y.dtype.name], atol=8 * U[y.dtype.name] * 30)
    checkpoint.save(path.parent / "model.safetensors", network)
    if x.ndim == 2:  # and it is one that `save` takes
        interop.save(network, path)
        assert [type(layer) for layer in interop.load(path)] == [
            type(layer) for layer in network if not isinstance(layer, nn.Dropout)
        ]


AFFINE = [name for name, (_, _, _, layers) in OPERATORS.items() if layers == "BatchNorm" and "batch" not in name]


@pytest.mark.parametrize("name", [name for name in AFFINE if "div" not in name])
def test_constants_are_computed_bit_for_bit(path, name):
    nodes, arrays, options, _ = OPERATORS[name]
    model = by_hand(nodes, arrays, options)
    network = interop.load(written(path, model))
    x = example(model)
    assert (network(x) == ort(path, x)).all()
    y = network.train()(x)  # it stays what it is in a training
    assert (y == ort(path, x)).all()
    assert set(network.params) == {"0.weight", "0.bias"}


FIVE, THREE = ["y", "o1", "o2", "o3", "o4"], ["y", "o1", "o2"]


@pytest.mark.parametrize(("opset", "outputs", "attributes"), [
    (6, ["y"], {"is_test": 0}), (7, FIVE, {}), (9, FIVE, {}), (14, THREE, {"training_mode": 1}),
    (15, THREE, {"training_mode": 1}), (17, ["y"], {"training_mode": 1}),
])  # fmt: skip
def test_the_training_form_is_a_layer_in_training_mode(path, opset, outputs, attributes):
    norm = node("BatchNormalization", ["x", *BN], outputs, momentum=0.8, epsilon=0.01, **attributes)
    network = interop.load(written(path, graph(norm, STATS, opset=opset)))
    assert repr(network[0]) == "BatchNorm(3, eps=0.01, momentum=0.2, unbiased=False)"
    assert network.training
    assert network[0].training
    x = RNG.standard_normal((9, 3)).astype(np.float32)
    y = network(x)
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 0.01) * V + V - 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(network[0].running_var, 0.8 * V + 0.2 * x.var(0), rtol=1e-6)


def test_old_inference_forms(path):
    for attributes in ({"is_test": 1}, {"is_test": 1, "consumed_inputs": [0, 0, 0, 1, 1]}):
        opset = 6 - 5 * ("consumed_inputs" in attributes)
        network = interop.load(written(path, graph(op("BatchNormalization", *BN, **attributes), STATS, opset=opset)))
        assert not network[0].training
    network = interop.load(written(path, graph(op("BatchNormalization", *BN, spatial=0), STATS, opset=7)))
    x = RNG.standard_normal((9, 3)).astype(np.float32)
    np.testing.assert_allclose(network(x), (x - 2 * V) / np.sqrt(V + 1e-5) * V + V - 1, rtol=0, atol=1e-6)
    refused(path, graph(op("BatchNormalization", *BN, spatial=0), STATS, opset=7, shape=("N", 3, 2)), "spatial=0")
    added = interop.load(
        written(path, graph(op("Add", "c", broadcast=1, axis=1), {"c": V}, opset=6, shape=("N", 3, 2)))
    )
    x = RNG.standard_normal((9, 3, 2)).astype(np.float32)
    assert (added(x) == x + V[:, None]).all()
    reshaped = interop.load(written(path, graph(op("Reshape", shape=[0, -1]), opset=4, shape=("N", 3, 2))))
    assert reshaped(x).shape == (9, 6)
    cast = interop.load(written(path, graph([op("Cast", to="FLOAT"), op("Relu")], opset=5)))
    assert [type(layer) for layer in cast] == [nn.ReLU]


def test_dropout_in_training_mode(path):
    for model in (
        graph(op("Dropout", "p", "t"), {"p": np.float32(0.25), "t": np.array(True)}),
        graph(op("Dropout", ratio=0.25), opset=6),
        graph(op("Dropout", ratio=0.25, is_test=0), opset=1),
    ):
        (layer,) = interop.load(written(path, model))
        assert layer.training
        assert layer.p == 0.25
    assert not interop.load(written(path, graph(op("Dropout", ratio=0.25, is_test=1), opset=6)))[0].training


def test_initializers_may_be_inputs_too(path):
    model = graph(op("Gemm", "w", "b"), {"w": W, "b": B})
    model.graph.input.extend([value("w", "float32", W.shape), value("b", "float32", B.shape)])
    assert len(interop.load(written(path, model))) == 1


def test_labels_and_masks_are_no_outputs(path):
    nodes = [op("Softmax", y="p"), node("ArgMax", ["p"], ["label"], axis=1)]
    model = graph([*nodes, op("Identity", x="p")], outputs=[value("label", "int64", None)])
    assert [type(layer) for layer in interop.load(written(path, model))] == [nn.Softmax]
    dropout = node("Dropout", ["x"], ["y", "mask"])
    model = graph(dropout, outputs=[value("mask", onnx.TensorProto.BOOL, None)])
    assert [type(layer) for layer in interop.load(written(path, model))] == [nn.Dropout]
    norm = node("BatchNormalization", ["x", *BN], ["y", "m1", "v1"], training_mode=1)
    model = graph(norm, STATS, outputs=[value("m1", "float32", None), value("v1", "float32", None)])
    assert interop.load(written(path, model))[0].training


@pytest.mark.parametrize("model", [nn.Sequential(nn.Dense(3, 2, seed=0), nn.ReLU())])
def test_weights_in_other_fields_are_the_same(path, model):
    interop.save(model, path)
    file = onnx.load(path)
    for tensor in file.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.ClearField("raw_data")
        tensor.float_data.extend(array.ravel().tolist())
    loaded = interop.load(written(path, file))
    assert all((loaded.params[k] == p).all() for k, p in model.params.items())


# --- load: refusals

TWO = [value("z", "float32", ("N", 3))]


def conv():
    return graph([op("Relu"), op("Conv", "w", name="conv1")], {"w": np.ones((1, 3, 1), "f4")}, shape=("N", 3, 9))


def branch():
    return graph([op("Relu", y="a"), op("Tanh", y="b"), node("Add", ["a", "b"], ["y"], name="sum")])


def control():
    inner = onnx.helper.make_graph([node("Relu", ["x"], ["t"])], "i", [], [value("t", FLOAT, None)])
    return graph(node("If", ["c", "x"], ["y"], then_branch=inner), {"c": np.array(True)})


def own_function():
    model = graph(op("Relu"))
    body = [node("Tanh", ["a"], ["b"])]
    model.functions.append(
        onnx.helper.make_function("", "Relu", ["a"], ["b"], body, [onnx.helper.make_opsetid("", 17)])
    )
    return model


F8 = {"w": W.astype("f8")}
REFUSALS = {
    "unknown operator": (conv, "node 'conv1' (Conv): expected one of Gemm,"),
    "unknown operator without a name": (lambda: graph([op("Relu"), op("Abs")]), "node 1 (Abs)"),
    "unknown domain": (lambda: graph(op("Relu", domain="com.example")), "node 0 (com.example.Relu)"),
    "function": (own_function, "node 0 (Relu, a function of the file's own)"),
    "branches": (branch, "node 'sum' (Add): expected a chain of nodes, got one where branches meet"),
    "x twice": (lambda: graph(node("Mul", ["x", "x"], ["y"])), "node 0 (Mul): expected a chain"),
    "control flow": (control, "node 0 (If)"),
    "two inputs": (lambda: graph(op("Relu"), inputs=TWO), "expected a graph with one input, got 2: 'x', 'z'"),
    "no input": (lambda: graph(node("Relu", ["c"], ["y"]), {"c": V}, shape=None), "got none"),
    "two outputs": (
        lambda: graph([op("Relu", y="t"), op("Tanh", x="t")], outputs=[value("t", "float32", None)]),
        "one output of floating numbers, got 2: 't', 'y'",
    ),
    "no output": (lambda: changed(graph(op("Relu")), lambda m: m.graph.ClearField("output")), "got none"),
    "an output of constants": (
        lambda: graph(node("Identity", ["c"], ["y"]), {"c": V}), "to depend on the input",
    ),
    "an output that nobody writes": (
        lambda: changed(graph(op("Relu")), lambda m: setattr(m.graph.output[0], "name", "w")), "'w' to depend on",
    ),
    "half input": (lambda: graph(op("Relu"), dtype=onnx.TensorProto.FLOAT16), "got float16"),
    "bfloat16 input": (lambda: graph(op("Relu"), dtype=onnx.TensorProto.BFLOAT16), "got bfloat16"),
    "integers": (lambda: graph(op("Relu"), dtype="int64"), "node 0 (Relu): expected floating numbers, got int64"),
    "integers and nothing": (lambda: graph(op("Identity"), dtype="int64"), "expected floating numbers, got int64"),
    "integers and constants": (lambda: graph(op("Sub", "c"), {"c": np.array([1, 2, 3])}, dtype="int64"), "got int64"),
    "half weights": (
        lambda: graph(op("BatchNormalization", *BN), {k: v.astype("f2") for k, v in STATS.items()}), "got float16",
    ),
    "bfloat16 weights": (
        lambda: changed(graph(op("MatMul", "w"), {"w": W}), lambda m: setattr(
            m.graph.initializer[0], "data_type", onnx.TensorProto.BFLOAT16)), "tensor 'w' to be of", "got bfloat16",
    ),
    "double weights for float": (lambda: graph(op("MatMul", "w"), F8), "expected arrays of float32, as x, got float64"),
    "transA": (lambda: graph(op("Gemm", "w", transA=1), {"w": W}), "(Gemm): expected x on the left, with transA=0"),
    "Gemm on the right": (lambda: graph(node("Gemm", ["w", "x"], ["y"]), {"w": W}), "x on the left"),
    "MatMul on the right": (
        lambda: graph(node("MatMul", ["w", "x"], ["y"]), {"w": W}), "the weight on the right",
    ),
    "C that varies": (
        lambda: graph([op("Relu", y="t"), node("Gemm", ["t", "w", "x"], ["y"])], {"w": W[:, :1]}),
        "(Gemm): expected a chain",
    ),
    "C of columns": (
        lambda: graph(op("Gemm", "w", "c"), {"w": W, "c": np.ones((2, 1), "f4")}), "expected a bias of 2 values",
    ),
    "weight of 3 axes": (lambda: graph(op("MatMul", "w"), {"w": W[None]}, shape=("N", 2, 3)), "weight of 2 dimensions"),
    "weight without values": (lambda: graph(op("MatMul", "w"), {"w": W[:, :0]}), "not empty"),
    "Gemm for 3 axes": (lambda: graph(op("Gemm", "w"), {"w": W}, shape=("N", 2, 3)), "x of 2 dimensions, got 3"),
    "another width": (lambda: graph(op("MatMul", "w"), {"w": W}, shape=("N", 4)), "x with 3 features along axis"),
    "missing weight": (lambda: graph(op("Gemm")), "(Gemm): expected a weight of 2 dimensions"),
    "Transpose of x": (lambda: graph(op("Transpose", perm=[1, 0])), "node 0 (Transpose)"),
    "statistics that vary": (
        lambda: graph([op("Relu", y="t"), node("BatchNormalization", ["t", "s", "b", "x", "v"], ["y"])],
        STATS), "(BatchNormalization): expected a chain",
    ),
    "statistics of other sizes": (
        lambda: graph(op("BatchNormalization", *BN), STATS | {"m": V[:2]}), "mean and variance of one shape",
    ),
    "statistics for others": (lambda: graph(op("BatchNormalization", *BN), STATS, shape=("N", 4)), "got 4"),
    "negative epsilon": (lambda: graph(op("BatchNormalization", *BN, epsilon=-1.0), STATS), "eps"),
    "NaN epsilon": (lambda: graph(op("BatchNormalization", *BN, epsilon=math.nan), STATS), "eps"),
    "NaN momentum": (lambda: graph(op("BatchNormalization", *BN, momentum=math.nan), STATS), "momentum"),
    "slope": (lambda: graph(op("LeakyRelu", alpha=-0.5)), "node 0 (LeakyRelu): expected negative_slope within [0, 1]"),
    "slopes": (lambda: graph(op("PRelu", "a"), {"a": V}), "node 0 (PRelu): expected a slope of one value"),
    "softmax of several axes": (lambda: graph(op("Softmax"), shape=("N", 4, 3), opset=11), "the last axis, got axis=1"),
    "softmax of no axis": (lambda: graph(op("Softmax", axis=2)), "expected x to have an axis 2"),
    "flatten of axis 2": (lambda: graph(op("Flatten", axis=2), shape=("N", 2, 3)), "expected axis=1, got axis=2"),
    "flatten of axis 0": (lambda: graph(op("Flatten", axis=0)), "expected axis=1, got axis=0"),
    "reshape to one axis": (lambda: graph(op("Reshape", "n"), {"n": np.array([-1])}), "(Reshape): expected all"),
    "reshape to other rows": (
        lambda: graph(op("Reshape", "n"), {"n": np.array([-1, 6])}), "got shape [-1, 6] for x of shape ['N', 3]",
    ),
    "reshape to fixed rows": (lambda: graph(op("Reshape", "n"), {"n": np.array([2, -1])}), "got shape [2, -1]"),
    "reshape of what is not known": (
        lambda: graph(op("Reshape", "n"), {"n": np.array([-1, 6])}, shape=("N", "a", "b")), "got shape [-1, 6]",
    ),
    "reshape by another axis": (
        lambda: graph([
            node("Shape", ["x"], ["s"]), node("Gather", ["s", "one"], ["n"]),
            node("Reshape", ["x", "n"], ["y"])], {"one": np.array([1])}, shape=("N", 3, 3)),
        "to be a shape of numbers and of the input's first axis",
    ),
    "dropout of many": (lambda: graph(op("Dropout", "p"), {"p": V}), "(Dropout): expected ratio and training_mode"),
    "dropout above 1": (lambda: graph(op("Dropout", "p"), {"p": np.float32(1.5)}), "expected p within [0, 1]"),
    "unknown attribute": (lambda: graph(op("Relu", slope=1.0)), "node 0 (Relu): expected no attribute 'slope'"),
    "attribute of another kind": (lambda: graph(op("LeakyRelu", alpha=1)), "attribute alpha to be of the kind 'f'"),
    "constants of several axes": (
        lambda: graph(op("Mul", "c"), {"c": np.ones((4, 3), "f4")}, shape=("N", 4, 3)), "(Mul): expected a constant",
    ),
    "constants of more axes": (lambda: graph(op("Mul", "c"), {"c": V.reshape(1, 1, 3)}), "expected a constant of one"),
    "constants of another size": (lambda: graph(op("Mul", "c"), {"c": V[:2]}), "expected x with 2 features"),
    "constants along the examples": (lambda: graph(op("Mul", "c"), {"c": V[:, None]}, shape=(3, 2)), "constant of one"),
    "one value for what is not known": (
        lambda: graph([op("Mul", "c", name="half"), op("Relu")], {"c": np.float32(0.5)}, shape=("N", "C")),
        "node 'half' (Mul): expected a graph that says how many features x has",
    ),
    "constant divided by x": (lambda: graph(node("Div", ["c", "x"], ["y"]), {"c": V}), "(Div)", "by x"),
    "cast to half": (lambda: graph(op("Cast", to=10)), "(Cast): expected a Cast to float32 or float64"),
    "cast to a double Relu": (
        lambda: graph([op("Cast", to=DOUBLE), op("Relu")], output="float64"), "node 1 (Relu): expected a Cast",
    ),
    "cast to a double Mul": (
        lambda: graph([op("Cast", to=DOUBLE), op("Mul", "c")], {"c": V.astype("f8")}, output="float64"),
        "node 1 (Mul): expected Sub and Div alone",
    ),
    "cast to float behind a Relu": (
        lambda: graph([op("Relu"), op("Cast", to=FLOAT)], dtype="float64", output="float32"), "(Cast): expected a Cast",
    ),
    "scale of zero": (
        lambda: graph(op("Scaler", domain="ai.onnx.ml", offset=[0.0], scale=[0.0])), "Scaler): expected an offset",
    ),
    "scales of another number": (
        lambda: graph(op("Scaler", domain="ai.onnx.ml", offset=[0.0, 1.0], scale=[1.0] * 3)), "Scaler", "3 features",
    ),
    "no scale": (lambda: graph(op("Scaler", domain="ai.onnx.ml", offset=[0.0])), "Scaler"),
    "p and 1 - p": (
        lambda: graph([
            op("Sigmoid", y="p"), node("Sub", ["one", "p"], ["q"]),
            node("Concat", ["p", "q"], ["y"], axis=1)], {"one": np.float32(1)}),
        "(Concat): expected a chain",
    ),
    "2 - p and p": (
        lambda: graph([
            op("Gemm", "w"), op("Sigmoid", y="p"), node("Sub", ["two", "p"], ["q"]),
            node("Concat", ["q", "p"], ["y"], axis=1)], {"w": W, "two": np.float32(2)}),
        "(Concat): expected a chain",
    ),
    "1 - p and p of no Dense": (
        lambda: graph([
            op("Sigmoid", y="p"), node("Sub", ["one", "p"], ["q"]),
            node("Concat", ["q", "p"], ["y"], axis=1)], {"one": np.float32(1)}),
        "(Concat): expected a MatMul or Gemm and a Sigmoid",
    ),
    "what is computed": (
        lambda: graph([node("ConstantOfShape", ["n"], ["w"]), op("MatMul", "w")],
        {"n": np.array([3, 2**40])}), "node 0 (ConstantOfShape) computes a constant",
    ),
    "what nobody writes": (lambda: graph(op("MatMul", "w")), "node 0 (MatMul) reads 'w', which nothing"),
    "a later node's": (
        lambda: graph([node("Relu", ["t"], ["y"]), node("Relu", ["x"], ["t"])]),
        "node 0 (Relu) reads 't', which nothing before it writes",
    ),
    "written twice": (
        lambda: graph([node("Relu", ["x"], ["t"]), node("Tanh", ["x"], ["t"]), op("Relu", x="t")]),
        "which is there already",
    ),
    "second output": (
        lambda: graph(node("Dropout", ["x"], ["a", "y"])), "expected a graph with one output",
    ),
    "sparse weights": (
        lambda: changed(graph(op("MatMul", "w"), {"w": W}), lambda m: (
            m.graph.sparse_initializer.add().values.CopyFrom(m.graph.initializer[0]),
            m.graph.ClearField("initializer"))),
        "'w' to be an array, got a sparse one",
    ),
    "an opset to come": (lambda: graph(op("Relu"), opset=10**6), "it has opset 1000000, and the onnx installed here"),
    "a missing second output": (
        lambda: graph([node("Dropout", ["x"], ["a", "m"]), op("Relu", x="m")]), "its first output",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_read_is_named(path, name):
    make, *words = REFUSALS[name]
    refused(path, make(), *words)


@pytest.mark.parametrize("content", [b"", b"not an ONNX file at all", b"\x08", b"\x3a\x00", os.urandom(4000)])
def test_other_files_are_refused(path, content):
    path.write_bytes(content)
    refused(path, None)
