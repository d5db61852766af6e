"""A scaler for streams."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import check_array, check_scalar
from sklearn.utils.validation import check_is_fitted, validate_data

from ..functional import batch_norm, moments
from ..running import RunningStats
from ..state import Array

_EPS = math.ulp(0.0)  # functional wants a positive one: added to a variance of normal size, this one changes nothing


class BatchNormTransformer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Scale each feature to mean 0 and variance 1 by the statistics of a stream: (x - mean) / sqrt(var).

    By default those of all samples seen, as `StandardScaler`, also where they came in parts; with `momentum` an
    exponentially weighted average of the parts' statistics, which follows a stream that drifts.

    Parameters
    ----------
    momentum : float or None
        Weight of the newest part, within (0, 1]; each call of `partial_fit` is a part. The average is debiased (see
        `fastbn.RunningStats`): after the first part it is that part's statistics. None: all samples count alike.

    Attributes
    ----------
    mean_, var_ : numpy.ndarray of shape (n_features_in_,), float64
        The variance is of 1/m, as StandardScaler's.
    scale_ : numpy.ndarray of shape (n_features_in_,), float64
        sqrt(var_), and 1 where that is 0: a constant feature is only centred.
    n_samples_seen_, n_features_in_ : int
    feature_names_in_ : numpy.ndarray of shape (n_features_in_,)
        Where X had names.

    Examples
    --------
    >>> from fastbn.estimators import BatchNormTransformer
    >>> scaler = BatchNormTransformer().partial_fit([[1.0, 7.0]]).partial_fit([[3.0, 7.0]])
    >>> scaler.transform([[1.0, 7.0], [5.0, 8.0]])
    array([[-1.,  0.],
           [ 3.,  1.]])
    """

    def __init__(self, momentum: float | None = None) -> None:
        self.momentum = momentum

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Take the statistics of X, and forget any before.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)
        y : None
            Ignored.

        Returns
        -------
        self
        """
        return self._update(X, first=True)

    def partial_fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Take X in, the next part of the stream.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)
        y : None
            Ignored.

        Returns
        -------
        self
        """
        return self._update(X, first=not hasattr(self, "mean_"))

    def _update(self, X: Any, first: bool) -> Self:
        if self.momentum is not None:
            check_scalar(self.momentum, "momentum", Real, min_val=0, max_val=1, include_boundaries="right")
        X = self._checked(X, reset=first)
        if first:
            self._stats = RunningStats(X.shape[1], self.momentum, unbiased=False, debias=self.momentum is not None)
        self._stats.update(moments(X))
        self.mean_, self.var_ = self._stats.mean, self._stats.var
        self.scale_ = np.where(self.var_ == 0, 1, np.sqrt(self.var_))
        self.n_samples_seen_ = self._stats.count
        return self

    def transform(self, X: ArrayLike) -> Any:
        """Scale X.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)

        Returns
        -------
        array of X's shape and dtype (float64 where that is not float32), or what `set_output` says
        """
        check_is_fitted(self)
        X = self._checked(X, reset=False)
        return batch_norm(X, self.mean_, np.where(self.var_ == 0, 1, self.var_), eps=_EPS)

    def inverse_transform(self, X: ArrayLike) -> Array:
        """X as it was before `transform`.

        Parameters
        ----------
        X : array_like of shape (n_samples, n_features)

        Returns
        -------
        numpy.ndarray of X's shape and dtype (float64 where that is not float32)
        """
        check_is_fitted(self)
        x: Array = check_array(X, dtype=(np.float64, np.float32))
        if x.shape[1] != self.n_features_in_:
            raise ValueError(f"expected X with {self.n_features_in_} features, got {x.shape[1]}")
        zeros, ones = np.zeros_like(self.mean_), np.ones_like(self.mean_)
        return batch_norm(x, zeros, ones, self.scale_, self.mean_, eps=_EPS)

    def _checked(self, X: Any, reset: bool) -> Array:
        return validate_data(self, X, dtype=(np.float64, np.float32), reset=reset)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
