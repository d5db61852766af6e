"""Inference networks: every Dense, and the BatchNorm and activation behind it, as one Dense."""

from __future__ import annotations

import copy
import decimal
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..batchnorm import BatchNorm
from ..state import Array
from .activations import Dropout, LeakyReLU, ReLU
from .dense import Dense

__all__ = ["folded"]


def folded(layers: Iterable[Any]) -> list[Any]:
    """New layers that compute what these compute in inference.

    Only exact classes are folded: a subclass may compute something else. Standardize stays before its Dense: W' x + b'
    would take the mean away only after the product, which at mean/std = 1e4 loses half of float32's digits.
    """
    result: list[Any] = []
    whole = False  # the last Dense holds a BatchNorm already: a second one would round its weights again
    for layer in layers:
        if type(layer) is Dropout:
            continue
        last = result[-1] if result else None
        if type(last) is Dense and last.activation is None:
            if name := _fused_name(layer):
                result[-1] = _dense(last.params["weight"], last.params.get("bias"), name, last.dtype)
                continue
            if not whole and type(layer) is BatchNorm and (merged := _merged(last, layer)):
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
    # Dense's features lie along the last axis, which is axis 1 of (N, C).
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
    return _dense(weight, shift, norm.config()["activation"], dense.dtype)


def _dense(weight: Array, bias: Array | None, activation: str | None, dtype: Any) -> Dense:
    dense = Dense(weight.shape[1], weight.shape[0], bias is not None, activation=activation, dtype=dtype)
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
