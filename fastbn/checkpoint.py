"""Checkpoints: a model, and an optimizer's state, in one safetensors file.

The model's tensors have PyTorch's keys, so that other readers of safetensors can use them; the optimizer's have the
prefix "optimizer.", those of the best epoch that `training.fit` has seen "best.", its averages "average.". The
architecture is JSON in the file's metadata, built from a fixed table of layer classes: nothing is unpickled, nothing
looked up by name elsewhere. The same content makes the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import nn
from .batchnorm import BatchNorm
from .files import check_file, write_whole
from .kernels import machine
from .nn import Sequential
from .state import Array

__all__ = ["load", "read_metadata", "restore", "save"]

_Path = str | os.PathLike[str]
OPTIMIZER, BEST, AVERAGE = "optimizer.", "best.", "average."
MODEL = "fastbn.model"
_CLASSES = {
    c.__name__: c
    for c in (
        BatchNorm,
        nn.Dense,
        nn.Dropout,
        nn.Flatten,
        nn.FoldedDense,
        nn.Identity,
        nn.LeakyReLU,
        nn.ReLU,
        nn.Sigmoid,
        nn.Softmax,
        nn.Standardize,
        nn.Tanh,
    )
}
# Tensors, and the constructor's arguments that are their shapes: for every layer that allocates by its arguments.
_SIZES: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "Dense": [("weight", ("n_out", "n_in"))],
    "FoldedDense": [("weight", ("n_out", "n_in"))],
    "BatchNorm": [("weight", ("num_features",)), ("running_mean", ("num_features",))],
    "Standardize": [("mean", ("num_features",))],
}


def save(path: _Path, model: Any, optimizer: Any = None, *, metadata: dict[str, Any] | None = None) -> None:
    """Write a model, and the state of its optimizer, to a safetensors file.

    The file appears whole or not at all: it is written beside its place, flushed to disk, then renamed. Of two who save
    to one path at once, one wins whole. A symbolic link stays, and what it points to is replaced. The same model,
    optimizer's state and metadata make the same bytes, in every process.

    Parameters
    ----------
    path : path
        Path of the file, which is overwritten if it exists.
    model : nn.Sequential, BatchNorm or a layer of fastbn.nn
        Model. The mode of every layer (training or inference, frozen or not) is saved as well.
    optimizer : optional
        Optimizer of `fastbn.optim`, whose state is saved. Its rate and its other arguments are not.
    metadata : dict, optional
        Anything that JSON can hold, for `read_metadata`. Its keys are sorted.

    Raises
    ------
    TypeError
        A layer of a class of your own, which `load` could not build, or metadata that JSON cannot hold.
    FileNotFoundError
        The folder does not exist.
    ImportError
        safetensors is not installed.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from fastbn import BatchNorm, checkpoint, nn
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> checkpoint.save(path, nn.Sequential(nn.Dense(4, 2, seed=0), BatchNorm(2)), metadata={"trained on": "nothing"})
    >>> checkpoint.read_metadata(path)
    {'trained on': 'nothing'}
    >>> len(checkpoint.load(path))
    2
    """
    write(path, *contents(model, optimizer, metadata))


def contents(
    model: Any, optimizer: Any = None, metadata: dict[str, Any] | None = None
) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors and texts of a file."""
    _safetensors()  # what is missing is said before anything is done
    if not isinstance(metadata, dict | None):
        raise TypeError(f"expected metadata to be a dict, got {type(metadata).__name__}")
    texts = {"format": "fastbn", MODEL: to_json(describe(model), default=float)}
    try:
        texts["fastbn.metadata"] = to_json({} if metadata is None else metadata)
    except TypeError as error:
        raise TypeError(f"metadata: {error} (tolist() makes lists and numbers of NumPy's)") from None
    tensors = model.state_dict()
    if optimizer is not None:
        tensors |= {OPTIMIZER + key: array for key, array in optimizer.state_dict().items()}
    return tensors, texts


def write(path: _Path, tensors: dict[str, Array], texts: dict[str, str]) -> None:
    """The whole file, or none of it."""
    write_whole(check_place(path), _in_order(_safetensors().numpy.save(tensors, texts)))


def _in_order(content: bytes) -> bytes:
    """The file with its metadata sorted: safetensors leaves them in an order that differs from process to process."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # as safetensors aligns what follows
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def to_json(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """JSON with its keys sorted, once they are the texts that JSON makes of them; `default` as for json.dumps."""
    return json.dumps(json.loads(json.dumps(value, default=default)), sort_keys=True)


def check_place(path: _Path) -> Path:
    """The path, once a file can be there."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"expected a file or nothing there, got a folder: {path}")
    return path


def load(path: _Path) -> Any:
    """Build the model that `save` wrote, every layer in the mode in which it was saved.

    Parameters
    ----------
    path : path
        Path of a file that `save`, `fastbn.training.fit` or ``fastbn train`` wrote.

    Returns
    -------
    model : nn.Sequential, BatchNorm or a layer of fastbn.nn
        A new model.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is damaged, truncated or not one of `save`: the message names the file and what is wrong.
    ImportError
        safetensors is not installed.
    """
    tensors, texts = read(path)
    description = read_json(path, texts, MODEL)
    with naming(path):
        model = build(description, tensors)
        model.load_state_dict(_of_model(tensors))
    return model


def restore(path: _Path, model: Any, optimizer: Any = None) -> None:
    """Put weights, and an optimizer's state, into objects that exist already.

    Parameters
    ----------
    path : path
        Path of a file that `save` wrote. Without an optimizer, any safetensors file with the keys and shapes of the
        model will do, as PyTorch's users write it from a ``state_dict()``. A missing num_batches_tracked is 0.
    model, optimizer
        Objects that are changed in place. After an error they are as they were.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is damaged or truncated, or its tensors are not this model's or this optimizer's: the message names
        the file and what is wrong.
    ImportError
        safetensors is not installed.
    """
    tensors, _ = read(path)
    with naming(path):
        put(tensors, model, optimizer)


def put(tensors: dict[str, Array], model: Any, optimizer: Any) -> None:
    """What `restore` does, once the file is read."""
    before = model.state_dict()
    try:
        model.load_state_dict(_of_model(tensors))
        if optimizer is not None:
            state = with_prefix(tensors, OPTIMIZER)
            if not state:
                raise ValueError("it holds no optimizer's state")
            optimizer.load_state_dict(state)
    except BaseException:
        model.load_state_dict(before)
        raise


def read_metadata(path: _Path) -> dict[str, Any]:
    """Return the metadata that were given to `save`; without any, an empty dict.

    Raises
    ------
    FileNotFoundError, ValueError, ImportError
        The same as in `load`.
    """
    metadata = read_json(path, read(path)[1], "fastbn.metadata")
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: damaged checkpoint, expected metadata to be a dict, got {metadata!r}")
    return metadata


def describe(model: Any) -> dict[str, Any]:
    """The architecture, and every layer's mode; TypeError for layers that `load` could not build."""
    if type(model) is Sequential:
        return {"class": "Sequential", "training": model.training, "layers": [describe(layer) for layer in model]}
    cls = nn.known_as(model)
    if _CLASSES.get(cls.__name__) is not cls:
        raise TypeError(f"cannot save a {type(model).__name__}: expected Sequential, {', '.join(_CLASSES)}")
    frozen = {"frozen": True} if getattr(model, "frozen", False) else {}
    parts = {"layers": [describe(layer) for layer in model.layers]} if isinstance(model, nn.FoldedDense) else {}
    return {"class": cls.__name__, "training": model.training, "config": model.config(), **frozen, **parts}


def build(description: Any, tensors: dict[str, Array]) -> Any:
    """A fresh model of what `describe` gave, of the tensors' sizes, every layer in its mode."""
    return _build(description, {key: array.shape for key, array in _of_model(tensors).items()})


def _build(description: Any, shapes: dict[str, tuple[int, ...]], prefix: str = "") -> Any:
    match description:
        case {"class": "Sequential", "training": bool(training), "layers": list(layers)}:
            model = Sequential(*(_build(layer, shapes, f"{prefix}{i}.") for i, layer in enumerate(layers)))
            model.training = training  # not .train(training): the layers have modes of their own
            return model
        case {"class": str(name), "training": bool(training), "config": dict(config)} if name in _CLASSES:
            _check_sizes(name, config, shapes, prefix)
            if isinstance(config.get("num_threads"), int):  # of the machine that it was saved on
                config = config | {"num_threads": min(config["num_threads"], machine.most_threads())}
            made: Any = _CLASSES[name]
            # A Dense without start values, which would be drawn only to be overwritten.
            layer = getattr(made, "_zeros", made)(**config).train(training)
            if isinstance(layer, nn.FoldedDense):
                parts = enumerate(description["layers"])
                layer.layers = [_build(part, shapes, f"{prefix}layers.{i}.") for i, part in parts]
            return layer.freeze() if isinstance(layer, BatchNorm) and description.get("frozen") is True else layer
    raise ValueError(f"expected a layer of a known class, got {str(description)[:100]}")


def _check_sizes(name: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], prefix: str) -> None:
    """Refuse sizes that are not those of the tensors, before a constructor allocates by them: a small file could ask
    for all memory."""
    for tensor, sizes in _SIZES.get(name, ()):
        expected = tuple(config.get(size) for size in sizes)
        if shapes.get(prefix + tensor, expected) != expected:
            got = shapes[prefix + tensor]
            raise ValueError(f"{prefix + tensor!r}: expected {', '.join(sizes)} = {expected}, got shape {got}")
    stateless = config.get("affine") is config.get("track_running_stats") is False
    if name in _SIZES and not stateless and not any(prefix + tensor in shapes for tensor, _ in _SIZES[name]):
        raise ValueError(f"missing key {prefix + _SIZES[name][0][0]!r}")


def _of_model(tensors: dict[str, Array]) -> dict[str, Array]:
    return {key: array for key, array in tensors.items() if not key.startswith((OPTIMIZER, BEST, AVERAGE))}


def with_prefix(tensors: dict[str, Array], prefix: str) -> dict[str, Array]:
    """Those whose keys start with it, without it."""
    return {key.removeprefix(prefix): array for key, array in tensors.items() if key.startswith(prefix)}


def read(path: _Path) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors, copied out of the file, and the metadata."""
    safetensors = _safetensors()
    check_file(path, "model.safetensors")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except (safetensors.SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a safetensors file that NumPy can hold, or a damaged one ({error})") from error


def read_json(path: _Path, texts: dict[str, str], key: str) -> Any:
    if key not in texts:
        raise ValueError(f"{path}: not a fastbn checkpoint, its metadata hold no {key!r}")
    try:
        return json.loads(texts[key])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged checkpoint, {key!r} is not JSON ({error})") from error


@contextlib.contextmanager
def naming(path: _Path) -> Iterator[None]:
    """Whatever is wrong within is one ValueError that names the file."""
    try:
        yield
    except (AttributeError, TypeError, ValueError, KeyError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be loaded: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError('checkpoints need safetensors: pip install "fastbn[train]"') from error
    return safetensors
