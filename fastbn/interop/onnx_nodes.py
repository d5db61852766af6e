"""Nodes of an ONNX graph as layers, in the order in which x goes through them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np

from .. import nn
from ..batchnorm import BatchNorm
from ..state import Array
from .layers import dense, standardize, two_classes
from .onnx_file import FLOATS, Graph, Node

__all__ = ["layers_of"]

_LEAST_EPS = 5e-324  # added to a variance of normal size, it changes nothing


def layers_of(graph: Graph) -> list[Any]:
    """The layers of a graph, each in its mode."""
    builder = _Builder(graph)
    nodes = graph.way(_HANDLERS)
    try:
        for node in nodes:
            builder.said = node.said
            _HANDLERS[node.kind](builder, node)
            node.finish()
        builder.end_of_affine()
        builder.check_dtype()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{builder.said}: {error}") from error
    return builder.layers


@dataclass
class _Affine:
    """((x - mean - mean_low)/deviation)*weight + bias: constants that x meets one after another, each once."""

    said: str = ""  # the first of their nodes
    values: dict[str, Array] = field(default_factory=dict)  # vectors, of one value or of one for each feature
    axis: int | None = None  # None as long as all of them have one value


_ORDER = ("mean", "mean_low", "deviation", "weight", "bias")


class _Builder:
    """The layers so far, and what is known of the values between the last one and the next.

    dtype is their type in the graph. own_dtype is the type that they have here, where every y has the type of x and
    Standardize alone changes it.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.layers = graph, list[Any]()
        self.dims = graph.dims
        self.dtype = self.own_dtype = graph.dtype
        self.affine = _Affine()
        self.said = "the input"  # and then the node at work
        self.widened = False  # whether the last layer, a Standardize, was given float32

    def add(self, layer: Any, training: bool = False) -> None:
        self.end_of_affine()
        self.check_dtype()
        if self.dtype != self.own_dtype:
            raise ValueError("expected a Cast to float64 to be followed by Sub and Div with constants alone")
        self.layers.append(layer.train(training))

    def check_dtype(self, *arrays: Array | None) -> None:
        """Refuse arrays that are not of the type of x, and integers."""
        if self.dtype not in FLOATS.values():
            raise ValueError(f"expected floating numbers, got {self.dtype} that no Cast changes")
        for array in arrays:
            if array is not None and array.dtype != self.dtype:
                raise ValueError(f"expected arrays of {self.dtype}, as x, got {array.dtype}")

    @property
    def rank(self) -> int | None:
        return None if self.dims is None else len(self.dims)

    @property
    def rows(self) -> int | None:
        """Length of the first axis."""
        return self.dims[0] if self.dims else None

    @property
    def width(self) -> int | None:
        """Product of all lengths but the first."""
        lengths: Any = [None] if self.dims is None else self.dims[1:]
        product: int | None = None if None in lengths else math.prod(lengths)
        return product

    def check_axis(self, axis: int) -> None:
        if self.rank is not None and not -self.rank <= axis < self.rank:
            raise ValueError(f"expected x to have an axis {axis}, got x of {self.rank} dimensions")

    def attribute(self, value: float) -> float:
        """An attribute, which is float32 in a file: where x is that too, the number that a program gave for it."""
        return float(_decimal(value)) if self.dtype == "float32" else value

    def features(self, axis: int, count: int | None = None) -> int:
        """How many features x has along an axis, once that does not contradict `count`."""
        self.check_axis(axis)
        known = None if self.dims is None else self.dims[axis]
        if known is not None and count is not None and known != count:
            raise ValueError(f"expected x with {count} features along axis {axis}, got {known}")
        if (n := known if count is None else count) is None:
            raise ValueError(f"expected a graph that says how many features x has along axis {axis}")
        return n

    # --- constants added, subtracted, multiplied, divided by

    def constant(self, slots: tuple[str, ...], value: Array) -> None:
        """Take one more constant, into the first of these slots that is free and that no later one is taken behind."""
        vector, axis = self._vector(value)
        taken = [_ORDER.index(name) for name in self.affine.values]
        free = next((name for name in slots if _ORDER.index(name) > max(taken, default=-1)), None)
        if free is None or (axis is not None and self.affine.axis not in (None, axis)):
            self.end_of_affine()
            free = slots[0]
        self.affine.said = self.affine.said or self.said
        self.affine.values[free] = vector
        self.affine.axis = self.affine.axis if axis is None else axis

    def _vector(self, value: Array) -> tuple[Array, int | None]:
        """A constant of one value, or of one for each feature; and the axis of features, which None leaves open."""
        self.check_dtype(value)
        rank = 1 if self.rank is None else self.rank  # x has at least one axis
        if value.size == 1 and value.ndim <= rank:
            return value.reshape(1), None
        shape = value.shape
        while shape[:1] == (1,):
            shape = shape[1:]
        axis = -1 if len(shape) == 1 else 1
        if value.ndim > rank or value.size != shape[0] or (axis == 1 and rank != len(shape) + 1):
            raise ValueError(
                "expected a constant of one value, or of one for each feature along axis 1 or the last one, got shape "
                f"{value.shape} for x of {'unknown' if self.rank is None else rank} dimensions"
            )
        self.features(axis, value.size)
        return value.reshape(-1), axis

    def end_of_affine(self) -> None:
        """The layer for the constants that have come, if any: a Standardize for differences and quotients.

        Everything else becomes a BatchNorm of frozen statistics, whose arithmetic is the same, bit for bit.
        """
        if not self.affine.values:
            return
        affine, self.affine = self.affine, _Affine()
        at_work, self.said = self.said, affine.said
        axis = -1 if affine.axis is None else affine.axis
        sizes = [v.size for v in affine.values.values()]
        count = self.features(axis, None if affine.axis is None else max(sizes))
        self.graph.spend(100 * count)
        values = {name: np.broadcast_to(v, (count,)).astype(np.float64) for name, v in affine.values.items()}
        deviation = values.get("deviation")
        zeros, ones = np.zeros(count), np.ones(count)
        # The root of a square is the number itself, in any arithmetic of base 2, unless the square leaves its range.
        if deviation is not None and not ((np.sqrt(deviation**2) == deviation) & (deviation > 0)).all():
            values["weight"] = values.get("weight", ones) / values.pop("deviation")
            deviation = None
        mean, low = values.get("mean", zeros), values.get("mean_low", zeros)
        var = ones if deviation is None else deviation**2
        if not {"weight", "bias"} & values.keys():
            self._standardize(mean, low, var, axis)
        elif self.dtype != self.own_dtype:
            raise ValueError("expected Sub and Div alone after a Cast to float64")
        else:
            layer = BatchNorm(count, _LEAST_EPS, axis=axis, dtype=self.dtype)
            layer.running_mean, layer.running_var = mean + low, var
            layer.weight, layer.bias = values.get("weight", ones), values.get("bias", zeros)
            self.layers.append(layer.freeze().eval())
        self.said = at_work

    def _standardize(self, mean: Array, low: Array, var: Array, axis: int) -> None:
        layer = standardize(mean, var, axis=axis)
        layer.mean_low[:] = low
        self.widened = self.dtype != self.own_dtype
        if self.widened:  # and if a Cast takes it back, `cast` changes that
            layer.dtype, self.own_dtype = np.dtype(self.dtype), self.dtype
        self.layers.append(layer.eval())

    def cast(self, dtype: str) -> None:
        if dtype == self.dtype:
            return
        if self.dtype not in FLOATS.values():  # fastbn computes integers in float64
            self.dtype = self.own_dtype = dtype
            return
        self.end_of_affine()
        if self.own_dtype != dtype and self.dtype == "float64":
            if not (self.layers and isinstance(self.layers[-1], nn.Standardize)):
                raise ValueError("expected a Cast to float32 to come after Sub and Div with constants alone")
            self.layers[-1].dtype = None if self.widened else np.dtype(dtype)
            self.own_dtype = dtype
        self.dtype = dtype


def _decimal(value: float) -> Decimal:
    """The shortest number that float32 rounds to this one: an attribute of 0.1 was 0.1, before it became a float32."""
    return Decimal(str(np.float32(value)))


# --- one function for each operator


def _gemm(builder: _Builder, node: Node) -> None:
    alpha, beta = node.take("alpha", "f", 1.0), node.take("beta", "f", 1.0)
    trans_a, trans_b = node.take("transA", "i", 0), node.take("transB", "i", 0)
    node.take("broadcast", "i")  # before opset 7
    if trans_a or not node.varies(0):
        raise ValueError("expected x on the left, with transA=0")
    weight, bias = node.constant(1), node.constant(2)
    if weight is None or weight.ndim != 2:
        raise ValueError("expected a weight of 2 dimensions")
    weight = weight if trans_b else weight.T
    builder.check_dtype(weight, bias)
    if builder.rank not in (None, 2):
        raise ValueError(f"expected x of 2 dimensions, got {builder.rank}")
    _dense(builder, _times(weight, alpha), None if bias is None else _times(_row(bias, len(weight)), beta))
    builder.dims = [builder.rows, len(weight)]


def _times(array: Array, factor: float) -> Array:
    return array if factor == 1 else (array * np.float64(factor)).astype(array.dtype)


def _row(bias: Array, n: int) -> Array:
    """A bias as ONNX broadcasts it, of shape (n,)."""
    if bias.size not in (1, n) or bias.ndim > 2 or bias.shape[:-1] not in ((), (1,)):
        raise ValueError(f"expected a bias of {n} values, got shape {bias.shape}")
    return np.broadcast_to(bias.reshape(-1), (n,))


def _dense(builder: _Builder, weight: Array, bias: Array | None) -> None:
    if 0 in weight.shape:
        raise ValueError(f"expected a weight that is not empty, got shape {weight.shape}")
    builder.features(-1, weight.shape[1])
    builder.graph.spend(3 * weight.nbytes)
    builder.add(dense(weight, bias))


def _matmul(builder: _Builder, node: Node) -> None:
    if not node.varies(0):
        raise ValueError("expected x on the left, and the weight on the right")
    weight = node.constant(1)
    if weight is None or weight.ndim != 2:
        raise ValueError("expected a weight of 2 dimensions")
    builder.check_dtype(weight)
    _dense(builder, weight.T, None)
    builder.dims = None if builder.dims is None else [*builder.dims[:-1], weight.shape[1]]


def _add(builder: _Builder, node: Node) -> None:
    value = _operand(builder, node)
    last = builder.layers[-1] if builder.layers else None
    alone = type(last) is nn.Dense and not last.bias and not builder.affine.values
    if last is not None and alone and value.ndim <= min(builder.rank or 1, 2) and builder.dtype == builder.own_dtype:
        builder.check_dtype(value)
        builder.graph.spend(3 * last.params["weight"].nbytes)
        builder.layers[-1] = dense(last.params["weight"], _row(value, last.n_out)).eval()
    else:
        builder.constant(("bias",), value)


def _operand(builder: _Builder, node: Node) -> Array:
    """The constant of Add, Sub, Mul or Div; before opset 7 its shape began at an axis of x."""
    value: Array | None = node.constant(1 if node.varies(0) else 0)
    broadcast, axis = node.take("broadcast", "i"), node.take("axis", "i")
    node.take("consumed_inputs", "ints")
    if value is None:
        raise ValueError("expected two inputs")
    builder.check_dtype(value)
    if node.opset < 7 and broadcast and axis is not None:
        if builder.rank is None or not 0 <= axis <= builder.rank - value.ndim:
            raise ValueError(f"expected an axis of x, got axis={axis}")
        value = value.reshape(value.shape + (1,) * (builder.rank - axis - value.ndim))
    return value


def _sub(builder: _Builder, node: Node) -> None:
    value = _operand(builder, node)
    if node.varies(0):
        taken = builder.affine.values
        slots = ("mean", "mean_low") if not taken or taken.keys() <= {"mean", "mean_low"} else ("bias",)
        builder.constant(slots, value if slots[0] == "mean" else -value)
    else:  # c - x
        builder.constant(("weight",), np.array([-1], value.dtype))
        builder.constant(("bias",), value)


def _mul(builder: _Builder, node: Node) -> None:
    builder.constant(("weight",), _operand(builder, node))


def _div(builder: _Builder, node: Node) -> None:
    if not node.varies(0):
        raise ValueError("expected x to be divided by a constant, got a constant that is divided by x")
    builder.constant(("deviation",), _operand(builder, node))


def _scaler(builder: _Builder, node: Node) -> None:
    offset, scale = (np.array(node.take(name, "floats", []), np.float64) for name in ("offset", "scale"))
    count = builder.features(-1, max(offset.size, scale.size) if max(offset.size, scale.size) > 1 else None)
    if {offset.size, scale.size} - {1, count} or not (scale > 0).all() or not np.isfinite(scale).all():
        raise ValueError(f"expected an offset and a positive scale for each of {count} features")
    builder.graph.spend(100 * count)
    builder.end_of_affine()
    narrows = builder.own_dtype != "float32"
    if builder.dtype != builder.own_dtype:
        raise ValueError("expected no Cast to float64 before it")
    mean, var = (np.broadcast_to(v, (count,)) for v in (offset, (1 / scale) ** 2))
    layer = standardize(mean, var, axis=-1)
    layer.dtype = np.dtype("float32") if narrows else None
    builder.dtype = builder.own_dtype = "float32"
    builder.add(layer)


def _batch_norm(builder: _Builder, node: Node) -> None:
    eps, momentum = node.take("epsilon", "f", 1e-5), _decimal(node.take("momentum", "f", 0.9))
    spatial, is_test = node.take("spatial", "i", 1), node.take("is_test", "i", 0)
    training = node.take("training_mode", "i", 0)
    node.take("consumed_inputs", "ints")
    if node.opset < 7:
        training = not is_test
    elif node.opset < 14:  # more outputs than y say so
        training = any(node.outputs[1:])
    if not spatial and builder.rank != 2:
        raise ValueError("expected spatial=1, or x of 2 dimensions, got spatial=0")
    arrays = [node.constant(i) for i in range(1, 5)]
    if any(a is None or a.ndim != 1 or a.size != arrays[0].size or not a.size for a in arrays):
        raise ValueError("expected scale, bias, mean and variance of one shape (C,)")
    weight, bias, mean, var = arrays
    builder.check_dtype(weight, bias)
    if {mean.dtype.name, var.dtype.name} - set(FLOATS.values()):
        raise ValueError(f"expected statistics of float32 or float64, got {mean.dtype} and {var.dtype}")
    builder.features(1, weight.size)
    builder.graph.spend(100 * weight.size)
    eps = builder.attribute(eps) or _LEAST_EPS
    layer = BatchNorm(weight.size, eps, float(1 - momentum), dtype=weight.dtype, unbiased=False)
    layer.weight, layer.bias, layer.running_mean, layer.running_var = weight, bias, mean, var
    builder.add(layer, bool(training))


def _leaky_relu(builder: _Builder, node: Node) -> None:
    slope = node.take("alpha", "f", 0.01)
    node.take("consumed_inputs", "ints")
    builder.add(nn.LeakyReLU(builder.attribute(slope)))


def _prelu(builder: _Builder, node: Node) -> None:
    slope = node.constant(1)
    node.take("consumed_inputs", "ints")
    if not node.varies(0) or slope is None or slope.size != 1:
        raise ValueError("expected a slope of one value")
    builder.check_dtype(slope)
    if slope.ndim > (1 if builder.rank is None else builder.rank):
        raise ValueError(f"expected a slope of no more dimensions than x, got shape {slope.shape}")
    builder.add(nn.LeakyReLU(builder.attribute(slope.item())))


def _softmax(builder: _Builder, node: Node) -> None:
    axis = node.take("axis", "i", 1 if node.opset < 13 else -1)
    if node.opset < 13:  # all axes from this one on, as one
        if builder.rank is None or axis not in (-1, builder.rank - 1):
            rank = "unknown" if builder.rank is None else builder.rank
            raise ValueError(f"expected the last axis, got axis={axis} of x of {rank} dimensions")
    else:
        builder.check_axis(axis)
    builder.add(nn.Softmax(axis))


def _dropout(builder: _Builder, node: Node) -> None:
    ratio, training = node.take("ratio", "f", 0.5), not node.take("is_test", "i", int(node.opset >= 7))
    node.take("seed", "i")
    node.take("consumed_inputs", "ints")
    given = [node.constant(i) for i in (1, 2)]
    if any(a is not None and a.size != 1 for a in given):
        raise ValueError("expected ratio and training_mode of one value each")
    ratio = ratio if given[0] is None else given[0].item()
    training = training if given[1] is None else bool(given[1].item())
    builder.add(nn.Dropout(float(_decimal(ratio))), training)


def _flatten(builder: _Builder, node: Node) -> None:
    axis = node.take("axis", "i", 1)
    if axis != 1 and (builder.rank is None or axis != 1 - builder.rank):
        raise ValueError(f"expected axis=1, got axis={axis}")
    _as_rows(builder, None)


def _as_rows(builder: _Builder, width: int | None) -> None:
    """All axes but the first as one; `width` is its length, where x's shape does not say it."""
    known = builder.width
    builder.add(nn.Flatten())
    builder.dims = [builder.rows, width if known is None else known]


def _reshape(builder: _Builder, node: Node) -> None:
    allow_zero = node.take("allowzero", "i", 0)
    old = node.take("shape", "ints")  # before opset 5
    node.take("consumed_inputs", "ints")
    if not node.varies(0) or (old is None and len(node.inputs) < 2):
        raise ValueError("expected x and a shape")
    shape = list(old) if old is not None else builder.graph.shape(node.inputs[1])
    if not allow_zero:
        shape = [None if n == 0 and i == 0 else n for i, n in enumerate(shape)]
    dims = builder.dims
    width = builder.width
    rows, columns = (*shape, 0, 0)[:2]
    first = rows is None or (dims is not None and dims[:1] == [rows])  # x's first axis, as it is
    if len(shape) == 2 and columns is not None and columns != 0 and dims != []:
        if (first and columns in (-1, width)) or (first and columns > 0 and width is None):
            return _rows_if_needed(builder, columns)
        if rows == -1 and columns == width:
            return _rows_if_needed(builder, columns)
    shown = ["N" if n is None else n for n in shape[:8]]
    known = "unknown" if dims is None else ["N" if n is None else n for n in dims]
    raise ValueError(f"expected all axes but the first to become one, got shape {shown} for x of shape {known}")


def _rows_if_needed(builder: _Builder, columns: int) -> None:
    if builder.rank != 2:
        _as_rows(builder, columns if columns > 0 else None)


def _concat(builder: _Builder, node: Node) -> None:
    """1 - p and p side by side."""
    axis = node.take("axis", "i", 1)
    flat = axis in (1, -1) and builder.rank == 2
    if not flat or builder.affine.values or [type(layer) for layer in builder.layers[-2:]] != [nn.Dense, nn.Sigmoid]:
        raise ValueError("expected a MatMul or Gemm and a Sigmoid before it, for 1 - p and p along axis 1")
    last = builder.layers[-2]
    weight, bias = last.params["weight"], last.params.get("bias")
    builder.graph.spend(6 * weight.nbytes)
    if last.n_out == 1:
        builder.layers[-2:] = [layer.eval() for layer in two_classes(last)]
    else:  # 1 - sigmoid(z) is sigmoid(-z)
        mirrored = dense(np.vstack([-weight, weight]), None if bias is None else np.append(-bias, bias))
        builder.layers[-2] = mirrored.eval()
    builder.dims = [builder.rows, 2 * len(weight)]


def _cast(builder: _Builder, node: Node) -> None:
    if node.opset < 6:
        to = {b"FLOAT": "float32", b"DOUBLE": "float64"}.get(node.take("to", "s"))
    else:
        to = FLOATS.get(node.take("to", "i"))
    node.take("saturate", "i")
    node.take("round_mode", "s")
    if to is None:
        raise ValueError("expected a Cast to float32 or float64")
    builder.cast(to)


def _activation(make: Callable[[], Any]) -> Callable[[_Builder, Node], None]:
    def handler(builder: _Builder, node: Node) -> None:
        node.take("consumed_inputs", "ints")
        builder.add(make())

    return handler


def _zip_map(builder: _Builder, node: Node) -> None:
    node.attributes.clear()  # names of the columns


_HANDLERS: dict[str, Callable[[_Builder, Node], None]] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "Relu": _activation(nn.ReLU),
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Sigmoid": _activation(nn.Sigmoid),
    "Tanh": _activation(nn.Tanh),
    "Softmax": _softmax,
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Identity": lambda builder, node: None,
    "Cast": _cast,
    "Add": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "Concat": _concat,
    "ai.onnx.ml.Scaler": _scaler,
    "ai.onnx.ml.ZipMap": _zip_map,
}
