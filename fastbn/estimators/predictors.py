"""The classifier and the regressor: targets, losses, decisions."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils.multiclass import check_classification_targets, type_of_target, unique_labels

from .. import losses, training
from ..state import Array
from .network import Network


def _log_loss(prediction: Array, target: Array) -> tuple[float, Array]:
    """The sum over the outputs, as MLPClassifier's, where fastbn's loss is their mean."""
    loss, gradient = losses.sigmoid_cross_entropy(prediction, target)
    gradient *= prediction.shape[1]
    return loss * prediction.shape[1], gradient


def _squared_error(prediction: Array, target: Array) -> tuple[float, Array]:
    """MLPRegressor's: half the mean over the outputs; the gradient is that of half their sum."""
    loss, gradient = losses.mse(prediction, target)
    gradient *= prediction.shape[1] / 2
    return loss / 2, gradient


class BatchNormClassifier(ClassifierMixin, Network):
    """A dense network with batch normalization that classifies: `MLPClassifier` with ``batch_norm=True``.

    Minimises the cross-entropy of a softmax, or of one sigmoid for each label where there are two classes or several
    labels, plus alpha/(2n) times the sum of the squared weights, n the size of the mini-batch. A hidden layer is
    Dense without bias, BatchNorm, activation.

    Parameters
    ----------
    hidden_layer_sizes : array_like of int, or int
        Units of each hidden layer; () is none.
    activation : {"relu", "tanh", "logistic", "identity"}
        Of the hidden layers.
    batch_norm : bool
        False: the same network without it, Dense with bias.
    solver : {"adam", "sgd", "rmsprop"}
        `fastbn.optim.Adam` with `beta_1` and `beta_2`, `SGD` with `momentum` and `nesterovs_momentum`, or `RMSprop`.
    alpha : float
        Strength of the penalty.
    batch_size : int or "auto"
        At least 2; "auto" is 200; n_samples where that is less. A last mini-batch of a single sample is left out.
    learning_rate_init : float
    max_iter : int
        Epochs at most.
    random_state : int, RandomState instance or None
        Of the start weights, the order of the samples and what early stopping holds out.
    tol : float
        The training loss, or with early stopping the validation score, must get better than its best by this.
    verbose : bool
        Print a line for each epoch.
    momentum : float
    nesterovs_momentum : bool
        Without momentum it does nothing.
    early_stopping : bool
        Hold out a part of the samples (of every class, but for several labels), stop by the score on it, and keep the
        weights and running averages of the best epoch.
    validation_fraction : float
        That part.
    beta_1, beta_2 : float
    n_iter_no_change : int
        Training stops once more than so many epochs in a row were no better, by `tol`, than the best one.

    Attributes
    ----------
    model_ : nn.Sequential
        The network, in inference mode: what it returns is before the softmax or sigmoid. `checkpoint.save` takes it.
        The running averages are at the end of `fit` the exact statistics of X (`training.recalibrate`), but for early
        stopping, where they are those of the best epoch.
    classes_ : numpy.ndarray of shape (n_classes,)
        Where y has several labels, their numbers.
    loss_curve_ : list of float
        Training loss with the penalty, for each epoch.
    loss_, best_loss_ : float
        Its last and its lowest value.
    validation_scores_, best_validation_score_ : list of float, float
        With early stopping, else None.
    n_iter_ : int
        Epochs done.
    n_outputs_, n_features_in_ : int
    feature_names_in_ : numpy.ndarray of shape (n_features_in_,)
        Where X had names.

    Notes
    -----
    Of MLPClassifier's parameters those are left out that `training.fit` and `fastbn.optim` have no equal for. X is
    dense, and there are no sample weights.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.model_selection import cross_val_score
    >>> from fastbn.estimators import BatchNormClassifier
    >>> classifier = BatchNormClassifier(32, batch_size=32, tol=0.01, random_state=0)
    >>> bool(cross_val_score(classifier, *load_iris(return_X_y=True)).mean() > 0.9)
    True
    """

    _y_numeric = False
    _score = staticmethod(accuracy_score)
    _encoder: Any

    def _targets(self, y: Any, dtype: np.dtype[Any], first: bool, classes: Any) -> Array:
        check_classification_targets(y)
        if first:
            given = y if classes is None or type_of_target(y).startswith("multilabel") else classes
            encoder = LabelBinarizer().fit(given)
        else:
            encoder = self._encoder
        known = encoder.classes_.tolist()
        if len(known) < 2:
            raise ValueError(f"expected at least 2 classes to tell apart, got one class: {known}")
        if not first and classes is not None and not np.array_equal(unique_labels(classes), encoder.classes_):
            raise ValueError(f"expected classes as in the first call, {known}, got {classes}")
        if type_of_target(y).startswith("multilabel") != encoder.y_type_.startswith("multilabel"):
            raise ValueError(f"expected {encoder.y_type_} y, as in the first call, got {type_of_target(y)} y")
        unseen = np.setdiff1d(unique_labels(y), encoder.classes_).tolist()
        if unseen:
            raise ValueError(f"expected labels among the classes {known}, got {unseen}")
        encoded = encoder.transform(y)
        self._encoder, self.classes_ = encoder, encoder.classes_
        return encoded.argmax(axis=1) if encoder.y_type_ == "multiclass" else encoded.astype(dtype)

    def _loss_and_outputs(self, targets: Array) -> tuple[training.Loss, int]:
        if targets.ndim == 1:
            return losses.softmax_cross_entropy, len(self.classes_)
        return _log_loss, targets.shape[1]

    def _decide(self, output: Array) -> Any:
        return self._encoder.inverse_transform(self._probabilities(output))

    def _probabilities(self, output: Array) -> Array:
        """One column for two classes."""
        return softmax(output, axis=1) if self._encoder.y_type_ == "multiclass" else expit(output)

    def partial_fit(self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None = None) -> Self:
        """Train on for one epoch over X and y; there is no early stopping here.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)
            At least 2 samples.
        y : array_like of shape (n_samples,) or (n_samples, n_outputs)
        classes : array_like of shape (n_classes,), optional
            All classes there will be; the first call needs them.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError, FloatingPointError
            As `fit`; for a first call without classes.
        """
        first = not hasattr(self, "model_")
        if first and classes is None:
            raise ValueError("expected classes in the first call to partial_fit, got None")
        return self._continue(X, y, first, classes)

    def predict_proba(self, X: ArrayLike) -> Array:
        """Probability of each class.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)

        Returns
        -------
        numpy.ndarray of shape (n_samples, n_classes)
            In the order of `classes_`, of X's dtype. Of several labels each has a probability of its own.
        """
        p = self._probabilities(self._output(X))
        return np.hstack([1 - p, p]) if p.shape[1] == 1 else p

    def predict_log_proba(self, X: ArrayLike) -> Array:
        """Logarithm of `predict_proba`, also where that is too small for its dtype.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)

        Returns
        -------
        numpy.ndarray of shape (n_samples, n_classes)
        """
        z = self._output(X)
        if self._encoder.y_type_ == "multiclass":
            return log_softmax(z, axis=1)
        return log_expit(np.hstack([-z, z]) if z.shape[1] == 1 else z)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class BatchNormRegressor(RegressorMixin, Network):
    """A dense network with batch normalization that predicts numbers: `MLPRegressor` with ``batch_norm=True``.

    Minimises half the squared error, summed over the outputs, plus alpha/(2n) times the sum of the squared weights, n
    the size of the mini-batch.

    Parameters
    ----------
    hidden_layer_sizes, activation, batch_norm, solver, alpha, batch_size, learning_rate_init, max_iter, random_state, \
tol, verbose, momentum, nesterovs_momentum, early_stopping, validation_fraction, beta_1, beta_2, n_iter_no_change
        As `BatchNormClassifier`'s. Early stopping goes by R^2.

    Attributes
    ----------
    model_, loss_curve_, loss_, best_loss_, validation_scores_, best_validation_score_, n_iter_, n_outputs_, \
n_features_in_, feature_names_in_
        As `BatchNormClassifier`'s. loss_curve_ is MLPRegressor's: the mean over the outputs, not their sum.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.estimators import BatchNormRegressor
    >>> X = np.random.default_rng(0).normal(size=(500, 3))
    >>> regressor = BatchNormRegressor(learning_rate_init=0.05, tol=0.01, random_state=0).fit(X, X[:, 0] * X[:, 1])
    >>> regressor.score(X, X[:, 0] * X[:, 1]) > 0.9
    True
    """

    _y_numeric = True
    _score = staticmethod(r2_score)

    def _targets(self, y: Any, dtype: np.dtype[Any], first: bool, classes: Any) -> Array:
        return y.reshape(len(y), -1).astype(dtype)

    def _loss_and_outputs(self, targets: Array) -> tuple[training.Loss, int]:
        return _squared_error, targets.shape[1]

    def _decide(self, output: Array) -> Any:
        return output[:, 0] if self.n_outputs_ == 1 else output

    def partial_fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train on for one epoch over X and y; there is no early stopping here.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)
            At least 2 samples.
        y : array_like of shape (n_samples,) or (n_samples, n_outputs)

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError, FloatingPointError
            As `fit`.
        """
        return self._continue(X, y, not hasattr(self, "model_"))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
