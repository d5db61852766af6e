"""Learning-rate schedules for `training.fit`.

A schedule is a function of t, the number of epochs done (a float: it counts within the epoch too), and of the number of
all epochs; it gives the factor by which the optimizer's rate is multiplied. It has no memory, so that a run that is
resumed needs none; any function of your own with these two arguments is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["constant", "cosine", "inverse_time", "step"]

Schedule = Callable[[float, int], float]


def constant() -> Schedule:
    """Return the schedule that leaves the rate as it is.

    Examples
    --------
    >>> from fastbn import schedules
    >>> schedules.constant()(7.5, 10)
    1.0
    """
    return lambda t, epochs: 1.0


def step(every: float, factor: float) -> Schedule:
    """Return the schedule ``factor**floor(t/every)``, which multiplies the rate after every so many epochs.

    Parameters
    ----------
    every : float
        Number of epochs, more than 0.
    factor : float
        Factor of the rate, not negative.

    Examples
    --------
    >>> from fastbn import schedules
    >>> rate = schedules.step(10, 0.5)
    >>> rate(9.99, 30), rate(10, 30), rate(29, 30)
    (1.0, 0.5, 0.25)
    """
    if not 0 < every < math.inf:
        raise ValueError(f"expected a finite every above 0, got {every}")
    if not 0 <= factor < math.inf:
        raise ValueError(f"expected a finite factor of at least 0, got {factor}")
    return lambda t, epochs: float(factor ** (t // every))


def cosine() -> Schedule:
    """Return the schedule ``(1 + cos(pi*t/epochs))/2``, which falls to 0 along half a wave.

    Source: Loshchilov & Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017, without restarts.

    Examples
    --------
    >>> from fastbn import schedules
    >>> [round(schedules.cosine()(t, 10), 3) for t in (0, 5, 10)]
    [1.0, 0.5, 0.0]
    """
    return lambda t, epochs: (1 + math.cos(math.pi * t / epochs)) / 2


def inverse_time(decay: float) -> Schedule:
    """Return the schedule ``1/(1 + decay*t)``.

    Parameters
    ----------
    decay : float
        Speed at which the rate falls, not negative.

    Examples
    --------
    >>> from fastbn import schedules
    >>> [schedules.inverse_time(1)(t, 10) for t in (0, 1, 3)]
    [1.0, 0.5, 0.25]
    """
    if not 0 <= decay < math.inf:
        raise ValueError(f"expected a finite decay of at least 0, got {decay}")
    return lambda t, epochs: 1 / (1 + decay * t)
