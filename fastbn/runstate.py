"""Where a run of `training.fit` stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from .history import History
from .state import Array

__all__ = ["RunState"]


@dataclass
class RunState:
    """All that the next step depends on, beside the model and its optimizer."""

    epoch: int = 0  # the one that is trained, from 1
    step: int = 0  # steps done in it
    total: float = 0.0  # its sums so far: of the examples' losses,
    seen: int = 0  # of examples,
    right: int = 0  # of right decisions
    decisions: int = 0  # among these,
    seconds: float = 0.0  # of time
    history: History = field(default_factory=History)
    best: dict[str, Array] = field(default_factory=dict)  # the model's state after history.best_epoch

    def finished(self, epochs: int, patience: int | None) -> bool:
        """Whether all epochs are done, or too many of them without a lower validation loss."""
        done, best = len(self.history.loss), self.history.best_epoch
        return done >= epochs or (patience is not None and best is not None and done - best >= patience)

    def begin_epoch(self) -> None:
        """The next epoch, unless one is to be gone on with."""
        if len(self.history.loss) == self.epoch:
            self.epoch += 1
            self.step = self.seen = self.right = self.decisions = 0
            self.total = self.seconds = 0.0

    def end_epoch(self) -> None:
        """The epoch's means go into the history."""
        self.history.seconds.append(self.seconds)
        self.history.loss.append(self.total / self.seen)
        if self.decisions:
            self.history.accuracy.append(self.right / self.decisions)
