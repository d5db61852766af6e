"""Named arrays that are written in place, and the checks of what is written into them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arguments import as_array, is_masked
from .arguments import floating as as_float
from .atomic import change

Array = NDArray[Any]
Float = TypeVar("Float", bound=np.floating[Any])  # of a function whose result has the dtype of what it is given
__all__ = [
    "FLOATS",
    "Array",
    "Arrays",
    "Float",
    "Held",
    "as_array",
    "as_float",
    "assign",
    "check_state",
    "checked_dtype",
    "checked_seed",
    "refuse_masked",
    "whole",
]

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_MOST = 2**53  # a count that training does not take out of int64, and float64 holds


def whole(value: Any, name: str) -> int:
    """The value as an int; TypeError with its name where it is no integer, Python's or NumPy's."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"expected {name} as an integer, got {type(value).__name__}") from None


def checked_dtype(value: Any) -> np.dtype[Any]:
    """The value as float32 or float64; TypeError for all others, also for texts that NumPy would parse as a program."""
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except Exception:  # NumPy's parsers raise errors of many kinds, a SyntaxError among them
        raise TypeError(f"expected dtype float32 or float64, got {value!r}") from None
    if dtype not in FLOATS:
        raise TypeError(f"expected dtype float32 or float64, got {dtype}")
    return dtype


def checked_seed(value: Any) -> int | None:
    """The value as NumPy's generators take it, before one is made: importing numpy.random takes time."""
    seed = None if value is None else whole(value, "seed")
    if seed is not None and seed < 0:
        raise ValueError(f"expected seed to be at least 0 or None, got {seed}")
    return seed


def assign(array: Array, value: ArrayLike, name: str) -> None:
    """Copy `value`, of array's shape or a scalar, into `array`."""
    change([_fitting(array, value, name)])


def _fitting(array: Array, value: ArrayLike, name: str) -> tuple[Array, Array]:
    """The two, checked, as `change` takes them."""
    given = as_float(value, name)
    if given.shape not in ((), array.shape):
        raise ValueError(f"expected {name} of shape {array.shape}, got {given.shape}")
    return array, given


def check_state(given: Mapping[str, ArrayLike], expected: Mapping[str, Array]) -> dict[str, Array]:
    """`given` as arrays, once keys, shapes and kinds are those of `expected`; ValueError naming the key if not,
    TypeError for a masked array.

    As PyTorch's strict load: a missing num_batches_tracked is 0 (PyTorch had none before 0.4.1, and layers that do not
    count have none), and counts may be of any dtype, as after ``.half()`` of a whole state, and of shape (1,).
    """
    given = dict(given)
    for key, value in given.items():
        refuse_masked(value, repr(key))
    arrays = {key: as_array(value, repr(key)) for key, value in given.items()}
    for key in expected.keys() - arrays.keys():
        if key.rpartition(".")[2] == "num_batches_tracked":
            arrays[key] = np.zeros((), np.int64)
    if wrong := expected.keys() ^ arrays.keys():
        first = min(wrong, key=str)
        what = "missing" if first in expected else "unexpected"
        raise ValueError(f"{what} key {first!r}: expected {sorted(expected)}, got {sorted(arrays, key=str)}")
    for key, a in arrays.items():
        dtype, shape = expected[key].dtype, expected[key].shape
        count = dtype.kind == "i"
        if a.shape not in ((shape, (1,)) if count else (shape,)) or a.dtype.kind not in ("iuf" if count else "biuf"):
            raise ValueError(f"{key!r}: expected {dtype} of shape {shape}, got {a.dtype} of shape {a.shape}")
        if count:
            if not 0 <= a.item() <= _MOST or a.item() % 1:
                raise ValueError(f"{key!r}: expected a count, a whole number from 0 to {_MOST}, got {a.item()}")
            arrays[key] = a.astype(dtype).reshape(shape)
    return arrays


def refuse_masked(a: Any, name: str) -> None:
    """TypeError for a masked array, as everywhere in fastbn: NumPy would hand on the values behind its mask."""
    if is_masked(a):
        raise TypeError(f"expected {name} without a mask, got a masked array: its mask would be lost")


class Held:
    """An attribute whose array (or None) the object holds as `_name`; assigning copies into it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    # None is not among the types: whoever made the layer with the array need not ask for it.
    def __get__(self, instance: Any, owner: type) -> Array | Any:
        if instance is None:
            return self  # of the class, for help() and its like
        return getattr(instance, f"_{self._name}")

    def __set__(self, instance: Any, value: ArrayLike) -> None:
        array = getattr(instance, f"_{self._name}")
        if array is None:
            raise ValueError(f"expected no {self._name}: this layer was made without")
        assign(array, value, self._name)


class Arrays(dict[str, Array]):
    """A dict of arrays that stay the same ones: layers, models and optimizers all hold on to them.

    Assigning to a key copies into its array, so that ``model.grads[k] = np.clip(model.grads[k], -1, 1)`` means what it
    says; keys can be neither added nor removed.
    """

    def __setitem__(self, key: str, value: ArrayLike) -> None:
        # layer.params[name] *= 2 has changed the array already, and hands it back.
        if key not in self or value is not self[key]:
            self.update({key: value})

    def update(self, other: Any = (), /, **more: ArrayLike) -> None:
        given = dict(other, **more)
        for key in given:
            if key not in self:
                raise KeyError(f"expected one of {sorted(self)}, got {key!r}")
        change([_fitting(self[key], value, key) for key, value in given.items()])

    def __ior__(self, other: Mapping[str, ArrayLike] | Iterable[tuple[str, ArrayLike]]) -> Arrays:  # type: ignore[override,misc]
        self.update(other)
        return self

    def _fixed(self, *_: Any) -> NoReturn:
        raise TypeError(f"expected the keys {sorted(self)} to stay: the layer works with these arrays")

    __delitem__ = pop = popitem = clear = setdefault = _fixed

    def __reduce__(self) -> tuple[Any, ...]:
        return Arrays, (dict(self),)
