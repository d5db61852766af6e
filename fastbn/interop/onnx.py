"""ONNX: networks written as graphs, and graphs read as networks.

The extra is ``pip install "fastbn[onnx]"``. To run what was written, you need a runtime such as ONNX Runtime.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np

from .. import nn
from ..batchnorm import BatchNorm
from ..checkpoint import check_place, naming
from ..files import check_file, write_whole
from ..state import Array
from .layers import library, position
from .onnx_file import FLOATS, Graph
from .onnx_nodes import layers_of

__all__ = ["load", "save"]

_OPSET, _IR = 17, 8  # of 2022: whatever runs ONNX today reads them
_NUMBERS = {dtype: number for number, dtype in FLOATS.items()}
_MOST_BYTES = 2**31 - 2**20  # of all arrays: protobuf's 2 GiB, less some room for the rest


# --- to ONNX


def save(model: Any, path: str | os.PathLike[str], folded: bool = False) -> None:
    """Write the inference forward of a network as an ONNX graph.

    The file appears whole or not at all. The same model makes the same bytes.

    Parameters
    ----------
    model : nn.Sequential, BatchNorm or a layer of fastbn.nn
        Model, whose layers may be in any mode.
    path : path
        Path of the file, which is overwritten if it exists.
    folded : bool
        Whether to write ``model.folded()``: a graph of fewer nodes.

    Raises
    ------
    TypeError
        A layer of a class of your own. The message has its position.
    ValueError
        A layer that has no such graph: one with another axis than that of the features of (N, C), a BatchNorm without
        running statistics, a Standardize without statistics, float64 parameters after a Standardize to float32. Layers
        that do not fit together, and networks of 2 GiB and more.
    FileNotFoundError
        The folder does not exist.
    ImportError
        onnx is not installed.

    Notes
    -----
    The graph has opset 17. Its input "x" is of shape (N, C), with any N, and its output is "y". A network that begins
    with Flatten takes x that is flat already.

    Input and parameters are of float32, if all parameters are, and else of float64. With a ``Standardize(dtype=...)``
    the input is of float64, and what follows has that dtype.

    Dense becomes Gemm, with the same weights, bit for bit. Activations become nodes, also those that Dense and
    BatchNorm have of their own. Dropout and Identity vanish. Standardize becomes Sub and Div in float64. Running
    statistics are rounded to the type of the graph: a runtime is then less accurate than fastbn where the mean is many
    times the standard deviation.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from fastbn import BatchNorm, nn
    >>> from fastbn.interop import onnx
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.onnx"
    >>> onnx.save(nn.Sequential(nn.Dense(4, 8, bias=False), BatchNorm(8), nn.ReLU(), nn.Dense(8, 3)), path)
    >>> onnx.load(path)
    Sequential(
        Dense(n_in=4, n_out=8, bias=False),
        BatchNorm(8, unbiased=False),
        ReLU(),
        Dense(n_in=8, n_out=3),
    )
    """
    library("onnx", "onnx")
    place = check_place(path)
    writer = _written(model)  # as it is, so that what is wrong has its position in the model
    if folded:
        writer = _written((model if isinstance(model, nn.Sequential) else nn.Sequential(model)).folded())
    write_whole(place, writer.content())


def _written(model: Any) -> _Writer:
    writer = _Writer(_input_type(layer for _, layer in _placed(model)))
    for name, layer in _placed(model):
        said = f"layer {name!r}" if name else "the layer"
        write = _WRITERS.get(nn.known_as(layer))
        if write is None:
            known = ", ".join(cls.__name__ for cls in _WRITERS)
            raise TypeError(f"cannot write {said} ({type(layer).__name__}): expected Sequential, {known}")
        writer.place = name
        try:
            write(writer, layer)
        except ValueError as error:
            raise ValueError(f"cannot write {said} ({type(layer).__name__}): {error}") from error
    return writer


def _placed(model: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The layers that x goes through, with their positions: "1.0" is the first layer of layer 1."""
    if type(model) is not nn.Sequential:
        yield place, model
        return
    for i, layer in enumerate(model):
        yield from _placed(layer, position(place, i))


def _input_type(layers: Iterator[Any]) -> str:
    for layer in layers:
        if isinstance(layer, nn.Standardize) and layer.dtype is not None:
            return "float64"  # the data may have more digits than float32
        if any(p.dtype == np.float64 for p in getattr(layer, "params", {}).values()):
            return "float64"
    return "float32"


class _Writer:
    """The graph so far: nodes, arrays, and what comes out of the last node."""

    def __init__(self, dtype: str) -> None:
        self.input_dtype = self.dtype = dtype
        self.input_width: int | None = None
        self.width: int | None = None  # of the last axis, where it is known
        self.place = ""
        self._nodes: list[tuple[str, str, list[str], dict[str, Any]]] = []
        self._arrays: dict[str, Array] = {}
        self._nbytes = 0

    def fits(self, width: int) -> None:
        if self.width is None:
            self.input_width = self.width = width
        if self.width != width:
            raise ValueError(
                f"it takes {width} features and would be given {self.width} by a graph whose x has shape (N, C)"
            )

    def array(self, name: str, array: Array, dtype: str | None = None) -> str:
        """An array of the graph, as the layer's parameters are named; in the type of the graph."""
        name = position(self.place, name)
        self._arrays[name] = array.astype(dtype or self.dtype, copy=False)
        self._nbytes += self._arrays[name].nbytes
        if self._nbytes > _MOST_BYTES:
            raise ValueError(f"up to here the arrays have {self._nbytes} bytes, and an ONNX file holds less than 2 GiB")
        return name

    def node(self, kind: str, *arrays: str, label: str = "", **attributes: Any) -> None:
        name = label or kind
        self._nodes.append((kind, position(self.place, name), list(arrays), attributes))

    def content(self) -> bytes:
        helper = library("onnx.helper", "onnx")
        if not self._nodes:
            self.place = ""
            self.node("Identity")
        model = library("onnx", "onnx").ModelProto(
            ir_version=_IR, producer_name="fastbn", producer_version=version("fastbn")
        )
        model.opset_import.add(domain="", version=_OPSET)
        graph, last = model.graph, "x"
        graph.name = "fastbn"
        for i, (kind, name, arrays, attributes) in enumerate(self._nodes):
            out = "y" if i == len(self._nodes) - 1 else f"{name}:y"
            graph.node.append(helper.make_node(kind, [last, *arrays], [out], name=name, **attributes))
            last = out
        ends = [("x", self.input_dtype, self.input_width), ("y", self.dtype, self.width)]
        x, y = (
            helper.make_tensor_value_info(name, _NUMBERS[dtype], ["N", width or "C"]) for name, dtype, width in ends
        )
        graph.input.append(x)
        graph.output.append(y)
        for name, array in self._arrays.items():
            raw = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
            graph.initializer.add(name=name, data_type=_NUMBERS[array.dtype.name], dims=array.shape, raw_data=raw)
        content: bytes = model.SerializeToString(deterministic=True)
        return content


def _of_its_dtype(writer: _Writer, layer: Any) -> None:
    if writer.dtype == "float32" and any(p.dtype == np.float64 for p in layer.params.values()):
        raise ValueError("expected parameters of float32 after a Standardize to float32, got float64")


def _write_activation(writer: _Writer, name: str | None) -> None:
    if name == "relu":
        writer.node("Relu")
    elif name == "leaky_relu":
        _write_leaky(writer, 0.01)


def _write_leaky(writer: _Writer, slope: float) -> None:
    if writer.dtype == "float64" and float(np.float32(slope)) != slope:  # an attribute is of float32
        writer.node("PRelu", writer.array("slope", np.array([slope])))
    else:
        writer.node("LeakyRelu", alpha=slope)


def _write_dense(writer: _Writer, layer: nn.Dense) -> None:
    _of_its_dtype(writer, layer)
    writer.fits(layer.n_in)
    writer.node("Gemm", *(writer.array(name, array) for name, array in layer.params.items()), transB=1)
    writer.width = layer.n_out
    _write_activation(writer, layer.activation)


def _write_norm(writer: _Writer, layer: BatchNorm) -> None:
    _of_its_dtype(writer, layer)
    if layer.axis not in (1, -1):
        raise ValueError(f"expected axis=1, or axis=-1 for x of (N, C), got axis={layer.axis}")
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError("expected running statistics, got a layer with track_running_stats=False")
    writer.fits(layer.num_features)
    ones, zeros = np.ones(layer.num_features), np.zeros(layer.num_features)
    var, eps = layer.running_var, float(np.float32(layer.eps))  # an attribute is of float32
    if writer.dtype == "float64" and eps != layer.eps:
        if eps > layer.eps:
            eps = float(np.nextafter(np.float32(eps), np.float32(0)))
        var = var + layer.eps - eps  # what float32 cannot hold of eps
    arrays = {
        "weight": layer.params.get("weight", ones),
        "bias": layer.params.get("bias", zeros),
        "running_mean": layer.running_mean,
        "running_var": var,
    }
    with np.errstate(all="ignore"):
        held = [arrays[name].astype(writer.dtype) for name in ("running_mean", "running_var")]
        lost = np.isinf(held[0]) > np.isinf(layer.running_mean)
        lost |= (np.isinf(held[1]) > np.isinf(var)) | ((held[1] + np.float32(eps) == 0) & (var + layer.eps > 0))
        names = [writer.array(name, array) for name, array in arrays.items()]
    if lost.any():
        raise ValueError("expected running statistics within the range of float32, got some that it does not hold")
    momentum: dict[str, Any] = {} if layer.momentum is None else {"momentum": 1 - layer.momentum}
    writer.node("BatchNormalization", *names, epsilon=eps, **momentum)
    _write_activation(writer, layer.activation)


def _write_standardize(writer: _Writer, layer: nn.Standardize) -> None:
    if layer.axis not in (1, -1):
        raise ValueError(f"expected axis=1, or axis=-1 for x of (N, C), got axis={layer.axis}")
    if not layer.count:
        raise ValueError("expected statistics, got a layer that has none yet: call fit(X) first")
    writer.fits(layer.num_features)
    if writer.dtype == "float32":
        writer.node("Cast", label="Widen", to=_NUMBERS["float64"])
    writer.node("Sub", writer.array("mean", layer.mean, "float64"))
    if layer.mean_low.any():
        writer.node("Sub", writer.array("mean_low", layer.mean_low, "float64"), label="Sub_low")
    deviation = np.sqrt(np.where(layer.var == 0, 1, layer.var))
    writer.node("Div", writer.array("deviation", deviation, "float64"))
    writer.dtype = writer.dtype if layer.dtype is None else layer.dtype.name
    if writer.dtype == "float32":
        writer.node("Cast", label="Round", to=_NUMBERS["float32"])


def _write_softmax(writer: _Writer, layer: nn.Softmax) -> None:
    if not -2 <= layer.axis < 2:
        raise ValueError(f"expected an axis of (N, C), got axis={layer.axis}")
    writer.node("Softmax", axis=layer.axis)


_WRITERS: dict[type, Callable[[_Writer, Any], None]] = {
    BatchNorm: _write_norm,
    nn.Dense: _write_dense,
    nn.FoldedDense: _write_dense,
    nn.Standardize: _write_standardize,
    nn.ReLU: lambda writer, layer: writer.node("Relu"),
    nn.LeakyReLU: lambda writer, layer: _write_leaky(writer, layer.negative_slope),
    nn.Sigmoid: lambda writer, layer: writer.node("Sigmoid"),
    nn.Tanh: lambda writer, layer: writer.node("Tanh"),
    nn.Softmax: _write_softmax,
    nn.Flatten: lambda writer, layer: writer.node("Flatten"),
    nn.Dropout: lambda writer, layer: None,
    nn.Identity: lambda writer, layer: None,
}


# --- from ONNX


def load(path: str | os.PathLike[str]) -> nn.Sequential:
    """Build the network that an ONNX graph computes.

    Nothing in the file is run, no other folder is read, and what the file says of sizes is checked before memory is
    taken.

    Parameters
    ----------
    path : path
        Path of the file, as `save`, PyTorch, Keras, tf2onnx and skl2onnx write them for networks of layers one after
        another. Weights may be in files of their own, in the same folder or one below it.

    Returns
    -------
    nn.Sequential
        Network in inference mode, except for a BatchNormalization or Dropout that the graph has in training mode.
        Weights are copied, bit for bit. A graph of double makes layers of float64.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is damaged, or its graph is another one. The message names the file, the node and its operator. Graphs
        have one input, and one output of floating numbers; no branches, no functions, and of ONNX's operators those
        in the notes.
    ImportError
        onnx is not installed.

    Notes
    -----
    Gemm and MatMul with a constant weight on the right become `fastbn.nn.Dense`, with the constant that is added to
    them. BatchNormalization, Relu, LeakyRelu, Sigmoid, Tanh, Softmax, Dropout and Flatten become the layers of these
    names; PRelu with one slope becomes a LeakyReLU, and a Reshape to two dimensions a Flatten. Identity vanishes.

    Add, Sub, Mul and Div with other constants become one layer where they come in a row. Sub and Div make a
    `fastbn.nn.Standardize`, as does the Scaler of ai.onnx.ml. All else makes a BatchNorm that is frozen: its constants
    are the statistics, weight and bias, and its arithmetic is the same.

    Behind a classifier, the output of probabilities is taken, from before a ZipMap. Where two columns come of one
    sigmoid, as 1 - p and p, they become those of a Softmax. For several labels they become those of a Sigmoid.

    A Cast to float64 may stand before the constants of a Standardize, and one to float32 behind them. Integers at the
    input are computed in float64. An attribute of float32, such as epsilon, is read as the shortest number that float32
    rounds to it, if the graph is of float32.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from fastbn import nn
    >>> from fastbn.interop import onnx
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.onnx"
    >>> onnx.save(nn.Sequential(nn.Dense(4, 3, activation="relu"), nn.Softmax()), path)
    >>> onnx.load(path)
    Sequential(
        Dense(n_in=4, n_out=3),
        ReLU(),
        Softmax(),
    )
    """
    library("onnx", "onnx")
    check_file(path, "model.onnx")  # a TypeError for what is no path
    with naming(path), np.errstate(all="ignore"):
        layers = layers_of(Graph(path))
        model = nn.Sequential(*layers)
        model.training = any(layer.training for layer in layers)
    return model
