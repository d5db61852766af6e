"""scikit-learn: the networks that its estimators and Pipelines are.

The extra is ``pip install "fastbn[train]"``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import nn
from .layers import dense, library, position, standardize, two_classes

__all__ = ["from_sklearn"]


def from_sklearn(estimator: Any) -> nn.Sequential:
    """Return the network that computes what a fitted estimator of scikit-learn predicts.

    Parameters
    ----------
    estimator : MLPClassifier, MLPRegressor, StandardScaler or Pipeline
        Fitted estimator; a Pipeline of these, nested or not, in which steps may be "passthrough" or None.

    Returns
    -------
    nn.Sequential
        Network in inference mode, for x of (N, n_features). It gives what the estimator does: ``predict_proba`` of a
        classifier, ``predict`` of a regressor, as (N, n_outputs) for one output too, and ``transform`` of a scaler. A
        classifier's network ends with Softmax, and with Sigmoid where samples have several labels. Weights are copied
        and keep their dtype; y has the dtype of x. Where x is float32, scikit-learn rounds a scaler's mean to float32
        and the network does not. Optimizers, penalties and names of features are not carried over.

    Raises
    ------
    sklearn.exceptions.NotFittedError
        The estimator, or a step of the Pipeline, is not fitted.
    TypeError
        An estimator of another class, a subclass too. The message has its class and step.
    ValueError
        An MLPRegressor of the Poisson loss, whose last function has no counterpart.
    ImportError
        scikit-learn is not installed.

    Notes
    -----
    ``model[:-1]`` of a classifier is what `fastbn.losses.softmax_cross_entropy` trains. With labels in two classes the
    last Dense has an output for each class, and the first one's is 0.

    Examples
    --------
    Column i of y belongs to ``estimator.classes_[i]``, which the network does not know:

    >>> import numpy as np
    >>> from sklearn.neural_network import MLPClassifier
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from fastbn.interop.sklearn import from_sklearn
    >>> X = np.array([[0.0, 0.0], [0.1, 0.0], [9.0, 5.0], [9.1, 5.0]])
    >>> labels = ["left", "left", "right", "right"]
    >>> estimator = make_pipeline(StandardScaler(), MLPClassifier(3, solver="lbfgs", random_state=0)).fit(X, labels)
    >>> model = from_sklearn(estimator)
    >>> model
    Sequential(
        Standardize(num_features=2),
        Dense(n_in=2, n_out=3, dtype='float64'),
        ReLU(),
        Dense(n_in=3, n_out=2, dtype='float64'),
        Softmax(),
    )
    >>> estimator.classes_[model(X).argmax(axis=1)].tolist()
    ['left', 'left', 'right', 'right']
    """
    return nn.Sequential(*_layers(estimator, "")).eval()


def _layers(estimator: Any, step: str) -> list[Any]:
    if type(estimator) is library("sklearn.pipeline", "train").Pipeline:
        steps = [(position(step, name), part) for name, part in estimator.steps]
        return [layer for name, part in steps if part not in (None, "passthrough") for layer in _layers(part, name)]
    said = f"step {step!r} ({type(estimator).__name__})" if step else type(estimator).__name__
    make = _converters().get(type(estimator))
    if make is None:
        known = "MLPClassifier, MLPRegressor, StandardScaler or a Pipeline of them"
        raise TypeError(f"cannot convert {said}: expected {known}")
    library("sklearn.utils.validation", "train").check_is_fitted(estimator)
    try:
        return make(estimator)
    except ValueError as error:
        raise ValueError(f"cannot convert {said}: {error}") from error


def _converters() -> dict[type, Callable[[Any], list[Any]]]:
    networks = library("sklearn.neural_network", "train")
    scaler = library("sklearn.preprocessing", "train").StandardScaler
    return {networks.MLPClassifier: _network, networks.MLPRegressor: _network, scaler: _scaling}


_ACTIVATIONS: dict[str, list[Callable[[], Any]]] = {
    "identity": [],
    "logistic": [nn.Sigmoid],
    "relu": [nn.ReLU],
    "softmax": [nn.Softmax],
    "tanh": [nn.Tanh],
}


def _network(estimator: Any) -> list[Any]:
    last = estimator.out_activation_
    if last not in _ACTIVATIONS:
        raise ValueError(f"its last function, {last}, has no counterpart")
    layers: list[Any] = []
    for weight, bias in zip(estimator.coefs_, estimator.intercepts_, strict=True):
        layers += [dense(weight.T, bias), *(layer() for layer in _ACTIVATIONS[estimator.activation])]
    layers = layers[: len(layers) - len(_ACTIVATIONS[estimator.activation])]
    if last == "logistic" and estimator.n_outputs_ == 1:
        return [*layers[:-1], *two_classes(layers[-1])]
    return [*layers, *(layer() for layer in _ACTIVATIONS[last])]


def _scaling(scaler: Any) -> list[Any]:
    n = scaler.n_features_in_
    mean = scaler.mean_ if scaler.with_mean else np.zeros(n)
    scale = scaler.scale_ if scaler.with_std else np.ones(n)
    # The root of a square is the number itself. scale_ is 1 where scikit-learn takes a feature for a constant one.
    return [standardize(mean, np.square(scale, dtype=np.float64), count=max(1, int(np.max(scaler.n_samples_seen_))))]
