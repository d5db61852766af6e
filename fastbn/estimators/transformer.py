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

from .. import functional
from ..batchstats import BatchStats, merge
from ..interop import dask
from ..state import Array

_EPS = 5e-324  # functional wants a positive one: added to a variance of normal size, this one changes nothing


class BatchNormTransformer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Scaler for data that come in parts: each feature gets mean 0 and variance 1, ``(x - mean)/sqrt(var)``.

    By default mean and variance are those of all samples seen, as in scikit-learn's StandardScaler. With momentum they
    are the exponentially weighted mean and variance of the stream, which follow it as it drifts.

    Parameters
    ----------
    momentum : float or None
        Weight of the newest part, within (0, 1]. Each call of `partial_fit` is a part, of one sample or more. With None
        all samples count alike. It is read when a stream begins.

    Attributes
    ----------
    mean_, var_ : numpy.ndarray of shape (n_features,), float64
        Statistics. The variance is of ``1/m``, as StandardScaler's.
    mean_low_ : numpy.ndarray of shape (n_features,), float64
        Low part of the mean, which is ``mean_ + mean_low_``: far from zero, float64 holds a mean to fewer digits than
        the deviations have.
    scale_ : numpy.ndarray of shape (n_features,), float64
        ``sqrt(var_)``, and 1 where that is 0: a constant feature is only centred.
    n_samples_seen_ : int
        Number of samples seen.
    n_features_in_ : int
        Number of features of X.
    feature_names_in_ : numpy.ndarray of shape (n_features,)
        Names of the features, if X had names.

    Notes
    -----
    With momentum a, part i of t has the weight ``a*(1 - a)**(t - i)/(1 - (1 - a)**t)``, which its samples share. Part t
    changes the statistics as follows (West 1979)::

        w = a/(1 - (1 - a)**t)
        delta = mean_t - mean
        mean = mean + w*delta
        var = (1 - w)*var + w*var_t + w*(1 - w)*delta**2

    The last term is the variance between parts. The running averages of `fastbn.BatchNorm` and `fastbn.RunningStats`
    leave it out, as PyTorch's do. So a stream may come in any parts, even row by row. After the first part, the
    statistics are those of this part.

    A dask array is read by blocks. `fit` and `partial_fit` compute its statistics at once, and refuse NaN and
    infinities. `transform` and `inverse_transform` do not look for them.

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
        X : array_like or dask.array.Array of shape (n_samples, n_features)
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
        X : array_like or dask.array.Array of shape (n_samples, n_features)
        y : None
            Ignored.

        Returns
        -------
        self
        """
        return self._update(X, first=not hasattr(self, "mean_"))

    def _update(self, X: Any, first: bool) -> Self:
        if self.momentum is not None:
            momentum = check_scalar(self.momentum, "momentum", Real, min_val=0, max_val=1, include_boundaries="right")
            if math.isnan(momentum):
                raise ValueError("expected momentum to be a number within (0, 1], or None, got nan")
        stats = self._statistics(X, first)
        into: Any
        if first:
            fading = None if self.momentum is None else 1 - self.momentum
            into, held, seen = np.zeros((3, len(stats.mean))), 0.0, 0
        else:
            # Copies: whoever holds the arrays of before keeps them, and a model mapped from a file is read-only.
            into = np.stack([self.mean_, self.mean_low_, self._spread])
            fading, held, seen = self._fading, self._weight, self.n_samples_seen_
        weight: float = stats.count
        if fading is not None:
            weight = 1
            held *= fading
            into[2] *= fading
        merge(tuple(into), held, (stats.mean, stats.mean_low, stats.var * weight), weight)
        var = into[2] / (held + weight)
        # At once: a signal's handler may raise between any two statements.
        self.__dict__.update(
            mean_=into[0], mean_low_=into[1], _spread=into[2], _fading=fading, _weight=held + weight, var_=var,
            n_samples_seen_=seen + stats.count, scale_=np.where(var == 0, 1, np.sqrt(var)),
        )  # fmt: skip
        return self

    def _statistics(self, X: Any, first: bool) -> BatchStats:
        if not dask.is_dask(X):
            return functional.moments(self._checked(X, reset=first))
        if not first:  # the number of features, before the work
            self._checked(X, reset=False)
        stats: BatchStats = dask.moments(_table(X)).compute()
        # What scikit-learn's checks refuse of an array in memory.
        if not stats.count:
            raise ValueError(f"expected X with at least 1 {'sample' if X.shape[1] else 'feature'}, got none")
        wrong = np.flatnonzero(~np.isfinite(stats.mean))
        if len(wrong):
            raise ValueError(f"expected finite numbers in X, got NaN or an infinity in column {wrong[0]}")
        if first:
            self._checked(X, reset=True)
        return stats

    def transform(self, X: ArrayLike) -> Any:
        """Scale X. A dask array is scaled by blocks, when the result is computed.

        Parameters
        ----------
        X : array_like or dask.array.Array of shape (n_samples, n_features)

        Returns
        -------
        array of X's shape and dtype (float64 where that is not float32), or what scikit-learn's ``set_output`` asks
        for; a dask array in X's chunks, where X is one
        """
        check_is_fitted(self)
        X = self._checked(X, reset=False)
        var = np.where(self.var_ == 0, 1, self.var_)
        return _batch_norm(X, self.mean_, var, bias=-self.mean_low_ / self.scale_, eps=_EPS)

    def inverse_transform(self, X: ArrayLike) -> Array:
        """Return X as it was before `transform`. A dask array is scaled by blocks, when the result is computed.

        Parameters
        ----------
        X : array_like or dask.array.Array of shape (n_samples, n_features)

        Returns
        -------
        array of X's shape and dtype (float64 where that is not float32); a dask array in X's chunks, where X is one
        """
        check_is_fitted(self)
        x: Array = _table(X) if dask.is_dask(X) else check_array(X, dtype=(np.float64, np.float32))
        if x.shape[1] != self.n_features_in_:
            raise ValueError(f"expected X with {self.n_features_in_} features, got {x.shape[1]}")
        low, one = -self.mean_low_ / self.scale_, np.ones_like(self.mean_)
        back: Array = _batch_norm(x, low, one, weight=self.scale_, bias=self.mean_, eps=_EPS)
        return back

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if before := self.__dict__.pop("_stats", None):  # a pickle of 0.1.0: a RunningStats held the state
            self.mean_low_ = before.mean_low
            self._fading = None if before.momentum is None else 1 - before.momentum
            self._weight = before.count if self._fading is None else (1 - before._rest) / before.momentum
            self._spread = self.var_ * self._weight

    def _checked(self, X: Any, reset: bool) -> Array:
        if dask.is_dask(X):
            x: Array = validate_data(self, _table(X), skip_check_array=True, reset=reset)
        else:
            x = validate_data(self, X, dtype=(np.float64, np.float32), reset=reset)
        return x

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _batch_norm(X: Any, *statistics: Array, **options: Any) -> Any:
    """y of X, as a dask array where X is one."""
    return (dask if dask.is_dask(X) else functional).batch_norm(X, *statistics, **options)


def _table(X: Any) -> Any:
    """The dask array X, which has rows and columns."""
    if X.ndim != 2:
        raise ValueError(f"expected X of shape (n_samples, n_features), got shape {X.shape}")
    return X
