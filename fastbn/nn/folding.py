"""Inference networks: every Dense, and the BatchNorm and activation behind it, as one Dense.

# Design: BatchNorm's usual axis, 1, is the axis of Dense's features in (N, C) and in no other shape, and which shape
# comes is not known before the call. So such a pair becomes a FoldedDense, which keeps the two for other shapes. To
# leave the pair unfolded would leave nearly every network as it is. To keep a second network for other shapes would
# leave a layer wrong that is taken out of its network, or stands behind one that reshapes.
"""

from __future__ import annotations

import copy
import decimal
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..batchnorm import BatchNorm
from ..state import Array, as_float, check_state
from .activations import Dropout, LeakyReLU, ReLU
from .dense import Dense
from .layer import known_as
from .reshaping import Identity

__all__ = ["FoldedDense", "folded"]


class FoldedDense(Dense):
    """Dense layer that was made of a Dense and a BatchNorm of axis 1, as `fastbn.nn.Sequential.folded` makes it.

    Axis 1 is the last axis of (N, C) alone. x of other shapes goes through the layers that this one was made of. It
    keeps them, in memory and in files.

    Parameters
    ----------
    n_in, n_out, bias, activation, dtype, seed
        The same as in `fastbn.nn.Dense`.

    Attributes
    ----------
    layers : sequence of layers
        Layers that this one was made of, in inference mode. params and grads are not theirs.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import BatchNorm, nn
    >>> model = nn.Sequential(nn.Dense(3, 5, seed=0), BatchNorm(5)).eval()
    >>> model.folded()
    Sequential(
        FoldedDense(n_in=3, n_out=5),
    )
    >>> x = np.ones((2, 5, 3))
    >>> bool((model.folded()(x) == model(x)).all())
    True
    """

    layers: Sequence[Any] = ()
    _again: list[Any] | None = None  # what the layers fold to, once it was needed: it takes longer than a short call

    def forward(self, x: ArrayLike) -> Array:
        """Return y, as the layers that this one was made of do.

        If weights were changed since, an x of other than 2 dimensions is a RuntimeError.
        """
        a = as_float(x)
        if a.ndim == 2:
            return super().forward(a)
        self._saved = None
        if self._again is None:
            self._again = folded(self.layers)
        made = self._again[0].params if self._again else {}
        if not made or any((made[name] != p).any() for name, p in self.params.items()):
            raise RuntimeError(
                f"FoldedDense expected x of shape (N, {self.n_in}), got {a.shape}: its weights are no longer those of "
                "the layers that it was made of, which other shapes go through"
            )
        for layer in self.layers:
            a = layer(a)
        return a

    def _incoming(self, dy: ArrayLike) -> tuple[Array, Array]:
        if self._saved is None:
            raise RuntimeError("FoldedDense.backward needs a forward call before it, with x of 2 dimensions")
        return super()._incoming(dy)

    def state_dict(self) -> dict[str, Array]:
        """Copies of the parameters, and under 'layers.0.weight' and the like of what this one was made of."""
        parts = {f"layers.{i}.{k}": v for i, layer in enumerate(self.layers) for k, v in layer.state_dict().items()}
        return super().state_dict() | parts

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Copy `state` into the arrays; ValueError, nothing changed, unless all keys and shapes fit."""
        given = check_state(state, self.state_dict())
        super().load_state_dict({name: given[name] for name in self.params})
        for i, layer in enumerate(self.layers):
            layer.load_state_dict({k: given[f"layers.{i}.{k}"] for k in layer.state_dict()})
        self._again = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_again": None}


def folded(layers: Iterable[Any]) -> list[Any]:
    """New layers that compute what these compute in inference.

    Only exact classes are folded: a subclass may compute something else. Standardize stays before its Dense: W' x + b'
    would take the mean away only after the product, which at mean/std = 1e4 loses half of float32's digits.
    """
    result: list[Any] = []
    whole = False  # the last Dense holds a BatchNorm already: a second one would round its weights again
    for layer in layers:
        if type(layer) in (Dropout, Identity):
            continue
        last = result[-1] if result else None
        if last is not None and type(last) in (Dense, FoldedDense) and last.activation is None:
            if name := _fused_name(layer):
                parts = [*last.layers, layer] if type(last) is FoldedDense else []
                result[-1] = _dense(last.params["weight"], last.params.get("bias"), name, last.dtype, parts)
                continue
            if not whole and type(last) is Dense and known_as(layer) is BatchNorm and (merged := _merged(last, layer)):
                result[-1], whole = merged, True
                continue
        result.append(copy.deepcopy(layer))
        whole = False
    return result


def _fused_name(layer: Any) -> str | None:
    if type(layer) is ReLU:
        return "relu"
    return "leaky_relu" if type(layer) is LeakyReLU and layer.negative_slope == 0.01 else None


def _merged(dense: Dense, norm: BatchNorm) -> Dense | None:
    """The two as one Dense; None where that cannot be, or where its weights would leave the range of their dtype."""
    if norm.axis not in (1, -1) or norm.num_features != dense.n_out:
        return None
    if norm.running_mean is None or norm.running_var is None:
        return None
    scale, shift = _affine(dense, norm, norm.running_mean, norm.running_var)
    with np.errstate(all="ignore"):
        weight = dense.params["weight"] * scale[:, np.newaxis]
        largest = abs(weight).max(axis=1)
    limits = np.finfo(dense.dtype)
    normal = (largest == 0) | ((limits.tiny <= largest) & (largest <= limits.max))
    if not (normal & (abs(shift) <= limits.max)).all():
        return None
    parts = [dense, norm] if norm.axis == 1 else []
    return _dense(weight, shift, norm.config()["activation"], dense.dtype, parts)


def _dense(weight: Array, bias: Array | None, activation: str | None, dtype: Any, parts: list[Any]) -> Dense:
    n_out, n_in = weight.shape
    dense = (FoldedDense if parts else Dense)._zeros(n_in, n_out, bias is not None, activation=activation, dtype=dtype)
    if isinstance(dense, FoldedDense):
        dense.layers = [copy.deepcopy(part).eval() for part in parts]
    dense.params.update({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return dense


def _affine(dense: Dense, norm: BatchNorm, means: Array, variances: Array) -> tuple[Array, Array]:
    """(scale, shift), float64: norm(z + b) = z scale + shift, b the bias of dense.

    norm.fold() would do for float32. In float64 its mean scale and our b scale cancel where b is large, and so may
    their difference and norm's bias; 60 digits leave one rounding.
    """
    ones, zeros = np.ones(dense.n_out), np.zeros(dense.n_out)
    weight = ones if norm.weight is None else norm.weight
    bias = zeros if norm.bias is None else norm.bias
    columns = dense.params.get("bias", zeros), means, variances, weight, bias
    number = decimal.Decimal
    folds = []
    with decimal.localcontext(decimal.Context(prec=60, traps=[])):
        eps = number(norm.eps)
        for b, mean, var, gamma, beta in zip(*(map(number, column.tolist()) for column in columns), strict=True):
            scale = gamma / (var + eps).sqrt()
            folds.append((float(scale), float((b - mean) * scale + beta)))
    return tuple(np.array(folds).T)
