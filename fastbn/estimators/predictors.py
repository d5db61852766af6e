"""The classifier and the regressor: targets, losses, decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils.multiclass import check_classification_targets, type_of_target, unique_labels

from .. import losses
from ..state import Array
from .network import DataLoss, Network


def _log_loss(prediction: Array, target: Array, sample_weight: Array | None = None) -> tuple[float, Array]:
    """The sum over the outputs, as MLPClassifier's, where fastbn's loss is their mean."""
    loss, gradient = losses.sigmoid_cross_entropy(prediction, target, sample_weight)
    gradient *= prediction.shape[1]
    return loss * prediction.shape[1], gradient


def _squared_error(prediction: Array, target: Array, sample_weight: Array | None = None) -> tuple[float, Array]:
    """MLPRegressor's: half the mean over the outputs; the gradient is that of half their sum."""
    loss, gradient = losses.mse(prediction, target, sample_weight)
    gradient *= prediction.shape[1] / 2
    return loss / 2, gradient


class BatchNormClassifier(ClassifierMixin, Network):
    """Classifier: a dense network with batch normalization, with the parameters of scikit-learn's MLPClassifier.

    A hidden layer is a Dense without bias, a BatchNorm and an activation. The training minimises the cross-entropy of a
    softmax. For two classes, and for several labels, it is that of one sigmoid for each label. A penalty is added:
    ``alpha/(2*n)`` times the sum of the squared weights, n the size of the mini-batch.

    Parameters
    ----------
    hidden_layer_sizes : array_like of int, or int
        Number of units of each hidden layer. () makes a network without hidden layers.
    activation : {"relu", "tanh", "logistic", "identity"}
        Activation of the hidden layers.
    batch_norm : bool
        Whether the hidden layers have batch normalization. Without it, their Dense layers have a bias.
    solver : {"adam", "sgd", "rmsprop"}
        Optimizer: `fastbn.optim.Adam` with beta_1 and beta_2, `fastbn.optim.SGD` with momentum and nesterovs_momentum,
        or `fastbn.optim.RMSprop`.
    alpha : float
        Strength of the penalty.
    batch_size : int or "auto"
        Number of samples in a mini-batch, at least 2. "auto" is 200, or n_samples if that is less. A last mini-batch of
        a single sample is left out.
    learning_rate_init : float
        Learning rate. It stays constant.
    max_iter : int
        Largest number of epochs.
    random_state : int, RandomState instance or None
        Seed of the start weights, of the order of the samples, and of what early stopping holds out.
    tol : float
        Smallest step by which the training loss, or with early stopping the validation score, counts as better.
    verbose : bool
        Whether a line is printed for each epoch.
    momentum : float
        Momentum of the solver "sgd".
    nesterovs_momentum : bool
        Whether this is Nesterov's momentum. Without momentum it does nothing.
    early_stopping : bool
        Whether a part of the samples is held out (of every class, unless y has several labels), and training stops by
        the score on it. The model then has the weights and running averages of the best epoch.
    validation_fraction : float
        Part of the samples that early stopping holds out.
    beta_1, beta_2 : float
        Weights of the past of the solver "adam".
    n_iter_no_change : int
        Number of epochs. Training stops after more than so many epochs in a row that were not better, by tol, than the
        best one.
    class_weight : dict, "balanced" or None
        Weights of the classes, ``{label: weight}``, by which the weights of their samples are multiplied. A class that
        is not in the dict has weight 1. But a dict with a label that is no class of y must name all classes, since that
        label may be a mistake. With "balanced", which only `fit` takes, every class has the same sum of weights. If y
        has several labels, it must be None.

    Attributes
    ----------
    model_ : nn.Sequential
        Network in inference mode. Its output is the one before the softmax or sigmoid. `fastbn.checkpoint.save` takes
        it. At the end of `fit` its running averages are the exact statistics of X (`fastbn.training.recalibrate`).
        After early stopping they are those of the best epoch.
    classes_ : numpy.ndarray of shape (n_classes,)
        Classes of y. If y has several labels, their numbers.
    loss_curve_ : list of float
        Training loss with the penalty, for each epoch.
    loss_, best_loss_ : float
        Last and lowest value of that.
    validation_scores_, best_validation_score_ : list of float, float
        Scores of early stopping; without it, None.
    n_iter_ : int
        Number of epochs done.
    n_outputs_ : int
        Number of outputs.
    n_features_in_ : int
        Number of features of X.
    feature_names_in_ : numpy.ndarray of shape (n_features,)
        Names of the features, if X had names.

    Notes
    -----
    These parameters of MLPClassifier are left out: ``solver="lbfgs"`` and max_fun (they work by full batches),
    learning_rate and power_t (the rate is constant), shuffle (samples are always shuffled), warm_start (`fit` trains a
    new network, and `partial_fit` trains on, one epoch for each call), and epsilon (1e-8, as Adam's). X is dense.

    The weight of a sample multiplies its loss. The weights, and alpha with them, are first divided by the mean of the
    weights. So whole-number weights equal repeated rows, if ``batch_norm=False`` and a batch holds all samples.
    Elsewhere they cannot: the statistics of a mini-batch count each row once, whatever its weight, as in every library,
    and repeated rows would make other mini-batches. Early stopping goes by the weighted score, and holds out no sample
    of weight 0. If the weights sum to 1, as AdaBoost's do, alpha is as strong as with a single sample.

    With one class in y, that class is predicted, with probability 1.

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
        class_weight: Mapping[Any, float] | str | None = None,
    ) -> None:
        super().__init__(
            hidden_layer_sizes, activation, batch_norm=batch_norm, solver=solver, alpha=alpha, batch_size=batch_size,
            learning_rate_init=learning_rate_init, max_iter=max_iter, random_state=random_state, tol=tol,
            verbose=verbose, momentum=momentum, nesterovs_momentum=nesterovs_momentum, early_stopping=early_stopping,
            validation_fraction=validation_fraction, beta_1=beta_1, beta_2=beta_2, n_iter_no_change=n_iter_no_change,
        )  # fmt: skip
        self.class_weight = class_weight

    def _targets(self, y: Any, dtype: np.dtype[Any], first: bool, classes: Any) -> Array:
        check_classification_targets(y)
        if first:
            given = y if classes is None or type_of_target(y).startswith("multilabel") else classes
            encoder = LabelBinarizer().fit(given)
        else:
            encoder = self._encoder
        known = encoder.classes_.tolist()
        if not first and classes is not None and not np.array_equal(unique_labels(classes), encoder.classes_):
            raise ValueError(f"expected classes as in the first call, {known}, got {classes}")
        if type_of_target(y).startswith("multilabel") != encoder.y_type_.startswith("multilabel"):
            raise ValueError(f"expected {encoder.y_type_} y, as in the first call, got {type_of_target(y)} y")
        unseen = np.setdiff1d(unique_labels(y), encoder.classes_).tolist()
        if unseen:
            raise ValueError(f"expected labels among the classes {known}, got {unseen}")
        encoded = encoder.transform(y)
        self._encoder, self.classes_ = encoder, encoder.classes_
        targets: Array = encoded.argmax(axis=1) if self._one_output_a_class() else encoded.astype(dtype)
        return targets

    def _one_output_a_class(self) -> bool:
        """Whether a softmax over the classes decides; a single class has probability 1, and nothing to learn."""
        return self._encoder.y_type_ == "multiclass" or len(self.classes_) == 1

    def _weighted_by_class(self, y: Any, weights: Array | None) -> Array | None:
        if self.class_weight is None:
            return weights
        if self._encoder.y_type_.startswith("multilabel"):
            raise ValueError(
                "expected class_weight=None where y has several labels, whose samples have several classes"
            )
        labels = self.classes_.tolist()
        index = np.searchsorted(self.classes_, y)
        if isinstance(self.class_weight, str):  # "balanced"
            totals = np.bincount(index, weights, len(labels))
            present = totals > 0
            factors: Array = np.divide(totals.sum() / present.sum(), totals, out=np.zeros(len(labels)), where=present)
        else:
            if not {*labels} <= {*self.class_weight} and not {*self.class_weight} <= {*labels}:
                raise ValueError(
                    f"expected the keys of class_weight among the classes {labels}, got {self.class_weight}"
                )
            factors = np.array([self.class_weight.get(label, 1) for label in labels], np.float64)
        weighted: Array = factors[index] if weights is None else factors[index] * weights
        return weighted

    def _loss_and_outputs(self, targets: Array) -> tuple[DataLoss, int]:
        if targets.ndim == 1:
            return losses.softmax_cross_entropy, len(self.classes_)
        return _log_loss, targets.shape[1]

    def _decide(self, output: Array) -> Any:
        return self._encoder.inverse_transform(self._probabilities(output))

    def _probabilities(self, output: Array) -> Array:
        """One column for two classes."""
        p: Array = softmax(output, axis=1) if self._one_output_a_class() else expit(output)
        return p

    def partial_fit(
        self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None = None, sample_weight: ArrayLike | None = None
    ) -> Self:
        """Train on for one epoch over X and y; there is no early stopping here.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)
            At least 2 samples.
        y : array_like of shape (n_samples,) or (n_samples, n_outputs)
            Labels.
        classes : array_like of shape (n_classes,), optional
            All classes that y will ever have. The first call needs them.
        sample_weight : array_like of shape (n_samples,), optional
            Weights, as in `fit`. They count relative to the other weights of the same call.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError, FloatingPointError
            The same as in `fit`, a first call without classes, or ``class_weight="balanced"``, which needs all of y.
        """
        if classes is None and not hasattr(self, "model_"):
            raise ValueError("expected classes in the first call to partial_fit, got None")
        if isinstance(self.class_weight, str) and self.class_weight == "balanced":
            raise ValueError(
                'expected class_weight as a dict in partial_fit, got "balanced", which needs all of y at once'
            )
        return self._continue(X, y, sample_weight, classes)

    def predict_proba(self, X: ArrayLike) -> Array:
        """Return the probability of each class.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)

        Returns
        -------
        numpy.ndarray of shape (n_samples, n_classes)
            Probabilities in the order of ``classes_``, of the dtype of X. If y has several labels, each has a
            probability of its own.
        """
        p = self._probabilities(self._output(X))
        return np.hstack([1 - p, p]) if p.shape[1] < len(self.classes_) else p

    def predict_log_proba(self, X: ArrayLike) -> Array:
        """Return the logarithm of the probabilities, also where these are too small for their dtype.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)

        Returns
        -------
        numpy.ndarray of shape (n_samples, n_classes)
        """
        z = self._output(X)
        if self._one_output_a_class():
            log_p: Array = log_softmax(z, axis=1)
        else:
            log_p = log_expit(np.hstack([-z, z]) if z.shape[1] == 1 else z)
        return log_p

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class BatchNormRegressor(RegressorMixin, Network):
    """Regressor: a dense network with batch normalization, with the parameters of scikit-learn's MLPRegressor.

    The training minimises half the squared error, summed over the outputs, plus ``alpha/(2*n)`` times the sum of the
    squared weights, n the size of the mini-batch.

    Parameters
    ----------
    hidden_layer_sizes, activation, batch_norm, solver, alpha, batch_size, learning_rate_init, max_iter, random_state, \
tol, verbose, momentum, nesterovs_momentum, early_stopping, validation_fraction, beta_1, beta_2, n_iter_no_change
        The same as in `BatchNormClassifier`; so are the weights of samples. Early stopping goes by R².

    Attributes
    ----------
    loss_curve_ : list of float
        Training loss with the penalty, for each epoch: the mean over the outputs, as MLPRegressor's, not their sum.
    model_, loss_, best_loss_, validation_scores_, best_validation_score_, n_iter_, n_outputs_
        The same as in `BatchNormClassifier`.
    n_features_in_, feature_names_in_
        The same as in `BatchNormClassifier`.

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
        super().__init__(
            hidden_layer_sizes, activation, batch_norm=batch_norm, solver=solver, alpha=alpha, batch_size=batch_size,
            learning_rate_init=learning_rate_init, max_iter=max_iter, random_state=random_state, tol=tol,
            verbose=verbose, momentum=momentum, nesterovs_momentum=nesterovs_momentum, early_stopping=early_stopping,
            validation_fraction=validation_fraction, beta_1=beta_1, beta_2=beta_2, n_iter_no_change=n_iter_no_change,
        )  # fmt: skip

    def _targets(self, y: Any, dtype: np.dtype[Any], first: bool, classes: Any) -> Array:
        if y.dtype.kind not in "biuf":
            raise TypeError(f"expected y to hold numbers, got {y.dtype}")
        with np.errstate(over="ignore"):
            targets: Array = y.reshape(len(y), -1).astype(dtype)
        if not np.isfinite(targets).all():
            raise ValueError(f"expected a y that {dtype} can hold, X's dtype, got values from {y.min()} to {y.max()}")
        return targets

    def _loss_and_outputs(self, targets: Array) -> tuple[DataLoss, int]:
        return _squared_error, targets.shape[1]

    def _decide(self, output: Array) -> Any:
        return output[:, 0] if self.n_outputs_ == 1 else output

    def partial_fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Train on for one epoch over X and y; there is no early stopping here.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)
            At least 2 samples.
        y : array_like of shape (n_samples,) or (n_samples, n_outputs)
        sample_weight : array_like of shape (n_samples,), optional
            Weights, as in `fit`. They count relative to the other weights of the same call.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError, FloatingPointError
            The same as in `fit`.
        """
        return self._continue(X, y, sample_weight)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
