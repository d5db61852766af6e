"""Keras's files as they are read: the zip, the HDF5 file, and which variables belong to which layer. No layers here.

# Design: a file's word is taken for nothing. What HDF5 can do and Keras never asks of it is refused before HDF5 does
# it: links to elsewhere, data in other files, filters that unpack. Memory is taken out of a budget, which is as large
# as the file: neither an architecture nor a header can ask for more.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..state import FLOATS, Array

__all__ = ["DAMAGE", "MOST_TEXT", "Layer", "Reader", "leaves", "unzipped"]

MOST_TEXT = 1 << 24  # bytes of an architecture; of a thousand layers it has one million
DAMAGE = (OSError, RuntimeError, EOFError, LookupError, struct.error, zlib.error, zipfile.BadZipFile)


@dataclass
class Layer:
    """A layer of Keras: what it is, and its variables in Keras's order."""

    place: str  # the numbers of the networks that it is in, and its own: 2.0.1
    kind: str
    said: str  # in errors
    config: dict[str, Any] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    input_shape: Any = None  # where the file tells it
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)  # None: any length
    datasets: dict[str, Any] = field(default_factory=dict)


def leaves(layers: list[Layer]) -> Iterator[Layer]:
    for layer in layers:
        yield from leaves(layer.layers) if layer.kind == "Sequential" else [layer]


def unzipped(data: bytes) -> tuple[str, bytes]:
    """The architecture and the file of the weights, of sizes in proportion to the zip."""
    size = len(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: info for info in archive.infolist()}
        contents = []
        for name, most in [("config.json", MOST_TEXT), ("model.weights.h5", 16 * size + (1 << 20))]:
            info = members.get(name)
            if info is None:
                raise ValueError(f"expected a .keras file of Keras, got a zip without {name}")
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"expected {name} stored or deflated, got it encrypted or compressed otherwise")
            if info.file_size > most or info.compress_size > size:
                raise ValueError(f"{name} claims {info.file_size} bytes, too many for a file of {size} bytes")
            contents.append(archive.read(info))
    return contents[0].decode(), contents[1]


class Reader:
    """Reads what stands in an HDF5 file itself, and no more than the file holds."""

    def __init__(self, h5py: Any, data: bytes) -> None:
        self._h5py, self._data = h5py, data
        self._left = len(data) + (1 << 20)  # a mean that stands for all features is repeated

    def spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise ValueError("it claims more data than it holds")

    def texts(self, group: Any, name: str) -> list[str]:
        """An attribute of one text or several, or of none; where they are long it stands in parts."""
        if group is None:
            return []
        numbered = (f"{name}{i}" for i in itertools.count())
        names = [name] if name in group.attrs else itertools.takewhile(lambda part: part in group.attrs, numbered)
        return [text.decode() for part in names for text in self._attribute(group, part)]

    def _attribute(self, group: Any, name: str) -> Iterator[bytes]:
        """The texts of an attribute, from the bytes of the file.

        HDF5 itself takes as much memory as a text claims to be long, before it looks for the text. This reads what
        Keras writes: object headers of version 1, texts of one length, and texts of any length in global heaps.
        """
        attribute = group.attrs.get_id(name)
        count, kind, size = math.prod(attribute.shape), attribute.dtype.kind, attribute.dtype.itemsize
        if count and kind not in "OS":
            raise ValueError(f"expected the attribute {name!r} as texts")
        at = self._value(self._h5py.h5o.get_info(group.id).addr, name.encode()) if count else 0
        for _ in range(count):
            if kind == "S":
                text = self._data[at : at + size].rstrip(b"\0")
                at += size
            else:
                length, heap, index = struct.unpack_from("<IQI", self._data, at)
                text = self._heap_object(heap, index)[:length]
                at += 16
            self.spend(len(text) + 16)
            yield text

    def _value(self, header: int, name: bytes) -> int:
        """Where the value of an attribute begins: it is one of the messages of its group's header."""
        version, size = struct.unpack_from("<B7xI", self._data, header)
        blocks = [(header + 16, size)]
        for at, size in blocks:
            end = at + size
            while version == 1 and at + 8 <= end:
                kind, length = struct.unpack_from("<HH", self._data, at)
                self.spend(8)  # a block may lead back to itself
                if kind == 16:  # the header goes on elsewhere
                    blocks.append(struct.unpack_from("<QQ", self._data, at + 8))
                elif kind == 12:
                    which, *sizes = struct.unpack_from("<BxHHH", self._data, at + 8)
                    sizes = [n + -n % 8 for n in sizes] if which == 1 else sizes
                    start = at + 16 + (which == 3)
                    if self._data[start : start + sizes[0]].rstrip(b"\0") == name:
                        return int(start + sum(sizes))
                at += 8 + length
        raise ValueError(f"expected the attribute {name.decode()!r} as Keras writes it")

    def _heap_object(self, heap: int, index: int) -> bytes:
        """An object of a global heap."""
        at, end = heap + 16, heap + struct.unpack_from("<8xQ", self._data, heap)[0]
        while self._data[heap : heap + 4] == b"GCOL" and at + 16 <= end:
            number, size = struct.unpack_from("<H6xQ", self._data, at)
            if number == index:
                return self._data[at + 16 : at + 16 + size]
            if number == 0:  # what is free
                break
            self.spend(1)
            at += 16 + size + -size % 8
        raise ValueError("expected a text in a heap of the file")

    def _item(self, group: Any, name: str) -> Any:
        """What has this name, or None. Links that lead elsewhere, to other files too, are not followed."""
        link = group.get(name, getlink=True)
        if link is None:
            return None
        if not isinstance(link, self._h5py.HardLink):
            raise ValueError(f"expected {name!r} in {group.name} itself, got a link to elsewhere")
        return group[name]

    def group(self, group: Any, name: str) -> Any:
        """The group of this name, or None."""
        item = None if group is None else self._item(group, name)
        if item is not None and not isinstance(item, self._h5py.Group):
            raise ValueError(f"expected {name!r} in {group.name} to be a group")
        return item

    def _dataset(self, group: Any, path: str) -> Any:
        *names, last = path.split("/")
        for name in names:
            group = self.group(group, name)
        item = None if group is None else self._item(group, last)
        if not isinstance(item, self._h5py.Dataset):
            raise ValueError(f"expected an array at {path!r}")
        return item

    def _variables(self, group: Any) -> list[Any]:
        """The arrays of a layer, which are numbered."""
        numbered = self.group(group, "vars")
        return [] if numbered is None else [self._dataset(numbered, str(i)) for i in range(len(numbered))]

    def array(self, layer: Layer, name: str) -> Array:
        """A variable, once its shape and size are as expected. Keras writes arrays whole, without filters."""
        dataset, expected = layer.datasets[name], layer.shapes[name]
        shape, layout = dataset.shape, dataset.id.get_create_plist().get_layout()
        fits = shape is not None and len(shape) == len(expected)
        if not fits or any(e not in (None, n) for e, n in zip(expected, shape, strict=True)):
            raise ValueError(f"expected {name} of shape {expected}, got {shape}".replace("None", "any"))
        dtype = dataset.dtype.newbyteorder("=")
        if dtype not in FLOATS:
            raise ValueError(f"expected {name} of float32 or float64, got {dataset.dtype}")
        h5d = self._h5py.h5d
        if layout not in (h5d.CONTIGUOUS, h5d.COMPACT) or dataset.external:
            raise ValueError(f"expected {name} in one piece in the file, got it compressed, in chunks or elsewhere")
        self.spend(dataset.size * dtype.itemsize)
        return np.asarray(dataset[()], dtype)

    def assign(self, layers: list[Layer], group: Any) -> None:
        """Give each layer its variables, as Keras 3 and TensorFlow since 2.12 write them.

        A network's group has a group of its layers, whose names are those of the classes: dense, dense_1. Before
        TensorFlow 2.14 there are gaps in these numbers, since layers with weights were counted twice.
        """
        box, gaps = self.group(group, "layers"), False
        if box is None:
            box, gaps = self.group(group, "_layer_checkpoint_dependencies"), True
        there = set() if box is None else set(box)
        seen = dict.fromkeys(_STEMS.values(), 0)
        names = {stem: [stem, *(f"{stem}_{i}" for i in range(1, len(layers)))] for stem in seen}
        if gaps:
            for stem in names:
                numbers = [re.fullmatch(rf"{stem}(?:_(\d+))?", name, re.ASCII) for name in there]
                names[stem] = [m[0] for m in sorted(filter(None, numbers), key=lambda m: int(m[1] or 0))]
        unused = there.copy()
        for layer in layers:
            if layer.kind not in _STEMS:
                continue
            stem = _STEMS[layer.kind]
            name = names[stem][seen[stem]] if seen[stem] < len(names[stem]) else ""
            seen[stem] += 1
            unused.discard(name)
            inner = self.group(box, name) if name in there else None
            if layer.kind == "Sequential":
                self.assign(layer.layers, inner)
            else:
                _give(layer, self._variables(inner))
        for name in sorted(unused):
            if re.sub(r"_[0-9]+$", "", name) in seen or self._variables(self.group(box, name)):
                raise ValueError(f"it has weights of {name!r} in {box.name}, and there is no such layer")

    def assign_in_order(self, layers: list[Layer], group: Any) -> None:
        """Give each layer its variables, as whole models in .h5 have them: by order alone."""
        saved = []
        for name in self.texts(group, "layer_names"):
            inner = self.group(group, name)
            if paths := self.texts(inner, "weight_names"):
                saved.append((name, inner, paths))
        owners = [layer for layer in layers if any(leaf.shapes for leaf in leaves([layer]))]
        if len(saved) != len(owners):
            raise ValueError(f"expected weights of {len(owners)} layers, got those of {len(saved)}")
        for owner, (name, inner, paths) in zip(owners, saved, strict=True):
            slots = [(leaf, variable) for leaf in leaves([owner]) for variable in leaf.shapes]
            slots.sort(key=lambda slot: not _is_trained(*slot))  # a network has what is trained before the rest
            if len(paths) != len(slots):
                raise ValueError(f"expected {len(slots)} variables of {owner.said}, got the {len(paths)} of {name!r}")
            for (leaf, variable), path in zip(slots, paths, strict=True):
                leaf.datasets[variable] = self._dataset(inner, path)


_STEMS = {
    "BatchNormalization": "batch_normalization",
    "Dense": "dense",
    "Normalization": "normalization",
    "Sequential": "sequential",
}


def _is_trained(layer: Layer, variable: str) -> bool:
    return variable in ("kernel", "bias", "gamma", "beta") and layer.config.get("trainable") is not False


def _give(layer: Layer, datasets: list[Any]) -> None:
    if len(datasets) != len(layer.shapes):
        raise ValueError(f"expected {list(layer.shapes)} of {layer.said}, got {len(datasets)} variables")
    layer.datasets = dict(zip(layer.shapes, datasets, strict=True))
