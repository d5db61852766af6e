"""Optimizers: SGD with momentum, RMSprop, Adam. Formulas and defaults are PyTorch's.

`weight_decay` acts on all parameters, as PyTorch's does. It is meant for the weights of linear layers, whose size it
holds down. A bias, and the weight and bias of BatchNorm, are few, and decay takes from them what the data ask for: many
trainings leave them out. Their arrays are those of one dimension:
``exclude=[name for name, p in model.params.items() if p.ndim == 1]``.

# Design: an optimizer reads model.grads and changes model.params in place, parameter by parameter, with the same
# bits on every machine: IEEE additions, products, quotients and square roots alone, in one order, and running
# products where the papers have powers (one library's pow differs from the next one's). A step is one compiled call,
# one pass over each parameter; it checks all arrays first, so that an error leaves everything as it was.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from . import steps
from .atomic import change
from .state import FLOATS, Array, check_state

__all__ = ["SGD", "Adam", "RMSprop"]

Changes = list[tuple[Array, ArrayLike]]


class Trainable(Protocol):
    """What an optimizer asks of a model: parameters and gradients by name; a single layer has them too."""

    @property
    def params(self) -> dict[str, Array]: ...
    @property
    def grads(self) -> dict[str, Array]: ...


class Optimizer:
    """State and its check; a subclass brings `step`."""

    def __init__(self, model: Trainable, lr: float, buffers: tuple[str, ...], exclude: Collection[str]) -> None:
        if not hasattr(model, "params"):
            raise TypeError(f"expected a model first, with params and grads, got {type(model).__name__}")
        if not model.params:
            raise ValueError("expected a model with parameters, got none")
        if isinstance(exclude, str):
            raise TypeError(f"expected exclude to be a list of parameters' names, got the text {exclude!r}")
        self.exclude = frozenset(exclude)
        if unknown := self.exclude - model.params.keys():
            raise ValueError(f"expected exclude to name some of {sorted(model.params)}, got {sorted(unknown, key=str)}")
        self.model = model
        self.lr = lr
        # as it goes into a checkpoint: "step", and for each buffer of "0.weight" a "0.weight.exp_avg"
        self._state: dict[str, Array] = {"step": np.zeros((), np.int64)}
        self._buffers: dict[str, list[Array]] = {}
        for name, p in model.params.items():
            if not isinstance(p, np.ndarray):
                raise TypeError(f"expected the parameter {name!r} as an array, got {type(p).__name__}")
            dtype = p.dtype.newbyteorder("=")
            if dtype not in FLOATS:
                raise TypeError(f"expected the parameter {name!r} of dtype float32 or float64, got {p.dtype}")
            own = {f"{name}.{buffer}": np.zeros(p.shape, dtype) for buffer in buffers}
            self._state |= own
            self._buffers[name] = [*own.values()]

    @property
    def lr(self) -> float:
        """Learning rate; may be set at any time."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = _not_negative(lr=value)

    def step(self) -> None:
        """Change the parameters of the model by its gradients, once.

        Raises
        ------
        KeyError
            A parameter has no gradient, or the model got it later than the optimizer.
        TypeError, ValueError
            An array is of another dtype than float32 and float64, a gradient does not have the shape and dtype of its
            parameter, or a parameter is read-only. No parameter has been changed then.
        """
        count = self._state["step"]
        self._update(self.model.params, self.model.grads, [(count, count + 1)])

    def _update(self, params: dict[str, Array], grads: dict[str, Array], changes: Changes) -> None:
        """Change the parameters, and with them some arrays: each comes with what becomes of it."""
        raise NotImplementedError

    def __repr__(self) -> str:
        arguments = [name for name in inspect.signature(type(self)).parameters if name not in ("model", "exclude")]
        shown = [f"{name}={getattr(self, name)!r}" for name in arguments]
        shown += [f"exclude={sorted(self.exclude)}"] if self.exclude else []
        return f"{type(self).__name__}({', '.join(shown)})"

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the step count and all buffers, as one dict; lr is not in it."""
        return {key: a.copy() for key, a in self._state.items()}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Copy in what `state_dict` gave.

        If a key or shape does not fit, this is a ValueError, and nothing is changed.
        """
        change([(self._state[key], a) for key, a in check_state(state, self._state).items()])


class _WithMomentum(Optimizer):
    """The buffers of momentum are there if it was above 0 from the start: without it a step needs no memory."""

    @property
    def momentum(self) -> float:
        """May be set at any time, but to no other number than 0 where it was 0 from the start."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float) -> None:
        momentum = _not_negative(momentum=value)
        made = getattr(self, "_state", None)
        if momentum and made is not None and not any(key.endswith(".momentum_buffer") for key in made):
            name = type(self).__name__
            raise ValueError(f"expected momentum 0, with which this {name} was made and has no buffers, got {value}")
        self._momentum = momentum


class SGD(_WithMomentum):
    """Gradient descent, with momentum, Nesterov's momentum and weight decay.

    A step changes each parameter p, whose gradient is g, as PyTorch's `SGD` does (Sutskever et al., ICML 2013)::

        d = g + weight_decay*p
        v = momentum*v + d
        p -= lr*v                    or, with nesterov, lr*(d + momentum*v)

    Parameters
    ----------
    model : object with params and grads
        Layer, network, or any object with these two dicts.
    lr : float
        Learning rate. The attribute ``lr`` may be set at any time.
    momentum, weight_decay : float
        Numbers that are not negative. Weight decay is L2: it is added to the gradient.
    nesterov : bool
        Whether the step looks ahead. It needs momentum.
    exclude : collection of str, optional
        Names of parameters, keys of ``model.params``, that weight decay leaves alone: biases, and
        BatchNorm's weight and bias, are best left out.

    Raises
    ------
    ValueError
        A rate, momentum or decay out of range, a model without parameters, or names that it does not have.
    TypeError
        An exclude that is a single text.

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
        self,
        model: Trainable,
        lr: float,
        momentum: float = 0,
        nesterov: bool = False,
        weight_decay: float = 0,
        *,
        exclude: Collection[str] = (),
    ) -> None:
        self.momentum = momentum
        self.nesterov = bool(nesterov)
        self.weight_decay = _not_negative(weight_decay=weight_decay)
        if self.nesterov and not self.momentum:
            raise ValueError(f"nesterov needs a momentum above 0, got momentum={momentum}")
        super().__init__(model, lr, ("momentum_buffer",) if self.momentum else (), exclude)

    def _update(self, params: dict[str, Array], grads: dict[str, Array], changes: Changes) -> None:
        numbers = self.lr, self.momentum, self.nesterov, self.weight_decay
        steps.sgd(params, grads, self._buffers, *numbers, self.exclude, changes)


class RMSprop(_WithMomentum):
    """The gradient divided by the root of its mean square.

    A step changes each parameter p, whose gradient is g, as PyTorch's `RMSprop` does (Hinton, "Neural Networks for
    Machine Learning", lecture 6, 2012)::

        d = g + weight_decay*p
        s = alpha*s + (1 - alpha)*d**2
        u = d/(sqrt(s) + eps)
        v = momentum*v + u
        p -= lr*v                    or, without momentum, lr*u

    Parameters
    ----------
    model : object with params and grads
        Layer, network, or any object with these two dicts.
    lr : float
        Learning rate. The attribute ``lr`` may be set at any time.
    alpha : float
        Weight of the past in the mean square.
    eps, weight_decay, momentum : float
        Numbers that are not negative. Weight decay is L2: it is added to the gradient.
    exclude : collection of str, optional
        Names of parameters, keys of ``model.params``, that weight decay leaves alone: biases, and
        BatchNorm's weight and bias, are best left out.

    Raises
    ------
    ValueError
        An argument out of range, a model without parameters, or names that it does not have.
    TypeError
        An exclude that is a single text.

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
        *,
        exclude: Collection[str] = (),
    ) -> None:
        self.alpha = _not_negative(alpha=alpha)
        self.eps = _not_negative(eps=eps)
        self.weight_decay = _not_negative(weight_decay=weight_decay)
        self.momentum = momentum
        buffers = ("square_avg", "momentum_buffer") if self.momentum else ("square_avg",)
        super().__init__(model, lr, buffers, exclude)

    def _update(self, params: dict[str, Array], grads: dict[str, Array], changes: Changes) -> None:
        numbers = self.lr, self.alpha, self.eps, self.weight_decay, self.momentum
        steps.rmsprop(params, grads, self._buffers, *numbers, self.exclude, changes)


class Adam(Optimizer):
    """Adam with bias correction; with weight_decay AdamW.

    Step t changes each parameter p, whose gradient is g, as PyTorch's `Adam` does (Kingma & Ba, ICLR 2015), or with
    weight_decay as its `AdamW` (Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019)::

        p *= 1 - lr*weight_decay
        m += (1 - b1)*(g - m)
        v = b2*v + (1 - b2)*g**2
        p -= lr/(1 - b1**t) * m/(sqrt(v)/sqrt(1 - b2**t) + eps)

    Parameters
    ----------
    model : object with params and grads
        Layer, network, or any object with these two dicts.
    lr : float
        Learning rate. The attribute ``lr`` may be set at any time.
    betas : pair of floats
        Weights of the past, b1 and b2, within [0, 1).
    eps, weight_decay : float
        Numbers that are not negative. The decay is decoupled from the gradient.
    exclude : collection of str, optional
        Names of parameters, keys of ``model.params``, that weight decay leaves alone: biases, and
        BatchNorm's weight and bias, are best left out.

    Raises
    ------
    ValueError
        An argument out of range, a model without parameters, or names that it does not have.
    TypeError
        An exclude that is a single text.

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
        *,
        exclude: Collection[str] = (),
    ) -> None:
        pair = tuple(betas)  # an iterator has them once
        if len(pair) != 2:
            raise ValueError(f"expected betas to be a pair, got {pair}")
        for i, beta in enumerate(pair):
            if not 0 <= beta < 1:
                raise ValueError(f"expected betas[{i}] within [0, 1), got {beta}")
        self.betas = float(pair[0]), float(pair[1])
        self.eps = _not_negative(eps=eps)
        self.weight_decay = _not_negative(weight_decay=weight_decay)
        super().__init__(model, lr, ("exp_avg", "exp_avg_sq"), exclude)
        self._state |= {"beta1_power": np.ones(()), "beta2_power": np.ones(())}  # b1^t and b2^t

    def _update(self, params: dict[str, Array], grads: dict[str, Array], changes: Changes) -> None:
        b1, b2 = self.betas
        power1 = self._state["beta1_power"].item() * b1
        power2 = self._state["beta2_power"].item() * b2
        lr, correction = self.lr, math.sqrt(1 - power2)
        kept = 1 - lr * self.weight_decay if self.weight_decay else 1.0
        numbers = lr / (1 - power1), b1, b2, correction, self.eps, kept
        changes = [*changes, (self._state["beta1_power"], power1), (self._state["beta2_power"], power2)]
        steps.adam(params, grads, self._buffers, *numbers, self.exclude, changes)


def _not_negative(**argument: float) -> float:
    """The one argument's value, once it is a finite number and not below 0."""
    ((name, value),) = argument.items()
    if isinstance(value, str) or value is None:
        raise TypeError(f"expected {name} as a number, got {type(value).__name__}")
    if not 0 <= value <= sys.float_info.max:  # not only infinity: an int or a long double may be more
        raise ValueError(f"expected a finite {name} of at least 0, got {value}")
    return float(value)
