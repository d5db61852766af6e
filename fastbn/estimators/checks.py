"""Checks of the estimators' parameters, and of data that scikit-learn's own checks let pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..state import refuse_masked

__all__ = ["check_parameters", "hidden_sizes", "refuse_missing"]

_ACTIVATIONS = ("identity", "logistic", "relu", "tanh")
_SOLVERS = ("adam", "rmsprop", "sgd")

_Rule = tuple[str, Callable[[Any], bool]]


def _whole(v: Any, low: int) -> bool:
    return isinstance(v, Integral) and int(v) >= low


def _number(expected: str, within: Callable[[Any], bool]) -> _Rule:
    return expected, lambda v: isinstance(v, Real) and within(v)


def _class_weights(v: Any) -> bool:
    if isinstance(v, Mapping):
        return all(isinstance(weight, Real) and 0 <= float(weight) < np.inf for weight in v.values())
    return v is None or (isinstance(v, str) and v == "balanced")


_FLAG: _Rule = "True or False", lambda v: isinstance(v, bool | np.bool_)
# What each may be, and whether a value is that. NaN is nowhere within.
_PARAMETERS: dict[str, _Rule] = {
    "hidden_layer_sizes": ("integers of at least 1", lambda v: _whole(v, 1)),
    "activation": (f"one of {[*_ACTIVATIONS]}", lambda v: v in _ACTIVATIONS),
    "batch_norm": _FLAG,
    "solver": (f"one of {[*_SOLVERS]}", lambda v: v in _SOLVERS),
    "batch_size": ('"auto" or an integer of at least 2', lambda v: v == "auto" or _whole(v, 2)),
    "max_iter": ("an integer of at least 1", lambda v: _whole(v, 1)),
    "alpha": _number("a finite number of at least 0", lambda v: 0 <= v < np.inf),
    "tol": _number("a finite number of at least 0", lambda v: 0 <= v < np.inf),
    "learning_rate_init": _number("a finite number above 0", lambda v: 0 < v < np.inf),
    "momentum": _number("a number within [0, 1]", lambda v: 0 <= v <= 1),
    "validation_fraction": _number("a number within (0, 1)", lambda v: 0 < v < 1),
    "beta_1": _number("a number within [0, 1)", lambda v: 0 <= v < 1),
    "beta_2": _number("a number within [0, 1)", lambda v: 0 <= v < 1),
    "n_iter_no_change": ("an integer of at least 1, or inf", lambda v: _whole(v, 1) or v == np.inf),
    "verbose": ("True, False or an integer of at least 0", lambda v: _FLAG[1](v) or _whole(v, 0)),
    "nesterovs_momentum": _FLAG,
    "early_stopping": _FLAG,
    "class_weight": ('None, "balanced" or a dict of classes and finite weights of at least 0', _class_weights),
}


def check_parameters(estimator: Any) -> None:
    """ValueError for the first parameter that is not what it may be."""
    for name, (expected, fits) in _PARAMETERS.items():
        value = getattr(estimator, name, None)  # the regressor has no class_weight
        for one in hidden_sizes(estimator) if name == "hidden_layer_sizes" else [value]:
            if not fits(one):
                raise ValueError(f"expected {name} to be {expected}, got {value!r}")


def hidden_sizes(estimator: Any) -> list[Any]:
    """hidden_layer_sizes as a list."""
    sizes = estimator.hidden_layer_sizes
    return [*sizes] if np.iterable(sizes) and not isinstance(sizes, str) else [sizes]


def refuse_missing(y: Any) -> None:
    """An error for a missing label that NumPy or scikit-learn would make a class: NaN beside text becomes "nan"."""
    refuse_masked(y, "y")
    if isinstance(y, list | tuple):
        labels = np.asarray(y, object)
    elif getattr(getattr(y, "dtype", None), "kind", None) in ("O", "m", "M"):
        labels = np.asarray(y)
    else:  # numbers and text; NaN among numbers is scikit-learn's to find
        return
    for place, label in np.ndenumerate(labels):
        kind = type(label).__name__
        if label is None or kind in ("NAType", "NaTType") or (isinstance(label, Real | np.generic) and label != label):
            raise ValueError(f"expected a y without missing values, got {label} in y[{place[0]}]")
