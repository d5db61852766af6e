"""The pairs (X, y) that `training` takes: their checks, before the first step, and the part that is held out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import losses
from .data import held_out_rows
from .nn import walk
from .state import Array, as_array, as_float, refuse_masked

__all__ = ["Loss", "Pair", "check_finite", "checked", "inference", "pair", "with_validation"]

Loss = Callable[[Array, Array], tuple[float, Array]]
Pair = tuple[ArrayLike, ArrayLike]
# Elements that are looked at together where an array's sum is not finite.
_BLOCK = 1 << 20


def pair(data: Pair, name: str) -> tuple[Array, Array]:
    """X as floats and y as numbers, equally long."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise TypeError(f"{name} must be a pair (X, y), got {type(data).__name__}")
    refuse_masked(data[1], f"{name}: y")
    X, y = as_float(data[0], f"{name}: X"), as_array(data[1], f"{name}: y")
    if X.ndim == 0 or y.ndim == 0 or len(X) != len(y):
        raise ValueError(f"{name}: X and y must be equally long, got shapes {X.shape} and {y.shape}")
    if len(X) == 0:
        raise ValueError(f"{name}: no examples")
    if y.dtype.kind not in "biuf":
        raise TypeError(f"{name}: y must hold numbers, got {y.dtype}")
    return X, y


def check_finite(array: Array, name: str) -> None:
    """ValueError naming the first NaN or infinity in the order of rows, if there is one."""
    if array.dtype.kind != "f":
        return
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(array.sum()):  # one pass without a copy; finite values whose sum is not are rare
            return
    rows = max(1, _BLOCK * len(array) // max(array.size, 1))
    for start in range(0, len(array), rows):
        finite = np.isfinite(array[start : start + rows])
        if not finite.all():
            first = np.unravel_index(int(finite.argmin()), finite.shape)
            at = (start + int(first[0]), *map(int, first[1:]))
            raise ValueError(f"{name}[{', '.join(map(str, at))}] is {array[at]}: expected finite numbers")


def checked(model: Any, data: Pair, loss: Loss, name: str) -> tuple[Array, Array]:
    """The pair, once all is finite, and the model takes such an x and the loss the lowest and the highest target."""
    X, y = pair(data, name)
    check_finite(X, f"{name}: X")
    check_finite(y, f"{name}: y")
    with inference(model):
        try:
            prediction = model(np.zeros((2, *X.shape[1:]), X.dtype))
            loss(prediction, np.stack([y.min(axis=0), y.max(axis=0)]))
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{name} does not fit the model and the loss: {error}") from error
    return X, y


def with_validation(
    model: Any, data: Pair, loss: Loss, validation: Pair | float | None, seed: int
) -> tuple[tuple[Array, Array], tuple[Array, Array] | None]:
    """Training and validation data, checked; the validation's are None, given, or a part of the first."""
    X, y = checked(model, data, loss, "data")
    X = np.ascontiguousarray(X)  # take would copy a strided X whole, for every mini-batch
    if validation is None:
        return (X, y), None
    # float is a Real, which mypy does not know
    if isinstance(validation, bool) or not isinstance(validation, Real | float):
        return (X, y), checked(model, validation, loss, "validation")
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a pair (X, y) or a fraction between 0 and 1, got {validation}")
    validation = float(validation)
    labels = y if loss is losses.softmax_cross_entropy else np.zeros(len(y))
    held = held_out_rows(labels, validation, seed)
    if not held.any():
        raise ValueError(f"validation={validation} holds out no example: there is one of each class")
    return (X[~held], y[~held]), (X[held], y[held])


@contextlib.contextmanager
def inference(model: Any) -> Iterator[None]:
    """Inference mode, and afterwards, even after an error, every layer's mode as it was."""
    modes = [(layer, layer.training) for layer in walk([model])]
    model.train(False)
    try:
        yield
    finally:
        for layer, mode in modes:  # the outer ones first: setting theirs sets the inner ones' too
            layer.train(mode)
