"""ONNX files as they are read: tensors, nodes, and the way from a graph's input to its output. No layers here.

# Design: a file's word is taken for nothing. Sizes are compared with the bytes that are there before an array is made.
# Tensors become arrays when a layer needs them. What all layers take is bounded by the size of the files, since a small
# file may use one weight a million times.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from ..state import Array
from .layers import library

__all__ = ["FLOATS", "Graph", "Node", "short"]

# ONNX's numbers of element types, and the field of a tensor that holds values which are not raw bytes.
_TYPES = {
    1: ("float32", "float_data"),
    6: ("int32", "int32_data"),
    7: ("int64", "int64_data"),
    9: ("bool", "int32_data"),
    11: ("float64", "double_data"),
}
_INTEGERS = {2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 12: "uint32", 13: "uint64"}
FLOATS = {1: "float32", 11: "float64"}
_MOST_BYTES = 2**31 - 1  # of a protobuf message
_SPARE_BYTES = 2**26  # what layers may take beyond a multiple of their file
_ATTRIBUTES = {"i": 2, "f": 1, "s": 3, "t": 4, "ints": 7, "floats": 6}  # fields, and ONNX's numbers of their types


def _text(value: Any) -> str:
    """A string of the file: protobuf hands on as bytes what is no UTF-8."""
    if not isinstance(value, str):
        raise ValueError("not an ONNX file, or a damaged one: a name in it is no text")
    return value


def _domain(value: Any) -> str:
    name = _text(value)
    return "" if name == "ai.onnx" else name  # two names of the same


def short(name: str) -> str:
    """A name for a message, which a file may have made of any length."""
    return repr(name if len(name) <= 100 else name[:100] + "...")


class Node:
    """One node: its inputs and outputs, and its attributes, each taken once."""

    __slots__ = ("attributes", "graph", "inputs", "kind", "opset", "outputs", "said")

    def __init__(self, graph: Graph, index: int, proto: Any) -> None:
        domain = _domain(proto.domain)
        self.graph, self.opset = graph, graph.opsets.get(domain, 1)
        self.kind = f"{domain}.{_text(proto.op_type)}" if domain else _text(proto.op_type)
        self.said = f"node {short(_text(proto.name)) if proto.name else index} ({short(self.kind)[1:-1]})"
        self.inputs, self.outputs = [_text(n) for n in proto.input], [_text(n) for n in proto.output]
        self.attributes = {_text(a.name): a for a in proto.attribute}

    def take(self, name: str, field: str, default: Any = None) -> Any:
        """The value of an attribute, of a field of ONNX's AttributeProto."""
        attribute = self.attributes.pop(name, None)
        if attribute is None:  # a default is of float32, as a value
            return float(np.float32(default)) if field == "f" and default is not None else default
        if attribute.type != _ATTRIBUTES[field] or attribute.ref_attr_name:
            raise ValueError(f"expected attribute {name} to be of the kind {field!r}, got another one")
        value = getattr(attribute, field)
        return list(value) if field in ("ints", "floats") else value

    def finish(self) -> None:
        """Refuse attributes that nobody has asked for."""
        if self.attributes:
            raise ValueError(f"expected no attribute {short(min(self.attributes))}")

    def constant(self, position: int) -> Any:
        """An input as an array, or None where the node has none there."""
        name = self.inputs[position] if position < len(self.inputs) else ""
        return self.graph.constant(name) if name else None

    def varies(self, position: int) -> bool:
        """Whether an input depends on the graph's input."""
        return position < len(self.inputs) and self.inputs[position] in self.graph.varying


class Graph:
    """The graph of a file.

    Attributes
    ----------
    input : str
        Name of its input.
    dtype, dims : str, list of (int or None) or None
        The input's type, and its shape as far as it is known.
    varying : set of str
        Names of what depends on the input.
    trunk : set of str
        Names on the way from the input to the output, once `way` was called.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
        content = _content(path)
        self._stored, self._taken, self._files = len(content), 0, set[str]()
        model = _parsed(content)
        self._enum = library("onnx", "onnx").TensorProto.DataType
        self._graph = model.graph
        self.opsets = {_domain(o.domain): o.version for o in model.opset_import}
        newest = library("onnx.defs", "onnx").onnx_opset_version()
        if self.opsets.get("", 1) > newest:
            raise ValueError(f"it has opset {self.opsets['']}, and the onnx installed here knows them up to {newest}")
        self._own = {(_domain(f.domain), _text(f.name)) for f in model.functions}
        self._tensors = {_text(t.name): t for t in self._graph.initializer}
        self._arrays: dict[str, Array] = {}
        self._read_input()
        self._read_nodes()

    def _read_input(self) -> None:
        inputs = [i for i in self._graph.input if _text(i.name) not in self._tensors]
        if len(inputs) != 1 or not inputs[0].name:
            raise ValueError(f"expected a graph with one input, got {_listed([i.name for i in inputs])}")
        self.input, described = inputs[0].name, inputs[0].type.tensor_type
        number = described.elem_type
        names = FLOATS | _INTEGERS | {key: name for key, (name, _) in _TYPES.items()}
        if number not in names:
            raise ValueError(
                f"expected input {short(self.input)} to be of float32 or float64, got {self._type_name(number)}"
            )
        self.dtype, self.dims = names[number], None
        if described.HasField("shape"):
            self.dims = [dim.dim_value if dim.dim_value > 0 else None for dim in described.shape.dim]

    def _read_nodes(self) -> None:
        """Who writes what, once every node reads only what stands before it."""
        self._writers: dict[str, Node] = {}
        self.varying = {self.input}
        known = {self.input, *self._tensors, *(_text(t.values.name) for t in self._graph.sparse_initializer)}
        for index, proto in enumerate(self._graph.node):
            node = Node(self, index, proto)
            if not any(node.outputs):
                raise ValueError(f"expected {node.said} to have an output, got none")
            for name in filter(None, node.inputs):
                if name not in known:
                    raise ValueError(f"{node.said} reads {short(name)}, which nothing before it writes")
            for name in filter(None, node.outputs):
                if name in known:
                    raise ValueError(f"{node.said} writes {short(name)}, which is there already")
                known.add(name)
                self._writers[name] = node
            if self.varying.intersection(node.inputs):
                self.varying.update(node.outputs)
            if (_domain(proto.domain), proto.op_type) in self._own:
                node.kind += ", a function of the file's own"
                node.said = node.said.removesuffix(")") + ", a function of the file's own)"

    def output(self) -> str:
        """Name of the output that is asked for: the one of floating numbers, or of a ZipMap, that no mask is."""
        found: list[str] = []
        names = [_text(output.name) for output in self._graph.output]
        for output in self._graph.output:
            number = output.type.tensor_type.elem_type
            labels = output.type.WhichOneof("value") == "tensor_type" and number != 0 and number not in FLOATS
            writer = self._writers.get(output.name)
            first = writer is None or writer.outputs[0] == output.name
            if first and (not labels or len(self._graph.output) == 1):
                found.append(output.name)
        if len(found) != 1:
            raise ValueError(f"expected a graph with one output of floating numbers, got {_listed(names)}")
        return found[0]

    def way(self, kinds: Iterable[str]) -> list[Node]:
        """The nodes from the input to the output, each of one of these kinds, and of one input that varies."""
        name, nodes, self.trunk = self.output(), list[Node](), {self.input}
        while name != self.input:
            if name not in self.varying:
                raise ValueError(f"expected the output {short(name)} to depend on the input {short(self.input)}")
            node = self._writers[name]
            if node.kind not in kinds:
                raise ValueError(f"{node.said}: expected one of {', '.join(kinds)}")
            if node.outputs[0] != name:
                raise ValueError(f"{node.said}: expected its first output to be used, got {short(name)}")
            nodes.append(node)
            self.trunk.add(name)
            name = self._before(node)
        return nodes[::-1]

    def _before(self, node: Node) -> str:
        """The one input of a node that comes on the way."""
        given = [name for name in node.inputs if name in self.varying]
        if node.kind == "Reshape":
            given = given[:1]
        if node.kind == "Concat" and len(node.inputs) == len(given) == 2:  # of 1 - p and p
            other = self._writers.get(given[0])
            if other is not None and other.kind == "Sub" and len(other.inputs) == 2 and other.inputs[1] == given[1]:
                one = None if other.varies(0) else other.constant(0)
                if one is not None and one.size == 1 and one.ndim <= 2 and one.item() == 1:
                    return given[1]
        if len(given) != 1:
            raise ValueError(f"{node.said}: expected a chain of nodes, got one where branches meet")
        return given[0]

    def constant(self, name: str) -> Array:
        """What does not depend on the input: initializers, constants, and these transposed."""
        if name in self._arrays:
            return self._arrays[name]
        if name in self._tensors:
            array = self._array(self._tensors[name])
        elif name in self.varying:
            raise ValueError(f"expected {short(name)} to be a constant, got one that depends on the input")
        elif name in self._writers:
            array = self._computed(self._writers[name])
        else:
            raise ValueError(f"expected {short(name)} to be an array, got a sparse one")
        self._arrays[name] = array
        return array

    def _computed(self, node: Node) -> Array:
        if node.kind == "Constant" and len(node.attributes) == 1:
            (attribute,) = node.attributes.values()
            if attribute.name == "value" and attribute.type == _ATTRIBUTES["t"]:
                return self._array(attribute.t)
            if attribute.name in ("value_float", "value_floats") and attribute.type in (1, 6):
                return np.array(attribute.f if attribute.type == 1 else attribute.floats, np.float32)
            if attribute.name in ("value_int", "value_ints") and attribute.type in (2, 7):
                return np.array(attribute.i if attribute.type == 2 else attribute.ints, np.int64)
        array: Array | None = node.constant(0) if node.kind in ("Identity", "Transpose") else None
        if array is not None:
            axes = [list(a.ints) for a in node.attributes.values()]
            return array.transpose(axes[0] if axes else None) if node.kind == "Transpose" else array
        raise ValueError(f"{node.said} computes a constant: expected a Constant, Identity or Transpose")

    def shape(self, name: str) -> list[int | None]:
        """A few integers that a Reshape is given; None is the length of the input's first axis, which layers keep."""
        if name not in self.varying:
            array = self.constant(name)
            if array.dtype.kind != "i" or array.size > 8:
                raise ValueError(f"expected {short(name)} to be a shape, got {array.size} numbers of {array.dtype}")
            return [int(n) for n in array.flat]
        node = self._writers.get(name)
        kind = "" if node is None else node.kind
        if node is not None and kind in ("Unsqueeze", "Squeeze", "Identity", "Cast") and node.varies(0):
            return self.shape(node.inputs[0])
        if node is not None and kind == "Concat":
            parts = [self.shape(part) for part in node.inputs]
            joined = [n for part in parts for n in part]
            if len(joined) <= 8 and all(parts):
                return joined
        if node is not None and kind in ("Gather", "Slice") and len(node.inputs) > 1:
            inner = self._writers.get(node.inputs[0])
            bounds = [self.shape(bound) for bound in node.inputs[1:]]
            first = [[0]] if kind == "Gather" else [[0], [1], [0], [1]][: max(2, len(bounds))]
            whole = inner is not None and inner.kind == "Shape" and not inner.attributes
            if inner is not None and whole and inner.inputs[0] in self.trunk and bounds == first:
                return [None]
        raise ValueError(f"expected {short(name)} to be a shape of numbers and of the input's first axis")

    # --- arrays

    def spend(self, nbytes: int) -> None:
        """Count what is about to be allocated; ValueError where it has nothing to do with the size of the file."""
        self._taken += nbytes
        if self._taken > _SPARE_BYTES + 8 * self._stored:
            raise ValueError(
                f"its layers would take {self._taken} bytes and more, of a file of {self._stored}: it uses one array "
                "many times, or claims sizes that nothing in it has"
            )

    def _type_name(self, number: int) -> str:
        return str(self._enum.Name(number)).lower() if number in self._enum.values() else f"type {number}"

    def _array(self, tensor: Any) -> Array:
        said, dims = f"tensor {short(_text(tensor.name))}", tuple(tensor.dims)
        if tensor.data_type not in _TYPES:
            raise ValueError(f"expected {said} to be of float32 or float64, got {self._type_name(tensor.data_type)}")
        name, field = _TYPES[tensor.data_type]
        dtype = np.dtype(name)
        if any(n < 0 for n in dims) or len(dims) > 32:
            raise ValueError(f"expected {said} to have a shape, got {list(dims)[:33]}")
        count = math.prod(dims)
        if tensor.data_location == tensor.EXTERNAL:
            raw = self._external(tensor, said, count * dtype.itemsize)
        elif tensor.HasField("raw_data"):
            raw = tensor.raw_data
        else:
            values = getattr(tensor, field)
            if len(values) != count:
                raise ValueError(f"expected {said} of shape {dims} to have {count} values, got {len(values)}")
            return np.array(values, dtype).reshape(dims)
        if len(raw) != count * dtype.itemsize:
            raise ValueError(f"expected {said} of shape {dims} to have {count * dtype.itemsize} bytes, got {len(raw)}")
        return np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(dims)

    def _external(self, tensor: Any, said: str, nbytes: int) -> bytes:
        """Bytes of a file in the model's folder, or in one below it."""
        entries = {_text(entry.key): _text(entry.value) for entry in tensor.external_data}
        location = entries.get("location", "")
        ways = PurePosixPath(location), PureWindowsPath(location)  # a file may come from either
        place = Path(os.path.realpath(os.path.join(self._folder, location)))
        outside = any(way.is_absolute() or way.drive or way.root or ".." in way.parts for way in ways)
        if outside or not location or not place.is_relative_to(self._folder):
            raise ValueError(f"expected {said} to be in the model's folder, got {short(location)}")
        if not os.path.isfile(place):
            raise ValueError(f"expected {said} to be in a file beside the model, got {short(location)}, which is none")
        start, length = (entries.get(key, "") for key in ("offset", "length"))
        size = place.stat().st_size
        at = int(start) if start.isdecimal() and len(start) < 20 else -1 if start else 0
        end = at + nbytes if length == str(nbytes) else size if not length else -1
        if at < 0 or end != at + nbytes or end > size:
            raise ValueError(
                f"expected {said} to have {nbytes} bytes in {short(location)}, got offset {short(start)} and length "
                f"{short(length)} of {size} bytes"
            )
        if place.as_posix() not in self._files:
            self._files.add(place.as_posix())
            self._stored += size
        self.spend(nbytes)
        try:
            with place.open("rb") as file:
                file.seek(at)
                return file.read(nbytes)
        except OSError as error:
            raise ValueError(f"{said} cannot be read from {short(location)} ({error.strerror})") from error


def _listed(names: list[str]) -> str:
    shown = ", ".join(short(name) for name in names[:4])
    return f"{len(names)}: {shown}{', ...' if len(names) > 4 else ''}" if names else "none"


def _content(path: str | os.PathLike[str]) -> bytes:
    if (size := os.path.getsize(path)) > _MOST_BYTES:
        raise ValueError(f"it has {size} bytes, and an ONNX file holds at most {_MOST_BYTES} (protobuf's limit)")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error


def _parsed(content: bytes) -> Any:
    onnx, message = library("onnx", "onnx"), library("google.protobuf.message", "onnx")
    try:
        model = onnx.ModelProto.FromString(content)
    except message.DecodeError as error:
        raise ValueError("not an ONNX file, or a damaged one") from error
    if not model.HasField("graph"):
        raise ValueError("not an ONNX file, or a damaged one: it has no graph")
    return model
