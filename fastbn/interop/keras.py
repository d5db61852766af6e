"""Keras: networks from its files, which are read with h5py alone. Keras itself is never imported.

The extra is ``pip install "fastbn[keras]"``.

# Design: a file's architecture becomes a list of Layer first, in which every class and argument is checked. Then each
# is given its variables, as h5py's datasets, whose shapes are known before anything is read. Only then are layers made.
# A network that is given instead of an architecture becomes the same list. keras_file.py reads, and counts the memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .. import nn
from ..batchnorm import BatchNorm
from ..checkpoint import naming
from ..files import check_file
from ..state import Array
from .keras_file import DAMAGE, MOST_TEXT, Layer, Reader, leaves, unzipped
from .layers import dense, library, position, standardize

__all__ = ["load"]

_EPSILON = 1e-7  # keras.backend.epsilon(), the least deviation that Normalization divides by
_MOST_LAYERS, _DEEPEST = 10_000, 50


def load(path: str | os.PathLike[str], model: nn.Sequential | None = None) -> nn.Sequential:
    """Return the network of a Keras file, or a given network with a file's weights.

    Parameters
    ----------
    path : path
        A ``.keras`` file of Keras 3 or of TensorFlow 2.12 to 2.15, or a whole model in ``.h5``. Without an
        architecture, which ``.weights.h5`` has not, the file's weights go into ``model``.
    model : nn.Sequential, optional
        Network with the layers whose weights the file holds, nested alike. Layers without weights do not matter. A
        BatchNorm stands for a BatchNormalization with both center and scale, or without them, and a Standardize for a
        Normalization that was adapted.

    Returns
    -------
    nn.Sequential
        ``model`` itself, or a new network in inference mode. Parameters have the dtype that they have in the file, bit
        for bit; a Dense's weight is Keras's kernel transposed. Running statistics become float64. An activation that is
        an argument becomes a layer of its own. y has the dtype of x, where Keras casts x to that of its layers.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is damaged or not Keras's, it has no architecture and no model is given, its weights are not those of
        ``model``, or it has a layer that has no counterpart here. The message names the file, and the layer with its
        class and its position in ``layers``. ``model`` is as it was.
    TypeError
        ``model`` is no ``Sequential``, or has a layer that Keras has not.
    ImportError
        h5py is not installed.

    Notes
    -----
    Models are ``Sequential``, nested or not, of ``Dense``, ``BatchNormalization``, ``Activation`` (linear, relu,
    leaky_relu, sigmoid, tanh, softmax), ``ReLU`` without arguments, ``LeakyReLU``, ``Softmax``, ``Dropout``,
    ``Flatten``, ``Normalization`` of one axis, ``Identity`` and ``InputLayer``, in float32 or float64.

    Keras's momentum is the weight of the old average, fastbn's that of the new batch: 0.99 becomes 0.01. Keras averages
    the variance of ``1/m``, hence ``unbiased=False``. A BatchNormalization without center or scale has zeros or ones
    for bias or weight here, which would train. One with ``trainable=False`` is frozen, as by
    `fastbn.BatchNorm.freeze`. For other layers that has no counterpart, and ``exclude=`` of the optimizers serves.
    Optimizers, losses, initializers, regularizers, constraints and seeds are not read.

    A network that ends with Softmax or Sigmoid gives probabilities. ``model[:-1]`` is what `fastbn.losses` trains.

    Examples
    --------
    >>> import os, pathlib, tempfile
    >>> os.environ.setdefault("KERAS_BACKEND", "torch")
    'torch'
    >>> import keras
    >>> from fastbn.interop.keras import load
    >>> layers = keras.layers
    >>> theirs = keras.Sequential([keras.Input((3,)), layers.Dense(5, activation="relu"), layers.BatchNormalization()])
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.keras"
    >>> theirs.save(path)
    >>> load(path)
    Sequential(
        Dense(n_in=3, n_out=5),
        ReLU(),
        BatchNorm(5, eps=0.001, momentum=0.01, axis=-1, unbiased=False),
    )
    """
    h5py = library("h5py", "keras")
    if model is not None and not isinstance(model, nn.Sequential):
        raise TypeError(f"expected model to be an nn.Sequential, got {type(model).__name__}")
    layers = None if model is None else _of_network(model, "")
    path = check_file(path, "model.keras")
    with open(path, "rb") as raw, naming(path):
        try:
            return _loaded(h5py, raw, model, layers)
        except DAMAGE as error:
            raise ValueError(f"damaged file ({error})") from error


def _loaded(h5py: Any, raw: Any, model: nn.Sequential | None, layers: list[Layer] | None) -> nn.Sequential:
    data, text = raw.read(), None
    if data.startswith(b"PK"):
        text, data = unzipped(data)
    elif not data.startswith(b"\x89HDF\r\n\x1a\n"):
        raise ValueError("expected a .keras or .h5 file of Keras, got neither a zip nor an HDF5 file")
    with h5py.File(io.BytesIO(data), "r") as file:
        reader = Reader(h5py, data)
        attributes = set(file.attrs) if text is None else set()
        if "model_config" in attributes:
            text = reader.texts(file, "model_config")[0]
        if layers is None:
            if text is None:
                raise ValueError("it has weights and no architecture: give model=, a network of the same layers")
            layers = _architecture(text)
        if attributes & {"model_config", "layer_names"}:
            whole = reader.group(file, "model_weights")
            reader.assign_in_order(layers, file if whole is None else whole)
        else:
            reader.assign(layers, file)
        if model is None:
            return nn.Sequential(*_made(layers, reader)).eval()
        model.load_state_dict({key: array for layer in leaves(layers) for key, array in _entries(layer, reader)})
        return model


# --- architectures


@contextlib.contextmanager
def _naming(layer: Layer) -> Iterator[None]:
    """Whatever is wrong within is a ValueError that names the layer."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"cannot convert {layer.said}: its config has no {error}") from error
    except (AttributeError, IndexError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"cannot convert {layer.said}: {error}") from error


def _architecture(text: str) -> list[Layer]:
    if len(text) > MOST_TEXT:
        raise ValueError(f"expected an architecture of at most {MOST_TEXT} characters, got {len(text)}")
    model = _parsed(json.loads(text), "")
    if model.kind != "Sequential":
        raise ValueError(f"expected a Sequential model, got one of the class {model.kind}")
    return model.layers


def _parsed(entry: Any, place: str) -> Layer:
    """A layer and those within, once classes, dtypes and arguments are ones that have a counterpart here."""
    match entry:
        case {"class_name": str(kind), "config": dict() | list()}:
            config = entry["config"]
        case _:
            raise ValueError(f"expected layer {place!r} with its class_name and config, got {str(entry)[:100]}")
    if isinstance(config, list):  # a Sequential of Keras before 2.3
        config = {"layers": config}
    config = {argument: _plain(value) for argument, value in config.items()}
    name = str(config.get("name"))[:100]
    layer = Layer(place, kind, f"layer {place} {name!r} ({kind})" if place else f"{name!r} ({kind})", config)
    if not _is_keras(entry) or kind not in ("Sequential", "InputLayer", *_MAKERS):
        raise ValueError(f"cannot convert {layer.said}: expected Keras's Sequential, {', '.join(_MAKERS)}")
    with _naming(layer):
        _dtype(config)
        for argument, plain in _PLAIN.get(kind, {}).items():
            if config.get(argument) not in (None, plain):
                raise ValueError(f"expected {argument}={plain}, got {str(config[argument])[:100]}")
        layer.shapes = _shapes(kind, config)
        built = (entry.get("build_config") or {}).get("input_shape")
        layer.input_shape = built or config.get("batch_shape") or config.get("batch_input_shape")
        layers = config["layers"] if kind == "Sequential" else []
        if len(layers) > _MOST_LAYERS or place.count(".") > _DEEPEST:
            raise ValueError(f"expected at most {_MOST_LAYERS} layers, and {_DEEPEST} networks in one another")
    shape = None
    for inner in layers:
        number = str(len(layer.layers))
        part = _parsed(inner, position(place, number))
        if part.kind == "InputLayer":  # what Keras itself leaves out of `layers`
            shape = part.input_shape
            continue
        part.input_shape, shape = part.input_shape or shape, None
        layer.layers.append(part)
    return layer


def _plain(value: Any) -> Any:
    """A number or a list where an argument was an array."""
    match value:
        case {"class_name": "__numpy__" | "__tensor__", "config": {"value": plain}}:
            return plain
    return value


def _is_keras(entry: dict[str, Any]) -> bool:
    """Whether a class or function is Keras's own. Others are registered under a package, as "Custom>Dense"."""
    module = str(entry.get("module") or "keras").partition(".")[0]
    return module in ("keras", "tf_keras", "builtins") and ">" not in str(entry.get("registered_name"))


def _dtype(config: dict[str, Any]) -> str:
    """What a layer has its variables in, and computes in."""
    policy = config.get("dtype") or "float32"
    if isinstance(policy, dict) and policy.get("class_name") in ("DTypePolicy", "FloatDTypePolicy", "Policy"):
        policy = policy["config"]["name"]
    if policy not in ("float32", "float64"):
        raise ValueError(f"expected dtype float32 or float64, got {str(policy)[:100]}")
    return str(policy)


# Arguments that have no counterpart, and what they are where they do nothing.
_PLAIN: dict[str, dict[str, Any]] = {
    "BatchNormalization": {"renorm": False, "virtual_batch_size": None},
    "Dense": {"quantization_config": None},
    "Dropout": {"noise_shape": None},
    "Flatten": {"data_format": "channels_last"},  # channels_first moves the channels to the end
    "Normalization": {"invert": False},
    "ReLU": {"max_value": None, "negative_slope": 0, "threshold": 0},
}


def _shapes(kind: str, config: dict[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """The variables, in the order of the files."""
    if kind == "Dense":
        units = config["units"]
        return {"kernel": (None, units)} | ({"bias": (units,)} if config.get("use_bias", True) else {})
    if kind == "BatchNormalization":
        chosen = {"gamma": config.get("scale", True), "beta": config.get("center", True)}
        names = [name for name, there in chosen.items() if there] + ["moving_mean", "moving_variance"]
        return dict.fromkeys(names, (None,))
    if kind == "Normalization" and config.get("mean") is None:
        shape = () if _axis(config) is None else (None,)
        return {"mean": shape, "variance": shape, "count": ()}
    return {}


def _axis(config: dict[str, Any]) -> Any:
    """The one axis, also where it stands in a list; None for no axis."""
    axis = config.get("axis", -1)
    if not isinstance(axis, list):
        return axis
    if len(axis) > 1:
        raise ValueError(f"expected one axis, got {str(axis)[:100]}")
    return axis[0] if axis else None


# --- layers


_NAMES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "mean": "mean",
    "variance": "var",
}


def _state(layer: Layer, reader: Reader) -> dict[str, Array]:
    """The variables under fastbn's names."""
    state = {_NAMES[name]: reader.array(layer, name) for name in layer.shapes if name in _NAMES}
    return state | {"weight": state["weight"].T} if layer.kind == "Dense" else state


def _made(layers: list[Layer], reader: Reader) -> list[Any]:
    made: list[Any] = []
    for layer in layers:
        if layer.kind == "Sequential":
            made.append(nn.Sequential(*_made(layer.layers, reader)))
            continue
        with _naming(layer):
            made += _MAKERS[layer.kind](layer, reader)
    return made


def _dense(layer: Layer, reader: Reader) -> list[Any]:
    state = _state(layer, reader)
    return [dense(state["weight"], state.get("bias")), *_activation(layer.config.get("activation"))]


def _batch_norm(layer: Layer, reader: Reader) -> list[Any]:
    state, config = _state(layer, reader), layer.config
    mean = state["running_mean"]
    affine = "weight" in state or "bias" in state
    if affine:
        state = {"weight": np.ones_like(mean), "bias": np.zeros_like(mean)} | state
    norm = BatchNorm(
        len(mean),
        float(config.get("epsilon", 1e-3)),
        round(1 - float(config.get("momentum", 0.99)), 15),
        affine,
        axis=_axis(config),
        dtype=mean.dtype,
        unbiased=False,
    )
    norm.load_state_dict(state)
    return [norm.freeze(config.get("trainable") is False)]


def _normalization(layer: Layer, reader: Reader) -> list[Any]:
    axis, config = _axis(layer.config), layer.config
    if layer.shapes:
        state = _state(layer, reader)
        given = np.stack([state["mean"], state["var"]])
    else:
        given = np.asarray([config["mean"], config["variance"]], np.float64).astype(_dtype(config))
    mean, var = given.reshape(2, -1)
    axis = -1 if axis is None else axis
    if len(mean) == 1 and layer.input_shape:  # one number for all features
        n = layer.input_shape[axis]
        reader.spend(8 * n)
        mean, var = np.repeat(mean, n), np.repeat(var, n)
    elif given.ndim == 1:
        raise ValueError("expected the shape of its input in the file, got one mean for all features")
    return [standardize(mean, _deviating(var), axis=axis)]


def _deviating(var: Array) -> Array:
    """The variance by whose root Keras divides."""
    return np.maximum(var.astype(np.float64), _EPSILON**2)


def _softmax(layer: Layer, reader: Reader) -> list[Any]:
    return [nn.Softmax(_axis(layer.config))]


def _leaky_relu(layer: Layer, reader: Reader) -> list[Any]:
    slope = layer.config.get("negative_slope", layer.config.get("alpha", 0.3))  # alpha: Keras 2
    return [nn.LeakyReLU(float(slope))]


_ACTIVATIONS: dict[str, Callable[[], Any]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softmax": nn.Softmax,
}


def _activation(value: Any) -> list[Any]:
    """The layers of an argument: a function's name, or a function or a layer with its config."""
    if isinstance(value, dict) and value.get("class_name") != "function":
        layer = _parsed(value, "")
        if layer.kind in ("ReLU", "LeakyReLU", "Softmax"):
            return _MAKERS[layer.kind](layer, None)
    elif isinstance(value, dict) and _is_keras(value):
        value = value.get("config")
    if value in (None, "linear"):
        return []
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise ValueError(f"expected activation linear, {', '.join(_ACTIVATIONS)}, got {str(value)[:100]}")
    return [_ACTIVATIONS[value]()]


_MAKERS: dict[str, Callable[[Layer, Any], list[Any]]] = {
    "Dense": _dense,
    "BatchNormalization": _batch_norm,
    "Normalization": _normalization,
    "Activation": lambda layer, _: _activation(layer.config["activation"]) or [nn.Identity()],
    "ReLU": lambda layer, _: [nn.ReLU()],
    "LeakyReLU": _leaky_relu,
    "Softmax": _softmax,
    "Dropout": lambda layer, _: [nn.Dropout(layer.config["rate"])],
    "Flatten": lambda layer, _: [nn.Flatten()],
    "Identity": lambda layer, _: [nn.Identity()],
}


# --- networks that are given


def _of_network(model: nn.Sequential, place: str) -> list[Layer]:
    """The layers of a network that Keras keeps weights of."""
    layers = []
    for i, layer in enumerate(model):
        at = position(place, i)
        if isinstance(layer, nn.Sequential):
            layers.append(Layer(at, "Sequential", f"layer {at} (Sequential)", layers=_of_network(layer, at)))
            continue
        shapes: dict[str, tuple[int | None, ...]] = {}
        if type(layer) is nn.Dense:
            kind, shapes = "Dense", {"kernel": (layer.n_in, layer.n_out)}
            shapes |= {"bias": (layer.n_out,)} if layer.bias else {}
        elif isinstance(layer, BatchNorm):
            kind, state = "BatchNormalization", layer.state_dict()
            names = ("gamma", "beta", "moving_mean", "moving_variance")
            shapes = {name: (layer.num_features,) for name in names if _NAMES[name] in state}
        elif isinstance(layer, nn.Standardize):
            kind, n = "Normalization", layer.num_features
            shapes = {"mean": (n,), "variance": (n,), "count": ()}
        elif layer.state_dict():
            raise TypeError(f"Keras has no layer {at} ({type(layer).__name__}): expected Dense, BatchNorm, Standardize")
        else:
            continue
        layers.append(Layer(at, kind, f"layer {at} ({type(layer).__name__})", shapes=shapes))
    return layers


def _entries(layer: Layer, reader: Reader) -> Iterator[tuple[str, Array]]:
    """What a state_dict has of a layer."""
    with _naming(layer):
        state = _state(layer, reader)
    if layer.kind == "Normalization":
        state |= {"mean_low": np.zeros_like(state["mean"]), "var": _deviating(state["var"]), "count": np.array(1)}
    for name, array in state.items():
        yield f"{layer.place}.{name}", array
