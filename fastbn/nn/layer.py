"""What the layers of this folder have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..atomic import change
from ..state import Array, Arrays, Float, as_float, check_state

__all__ = ["Activation", "Layer", "known_as"]


class Layer:
    """Mode, state and repr; a subclass keeps its constructor's arguments as attributes of the same names."""

    params: Arrays
    grads: Arrays
    training: bool
    _saved: Any  # None, or what backward needs: an array of x's dtype, the shape of y, and what else there is

    def __init__(self) -> None:
        self.params, self.grads = Arrays(), Arrays()
        self.training = True
        self._saved = None

    def forward(self, x: ArrayLike) -> Array:
        raise NotImplementedError

    @overload
    def __call__(self, x: NDArray[Float]) -> NDArray[Float]: ...
    @overload
    def __call__(self, x: ArrayLike) -> Array: ...
    def __call__(self, x: ArrayLike) -> Array:
        return self.forward(x)

    def _incoming(self, dy: ArrayLike) -> tuple[Array, Array]:
        """What forward saved, and dy, checked, in x's dtype."""
        if self._saved is None:
            raise RuntimeError(f"{type(self).__name__}.backward needs a forward call before it")
        saved, shape = self._saved[:2]
        grad = as_float(dy, "dy")
        if grad.shape != shape:
            raise ValueError(f"{type(self).__name__}.backward expected dy of shape {shape}, got {grad.shape}")
        return saved, grad if grad.dtype == saved.dtype else grad.astype(saved.dtype)

    def train(self, mode: bool = True) -> Self:
        """Switch to training, or with False to inference, and return the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Switch to inference, and return the layer."""
        return self.train(False)

    def state_dict(self) -> dict[str, Array]:
        """Return copies of all arrays that a model file holds, under PyTorch's keys."""
        return {name: p.copy() for name, p in self.params.items()}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Copy state into the parameters.

        If a key or shape does not fit, this is a ValueError, and nothing is changed.
        """
        change([(self.params[name], a) for name, a in check_state(state, self.params).items()])

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments: ``type(layer)(**layer.config())`` is a fresh layer of the same kind."""
        arguments = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {k: v.name if isinstance(v, np.dtype) else v for k, v in arguments.items()}

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        shown = (f"{k}={v!r}" for k, v in self.config().items() if v != defaults[k].default)
        return f"{type(self).__name__}({', '.join(shown)})"

    def __getstate__(self) -> dict[str, Any]:  # pickle and deepcopy without the saved batch
        return {**self.__dict__, "_saved": None}


class Activation(Layer):
    """A function whose y has the shape of x; a subclass fills y, tells what to save, and fills dx."""

    _forward: Callable[..., Array]  # (x, y) -> saved
    _backward: Callable[..., None]  # (saved, dy, dx)

    def forward(self, x: ArrayLike) -> Array:
        """Return y, of the shape and dtype of x."""
        a = as_float(x)
        y = np.empty_like(a)
        self._saved = self._forward(a, y), y.shape
        return y

    def backward(self, dy: ArrayLike) -> Array:
        """Return dx, of the shape and dtype of x."""
        saved, grad = self._incoming(dy)
        dx = np.empty_like(grad)
        self._backward(saved, grad, dx)
        return dx


def known_as(layer: Any) -> type:
    """Its class, as files and folded networks know it: one that differs in training alone names another one."""
    cls: type = vars(type(layer)).get("known_as", type(layer))  # not inherited: a subclass may compute something else
    return cls
