"""Averages of a model's parameters over a training: exponentially weighted, or the plain mean."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .atomic import change
from .state import Array, check_state

__all__ = ["Average"]


class Average:
    """A weighted mean of all values that the parameters had when `update` was called, in float64.

    After the n-th update, a = a + w (p - a). With a decay d, w = (1 - d) / (1 - d^n): the exponentially weighted
    average from zero, divided by what its weights sum to (Kingma & Ba, ICLR 2015, section 7.2). Without, w = 1/n: the
    mean (Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018). d^n is a
    running product, so that the bits are the same on every machine.

    Parameters
    ----------
    params : dict of numpy.ndarray
        A model's parameters, by name.
    decay : float within (0, 1), or None
    """

    def __init__(self, params: Mapping[str, Array], decay: float | None) -> None:
        self._params, self._decay = params, decay
        self._means = {name: np.zeros(p.shape) for name, p in params.items()}
        self._count, self._power = np.zeros((), np.int64), np.ones(())
        self._scratch = np.empty(max((p.size for p in params.values()), default=0))

    @property
    def count(self) -> int:
        """Number of updates."""
        return int(self._count)

    def update(self) -> None:
        """Take the parameters in as they are now."""
        self._count[()] += 1
        if self._decay is None:
            weight = 1 / self.count
        else:
            self._power[()] *= self._decay
            weight = (1 - self._decay) / (1 - float(self._power))
        for name, p in self._params.items():
            mean = self._means[name]
            change = np.subtract(p, mean, out=self._scratch[: p.size].reshape(p.shape))
            change *= weight
            mean += change

    def give(self) -> None:
        """Write the average into the parameters, rounded once."""
        for name, p in self._params.items():
            p[...] = self._means[name]

    def state_dict(self) -> dict[str, Array]:
        """Copies of everything that a checkpoint must hold."""
        return {key: a.copy() for key, a in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Copy `state` in; ValueError, nothing changed, unless all keys and shapes fit."""
        given = check_state(state, self._state())
        change([(array, given[key]) for key, array in self._state().items()])

    def _state(self) -> dict[str, Array]:
        return {"count": self._count, "power": self._power} | {f"mean.{name}": a for name, a in self._means.items()}
