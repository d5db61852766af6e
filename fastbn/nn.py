"""Layers for training networks around BatchNorm: Dense, activations, Dropout, Sequential.

# Design: a layer is any object with forward (= call), backward, params, grads, train, eval, state_dict and
# load_state_dict. It keeps what its backward needs from the last forward; there is no graph. BatchNorm is a
# layer as it stands, and this file does not know it. Arrays in params and grads are created once and written
# in place ever after, so that optimizers and Sequential may hold on to them. Matrix products are NumPy's.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from .state import FLOATS, Array, Arrays, as_float, check_state

__all__ = ["Dense", "Dropout", "LeakyReLU", "ReLU", "Sequential", "Sigmoid", "Tanh"]


class Layer:
    """Mode, state and repr; a subclass keeps its constructor's arguments as attributes of the same names."""

    params: Arrays
    grads: Arrays
    training: bool
    _saved: tuple[Array, tuple[int, ...]] | None  # what backward needs, with x's dtype; the shape of y

    def __init__(self) -> None:
        self.params, self.grads = Arrays(), Arrays()
        self.training = True
        self._saved = None

    def forward(self, x: ArrayLike) -> Array:
        raise NotImplementedError

    def __call__(self, x: ArrayLike) -> Array:
        return self.forward(x)

    def _incoming(self, dy: ArrayLike) -> tuple[Array, Array]:
        """What forward saved, and dy, checked, in x's dtype."""
        if self._saved is None:
            raise RuntimeError(f"{type(self).__name__}.backward needs a forward call before it")
        saved, shape = self._saved
        grad = as_float(dy)
        if grad.shape != shape:
            raise ValueError(f"{type(self).__name__}.backward expected dy of shape {shape}, got {grad.shape}")
        return saved, grad if grad.dtype == saved.dtype else grad.astype(saved.dtype)

    def train(self, mode: bool = True) -> Self:
        """Set training mode (or inference, with False); returns the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Set inference mode; returns the layer."""
        return self.train(False)

    def state_dict(self) -> dict[str, Array]:
        """Copies of everything that a checkpoint must hold, by PyTorch's names."""
        return {name: p.copy() for name, p in self.params.items()}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Copy `state` into the parameters; ValueError, nothing changed, unless all keys and shapes fit."""
        for name, a in check_state(state, self.params).items():
            self.params[name][...] = a

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able: `type(layer)(**layer.config())` is one like it."""
        arguments = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {k: v.name if isinstance(v, np.dtype) else v for k, v in arguments.items()}

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        shown = (f"{k}={v!r}" for k, v in self.config().items() if v != defaults[k].default)
        return f"{type(self).__name__}({', '.join(shown)})"

    def __getstate__(self) -> dict[str, Any]:  # pickle and deepcopy without the saved batch
        return {**self.__dict__, "_saved": None}


class Dense(Layer):
    """Affine map of the last axis, y = x W^T + b.

    Parameters
    ----------
    n_in, n_out : int
        Length of the last axis of x and of y.
    bias : bool
        False leaves b out, as it should be where BatchNorm comes next: that takes any b away again.
    dtype : {"float32", "float64"}
        Type of the parameters and their gradients; x may have either, and y has x's.
    seed : int or None
        Seed of the start values, U(-1/sqrt(n_in), 1/sqrt(n_in)) for W and b, as in PyTorch's `Linear`.
        Layers of one shape and one seed start alike.

    Attributes
    ----------
    params, grads : dict
        "weight", (n_out, n_in), and with bias "bias", (n_out,).

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import nn
    >>> layer = nn.Dense(3, 2, seed=0)
    >>> layer(np.ones((5, 3), np.float32)).shape
    (5, 2)
    >>> layer
    Dense(n_in=3, n_out=2, seed=0)
    """

    def __init__(
        self, n_in: int, n_out: int, bias: bool = True, *, dtype: Any = "float32", seed: int | None = None
    ) -> None:
        self.n_in, self.n_out = operator.index(n_in), operator.index(n_out)
        if self.n_in < 1 or self.n_out < 1:
            raise ValueError(f"expected n_in and n_out of at least 1, got {n_in} and {n_out}")
        self.bias, self.dtype = bool(bias), np.dtype(dtype)
        if self.dtype not in FLOATS:
            raise TypeError(f"expected dtype float32 or float64, got {self.dtype}")
        self.seed = None if seed is None else operator.index(seed)
        rng, bound = np.random.default_rng(self.seed), 1 / math.sqrt(self.n_in)
        params = {"weight": rng.uniform(-bound, bound, (self.n_out, self.n_in)).astype(self.dtype)}
        if self.bias:
            params["bias"] = rng.uniform(-bound, bound, self.n_out).astype(self.dtype)
        super().__init__()
        self.params = Arrays(params)
        self.grads = Arrays({name: np.zeros_like(p) for name, p in params.items()})

    def forward(self, x: ArrayLike) -> Array:
        """y, (..., n_out), from x, (..., n_in); ValueError where the last axis of x is not n_in long."""
        a = as_float(x)
        if a.ndim == 0 or a.shape[-1] != self.n_in:
            raise ValueError(f"Dense expected x of shape (..., {self.n_in}), got {a.shape}")
        rows = a if a.ndim == 2 else a.reshape(-1, self.n_in)
        y = np.empty((len(rows), self.n_out), a.dtype)
        np.matmul(rows, self.params["weight"].T, out=y)
        if self.bias:
            y += self.params["bias"]
        if a.ndim != 2:
            y = y.reshape(*a.shape[:-1], self.n_out)
        self._saved = a, y.shape
        return y

    def backward(self, dy: ArrayLike, input_grad: bool = True) -> Array | None:
        """Fill grads with dW = dy^T x and db = sum dy; returns dx = dy W, or None without `input_grad`."""
        x, grad = self._incoming(dy)
        rows, grad = (x, grad) if x.ndim == 2 else (x.reshape(-1, self.n_in), grad.reshape(-1, self.n_out))
        np.matmul(grad.T, rows, out=self.grads["weight"])
        if self.bias:
            np.add.reduce(grad, axis=0, out=self.grads["bias"])
        if not input_grad:
            return None
        dx = np.empty(rows.shape, x.dtype)
        np.matmul(grad, self.params["weight"], out=dx)
        return dx.reshape(x.shape)


class _Elementwise(Layer):
    """A function of each value of x, of any shape; a subclass fills y, tells what to save, and fills dx."""

    _forward: Callable[..., Array]  # (x, y) -> saved
    _backward: Callable[..., None]  # (saved, dy, dx)

    def forward(self, x: ArrayLike) -> Array:
        """y, with the shape and dtype of x."""
        a = as_float(x)
        y = np.empty_like(a)
        self._saved = self._forward(a, y), y.shape
        return y

    def backward(self, dy: ArrayLike) -> Array:
        """dx, with the shape and dtype of x."""
        saved, grad = self._incoming(dy)
        dx = np.empty_like(grad)
        self._backward(saved, grad, dx)
        return dx


class ReLU(_Elementwise):
    """y = max(x, 0); dx = dy where y > 0, else 0.

    Examples
    --------
    >>> from fastbn import nn
    >>> nn.ReLU()([-1.0, 2.0])
    array([0., 2.])
    """

    def _forward(self, x: Array, y: Array) -> Array:
        return np.maximum(x, 0, out=y)

    def _backward(self, saved: Array, dy: Array, dx: Array) -> None:
        np.greater(saved, 0, out=dx)  # 0 and 1 times dy: half the time of np.where
        dx *= dy


class LeakyReLU(_Elementwise):
    """y = x where x > 0, else negative_slope * x, the slope within [0, 1]; dx = dy times 1 or the slope.

    Examples
    --------
    >>> from fastbn import nn
    >>> nn.LeakyReLU(0.1)([-1.0, 2.0])
    array([-0.1,  2. ])
    """

    def __init__(self, negative_slope: float = 0.01) -> None:
        if not 0 <= negative_slope <= 1:
            raise ValueError(f"expected negative_slope within [0, 1], got {negative_slope}")
        self.negative_slope = float(negative_slope)
        super().__init__()

    def _forward(self, x: Array, y: Array) -> Array:
        slope = np.empty_like(x)
        np.greater(x, 0, out=slope)
        np.maximum(slope, self.negative_slope, out=slope)
        np.multiply(x, slope, out=y)
        return slope

    def _backward(self, saved: Array, dy: Array, dx: Array) -> None:
        np.multiply(dy, saved, out=dx)


class Sigmoid(_Elementwise):
    """y = 1 / (1 + exp(-x)), for x of any size, with a small relative error in both tails; dx = dy y (1 - y).

    Examples
    --------
    >>> from fastbn import nn
    >>> nn.Sigmoid()([-1e4, 0.0, 1e4])
    array([0. , 0.5, 1. ])
    """

    def _forward(self, x: Array, y: Array) -> Array:
        np.negative(x, out=y)
        # exp may overflow to inf or underflow to 0, and the quotient is then the right one
        with np.errstate(over="ignore", under="ignore"):
            np.exp(y, out=y)
            y += 1
            return np.divide(1, y, out=y)

    def _backward(self, saved: Array, dy: Array, dx: Array) -> None:
        np.subtract(1, saved, out=dx)
        dx *= saved
        dx *= dy


class Tanh(_Elementwise):
    """y = tanh(x); dx = dy (1 - y^2).

    Examples
    --------
    >>> from fastbn import nn
    >>> nn.Tanh()([-1e4, 0.0, 1e4])
    array([-1.,  0.,  1.])
    """

    def _forward(self, x: Array, y: Array) -> Array:
        return np.tanh(x, out=y)

    def _backward(self, saved: Array, dy: Array, dx: Array) -> None:
        np.multiply(saved, saved, out=dx)
        np.subtract(1, dx, out=dx)
        dx *= dy


class Dropout(_Elementwise):
    """In training, zero each value with probability p and divide the rest by 1 - p; the identity in inference.

    Source: Srivastava et al., "Dropout", JMLR 15 (2014), in its inverted form, as PyTorch's.

    Parameters
    ----------
    p : float
        Within [0, 1].
    seed : int or None
        Seed of the layer's own random stream.

    Attributes
    ----------
    rng : numpy.random.Generator
        That stream; no part of `state_dict()`.

    Examples
    --------
    >>> from fastbn import nn
    >>> nn.Dropout(0.5, seed=0)([1.0, 1.0, 1.0])
    array([2., 0., 0.])
    >>> nn.Dropout(0.5).eval()([1.0, 1.0, 1.0])
    array([1., 1., 1.])
    """

    def __init__(self, p: float, *, seed: int | None = None) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"expected p within [0, 1], got {p}")
        self.p, self.seed = float(p), None if seed is None else operator.index(seed)
        self.rng = np.random.default_rng(self.seed)
        super().__init__()

    def forward(self, x: ArrayLike) -> Array:
        """y, with the shape and dtype of x; in inference x itself."""
        if self.training:
            return super().forward(x)
        a = as_float(x)
        self._saved = np.ones((), a.dtype), a.shape
        return a

    def _forward(self, x: Array, y: Array) -> Array:
        scale: Array = self.rng.random(x.shape, dtype=x.dtype.type)
        np.greater_equal(scale, self.p, out=scale)
        scale *= 1 / (1 - self.p) if self.p < 1 else 0
        np.multiply(x, scale, out=y)
        return scale

    def _backward(self, saved: Array, dy: Array, dx: Array) -> None:
        np.multiply(dy, saved, out=dx)


class Sequential:
    """Layers one after another.

    Parameters
    ----------
    *layers : layer objects
        BatchNorm, those of this file, or any with the same methods. One that came twice would overwrite its
        saved batch: ValueError.

    Attributes
    ----------
    params, grads : dict
        The layers' own arrays (not copies) by PyTorch's keys: "0.weight" is the weight of layer 0.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import BatchNorm, nn
    >>> model = nn.Sequential(nn.Dense(4, 8, bias=False), BatchNorm(8), nn.ReLU(), nn.Dense(8, 3))
    >>> model(np.eye(4)).shape
    (4, 3)
    >>> model.backward(np.ones((4, 3)))
    >>> sorted(model.grads)
    ['0.weight', '1.bias', '1.weight', '3.bias', '3.weight']
    >>> model[2], len(model)
    (ReLU(), 4)
    """

    def __init__(self, *layers: Any) -> None:
        for i, layer in enumerate(layers):
            if isinstance(layer, type) or not hasattr(layer, "backward"):
                raise TypeError(f"expected layer objects, got {layer!r} as layer {i}")
        seen = [id(leaf) for leaf in walk(layers)]
        if len(set(seen)) < len(seen):
            raise ValueError("the same layer object is there twice: its second batch would overwrite the first")
        self._layers = layers
        self.training = True
        self._collect()

    def _collect(self) -> None:
        layers = self._layers
        self.params = Arrays({f"{i}.{k}": p for i, layer in enumerate(layers) for k, p in layer.params.items()})
        self.grads = Arrays({f"{i}.{k}": g for i, layer in enumerate(layers) for k, g in layer.grads.items()})

    def forward(self, x: ArrayLike) -> Any:
        """x through all layers."""
        y: Any = x
        for layer in self._layers:
            y = layer(y)
        return y

    def __call__(self, x: ArrayLike) -> Any:
        return self.forward(x)

    def backward(self, dy: ArrayLike, input_grad: bool = False) -> Any:
        """Fill every layer's grads; returns dx, or None without `input_grad`: it costs a matrix product."""
        grad: Any = dy
        for i in reversed(range(len(self._layers))):
            layer = self._layers[i]
            if isinstance(layer, (Dense, Sequential)):
                grad = layer.backward(grad, input_grad=input_grad or i > 0)
            else:
                grad = layer.backward(grad)
        return grad if input_grad else None

    def train(self, mode: bool = True) -> Self:
        """Set training mode (or inference, with False) for every layer; returns the model."""
        for layer in self._layers:
            layer.train(mode)
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Set inference mode for every layer; returns the model."""
        return self.train(False)

    def state_dict(self) -> dict[str, Array]:
        """Copies of every layer's state, by PyTorch's keys: '0.weight', '1.running_mean'."""
        return {f"{i}.{k}": v for i, layer in enumerate(self._layers) for k, v in layer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Copy `state` into the layers; ValueError, and nothing changed, unless all keys and shapes fit."""
        arrays = check_state(state, self.state_dict())
        before = [layer.state_dict() for layer in self._layers]
        try:
            for i, layer in enumerate(self._layers):
                layer.load_state_dict({k: arrays[f"{i}.{k}"] for k in before[i]})
        except BaseException:
            for layer, state_before in zip(self._layers, before, strict=True):
                layer.load_state_dict(state_before)
            raise

    def __getitem__(self, index: int | slice) -> Any:
        """A layer, or with a slice a Sequential of those very layers (`model[:-1]`: the last one's input)."""
        return Sequential(*self._layers[index]) if isinstance(index, slice) else self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._layers)

    def __repr__(self) -> str:
        inner = ",\n".join(repr(layer) for layer in self._layers).replace("\n", "\n    ")
        return f"Sequential(\n    {inner},\n)" if self._layers else "Sequential()"

    def __setstate__(self, state: dict[str, Any]) -> None:  # params and grads must be the copied layers' own
        self.__dict__.update(state)
        self._collect()


def walk(layers: Any) -> Iterator[Any]:
    """These layers and all that they hold, the outer ones first."""
    for layer in layers:
        yield layer
        if isinstance(layer, Sequential):
            yield from walk(layer)
