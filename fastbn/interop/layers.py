"""What the converters share: other libraries imported, and layers that are made of given arrays."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import nn
from ..state import Array

__all__ = ["dense", "library", "position", "standardize", "two_classes"]


def library(name: str, extra: str) -> Any:
    """The module, or an ImportError that says what to install."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f'this needs {name.partition(".")[0]}: pip install "fastbn[{extra}]"') from error


def position(place: str, name: str | int) -> str:
    """The position of a layer in the network at `place`, as in the keys of a state dict: "1.0"."""
    return f"{place}.{name}" if place else str(name)


def dense(weight: Array, bias: Array | None = None) -> nn.Dense:
    """A Dense of these arrays, (n_out, n_in) and (n_out,)."""
    n_out, n_in = weight.shape
    layer = nn.Dense._zeros(n_in, n_out, bias is not None, dtype=weight.dtype)
    layer.params.update({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


def standardize(mean: ArrayLike, var: ArrayLike, *, axis: int = 1, count: int = 1) -> nn.Standardize:
    """A Standardize of these statistics, which `count` values were seen for."""
    mean, var = np.asarray(mean, np.float64), np.asarray(var, np.float64)
    layer = nn.Standardize(len(mean), axis=axis)
    layer.load_state_dict({"mean": mean, "mean_low": np.zeros_like(mean), "var": var, "count": count})
    return layer


def two_classes(last: nn.Dense) -> list[Any]:
    """Layers for the probabilities of both classes, where `last` and a sigmoid give that of the second.

    The softmax of (0, z) is (1 - sigmoid(z), sigmoid(z)).
    """
    weight = np.vstack([np.zeros_like(last.params["weight"]), last.params["weight"]])
    bias = None if "bias" not in last.params else np.append(np.zeros(1, last.dtype), last.params["bias"])
    return [dense(weight, bias), nn.Softmax()]
