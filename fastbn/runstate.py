"""Where a run of `training.fit` stands, and the file from which it can go on.

That file is one of `checkpoint`, with more tensors: those of the best epoch, with the prefix "best.", and the averages
of the parameters, with "average."; and, as JSON under "fastbn.run" in the metadata, the other fields of RunState, the
rest of the state, and the identity of the run. Floats survive JSON: Python writes all their digits.

# Design: what training may change is state. The file has it as it was when the run stopped, and a run that goes on gets
# it from there: weights, averages, buffers, the random streams of Dropout, and what LAYER_STATE and OPTIMIZER_STATE
# name, which callbacks may set. What makes two runs the same run is identity: what IDENTITY names. It must be the same
# when the run goes on, and is never set.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from . import checkpoint
from .averaging import Average
from .history import History
from .nn import Dropout, walk
from .state import Array, check_state

__all__ = ["RunFile", "RunState"]

# State: attributes of layers that callbacks may set, and the numbers of optimizers.
LAYER_STATE = ("training", "frozen", "renorm", "p", "negative_slope")
OPTIMIZER_STATE = ("lr", "momentum", "nesterov", "weight_decay", "alpha", "betas", "eps")
# Identity: the description of the model, the class of the optimizer, arguments of fit, and the data, by checksums.
IDENTITY = (
    "model", "optimizer", "exclude", "batch_size", "seed", "average", "average_from", "validation", "X", "y",
    "validation X", "validation y",
)  # fmt: skip
# Of a model's description, what tells nothing about which run it is. (p and negative_slope are no part of this: they
# have to be what they were when the run began, or what the file has.)
_NEVER_COMPARED = ("renorm", "num_threads")

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
    average : Average or None
    made_of : dict of str to array or JSON
        What IDENTITY names, but for the model and its optimizer.
    """

    def __init__(
        self, path: _Path, model: Any, optimizer: Any, average: Average | None, made_of: dict[str, Any]
    ) -> None:
        if not hasattr(optimizer, "load_state_dict"):
            name = type(optimizer).__name__
            raise TypeError(f"a checkpoint needs an optimizer with state_dict and load_state_dict, got {name}")
        checkpoint.check_place(path)
        checkpoint.contents(model, optimizer)  # better now than after the first epoch
        self._path, self._model, self._optimizer, self._average = path, model, optimizer, average
        made_of = made_of | {
            "model": checkpoint.describe(model),
            "optimizer": type(optimizer).__name__,
            "exclude": sorted(getattr(optimizer, "exclude", ())),
        }
        parts = {name: made_of[name] for name in IDENTITY}
        self._identity = _plain({k: _fingerprint(a) if isinstance(a, np.ndarray) else a for k, a in parts.items()})
        self._begun_with = self._optimizer_state()

    def save(self, state: RunState) -> None:
        """Write the file, whole or not at all."""
        tensors, texts = checkpoint.contents(self._model, self._optimizer)
        tensors |= {checkpoint.BEST + key: array for key, array in state.best.items()}
        if self._average is not None:
            tensors |= {checkpoint.AVERAGE + key: array for key, array in self._average.state_dict().items()}
        run = {name: getattr(state, name) for name in _NUMBERS}
        streams = [layer.rng.bit_generator.state for layer in self._dropouts()]
        run |= {"history": asdict(state.history), "random": streams, "identity": self._identity}
        run |= {"optimizer_begun_with": self._begun_with, "optimizer": self._optimizer_state()}
        texts[_RUN] = checkpoint.to_json(run)
        checkpoint.write(self._path, tensors, texts)

    def load(self, *, best_wanted: bool) -> RunState:
        """Put the file into model and optimizer; ValueError, nothing changed, if it is damaged or of another run."""
        tensors, texts = checkpoint.read(self._path)
        if _RUN not in texts:
            raise ValueError(f"{self._path}: cannot be resumed: not a checkpoint that fit wrote")
        run = checkpoint.read_json(self._path, texts, _RUN)
        description = checkpoint.read_json(self._path, texts, checkpoint.MODEL)
        with checkpoint.naming(self._path):
            if not isinstance(run.get("identity"), dict) or {*run["identity"]} != {*IDENTITY}:
                raise ValueError("it was written by another version of fastbn: delete it to begin anew")
            _check_same(run["identity"], self._identity, description)
            as_saved = checkpoint.build(description, tensors)
            numbers = self._numbers(run)
            state = _state(run)
            if best_wanted and state.history.val_loss:
                best = checkpoint.with_prefix(tensors, checkpoint.BEST)
                if not best:
                    raise ValueError("it was made without patience, and holds no weights of the best epoch")
                state.best = check_state(best, self._model.state_dict())
            if self._average is not None:
                self._average.load_state_dict(checkpoint.with_prefix(tensors, checkpoint.AVERAGE))
            streams = list(zip(self._dropouts(), map(_stream, run["random"]), strict=True))
            checkpoint.put(tensors, self._model, self._optimizer)
        for layer, stream in streams:
            layer.rng = stream
        for layer, saved in zip(walk([self._model]), walk([as_saved]), strict=True):
            for name in LAYER_STATE:
                if hasattr(saved, name):
                    setattr(layer, name, getattr(saved, name))
        _set_numbers(self._optimizer, numbers)
        self._identity = run["identity"]
        return state

    def _numbers(self, run: Any) -> dict[str, Any]:
        """The optimizer's numbers to go on with: the file's, but for those that are neither what the run began with
        nor what it stopped with, which somebody wants to be others from here on."""
        numbers: dict[str, Any] = {}
        for name, given in self._begun_with.items():
            begun, stopped = run["optimizer_begun_with"][name], run["optimizer"][name]
            if not all(isinstance(n, int | float) and 0 <= n < math.inf for n in np.ravel([begun, stopped]).tolist()):
                raise ValueError(f"damaged, expected {name} of an optimizer, got {begun!r} and {stopped!r}")
            known = given in (begun, stopped)
            self._begun_with[name], numbers[name] = (begun, stopped) if known else (given, given)
        _set_numbers(copy.copy(self._optimizer), numbers)  # what it does not take must be an error now
        return numbers

    def _optimizer_state(self) -> dict[str, Any]:
        held = {name: getattr(self._optimizer, name) for name in OPTIMIZER_STATE if hasattr(self._optimizer, name)}
        return dict(_plain(held))

    def _dropouts(self) -> list[Dropout]:
        return [layer for layer in walk([self._model]) if isinstance(layer, Dropout)]


def _set_numbers(optimizer: Any, numbers: dict[str, Any]) -> None:
    """As they come from JSON, which has lists for tuples."""
    for name, value in numbers.items():
        setattr(optimizer, name, tuple(value) if isinstance(value, list) else value)


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=float))


def _fingerprint(array: Array) -> str:
    return f"{array.dtype.name} {array.shape}, crc32 {zlib.crc32(np.ascontiguousarray(array).data):08x}"


def _check_same(there: Any, here: dict[str, Any], stopped_as: Any) -> None:
    """ValueError with the first difference of two identities. The model may also be as the file has it: a callback may
    have changed it since the run began, and the caller goes on with that very object."""
    differences = [(name, there[name], here[name]) for name in IDENTITY if name != "model"]
    differences = [(name, was, now) for name, was, now in differences if was != now]
    if not any(next(_differences(one, here["model"]), None) is None for one in (there["model"], stopped_as)):
        differences += _differences(there["model"], here["model"])
    for name, was, now in differences:
        raise ValueError(f"it is of another run, {name} was {was}, is {now}")


def _differences(there: Any, here: Any, name: str = "model") -> Iterator[tuple[str, Any, Any]]:
    """Between two descriptions of models, but for what is never compared: name, what was, and what is."""
    if there["class"] != here["class"]:
        yield name, there["class"], here["class"]
    elif here["class"] == "Sequential":
        for i, (one, other) in enumerate(itertools.zip_longest(there["layers"], here["layers"])):
            if one is None or other is None:
                was, now = ("no layer" if layer is None else layer["class"] for layer in (one, other))
                yield f"{name}[{i}]", was, now
            else:
                yield from _differences(one, other, f"{name}[{i}]")
    else:
        for key, value in here["config"].items():
            if key not in _NEVER_COMPARED and there["config"][key] != value:
                yield f"{name}.{key}", repr(there["config"][key]), repr(value)


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
