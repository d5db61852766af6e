"""Graphs by hand, and what ONNX Runtime makes of them: for the tests of fastbn.interop.onnx."""

import itertools

import numpy as np
import onnx
import pytest

from fastbn.interop import onnx as interop

onnxruntime = pytest.importorskip("onnxruntime")
onnxruntime.set_default_logger_severity(4)  # its warnings would drown the tests' own lines

FLOAT, DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
TYPES = {"float32": FLOAT, "float64": DOUBLE, "int64": onnx.TensorProto.INT64}
U = {"float32": 2.0**-24, "float64": 2.0**-53}

W = np.array([[1, 2], [3, 4], [5, 7]], np.float32)  # (n_in, n_out)
V = np.array([0.5, 1.5, 2.5], np.float32)
B = np.array([0.5, -1], np.float32)
STATS = {"s": V, "b": V - 1, "m": V * 2, "v": V}
BN = ("s", "b", "m", "v")


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def ort(path, x):
    """What ONNX Runtime makes of x: the last output, with the columns that a ZipMap has named."""
    running = session(path)
    y = running.run(None, {running.get_inputs()[0].name: x})[-1]
    return np.array([list(row.values()) for row in y], x.dtype) if isinstance(y, list) else y


def value(name, dtype, shape):
    return onnx.helper.make_tensor_value_info(name, TYPES.get(dtype, dtype), shape)


def tensors(arrays):
    return [onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()]


node = onnx.helper.make_node


def op(kind, *arrays, x="x", y="y", domain="", name="", **attributes):
    return node(kind, [x, *arrays], [y], name=name, domain=domain, **attributes)


def graph(nodes, arrays=None, *, shape=("N", 3), dtype="float32", opset=17, output=None, inputs=(), outputs=(), ml=3):
    """A model of these nodes. One that reads "x" is given what the one before it has written to "y"."""
    nodes = [nodes] if isinstance(nodes, onnx.NodeProto) else nodes
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    for i, (before, after) in enumerate(itertools.pairwise(n for n in nodes if "x" in n.input)):
        if before.output[0] == "y":
            before.output[0] = f"t{i}"
            after.input[list(after.input).index("x")] = f"t{i}"
    x = [] if shape is None else [value("x", dtype, shape)]
    y = value("y", output or dtype, None)
    made = onnx.helper.make_graph(nodes, "g", [*x, *inputs], [*outputs, y], tensors(arrays or {}))
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("ai.onnx.ml", ml)]
    return onnx.helper.make_model(made, opset_imports=imports, ir_version=8)


def written(path, model):
    path.write_bytes(model.SerializeToString())
    return path


def refused(path, model, *words):
    """The message of the error, which names the file."""
    with pytest.raises(ValueError, match=r"cannot be loaded") as caught:
        interop.load(written(path, model) if isinstance(model, onnx.ModelProto) else path)
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be loaded: "), message
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def changed(model, change):
    change(model)
    return model
