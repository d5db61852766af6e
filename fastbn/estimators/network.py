"""What BatchNormClassifier and BatchNormRegressor share: network, training.

# Design: scikit-learn's own helpers check the input, encode the labels and hold out the validation data, and
# training.fit trains the network. What is written here is what MLPClassifier adds to a training: its penalty and its
# rule for stopping. Parameters and attributes have its names and its meaning.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from .. import nn, optim, training
from ..batchnorm import BatchNorm
from ..data import held_out_rows
from ..state import Array, refuse_masked
from .checks import check_parameters, hidden_sizes, refuse_missing

# The layers that follow Dense or BatchNorm, which apply relu themselves.
_ACTIVATION_LAYERS: dict[str, Any] = {"logistic": (nn.Sigmoid,), "tanh": (nn.Tanh,)}
_CHUNK = 1024  # examples that go through the network at once in predict: a matter of memory

DataLoss = Callable[..., tuple[float, Array]]  # one of fastbn.losses, or like them: (prediction, target, sample_weight)


class Objective:
    """What a training minimises: the data's loss plus a penalty on the weight matrices, whose gradient step() adds.

    The targets that `loss` takes are numbers of rows, by which it finds the rows' targets and weights. The weights are
    divided by their mean w, and the penalty is alpha/(2nw) sum(W^2) for a mini-batch of n examples. So weights that
    are whole numbers mean repeated rows. Biases and batch normalization's parameters are not penalised.
    """

    def __init__(
        self, loss: DataLoss, targets: Array, weights: Array | None, model: nn.Sequential, optimizer: Any, alpha: float
    ) -> None:
        self._data_loss, self._targets, self._optimizer = loss, targets, optimizer
        mean = 1.0 if weights is None else float(weights.mean())
        self._example_weights = None if weights is None else weights / mean
        self._alpha = alpha / mean
        matrices = [name for name, p in model.params.items() if p.ndim == 2 and alpha > 0]
        self._weights = [model.params[name].reshape(-1) for name in matrices]
        self._grads = [model.grads[name].reshape(-1) for name in matrices]
        self._parts = [np.empty_like(w) for w in self._weights]

    def loss(self, prediction: Array, rows: Array) -> tuple[float, Array]:
        weights = None if self._example_weights is None else self._example_weights[rows]
        value, gradient = self._data_loss(prediction, self._targets[rows], weights)
        self._decay = self._alpha / len(prediction)
        return value + self._decay / 2 * sum(float(w.dot(w)) for w in self._weights), gradient

    def step(self) -> None:
        for weight, grad, part in zip(self._weights, self._grads, self._parts, strict=True):
            np.multiply(weight, self._decay, out=part)
            grad += part
        self._optimizer.step()


class Network(BaseEstimator):
    """What classifier and regressor share."""

    # What a subclass brings: whether y holds numbers, the score of (y, prediction, sample_weight=), and three methods.
    _y_numeric: bool
    _score: Callable[..., float]

    def _targets(self, y: Any, dtype: np.dtype[Any], first: bool, classes: Any) -> Array:
        """y as the loss takes it; with `first` the classes are taken from it, or from `classes`."""
        raise NotImplementedError

    def _loss_and_outputs(self, targets: Array) -> tuple[DataLoss, int]:
        """The loss, and how many outputs the network has."""
        raise NotImplementedError

    def _decide(self, output: Array) -> Any:
        """The prediction for the network's output."""
        raise NotImplementedError

    def __init__(
        self,
        hidden_layer_sizes: Any,
        activation: str,
        *,
        batch_norm: bool,
        solver: str,
        alpha: float,
        batch_size: int | str,
        learning_rate_init: float,
        max_iter: int,
        random_state: Any,
        tol: float,
        verbose: bool,
        momentum: float,
        nesterovs_momentum: bool,
        early_stopping: bool,
        validation_fraction: float,
        beta_1: float,
        beta_2: float,
        n_iter_no_change: int,
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

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Train a new network; an error leaves the one that there was.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)
            At least 2 samples. float32 is computed in float32, everything else in float64.
        y : array_like of shape (n_samples,) or (n_samples, n_outputs)
            Labels of a classifier, numbers of a regressor.
        sample_weight : array_like of shape (n_samples,), optional
            Finite weights of at least 0, not all of them 0, by which the samples count in the loss and in early
            stopping's score. Batch normalization's statistics do not see them, as in every library: a sample of
            weight 0 is still one of its batch.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            Parameters or data do not fit.
        FloatingPointError
            The loss, the network or its predictions for early stopping are no longer finite. The message names the
            epoch.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            There was still progress after max_iter epochs.
        """
        with self._all_or_nothing():
            converged = self._fit(X, y, sample_weight)
        if not converged:
            message = f"max_iter={self.max_iter} epochs are done, and the optimization has not converged yet"
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        return self

    @contextlib.contextmanager
    def _all_or_nothing(self, *changed: Any) -> Iterator[None]:
        """An error leaves the estimator as it was; `changed` are the objects that are written into, with states."""
        attributes, states = self.__dict__.copy(), [part.state_dict() for part in changed]
        try:
            yield
        except BaseException:
            self.__dict__ = attributes
            for part, state in zip(changed, states, strict=True):
                part.load_state_dict(state)
            raise

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> bool:
        """Train a new network; True where it stopped because there was no more progress."""
        check_parameters(self)
        x, labels, targets, weights = self._check_data(X, y, sample_weight, first=True)
        self._build(x, targets)
        held_out = None
        if self.early_stopping:
            held = self._held_out(labels, weights)
            held_out = x[held], labels[held], None if weights is None else weights[held]
            x, targets, weights = x[~held], targets[~held], None if weights is None else weights[~held]
        converged = self._train(x, targets, weights, held_out, self.max_iter)
        if self.batch_norm and hidden_sizes(self) and held_out is None:
            # The averages over the last mini-batches lag behind the weights: 0.4 to 1 point less on Fashion-MNIST.
            # Those of the best epoch stay: they are what was scored.
            training.recalibrate(self.model_, x)
        return converged

    def _held_out(self, labels: Any, weights: Array | None) -> Array:
        """The rows that early stopping holds out: some of those that count."""
        count = np.ones(labels.shape[0], bool) if weights is None else weights > 0
        classes = labels if labels.ndim == 1 and not self._y_numeric else np.zeros(labels.shape[0])
        held = np.zeros(len(count), bool)
        # R^2 of a single sample is not defined
        held[count] = held_out_rows(classes[count], max(self.validation_fraction, 2 / count.sum()), self._seed())
        if held.sum() < 2 or len(held) - held.sum() < 2:
            raise ValueError(f"expected more samples to hold some of them out, got n_samples={count.sum()}")
        return held

    def _check_data(
        self, X: Any, y: Any, sample_weight: Any, first: bool, classes: Any = None
    ) -> tuple[Array, Any, Array, Array | None]:
        """X, y, y as the loss takes it, and the samples' weights."""
        refuse_missing(y)
        refuse_masked(X, "X")
        X, y = validate_data(
            self, X, y, reset=first, dtype=(np.float64, np.float32), multi_output=True, y_numeric=self._y_numeric
        )
        if len(X) < 2:
            raise ValueError("expected at least 2 samples to train on, got n_samples=1")
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        targets = self._targets(y, X.dtype, first, classes)
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        weights = self._weighted_by_class(y, weights)
        with np.errstate(over="ignore"):
            total = 1.0 if weights is None else weights.sum()
        if not 0 < total < np.inf:
            raise ValueError(f"expected weights with a finite sum above zero, got {total}")
        return X, y, targets, weights

    def _weighted_by_class(self, y: Any, weights: Array | None) -> Array | None:
        """The weights, multiplied by what class_weight says where there is one."""
        return weights

    def _build(self, X: Array, targets: Array) -> None:
        """The network and its optimizer, before the first step."""
        self._rng = np.random.default_rng(check_random_state(self.random_state).randint(2**31 - 1))
        self._loss, self.n_outputs_ = self._loss_and_outputs(targets)
        relu = "relu" if self.activation == "relu" else None
        layers: list[Any] = []
        width = X.shape[1]
        for size in hidden_sizes(self):
            if self.batch_norm:
                layers.append(nn.Dense(width, size, bias=False, dtype=X.dtype, seed=self._seed()))
                layers.append(BatchNorm(size, dtype=X.dtype, activation=relu))
            else:
                layers.append(nn.Dense(width, size, activation=relu, dtype=X.dtype, seed=self._seed()))
            layers += [layer() for layer in _ACTIVATION_LAYERS.get(self.activation, ())]
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

    def _train(
        self,
        X: Array,
        targets: Array,
        weights: Array | None,
        held_out: tuple[Array, Any, Array | None] | None,
        epochs: int,
    ) -> bool:
        """Train on; True where it stopped because there was no more progress."""
        batch_size = 200 if self.batch_size == "auto" else int(self.batch_size)
        stalled = 0  # epochs in a row that were not better than the best one by tol
        best: dict[str, Array] = {}

        def on_epoch(epoch: int, history: training.History) -> bool:
            nonlocal stalled, best
            score = None if held_out is None else self._validation_score(*held_out, epoch)
            self.n_iter_ += 1
            self.loss_ = history.loss[-1]
            self.loss_curve_.append(self.loss_)
            cost, best_cost, news = self.loss_, self.best_loss_, ""
            self.best_loss_ = min(cost, best_cost)
            if score is not None:
                self.validation_scores_.append(score)
                cost, best_cost, news = -score, -self.best_validation_score_, f", validation score = {score:.6f}"
                if score > self.best_validation_score_:
                    self.best_validation_score_, best = score, self.model_.state_dict()
            stalled = stalled + 1 if cost > best_cost - self.tol else 0
            if self.verbose:
                print(f"Iteration {self.n_iter_}, loss = {self.loss_:.8f}{news}")
            return bool(stalled > self.n_iter_no_change)

        objective = Objective(self._loss, targets, weights, self.model_, self._optimizer, self.alpha)
        try:
            history = training.fit(
                self.model_, (X, np.arange(len(X))), objective.loss, objective, epochs=epochs,
                batch_size=min(batch_size, len(X)), seed=self._seed(), on_epoch=on_epoch, progress=False,
            )  # fmt: skip
        finally:
            self.model_.eval()
        if not all(np.isfinite(array).all() for array in self._optimizer.state_dict().values()):
            raise FloatingPointError(f"the optimizer is not finite any more after epoch {len(history.loss)}")
        if best:
            self.model_.load_state_dict(best)
        return bool(stalled > self.n_iter_no_change)

    def _validation_score(self, X: Array, labels: Any, weights: Array | None, epoch: int) -> float:
        self.model_.eval()
        output = self._forward(X)
        self.model_.train()
        if not np.isfinite(output).all():
            raise FloatingPointError(f"the predictions for the held-out samples are not finite at epoch {epoch}")
        score = float(self._score(labels, self._decide(output), sample_weight=weights))
        if not np.isfinite(score):
            raise FloatingPointError(f"the validation score is {score} at epoch {epoch}")
        return score

    def _continue(self, X: Any, y: Any, sample_weight: Any, classes: Any = None) -> Self:
        """One epoch over X and y, of a new network where there is none; an error leaves all as it was."""
        first = not hasattr(self, "model_")
        changed = () if first else (self.model_, self._optimizer)
        if not first and not all(p.flags.writeable for p in self.model_.params.values()):
            raise ValueError(
                "expected a network that can be written into, got one of read-only arrays: "
                'read it with mmap_mode="c", or train on with a copy.deepcopy'
            )
        with self._all_or_nothing(*changed):
            check_parameters(self)
            X, _, targets, weights = self._check_data(X, y, sample_weight, first, classes)
            if first:
                self._build(X, targets)
            # What an error goes back to must not change.
            self._rng, self.loss_curve_ = copy.deepcopy(self._rng), self.loss_curve_.copy()
            self._train(X, targets, weights, None, 1)
        return self

    def _output(self, X: Any) -> Array:
        """The network's output for X as the user gives it."""
        check_is_fitted(self, "model_")
        refuse_masked(X, "X")
        return self._forward(validate_data(self, X, reset=False, dtype=(np.float64, np.float32)))

    def _forward(self, X: Array) -> Array:
        # Copies: layers refer to what went through them last, and must not keep all of X alive.
        return np.concatenate([self.model_(X[start : start + _CHUNK].copy()) for start in range(0, len(X), _CHUNK)])

    def predict(self, X: ArrayLike) -> Any:
        """Return predictions, made with the running averages of batch normalization.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)

        Returns
        -------
        numpy.ndarray of shape (n_samples,) or (n_samples, n_outputs)
        """
        return self._decide(self._output(X))
