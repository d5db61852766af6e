"""ONNX's own cases for BatchNormalization: its operator tests, and the models that it converted from PyTorch."""

import importlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.case import node as node_cases

import fastbn

NODE = ["example", "epsilon", "example_training_mode", "epsilon_training_mode"]
CONVERTED = ["1d_3d_input", "2d", "2d_momentum", "3d", "3d_momentum"]
RTOL, ATOL = 1e-3, 1e-7  # onnx.backend.test's own


def evaluate(node, x, scale, bias, mean, var):
    """The operator in terms of batch_norm: ONNX's momentum is the weight of the old, its variances are over m."""
    options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    training = bool(options.get("training_mode", 0))
    mean, var = np.asarray(mean, np.float64).copy(), np.asarray(var, np.float64).copy()
    momentum, eps = 1 - options.get("momentum", 0.9), options.get("epsilon", 1e-5)
    y = fastbn.batch_norm(x, mean, var, scale, bias, training, momentum, eps, unbiased=False)
    return [y, mean, var] if training else [y]


def check(node, inputs, outputs):
    for got, expected in zip(evaluate(node, *inputs), outputs, strict=True):
        np.testing.assert_allclose(got, expected, rtol=RTOL, atol=ATOL)


@pytest.fixture(scope="module")
def operator_cases():
    # Importing the file exports its cases; the public collector would import, and compute, those of every operator.
    importlib.import_module("onnx.backend.test.case.node.batch_normalization")
    return {case.name: case for case in node_cases._NodeTestCases}


@pytest.mark.parametrize("name", NODE)
def test_operator(name, operator_cases):
    case = operator_cases[f"test_batchnorm_{name}"]
    assert case.data_sets
    for inputs, outputs in case.data_sets:
        check(case.model.graph.node[0], inputs, outputs)


def load(path):
    return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_from_pytorch(name):
    folder = Path(onnx.__file__).parent / f"backend/test/data/pytorch-converted/test_BatchNorm{name}_eval"
    graph = onnx.load(folder / "model.onnx").graph
    (node,) = graph.node
    assert node.op_type == "BatchNormalization"
    known = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    sets = sorted(folder.glob("test_data_set_*"))
    assert sets
    for data in sets:
        known[node.input[0]] = load(data / "input_0.pb")
        check(node, [known[k] for k in node.input], [load(data / "output_0.pb")])
