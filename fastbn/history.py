"""What `training.fit` measured, epoch by epoch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

from . import plots

__all__ = ["History"]


@dataclass
class History:
    """Measurements of a training by `fastbn.training.fit`, one entry for each epoch.

    Attributes
    ----------
    loss, accuracy : list of float
        Means over the examples of an epoch. Each is taken in training mode, before the step that its mini-batch made.
        accuracy stays empty for a loss that has none (see `fastbn.training.evaluate`).
    val_loss, val_accuracy : list of float
        Loss and accuracy on the validation data after the epoch, in inference mode. They are empty without such data.
    lr : list of float
        Rate of the optimizer in the last step of the epoch, empty for an optimizer without ``lr``.
    seconds : list of float
        Time that the training of an epoch took, without the validation.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def best_epoch(self) -> int | None:
        """First epoch, counted from 1, with the lowest validation loss; None without validation."""
        losses = [math.inf if math.isnan(loss) else loss for loss in self.val_loss]
        return 1 + losses.index(min(losses)) if losses else None

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw loss and accuracy, epoch by epoch; see `plots.learning_curves` for the errors.

        Parameters
        ----------
        path : path, optional
            Written, or overwritten, as PNG whatever its suffix.

        Returns
        -------
        matplotlib.figure.Figure or None
            The picture where there is no path: a notebook shows it.
        """
        return plots.learning_curves({"": self}, path)
