"""What BatchNormClassifier and BatchNormRegressor share: parameters, network, training.

# Design: scikit-learn's own helpers check the input, encode the labels and hold out the validation data, and
# training.fit trains the network. What is written here is what MLPClassifier adds to a training: its penalty and its
# rule for stopping. Parameters and attributes have its names and its meaning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.validation import check_is_fitted, validate_data

from .. import nn, optim, training
from ..batchnorm import BatchNorm
from ..data import held_out_rows
from ..state import Array

# The layers that follow Dense or BatchNorm, which apply relu themselves.
_ACTIVATIONS: dict[str, Any] = {"identity": (), "logistic": (nn.Sigmoid,), "relu": (), "tanh": (nn.Tanh,)}
_SOLVERS = ("adam", "rmsprop", "sgd")

_Rule = tuple[str, Callable[[Any], bool]]


def _whole(v: Any, low: int) -> bool:
    return isinstance(v, Integral) and int(v) >= low


def _number(expected: str, within: Callable[[Any], bool]) -> _Rule:
    return expected, lambda v: isinstance(v, Real) and within(v)


_FLAG: _Rule = "True or False", lambda v: isinstance(v, bool | np.bool_)
# What each may be, and whether a value is that. NaN is nowhere within.
_PARAMETERS: dict[str, _Rule] = {
    "hidden_layer_sizes": ("integers of at least 1", lambda v: _whole(v, 1)),
    "activation": (f"one of {[*_ACTIVATIONS]}", lambda v: v in [*_ACTIVATIONS]),
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
}
_CHUNK = 1024  # examples that go through the network at once in predict: a matter of memory


class Objective:
    """The penalty alpha/(2n) sum(W^2), n examples in the mini-batch: added to the loss, and its gradient in step().

    It falls on the weights alone, not on biases and batch normalization's parameters.
    """

    def __init__(self, loss: training.Loss, model: nn.Sequential, optimizer: Any, alpha: float) -> None:
        self._data_loss, self._optimizer, self._alpha = loss, optimizer, alpha
        matrices = [name for name, p in model.params.items() if p.ndim == 2 and alpha > 0]
        self._weights = [model.params[name].reshape(-1) for name in matrices]
        self._grads = [model.grads[name].reshape(-1) for name in matrices]
        self._parts = [np.empty_like(w) for w in self._weights]

    def loss(self, prediction: Array, target: Array) -> tuple[float, Array]:
        value, gradient = self._data_loss(prediction, target)
        self._decay = self._alpha / len(prediction)
        return value + self._decay / 2 * sum(float(w.dot(w)) for w in self._weights), gradient

    def step(self) -> None:
        for weight, grad, part in zip(self._weights, self._grads, self._parts, strict=True):
            np.multiply(weight, self._decay, out=part)
            grad += part
        self._optimizer.step()


def _check_present(y: Any) -> None:
    """ValueError where an array of objects lacks a label: scikit-learn makes NaN of None, or cannot sort it."""
    given = np.asarray(y)
    if given.dtype.kind == "O" and given.ndim:
        for place, label in np.ndenumerate(given):
            if label is None or type(label).__name__ in ("NAType", "NaTType") or label != label:
                raise ValueError(f"Input y contains NaN: the label of sample {place[0]} is missing ({label!r})")


class Network(BaseEstimator):
    """What classifier and regressor share."""

    # What a subclass brings: whether y holds numbers, the score of (y, prediction), and three methods.
    _y_numeric: bool
    _score: Callable[[Any, Any], float]

    def _targets(self, y: Any, dtype: np.dtype[Any], first: bool, classes: Any) -> Array:
        """y as the loss takes it; with `first` the classes are taken from it, or from `classes`."""
        raise NotImplementedError

    def _loss_and_outputs(self, targets: Array) -> tuple[training.Loss, int]:
        """The loss, and how many outputs the network has."""
        raise NotImplementedError

    def _decide(self, output: Array) -> Any:
        """The prediction for the network's output."""
        raise NotImplementedError

    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        batch_norm: bool = True,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate_init: float = 0.001,
        max_iter: int = 200,
        random_state: Any = None,
        tol: float = 0.0001,
        verbose: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        n_iter_no_change: int = 10,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.batch_norm = batch_norm
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.n_iter_no_change = n_iter_no_change

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train a new network.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)
            At least 2 samples. float32 is computed with in float32, all else in float64.
        y : array_like of shape (n_samples,) or (n_samples, n_outputs)

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            For parameters and data that do not fit.
        FloatingPointError
            The loss is no longer finite: names the epoch and the step.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            There was still progress after `max_iter` epochs.
        """
        self._check_parameters()
        x, labels, targets = self._check_data(X, y, first=True)
        self._build(x, targets)
        held_out = None
        if self.early_stopping:
            classes = labels if labels.ndim == 1 and not self._y_numeric else np.zeros(len(x))
            # R^2 of a single sample is not defined
            held = held_out_rows(classes, max(self.validation_fraction, 2 / len(x)), self._seed())
            if held.sum() < 2 or len(x) - held.sum() < 2:
                raise ValueError(f"expected more samples to hold some of them out, got n_samples={len(x)}")
            held_out = x[held], labels[held]
            x, targets = x[~held], targets[~held]
        converged = self._train(x, targets, held_out, self.max_iter)
        if self.batch_norm and self._hidden() and held_out is None:
            # The averages over the last mini-batches lag behind the weights: 0.4 to 1 point less on Fashion-MNIST.
            # Those of the best epoch stay: they are what was scored.
            training.recalibrate(self.model_, x)
        if not converged:
            message = f"max_iter={self.max_iter} epochs are done, and the optimization has not converged yet"
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        return self

    def _check_parameters(self) -> None:
        for name, (expected, fits) in _PARAMETERS.items():
            value = getattr(self, name)
            for one in self._hidden() if name == "hidden_layer_sizes" else [value]:
                if not fits(one):
                    raise ValueError(f"expected {name} to be {expected}, got {value!r}")

    def _hidden(self) -> list[Any]:
        sizes = self.hidden_layer_sizes
        return [*sizes] if np.iterable(sizes) and not isinstance(sizes, str) else [sizes]

    def _check_data(self, X: Any, y: Any, first: bool, classes: Any = None) -> tuple[Array, Any, Array]:
        """X, y and y as the loss takes it; an error leaves names, widths and classes as they were."""
        before = self.__dict__.copy()
        try:
            return self._checked(X, y, first, classes)
        except BaseException:
            self.__dict__ = before
            raise

    def _checked(self, X: Any, y: Any, first: bool, classes: Any) -> tuple[Array, Any, Array]:
        _check_present(y)
        X, y = validate_data(
            self, X, y, reset=first, dtype=(np.float64, np.float32), multi_output=True, y_numeric=self._y_numeric
        )
        if len(X) < 2:
            raise ValueError("expected at least 2 samples to train on, got n_samples=1")
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        return X, y, self._targets(y, X.dtype, first, classes)

    def _build(self, X: Array, targets: Array) -> None:
        """The network and its optimizer, before the first step."""
        self._rng = np.random.default_rng(check_random_state(self.random_state).randint(2**31 - 1))
        self._loss, self.n_outputs_ = self._loss_and_outputs(targets)
        relu = "relu" if self.activation == "relu" else None
        layers: list[Any] = []
        width = X.shape[1]
        for size in self._hidden():
            if self.batch_norm:
                layers.append(nn.Dense(width, size, bias=False, dtype=X.dtype, seed=self._seed()))
                layers.append(BatchNorm(size, dtype=X.dtype, activation=relu))
            else:
                layers.append(nn.Dense(width, size, activation=relu, dtype=X.dtype, seed=self._seed()))
            layers += [layer() for layer in _ACTIVATIONS[self.activation]]
            width = size
        self.model_ = nn.Sequential(*layers, nn.Dense(width, self.n_outputs_, dtype=X.dtype, seed=self._seed()))
        rate = self.learning_rate_init
        if self.solver == "adam":
            self._optimizer: Any = optim.Adam(self.model_, rate, (self.beta_1, self.beta_2))
        elif self.solver == "sgd":
            nesterov = self.nesterovs_momentum and self.momentum > 0
            self._optimizer = optim.SGD(self.model_, rate, self.momentum, nesterov)
        else:
            self._optimizer = optim.RMSprop(self.model_, rate)
        self.n_iter_ = 0
        self.loss_curve_: list[float] = []
        self.best_loss_ = np.inf
        self.validation_scores_: Any = [] if self.early_stopping else None
        self.best_validation_score_: Any = -np.inf if self.early_stopping else None

    def _seed(self) -> int:
        return int(self._rng.integers(2**32))

    def _train(self, X: Array, targets: Array, held_out: tuple[Array, Any] | None, epochs: int) -> bool:
        """Train on; True where it stopped because there was no more progress."""
        batch_size = 200 if self.batch_size == "auto" else int(self.batch_size)
        stalled = 0  # epochs in a row that were not better than the best one by tol
        best: dict[str, Array] = {}

        def on_epoch(epoch: int, history: training.History) -> bool:
            nonlocal stalled, best
            self.n_iter_ += 1
            self.loss_ = history.loss[-1]
            self.loss_curve_.append(self.loss_)
            cost, best_cost, news = self.loss_, self.best_loss_, ""
            self.best_loss_ = min(cost, best_cost)
            if held_out is not None:
                self.model_.eval()
                score = float(self._score(held_out[1], self._decide(self._forward(held_out[0]))))
                self.model_.train()
                self.validation_scores_.append(score)
                cost, best_cost, news = -score, -self.best_validation_score_, f", validation score = {score:.6f}"
                if score > self.best_validation_score_:
                    self.best_validation_score_, best = score, self.model_.state_dict()
            stalled = stalled + 1 if cost > best_cost - self.tol else 0
            if self.verbose:
                print(f"Iteration {self.n_iter_}, loss = {self.loss_:.8f}{news}")
            return stalled > self.n_iter_no_change

        objective = Objective(self._loss, self.model_, self._optimizer, self.alpha)
        try:
            training.fit(
                self.model_, (X, targets), objective.loss, objective, epochs=epochs,
                batch_size=min(batch_size, len(X)), seed=self._seed(), on_epoch=on_epoch, progress=False,
            )  # fmt: skip
        finally:
            self.model_.eval()
        if best:
            self.model_.load_state_dict(best)
        return stalled > self.n_iter_no_change

    def _continue(self, X: Any, y: Any, first: bool, classes: Any = None) -> Self:
        """One epoch over X and y, of a new network where `first`."""
        self._check_parameters()
        X, _, targets = self._check_data(X, y, first, classes)
        if first:
            self._build(X, targets)
        self._train(X, targets, None, 1)
        return self

    def _output(self, X: Any) -> Array:
        """The network's output for X as the user gives it."""
        check_is_fitted(self, "model_")
        return self._forward(validate_data(self, X, reset=False, dtype=(np.float64, np.float32)))

    def _forward(self, X: Array) -> Array:
        # Copies: layers refer to what went through them last, and must not keep all of X alive.
        return np.concatenate([self.model_(X[start : start + _CHUNK].copy()) for start in range(0, len(X), _CHUNK)])

    def predict(self, X: ArrayLike) -> Any:
        """Predict, with the running averages of batch normalization.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)

        Returns
        -------
        numpy.ndarray of shape (n_samples,) or (n_samples, n_outputs)
        """
        return self._decide(self._output(X))
