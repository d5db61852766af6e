"""Sequential: layers one after another, of any kind."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, Literal, Self, overload

from numpy.typing import ArrayLike

from ..state import Array, Arrays, check_state
from . import folding
from .dense import Dense

__all__ = ["Sequential", "leaves", "walk"]


class Sequential:
    """Network whose layers come one after another.

    Parameters
    ----------
    *layers : layer objects
        `BatchNorm <fastbn.BatchNorm>`, layers of `fastbn.nn`, or objects with the same methods. The same object twice
        is a ValueError, since it would overwrite the batch that it keeps for backward.

    Attributes
    ----------
    params, grads : dict
        Parameters and gradients of all layers under PyTorch's keys: "0.weight" is the weight of layer 0. The arrays are
        the layers' own, not copies.

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
        self._trained_before = [*accumulate((bool(layer.params) for layer in layers), operator.or_, initial=False)]

    def forward(self, x: ArrayLike) -> Array:
        """Return x after all layers."""
        y: Any = x
        for layer in self._layers:
            y = layer(y)
        result: Array = y
        return result

    def __call__(self, x: ArrayLike) -> Array:
        return self.forward(x)

    @overload
    def backward(self, dy: ArrayLike, input_grad: Literal[False] = False) -> None: ...
    @overload
    def backward(self, dy: ArrayLike, input_grad: Literal[True]) -> Array: ...
    @overload
    def backward(self, dy: ArrayLike, input_grad: bool) -> Array | None: ...
    def backward(self, dy: ArrayLike, input_grad: bool = False) -> Array | None:
        """Fill the grads of every layer. Return dx with input_grad, which costs a matrix product, and None without."""
        grad: Any = dy
        for i in reversed(range(len(self._layers))):
            layer = self._layers[i]
            if isinstance(layer, (Dense, Sequential)):
                grad = layer.backward(grad, input_grad=input_grad or self._trained_before[i])
                if grad is None:
                    break
            else:
                grad = layer.backward(grad)
        return grad if input_grad else None

    def folded(self) -> Sequential:
        """Return a network for inference, in which each Dense, BatchNorm and activation in a row are one Dense.

        It computes the inference forward with the running averages as they are now, whatever the mode of this network.
        Weights are computed in float64 and rounded once. Each output of a folded Dense, before its activation, is
        within ``4*n_in*u*(sum(abs(W'*x)) + abs(b'))`` of the exact one, as long as nothing underflows. W' and b' are
        its weight and bias, and u is the unit roundoff of its dtype, or of the dtype of x if that is coarser.

        Returns
        -------
        Sequential
            Network in inference mode, without Dropout and Identity, nested networks flattened. It shares no array with
            this one, which stays as it is. A BatchNorm of axis -1 makes a plain Dense. A BatchNorm of axis 1 makes a
            `fastbn.nn.FoldedDense`, since axis 1 is the last axis of (N, C) alone; it keeps the layers that it stands
            for, and sends x of other shapes through these.

        Notes
        -----
        These layers are not folded but copied: a BatchNorm that does not follow a Dense, or has another number of
        features, another axis, no running averages, or values that would take the weights out of the range of their
        dtype; an activation other than ReLU and LeakyReLU(0.01); a subclass of Sequential with a forward of its own;
        and any other layer.

        Examples
        --------
        >>> from fastbn import BatchNorm, nn
        >>> model = nn.Sequential(nn.Dense(4, 8, bias=False), BatchNorm(8), nn.ReLU(), nn.Dropout(0.5), nn.Dense(8, 3))
        >>> model.folded()
        Sequential(
            FoldedDense(n_in=4, n_out=8, activation='relu'),
            Dense(n_in=8, n_out=3),
        )
        """
        return Sequential(*folding.folded(leaves([self]))).eval()

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
        """Copy `state` into the layers; ValueError, and nothing changed, unless all keys and shapes fit.

        As PyTorch's strict load, it takes a state without num_batches_tracked, which is 0 then.
        """
        arrays = check_state(state, self.state_dict())
        before = [layer.state_dict() for layer in self._layers]
        try:
            for i, layer in enumerate(self._layers):
                layer.load_state_dict({k: arrays[f"{i}.{k}"] for k in before[i]})
        except BaseException:
            for layer, state_before in zip(self._layers, before, strict=True):
                layer.load_state_dict(state_before)
            raise

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
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


def leaves(layers: Any) -> Iterator[Any]:
    """The layers that x goes through; a subclass of Sequential with a forward of its own is one of them."""
    for layer in layers:
        if isinstance(layer, Sequential) and type(layer).forward is Sequential.forward:
            yield from leaves(layer)
        else:
            yield layer
