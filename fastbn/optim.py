"""Optimizers: SGD with momentum, RMSprop, Adam. Formulas and defaults are PyTorch's.

# Design: an optimizer reads model.grads and changes model.params in place, parameter by parameter, with the same
# bits on every machine: IEEE additions, products, quotients and square roots alone, in one order, and running
# products where the papers have powers (one library's pow differs from the next one's).
# Buffers and scratch space come with the constructor; a step allocates nothing that grows with the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from .state import Array, check_state

__all__ = ["SGD", "Adam", "RMSprop"]


class Trainable(Protocol):
    """What an optimizer asks of a model: parameters and gradients by name; a single layer has them too."""

    @property
    def params(self) -> dict[str, Array]: ...
    @property
    def grads(self) -> dict[str, Array]: ...


class Optimizer:
    """State and the walk over the parameters; a subclass brings `_update` for one of them."""

    def __init__(self, model: Trainable, lr: float, buffers: tuple[str, ...], scratch: int) -> None:
        if not model.params:
            raise ValueError("expected a model with parameters, got none")
        self.model = model
        self.lr = _not_negative(lr=lr)
        # as it goes into a checkpoint: "step", and for each buffer of "0.weight" a "0.weight.exp_avg"
        self._state: dict[str, Array] = {"step": np.zeros((), np.int64)}
        self._buffers: dict[str, list[Array]] = {}
        largest = max(p.size for p in model.params.values())
        shared = {p.dtype: np.empty((scratch, largest), p.dtype) for p in model.params.values()}
        for name, p in model.params.items():
            own = {f"{name}.{buffer}": np.zeros_like(p) for buffer in buffers}
            self._state |= own
            self._buffers[name] = [*own.values(), *(s[: p.size].reshape(p.shape) for s in shared[p.dtype])]

    def step(self) -> None:
        """Change the model's params by its grads, once."""
        self._begin()
        grads = self.model.grads
        for name, p in self.model.params.items():
            self._update(p, grads[name], *self._buffers[name])

    def _begin(self) -> None:
        self._state["step"] += 1

    def _update(self, p: Array, g: Array, *buffers: Array) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Array]:
        """Copies of the step count and all buffers, as a flat dict that a checkpoint can hold; lr is not in it."""
        return {key: a.copy() for key, a in self._state.items()}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Copy what `state_dict` gave; ValueError, and nothing changed, unless all keys and shapes fit."""
        for key, a in check_state(state, self._state).items():
            self._state[key][...] = a


class SGD(Optimizer):
    """Gradient descent, with momentum, Nesterov's momentum and weight decay.

    d = g + weight_decay p;  v = momentum v + d;  p -= lr v,  or with nesterov  p -= lr (d + momentum v).
    Source: Sutskever et al., ICML 2013, in the form of PyTorch's `SGD`.

    Parameters
    ----------
    model : object with params and grads
        A layer, a `Sequential`, or anything with these two dicts.
    lr : float
        Learning rate; the attribute `lr` may be set at any time.
    momentum, weight_decay : float
        Not negative; weight decay is L2, added to the gradient.
    nesterov : bool
        Needs momentum.

    Raises
    ------
    ValueError
        For a rate, momentum or decay out of range, or a model without parameters.

    Examples
    --------
    >>> from fastbn import nn, optim
    >>> layer = nn.Dense(2, 1, seed=0)
    >>> layer.params["bias"][:], layer.grads["bias"][:] = 1, 0.5
    >>> optim.SGD(layer, lr=0.5).step()
    >>> layer.params["bias"]
    array([0.75], dtype=float32)
    """

    def __init__(
        self, model: Trainable, lr: float, momentum: float = 0, nesterov: bool = False, weight_decay: float = 0
    ) -> None:
        self.momentum = _not_negative(momentum=momentum)
        self.nesterov = bool(nesterov)
        self.weight_decay = _not_negative(weight_decay=weight_decay)
        if self.nesterov and not self.momentum:
            raise ValueError(f"nesterov needs a momentum above 0, got momentum={momentum}")
        super().__init__(model, lr, ("momentum_buffer",) if self.momentum else (), scratch=2)

    def _update(self, p: Array, g: Array, *buffers: Array) -> None:
        *velocity, d, s = buffers
        if self.weight_decay:
            np.multiply(p, self.weight_decay, out=d)
            d += g
            g = d
        if velocity:
            v = velocity[0]
            v *= self.momentum
            v += g
            if self.nesterov:
                np.multiply(v, self.momentum, out=s)
                s += g
                g = s
            else:
                g = v
        np.multiply(g, float(self.lr), out=s)
        p -= s


class RMSprop(Optimizer):
    """The gradient divided by the root of its mean square.

    d = g + weight_decay p;  s = alpha s + (1 - alpha) d^2;  u = d / (sqrt(s) + eps);
    p -= lr u,  or with momentum  v = momentum v + u;  p -= lr v.
    Source: Hinton, "Neural Networks for Machine Learning", lecture 6, 2012, in the form of PyTorch's `RMSprop`.

    Parameters
    ----------
    model : object with params and grads
        A layer, a `Sequential`, or anything with these two dicts.
    lr : float
        Learning rate; the attribute `lr` may be set at any time.
    alpha : float
        Weight of the past in the mean square.
    eps, weight_decay, momentum : float
        Not negative; weight decay is L2, added to the gradient.

    Raises
    ------
    ValueError
        For an argument out of range, or a model without parameters.

    Examples
    --------
    >>> from fastbn import nn, optim
    >>> layer = nn.Dense(2, 1, seed=0)
    >>> layer.params["bias"][:], layer.grads["bias"][:] = 1, 0.5
    >>> optim.RMSprop(layer, lr=0.05).step()
    >>> layer.params["bias"].round(4)
    array([0.5], dtype=float32)
    """

    def __init__(
        self,
        model: Trainable,
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
    ) -> None:
        self.alpha = _not_negative(alpha=alpha)
        self.eps = _not_negative(eps=eps)
        self.weight_decay = _not_negative(weight_decay=weight_decay)
        self.momentum = _not_negative(momentum=momentum)
        names = ("square_avg", "momentum_buffer") if self.momentum else ("square_avg",)
        super().__init__(model, lr, names, scratch=2)

    def _update(self, p: Array, g: Array, *buffers: Array) -> None:
        square_avg, *velocity, d, s = buffers
        if self.weight_decay:
            np.multiply(p, self.weight_decay, out=d)
            d += g
            g = d
        np.multiply(g, g, out=s)
        s *= 1 - self.alpha
        square_avg *= self.alpha
        square_avg += s
        np.sqrt(square_avg, out=s)
        s += self.eps
        np.divide(g, s, out=s)
        if velocity:
            v = velocity[0]
            v *= self.momentum
            v += s
            np.multiply(v, float(self.lr), out=s)
        else:
            s *= float(self.lr)
        p -= s


class Adam(Optimizer):
    """Adam with bias correction; with weight_decay AdamW.

    p *= 1 - lr weight_decay;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2;
    p -= lr / (1 - b1^t)  m / (sqrt(v) / sqrt(1 - b2^t) + eps)  at step t.
    Sources: Kingma & Ba, ICLR 2015; Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019;
    in the form of PyTorch's `Adam` and, with weight_decay, `AdamW`.

    Parameters
    ----------
    model : object with params and grads
        A layer, a `Sequential`, or anything with these two dicts.
    lr : float
        Learning rate; the attribute `lr` may be set at any time.
    betas : pair of floats
        b1 and b2, within [0, 1).
    eps, weight_decay : float
        Not negative; the decay is decoupled from the gradient.

    Raises
    ------
    ValueError
        For an argument out of range, or a model without parameters.

    Examples
    --------
    >>> from fastbn import nn, optim
    >>> layer = nn.Dense(2, 1, seed=0)
    >>> layer.params["bias"][:], layer.grads["bias"][:] = 1, 0.5
    >>> optim.Adam(layer, lr=0.25).step()
    >>> layer.params["bias"]
    array([0.75], dtype=float32)
    """

    def __init__(
        self,
        model: Trainable,
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
    ) -> None:
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"expected betas[{i}] within [0, 1), got {beta}")
        b1, b2 = betas
        self.betas = float(b1), float(b2)
        self.eps = _not_negative(eps=eps)
        self.weight_decay = _not_negative(weight_decay=weight_decay)
        super().__init__(model, lr, ("exp_avg", "exp_avg_sq"), scratch=1)
        self._state |= {"beta1_power": np.ones(()), "beta2_power": np.ones(())}  # b1^t and b2^t

    def _begin(self) -> None:
        super()._begin()
        self._state["beta1_power"] *= self.betas[0]
        self._state["beta2_power"] *= self.betas[1]
        self._step_size = float(self.lr) / (1 - float(self._state["beta1_power"]))
        self._correction = math.sqrt(1 - float(self._state["beta2_power"]))

    def _update(self, p: Array, g: Array, *buffers: Array) -> None:
        m, v, s = buffers
        b1, b2 = self.betas
        if self.weight_decay:
            p *= 1 - float(self.lr) * self.weight_decay
        np.subtract(g, m, out=s)
        s *= 1 - b1
        m += s
        np.multiply(g, g, out=s)
        s *= 1 - b2
        v *= b2
        v += s
        np.sqrt(v, out=s)
        s /= self._correction
        s += self.eps
        np.divide(m, s, out=s)
        s *= self._step_size
        p -= s


def _not_negative(**argument: float) -> float:
    """The one argument's value, once it is a finite number and not below 0."""
    ((name, value),) = argument.items()
    if not 0 <= value < math.inf:
        raise ValueError(f"expected a finite {name} of at least 0, got {value}")
    return float(value)
