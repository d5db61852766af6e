"""Where a run of `training.fit` stands, and the file from which it can go on.

That file is one of `checkpoint`, with two things more: the tensors of the best epoch, with the prefix "best."; and, as
JSON under "fastbn.run" in the metadata, the other fields of RunState, the states of Dropout's random streams, and what
the run is made of, which must be the same when it goes on. Floats survive JSON: Python writes all their digits.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from . import checkpoint
from .history import History
from .nn import Dropout, walk
from .state import Array, check_state

__all__ = ["RunFile", "RunState"]

_Path = str | os.PathLike[str]
_RUN = "fastbn.run"
# The fields of RunState that are numbers.
_NUMBERS = {"epoch": int, "step": int, "total": float, "seen": int, "right": int, "decisions": int, "seconds": float}


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

    def end_epoch(self, lr: float | None, validation: tuple[float, float | None] | None) -> None:
        """Into the history: the epoch's means, its rate, and loss and accuracy of the validation data."""
        self.history.seconds.append(self.seconds)
        self.history.loss.append(self.total / self.seen)
        if self.decisions:
            self.history.accuracy.append(self.right / self.decisions)
        if lr is not None:
            self.history.lr.append(float(lr))
        if validation is not None:
            self.history.val_loss.append(validation[0])
            if validation[1] is not None:
                self.history.val_accuracy.append(validation[1])


class RunFile:
    """The file of one run.

    Parameters
    ----------
    path : path
        FileNotFoundError, IsADirectoryError where no file can be there.
    model, optimizer
        TypeError for those that cannot be saved.
    made_of : dict of str to array or JSON
        What must be the same when the run goes on; of arrays, their checksums are kept.
    """

    def __init__(self, path: _Path, model: Any, optimizer: Any, made_of: dict[str, Any]) -> None:
        if not hasattr(optimizer, "load_state_dict"):
            name = type(optimizer).__name__
            raise TypeError(f"a checkpoint needs an optimizer with state_dict and load_state_dict, got {name}")
        checkpoint.check_place(path)
        checkpoint.contents(model, optimizer)  # better now than after the first epoch
        self._path, self._model, self._optimizer = path, model, optimizer
        self._made_of = {key: _fingerprint(a) if isinstance(a, np.ndarray) else a for key, a in made_of.items()}

    def save(self, state: RunState) -> None:
        """Write the file, whole or not at all."""
        tensors, texts = checkpoint.contents(self._model, self._optimizer)
        tensors |= {checkpoint.BEST + key: array for key, array in state.best.items()}
        run = {name: getattr(state, name) for name in _NUMBERS}
        streams = [layer.rng.bit_generator.state for layer in self._dropouts()]
        run |= {"history": asdict(state.history), "random": streams, "made_of": self._made_of}
        texts[_RUN] = json.dumps(run)
        checkpoint.write(self._path, tensors, texts)

    def load(self, *, best_wanted: bool) -> RunState:
        """Put the file into model and optimizer; ValueError, nothing changed, if it is damaged or of another run."""
        tensors, texts = checkpoint.read(self._path)
        if _RUN not in texts:
            raise ValueError(f"{self._path}: cannot be resumed: not a checkpoint that fit wrote")
        run = checkpoint.read_json(self._path, texts, _RUN)
        model = checkpoint.read_json(self._path, texts, checkpoint.MODEL)
        with checkpoint.naming(self._path):
            _compare(run["made_of"], self._made_of, "")
            _compare(model, json.loads(checkpoint.contents(self._model)[1][checkpoint.MODEL]), "model.")
            state = _state(run)
            if best_wanted and state.history.val_loss:
                best = checkpoint.with_prefix(tensors, checkpoint.BEST)
                if not best:
                    raise ValueError("it was made without patience, and holds no weights of the best epoch")
                state.best = check_state(best, self._model.state_dict())
            streams = list(zip(self._dropouts(), map(_stream, run["random"]), strict=True))
            checkpoint.put(tensors, self._model, self._optimizer)
        for layer, stream in streams:
            layer.rng = stream
        return state

    def _dropouts(self) -> list[Dropout]:
        return [layer for layer in walk([self._model]) if isinstance(layer, Dropout)]


def _fingerprint(array: Array) -> str:
    return f"{array.dtype.name} {array.shape}, crc32 {zlib.crc32(np.ascontiguousarray(array).data):08x}"


def _compare(there: Any, here: Any, name: str) -> None:
    """ValueError with the first difference of two things made of JSON, but for the layers' modes: fit sets them."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in here | there:
            if key != "training":
                _compare(there.get(key), here.get(key), f"{name}{key}.")
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for i, (one, other) in enumerate(zip(there, here, strict=True)):
            _compare(one, other, f"{name}{i}.")
    elif there != here:
        raise ValueError(f"it is of another run, {name.rstrip('.')} was {str(there)[:200]}, is {str(here)[:200]}")


def _state(run: Any) -> RunState:
    state = RunState(**{name: run[name] for name in _NUMBERS})
    state.history = History(**{name: list(run["history"][name]) for name in asdict(state.history)})
    for name, kind in _NUMBERS.items():
        if type(run[name]) is not kind or (kind is int and run[name] < 0):
            raise ValueError(f"damaged, expected {name} to be {kind.__name__}, got {run[name]!r}")
    for name, values in asdict(state.history).items():
        if not all(isinstance(value, float) for value in values):
            raise ValueError(f"damaged, expected {name} to be numbers, got {values!r}")
    if len(state.history.loss) not in (state.epoch, state.epoch - 1) or (state.step > 0) != (state.seen > 0):
        raise ValueError("damaged, its epochs and steps contradict each other")
    return state


def _stream(state: Any) -> np.random.Generator:
    generator = np.random.Generator(np.random.PCG64())
    generator.bit_generator.state = state
    return generator
