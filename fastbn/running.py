"""Averages over batches: exponentially weighted, debiased, or exact."""

from __future__ import annotations

import math
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .atomic import change
from .batchstats import BatchStats, averaged, merge
from .state import whole

Array = NDArray[np.float64]


class RunningStats:
    """Mean and variance of each feature over many batches.

    Parameters
    ----------
    num_features : int
        Number of features, C.
    momentum : float or None
        Weight of the newest batch, finite: ``new = (1 - momentum)*old + momentum*batch``, from mean 0 and variance 1,
        as PyTorch's running averages. So var averages the variances within batches. The distances between the means of
        batches are not in it; `fastbn.estimators.BatchNormTransformer` has them.
        None keeps the exact statistics of every value seen, merged by the rule of Chan, Golub & LeVeque (1979).
    unbiased : bool
        Whether var is of ``1/(m - 1)``, as PyTorch's running variance, or of ``1/m``, as Keras's and ONNX's.
    debias : bool
        Whether the average starts at zero, and is divided by ``1 - (1 - momentum)**t`` after t batches (Kingma & Ba
        2015, section 3). Without it the first averages lean towards the start.

    Attributes
    ----------
    mean, var : numpy.ndarray of shape (C,), float64
        Statistics. An exponentially weighted average without debias gives its own arrays. All others are computed when
        you ask for them, and NaN before the first value.
    mean_low : numpy.ndarray of shape (C,), float64
        Low part of the exact mean, which is ``mean + mean_low``: far from zero, float64 holds a mean to fewer digits
        than the deviations have. It is a copy, and 0 for exponentially weighted averages.
    count : int
        Number of values per feature seen.
    num_batches : int
        Number of batches seen.

    Raises
    ------
    ValueError
        A momentum that is not finite, or debias without momentum.

    Examples
    --------
    Parts of a data set counted apart and merged equal the whole:

    >>> import numpy as np, fastbn
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> left, right = fastbn.RunningStats(2, momentum=None), fastbn.RunningStats(2, momentum=None)
    >>> left.update(fastbn.moments(x[:2]))
    >>> right.update(fastbn.moments(x[2:]))
    >>> left.merge(right)
    >>> left.mean.tolist(), left.count
    ([5.0, 6.0], 6)
    """

    def __init__(
        self, num_features: int, momentum: float | None = 0.1, *, unbiased: bool = True, debias: bool = False
    ) -> None:
        self.num_features = whole(num_features, "num_features")
        if self.num_features < 1:
            raise ValueError(f"expected num_features to be at least 1, got {num_features}")
        if momentum is not None and not math.isfinite(momentum):
            raise ValueError(f"expected momentum to be finite or None, got {momentum!r}")
        if debias and momentum is None:
            raise ValueError("expected a momentum where debias=True, got None: exact statistics have no bias")
        self.momentum = None if momentum is None else float(momentum)
        self.unbiased = bool(unbiased)
        self.debias = bool(debias)
        self._mean: Array = np.zeros(self.num_features)
        self._low: Array = np.zeros(self.num_features)  # exact: what rounding took from _mean
        self._spread: Array = np.zeros(self.num_features)  # exact: the sum of squared deviations; else the variance
        self.count = self.num_batches = 0
        self._rest = 1.0
        self.reset()

    def reset(self) -> None:
        """Forget every batch."""
        spread = 0 if self.debias or self.momentum is None else 1
        # _rest: (1 - momentum)**num_batches, as a running product
        change([(self._mean, 0), (self._low, 0), (self._spread, spread)], *self._counts(0, 0, 1.0))

    @property
    def mean(self) -> Array:
        if self.momentum is None:
            return self._mean.copy() if self.count else np.full(self.num_features, np.nan)
        return self._debiased(self._mean) if self.debias else self._mean

    @property
    def mean_low(self) -> Array:
        return self._low.copy()

    @property
    def var(self) -> Array:
        if self.momentum is None:
            degrees = self.count - self.unbiased
            return self._spread / degrees if degrees > 0 else np.full(self.num_features, np.nan)
        return self._debiased(self._spread) if self.debias else self._spread

    def _debiased(self, average: Array) -> Array:
        if self.num_batches == 0:
            return np.full(self.num_features, np.nan)
        with np.errstate(all="ignore"):  # momentum 0 or 2 may leave nothing to divide by
            return average / (1 - self._rest)

    def update(self, stats: BatchStats) -> None:
        """Take one batch in. An empty batch changes nothing.

        Parameters
        ----------
        stats : BatchStats
            Statistics of the batch, as `fastbn.moments` returns them.

        Raises
        ------
        TypeError
            stats is no BatchStats.
        ValueError
            Another number of features, or a single value where an unbiased variance is averaged.
        """
        if not isinstance(stats, BatchStats):
            raise TypeError(f"expected stats to be a BatchStats, as moments returns, got {type(stats).__name__}")
        self._check(stats.mean.shape)
        if stats.count == 0:
            return
        if self.momentum is None:
            with np.errstate(all="ignore"):
                spread = stats.var * stats.count
            self._merge((stats.mean, stats.mean_low, spread), stats.count, 1)
            return
        if self.unbiased and stats.count == 1:
            raise ValueError("expected more than 1 value per feature for an unbiased variance, got 1")
        numbers = np.stack([stats.mean, stats.var])[np.newaxis]
        mean, spread, _ = averaged((self._mean, self._spread), numbers, [stats.count], self.momentum, 0, self.unbiased)
        counts = self._counts(self.count + stats.count, self.num_batches + 1, self._rest * (1 - self.momentum))
        change([(self._mean, mean), (self._spread, spread)], *counts)

    def merge(self, other: Self) -> None:
        """Take in everything that another one has seen.

        Parameters
        ----------
        other : RunningStats
            Exact statistics (momentum None), as these are. They are not changed.

        Raises
        ------
        TypeError
            For anything but a RunningStats.
        ValueError
            One of the two is an exponentially weighted average, which cannot be merged, or has another number of
            features.
        """
        if not isinstance(other, RunningStats):
            raise TypeError(f"expected other to be a RunningStats, got {type(other).__name__}")
        if self.momentum is not None or other.momentum is not None:
            raise ValueError(
                f"expected momentum=None on both sides of merge, got {self.momentum!r} and {other.momentum!r}"
            )
        self._check(other._mean.shape)
        if other.count == 0:
            return
        self._merge((other._mean, other._low, other._spread), other.count, other.num_batches)

    def _merge(self, part: tuple[Array, Array, Array], count: int, batches: int) -> None:
        own = self._mean, self._low, self._spread
        merged = self._mean.copy(), self._low.copy(), self._spread.copy()
        merge(merged, self.count, part, count)
        counts = self._counts(self.count + count, self.num_batches + batches, self._rest)
        change(zip(own, merged, strict=True), *counts)

    def _counts(self, count: int, num_batches: int, rest: float) -> list[tuple[object, str, float]]:
        return [(self, "count", count), (self, "num_batches", num_batches), (self, "_rest", rest)]

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape != (self.num_features,):
            raise ValueError(f"expected statistics of shape ({self.num_features},), got {shape}")

    def __repr__(self) -> str:
        return (
            f"RunningStats({self.num_features}, momentum={self.momentum!r}, "
            f"unbiased={self.unbiased}, debias={self.debias})"
        )
