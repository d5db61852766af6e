"""Dense: the affine layer, and the activations that it applies itself."""

from __future__ import annotations

import math
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import calls
from ..state import Array, Arrays, as_float, checked_dtype, checked_seed, whole
from .activations import relu_gradient, slopes
from .layer import Layer

__all__ = ["Dense"]


class Dense(Layer):
    """Linear layer with bias and activation f: ``y = f(x @ weight.T + bias)``, along the last axis of x.

    Parameters
    ----------
    n_in, n_out : int
        Length of the last axis of x, and of y.
    bias : bool
        Whether there is a bias. A Dense that feeds BatchNorm needs none: the normalisation takes it away again.
    activation : {None, "relu", "leaky_relu"}
        Function f, applied in place. The slope of leaky_relu is 0.01. backward takes the derivative of f from the sign
        of y: if you change y before it, the gradients are wrong.
    dtype : {"float32", "float64"}
        Type of the parameters and their gradients. x may be of either type, and y has the type of x.
    seed : int or None
        Seed of the start values. Weight and bias start uniformly distributed between ``-1/sqrt(n_in)`` and
        ``1/sqrt(n_in)``, as in PyTorch's ``Linear``. Layers of one shape and one seed start alike.

    Attributes
    ----------
    params, grads : dict
        Parameters and their gradients: "weight" of shape (n_out, n_in), and "bias" of shape (n_out,) if there is one.

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
        self,
        n_in: int,
        n_out: int,
        bias: bool = True,
        *,
        activation: str | None = None,
        dtype: DTypeLike = "float32",
        seed: int | None = None,
    ) -> None:
        self._make(n_in, n_out, bias, activation, dtype, seed)
        rng, bound = np.random.default_rng(self.seed), 1 / math.sqrt(self.n_in)
        for p in self.params.values():
            p[...] = rng.uniform(-bound, bound, p.shape)

    @classmethod
    def _zeros(cls, *arguments: Any, **named: Any) -> Self:
        """A layer of zeros, for values that are there already. It needs no numpy.random, whose import takes time."""
        layer = cls.__new__(cls)
        layer._make(*arguments, **named)
        return layer

    def _make(
        self,
        n_in: int,
        n_out: int,
        bias: bool = True,
        activation: str | None = None,
        dtype: DTypeLike = "float32",
        seed: int | None = None,
    ) -> None:
        self.n_in, self.n_out = whole(n_in, "n_in"), whole(n_out, "n_out")
        if self.n_in < 1 or self.n_out < 1:
            raise ValueError(f"expected n_in and n_out of at least 1, got {n_in} and {n_out}")
        self.bias, self.activation, self.dtype = bool(bias), activation, checked_dtype(dtype)
        self.seed = checked_seed(seed)
        super().__init__()
        shapes = {"weight": (self.n_out, self.n_in)} | ({"bias": (self.n_out,)} if self.bias else {})
        self.params = Arrays({name: np.zeros(shape, self.dtype) for name, shape in shapes.items()})
        self.grads = Arrays({name: np.zeros(shape, self.dtype) for name, shape in shapes.items()})
        self._connect()

    def _connect(self) -> None:
        # Bias and activation as batch normalization with mean 0 and variance 1: one compiled pass in place, where NumPy
        # makes two or three. On one thread: more would find those of the matrix product still spinning.
        self._finish = calls.Constants(
            self.n_out,
            None,
            self.params.get("bias"),
            5e-324,  # eps; 1 plus that is 1
            mean=np.zeros(self.n_out),
            var=np.ones(self.n_out),
            axis=-1,
            activation=self.activation,
            num_threads=1,
        )

    def forward(self, x: ArrayLike) -> Array:
        """Return y, (..., n_out), for x, (..., n_in); ValueError if the last axis of x is not n_in long."""
        a = as_float(x)
        if a.ndim == 0 or a.shape[-1] != self.n_in:
            raise ValueError(f"Dense expected x of shape (..., {self.n_in}), got {a.shape}")
        rows = a if a.ndim == 2 else a.reshape(-1, self.n_in)
        y = np.empty((len(rows), self.n_out), a.dtype)
        np.matmul(rows, self.params["weight"].T, out=y)
        if self.bias or self.activation is not None:
            calls.infer(self._finish, y, y)
        if a.ndim != 2:
            y = y.reshape(*a.shape[:-1], self.n_out)
        self._saved = (a, y.shape) if self.activation is None else (a, y.shape, y)
        return y

    @overload
    def backward(self, dy: ArrayLike, input_grad: Literal[True] = True) -> Array: ...
    @overload
    def backward(self, dy: ArrayLike, input_grad: Literal[False]) -> None: ...
    @overload
    def backward(self, dy: ArrayLike, input_grad: bool) -> Array | None: ...
    def backward(self, dy: ArrayLike, input_grad: bool = True) -> Array | None:
        """Fill grads with ``g.T @ x`` and ``sum(g)``, and return dx, or None without input_grad.

        g is the gradient before f.
        """
        x, grad = self._incoming(dy)
        if self.activation is not None:
            y = self._saved[2]  # of the sign of what came before the activation
            grad = relu_gradient(y, grad, np.empty_like(grad)) if self.activation == "relu" else slopes(y, 0.01) * grad
        rows, grad = (x, grad) if x.ndim == 2 else (x.reshape(-1, self.n_in), grad.reshape(-1, self.n_out))
        np.matmul(grad.T, rows, out=self.grads["weight"])
        if self.bias:
            np.add.reduce(grad, axis=0, out=self.grads["bias"])
        if not input_grad:
            return None
        dx = np.empty(rows.shape, x.dtype)
        np.matmul(grad, self.params["weight"], out=dx)
        return dx.reshape(x.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_finish"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()
