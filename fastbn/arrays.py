"""Arrays in files: .npz, and folders of idx files as MNIST has them."""

from __future__ import annotations

import gzip
import math
import re
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .labels import LARGEST

__all__ = ["Part", "read_idx_folder", "read_npz"]

# The idx format's magic number: two zero bytes, the type (8: unsigned byte), the number of dimensions.
_IDX_IMAGES, _IDX_LABELS = 0x00000803, 0x00000801
_CHUNK_BYTES = 1 << 24
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_NPY_HEADERS[3, 0] = _NPY_HEADERS[2, 0]  # only the names of fields are written otherwise
_DEFLATED_AT_MOST = 1032  # bytes that zlib can make of one
_ROLES = {"X": "x|data|images?|imgs?|features?|inputs?", "y": "y|labels?|targets?"}
_PARTS = {"train": "train|training", "test": "test|testing|t10k", "validation": "validation|valid|val|dev"}
_ANY_PART = "|".join(_PARTS.values())
_NPZ_NAME = re.compile(
    rf"(?P<before>{_ANY_PART})?[ _.-]*(?P<role>{'|'.join(_ROLES.values())})[ _.-]*(?P<behind>{_ANY_PART})?",
    re.IGNORECASE,
)
_IDX_NAME = re.compile(
    rf"(.*[ _.-])?(?P<part>{_ANY_PART})[ _.-]*(?P<role>images?|imgs?|labels?)[ _.-]*idx\d[ _.-]*(ubyte)?(\.gz)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Part:
    """Examples, (N, features), with their labels or None; `place` is where these are, for the sentence of an error."""

    X: np.ndarray
    images: bool
    labels: np.ndarray | None
    place: str


def read_npz(path: Path) -> tuple[Part, Part | None, tuple[str, ...]]:
    """The examples, the file's own test part if it has one, and remarks on which arrays were read."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz file, or a damaged one")
    roles: dict[tuple[str, str], str] = {}
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:  # np.load may leave its own open
            names = list(file)
            roles, fault = _npz_roles(names)
            for name in roles.values():
                _check_member(file.zip, name)
            arrays = {at: np.asarray(file[name]) for at, name in roles.items()}
    except MemoryError:
        raise
    except Exception as error:  # of NumPy's readers of headers and zipfile's unpackers there are many kinds
        objects = "it holds Python objects, which are not unpickled" if "pickle" in str(error) else error
        raise ValueError(f"{path}: cannot be read ({objects})") from error
    if fault:
        raise ValueError(f"{path}: {fault}; got {', '.join(names) or 'nothing'}")
    parts = [_npz_part(path, arrays, roles, part) for part in ("train", "test") if (part, "X") in roles]
    if len({part.X.shape[1] for part in parts}) > 1:
        raise ValueError(f"{path}: expected as many features in {roles['test', 'X']} as in {roles['train', 'X']}")
    read = list(roles.values())
    unused = [name for name in names if name not in read]
    note = f"read {', '.join(read)}" + (f"; not used: {', '.join(unused)}" if unused else "")
    return parts[0], parts[1] if len(parts) > 1 else None, () if set(names) <= {"X", "y"} else (note,)


def _check_member(archive: zipfile.ZipFile, name: str) -> None:
    """ValueError for an array whose header asks for more than the archive can hold, before memory is taken for it."""
    info = archive.getinfo(name if name in archive.namelist() else f"{name}.npy")
    with archive.open(info) as member:
        shape, _, dtype = _NPY_HEADERS[np.lib.format.read_magic(member)](member)
    asked, there = math.prod(shape) * dtype.itemsize, min(info.file_size, _DEFLATED_AT_MOST * info.compress_size)
    if asked > there and not dtype.hasobject:
        raise ValueError(f"{name} asks for {asked} bytes of data, of which there are at most {there}")


def _npz_roles(names: list[str]) -> tuple[dict[tuple[str, str], str], str]:
    """The names by part, "train" and "test", and role, "X" or "y"; or what is wrong with them."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if match := _NPZ_NAME.fullmatch(name):
            parts = [part for part in (match["before"], match["behind"]) if part]
            part = _which(_PARTS, parts[0]) if len(parts) == 1 else "all"
            found.setdefault((part, _which(_ROLES, match["role"])), []).append(name)
    if set(names) in ({"arr_0"}, {"arr_0", "arr_1"}):  # savez without names
        found |= {("all", role): [name] for role, name in zip("Xy", sorted(names), strict=False)}
    found |= {("all", role): [role] for role in "Xy" if role in names}
    whole = next((part for part in ("all", "train", "test") if (part, "X") in found), None)
    if whole is None:
        return {}, "holds no array called X: expected X and y, or x_train, y_train, x_test, y_test"
    sources = {"train": whole}
    if whole == "train" or (whole == "all" and ("train", "X") not in found):
        sources["test"] = "test"
    roles = {(part, role): found.get((source, role), []) for part, source in sources.items() for role in "Xy"}
    if several := next((arrays for arrays in roles.values() if len(arrays) > 1), None):
        return {}, f"expected one of {', '.join(several)}: call the arrays X and y"
    return {at: arrays[0] for at, arrays in roles.items() if arrays}, ""


def _which(kinds: dict[str, str], text: str) -> str:
    return next(kind for kind, pattern in kinds.items() if re.fullmatch(pattern, text, re.IGNORECASE))


def _npz_part(
    path: Path, arrays: dict[tuple[str, str], np.ndarray], roles: dict[tuple[str, str], str], part: str
) -> Part:
    X, labels, name = arrays[part, "X"], arrays.get((part, "y")), roles[part, "X"]
    if X.dtype.kind not in "biuf" or X.ndim < 2 or X.size == 0:
        raise ValueError(f"{path}: {name} must be a non-empty (N, features) array of numbers, got {X.dtype} {X.shape}")
    # float32 where it holds all that the dtype does, float64 elsewhere
    dtype = np.float64 if X.dtype.itemsize > 8 else np.result_type(X.dtype, np.float32)
    rows = X.reshape(len(X), -1).astype(dtype, copy=False)
    usable = np.abs(rows) < LARGEST if dtype == np.float64 else np.isfinite(rows)
    if not usable.all():
        row, column = np.argwhere(~usable)[0]
        at = f"{path}: {name}[{row}, {column}]"
        raise ValueError(f"{at} is {rows[row, column]:g}, expected a finite number below {LARGEST:g}")
    images = X.ndim > 2 and (X.dtype == np.uint8 or bool(rows.min() >= 0 and rows.max() <= 1))
    if images and X.dtype == np.uint8:  # as idx files: the same images are the same numbers in either
        rows /= 255
    if labels is None:
        return Part(rows, images, None, "")
    labels_name = roles[part, "y"]
    if labels.dtype.kind not in "biufSU" or labels.size != len(X) or labels.shape[:1] != (len(X),):
        one_hot = labels.ndim == 2 and len(labels) == len(X) and labels.dtype.kind in "biuf"
        hint = ": one number an example, as y.argmax(axis=1) makes of a one-hot y" if one_hot else ""
        got = f"got {labels.dtype} {labels.shape}"
        raise ValueError(f"{path}: expected {labels_name} to be {len(X)} labels, {got}{hint}")
    labels = labels.ravel()
    if labels.dtype.kind == "U" and labels.itemsize:
        characters = labels.astype(labels.dtype.newbyteorder("=")).view(np.uint32)
        if characters.max() > sys.maxunicode:  # else Python raises a SystemError, later
            raise ValueError(f"{path}: expected {labels_name} to be text, got a character of number {characters.max()}")
    return Part(rows, images, labels, f"{path}: {labels_name}")


def read_idx_folder(folder: Path) -> tuple[Part, Part | None, tuple[str, ...]]:
    """The examples of the folder's training part, or of its only part, and those of its test part."""
    files: dict[tuple[str, str], list[Path]] = {}
    names = sorted(entry.name for entry in folder.iterdir())
    for name in names:
        if (match := _IDX_NAME.fullmatch(name)) and (folder / name).is_file():
            if name.lower().endswith(".gz") and name[:-3] in names:
                continue
            role = "y" if match["role"].lower().startswith("label") else "X"
            files.setdefault((_which(_PARTS, match["part"]), role), []).append(folder / name)
    if several := next((paths for paths in files.values() if len(paths) > 1), None):
        raise ValueError(f"{folder}: expected one file for each part, got {', '.join(path.name for path in several)}")
    parts = [_idx_part(files, part) for part in ("train", "test") if (part, "X") in files]
    if not parts:
        there = ", ".join(names[:8]) + ", ..." * (len(names) > 8) if names else "nothing"
        raise ValueError(
            f"{folder}: holds neither train-images-idx3-ubyte nor t10k-images-idx3-ubyte (.gz or not), got {there}"
        )
    if len({part.X.shape[1] for part in parts}) > 1:
        raise ValueError(f"{folder}: the train and test images differ in size")
    return parts[0], parts[1] if len(parts) > 1 else None, _unread(files)


def _unread(files: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return ("not used: the validation part",) if any(part == "validation" for part, _ in files) else ()


def _idx_part(files: dict[tuple[str, str], list[Path]], part: str) -> Part:
    images = files[part, "X"][0]
    pixels = _read_idx(images, _IDX_IMAGES)
    X = pixels.reshape(len(pixels), -1).astype(np.float32)
    X /= 255
    if (part, "y") not in files:
        return Part(X, True, None, "")
    file = files[part, "y"][0]
    labels = _read_idx(file, _IDX_LABELS)
    if len(labels) != len(pixels):
        raise ValueError(f"{file}: {len(labels)} labels for the {len(pixels)} images of {images.name}")
    return Part(X, True, labels, f"{file}: label")


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """Read an idx file of unsigned bytes.

    Big-endian 32-bit words: the magic number, then one size for each dimension; then the bytes
    (the format's description stood at yann.lecun.com/exdb/mnist).
    """
    ndim = magic & 0xFF
    start = 4 * (1 + ndim)
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            head = file.read(start)
            if len(head) < start:
                raise ValueError(f"{path}: truncated, expected a header of {start} bytes, got {len(head)} bytes")
            found, *shape = (int(word) for word in np.frombuffer(head, ">u4", count=1 + ndim))
            if found != magic:
                raise ValueError(f"{path}: expected the magic number 0x{magic:08x}, got 0x{found:08x}")
            asked = math.prod(shape)
            if asked == 0:
                raise ValueError(f"{path}: empty, got shape {tuple(shape)}")
            content = b"".join(_chunks(file, asked + 1))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated ({error})") from error
    if len(content) != asked:
        got = "more" if len(content) > asked else len(content)
        raise ValueError(f"{path}: damaged, shape {tuple(shape)} asks for {asked} bytes of data, got {got}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _chunks(file: Any, most: int) -> Iterator[bytes]:
    """The file's next bytes, at most so many: one read would take the memory of all that a header names."""
    while most > 0 and (chunk := file.read(min(most, _CHUNK_BYTES))):
        most -= len(chunk)
        yield chunk
