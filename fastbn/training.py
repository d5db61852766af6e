"""The training loop: seeded shuffled mini-batches, a progress bar, a history; and evaluation at test time."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import losses
from .data import held_out_rows, minibatches
from .history import History
from .nn import walk
from .recalibration import recalibrate
from .runstate import RunFile, RunState
from .schedules import Schedule
from .state import Array, as_float
from .terminal import CtrlC, progress_bar

__all__ = ["History", "evaluate", "fit", "recalibrate"]

Loss = Callable[[Array, Array], tuple[float, Array]]


def fit(
    model: Any,
    data: tuple[ArrayLike, ArrayLike],
    loss: Loss,
    optimizer: Any,
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    validation: tuple[ArrayLike, ArrayLike] | float | None = None,
    patience: int | None = None,
    schedule: Schedule | None = None,
    clip_norm: float | None = None,
    on_step: Callable[[int, float], Any] | None = None,
    on_epoch: Callable[[int, History], Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> History:
    """Train a model by mini-batches, and leave it in training mode.

    Parameters
    ----------
    model : nn.Sequential, BatchNorm or any layer
        Changed in place.
    data : (X, y)
        X, (N, ...), float32 or float64, and y, (N, ...), what `loss` takes as targets for it.
    loss : callable
        (prediction, target) -> (mean loss, its gradient with respect to the prediction), as those of `fastbn.losses`.
    optimizer : SGD, RMSprop, Adam, or anything with a `step()`
        Made for this model.
    epochs, batch_size : int
        At least 1; at least 2. Every epoch visits all examples in a fresh order. The last short mini-batch is kept,
        and dropped where it would hold a single example, which has no variance.
    seed : int
        Of the order of the examples: the same seed, data and batch size give the same mini-batches.
    validation : (X, y) or float, optional
        Evaluated after every epoch. A fraction within (0, 1) holds out that part of the data, drawn by `seed`: of
        every class for `losses.softmax_cross_entropy`, of all examples for another loss.
    patience : int, optional
        Stop after so many epochs in a row without a lower validation loss. Wherever training ends, the model then
        gets the weights and running averages of `history.best_epoch`.
    schedule : callable, optional
        schedule(t, epochs) -> the factor of the optimizer's rate for the next step, where t is the number of epochs
        done, a float: see `fastbn.schedules`. The rate is afterwards what it was.
    clip_norm : float, optional
        Where the Euclidean norm of all gradients together, taken in float64, is more, they are scaled down to it, as
        by PyTorch's `clip_grad_norm_`.
    on_step : callable, optional
        on_step(step, loss) after every update; steps are counted from 1 over all epochs.
    on_epoch : callable, optional
        on_epoch(epoch, history) after every epoch and its validation. A true result of either ends training there.
    checkpoint : path, optional
        A file from which training can go on, written after every epoch and where training stops: by a callback, or
        by Ctrl-C. `fastbn.checkpoint.load` reads it as the model as it was after its last step.
    resume : bool
        Go on from that file, with the bits that a run never stopped would have; from the beginning where there is no
        such file. A run that is finished is only read. `epochs`, `patience` and the optimizer's numbers may be others
        than before; what callbacks keep is theirs to restore.
    progress : bool
        Show a bar with loss, accuracy and examples per second, where standard error is a terminal and tqdm is
        installed.

    Returns
    -------
    History

    Raises
    ------
    ValueError, TypeError
        Before the first step, for arguments that do not fit together, and for a checkpoint that is damaged or of
        another run: data, seed, batch size, model, optimizer. Nothing has been changed then.
    FloatingPointError
        The loss, or with `clip_norm` the norm of the gradients, is no longer finite; names epoch and step. The
        parameters are those that gave this loss.

    Notes
    -----
    Ctrl-C in the main thread acts after the current step: the checkpoint is written, KeyboardInterrupt raised. A
    second one acts at once.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import BatchNorm, losses, nn, optim, training
    >>> X = np.random.default_rng(0).standard_normal((256, 4), dtype=np.float32)
    >>> y = (X.sum(axis=1) > 0).astype(int)
    >>> model = nn.Sequential(nn.Dense(4, 16, bias=False, seed=0), BatchNorm(16, activation="relu"),
    ...                       nn.Dense(16, 2, seed=1))
    >>> history = training.fit(model, (X, y), losses.softmax_cross_entropy, optim.Adam(model, 1e-2),
    ...                        epochs=5, batch_size=32, validation=0.2, patience=3)
    >>> history.accuracy[-1] > 0.9
    True
    """
    epochs, batch_size, seed = operator.index(epochs), operator.index(batch_size), operator.index(seed)
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2 (one example has no variance), got {batch_size}")
    if seed < 0:
        raise ValueError(f"seed must be non-negative, got {seed}")
    if patience is not None and operator.index(patience) < 1:
        raise ValueError(f"patience must be at least 1, got {patience}")
    if patience is not None and validation is None:
        raise ValueError("patience needs validation data")
    if schedule is not None and not hasattr(optimizer, "lr"):
        raise TypeError(f"a schedule needs an optimizer with lr, got {type(optimizer).__name__}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be above 0, got {clip_norm}")
    if resume and checkpoint is None:
        raise ValueError("resume needs the checkpoint to go on from")
    (X, y), held_out = _data(model, data, loss, validation, seed)
    if len(X) < 2:
        raise ValueError(f"training needs at least 2 examples, got {len(X)}")
    steps = len(X) // batch_size + (len(X) % batch_size > 1)
    state = RunState()
    if checkpoint is not None:
        made_of = {"optimizer": type(optimizer).__name__, "batch_size": batch_size, "seed": seed, "X": X, "y": y}
        made_of |= zip(("validation X", "validation y"), held_out or (None, None), strict=True)
        file = RunFile(checkpoint, model, optimizer, made_of)
        if resume and os.path.exists(checkpoint):
            state = file.load(best_wanted=patience is not None)

    rate: Any = getattr(optimizer, "lr", None)
    # The rate of a step of the epoch, counted from 0.
    rate_of = None if schedule is None else lambda step: rate * schedule(state.epoch - 1 + step / steps, epochs)
    # One buffer for all mini-batches: layers refer to x only until the next forward.
    buffer = np.empty((min(batch_size, len(X)), *X.shape[1:]), X.dtype)
    with (
        CtrlC() as ctrl_c,
        progress_bar(state, epochs=epochs, examples=len(X) - (len(X) % batch_size == 1), progress=progress) as bar,
        contextlib.ExitStack() as afterwards,
        np.errstate(over="ignore", invalid="ignore"),  # every loss is looked at: a warning before it would say less
    ):
        if rate_of is not None:
            afterwards.callback(setattr, optimizer, "lr", rate)
        model.train()
        stopped = False
        while not (stopped or ctrl_c.pressed or state.finished(epochs, patience)):
            state.begin_epoch()
            started = time.perf_counter() - state.seconds
            batches = minibatches(len(X), batch_size, np.random.default_rng([seed, state.epoch]))
            for rows in itertools.islice(batches, state.step, None):
                if rate_of is not None:
                    optimizer.lr = rate_of(state.step)
                # mode="clip" lets take write into the buffer directly; the rows are in range by construction
                x = np.take(X, rows, axis=0, out=buffer[: len(rows)], mode="clip")
                value = _step(model, x, y[rows], loss, optimizer, clip_norm, state)
                if bar is not None:
                    bar.update(len(rows))
                if on_step is not None and on_step((state.epoch - 1) * steps + state.step, value):
                    stopped = True
                if stopped or ctrl_c.pressed:
                    state.seconds = time.perf_counter() - started
                    break
            else:
                state.seconds = time.perf_counter() - started
                lr = getattr(optimizer, "lr", None) if rate_of is None else rate_of(steps - 1)
                state.end_epoch(lr, None if held_out is None else evaluate(model, held_out, loss))
                if patience is not None and state.history.best_epoch == state.epoch:
                    state.best = model.state_dict()
                stopped = on_epoch is not None and bool(on_epoch(state.epoch, state.history))
            if checkpoint is not None:
                file.save(state)
    if patience is not None and state.best:
        model.load_state_dict(state.best)
    return state.history


def _step(
    model: Any, x: Array, target: Array, loss: Loss, optimizer: Any, clip_norm: float | None, state: RunState
) -> float:
    """One mini-batch: forward, loss, backward, update. Returns the loss; the state counts it."""
    prediction = model(x)
    value, gradient = loss(prediction, target)
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} at epoch {state.epoch}, step {state.step + 1}")
    model.backward(gradient)
    if clip_norm is not None:
        norm = _clip(model.grads, clip_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradients' norm is {norm} at epoch {state.epoch}, step {state.step + 1}")
    optimizer.step()
    state.step += 1
    state.seen += len(x)
    state.total += float(value) * len(x)
    right, decisions = _right(loss, prediction, target)
    state.right += right
    state.decisions += decisions
    return value


def _clip(grads: Mapping[str, Array], limit: float) -> float:
    """Scale gradients to a joint norm of at most `limit`; returns the norm that they had."""
    norm = math.hypot(*(float(np.linalg.norm(g.astype(np.float64))) for g in grads.values()))
    scale = limit / (norm + 1e-6)  # PyTorch's, to the last constant
    if scale < 1:
        for g in grads.values():
            g *= scale
    return norm


def evaluate(
    model: Any, data: tuple[ArrayLike, ArrayLike], loss: Loss, batch_size: int = 1024
) -> tuple[float, float | None]:
    """Loss and accuracy at test time: in inference mode, with the running averages.

    Every layer's mode is afterwards what it was, even after an error.

    Parameters
    ----------
    model, data, loss
        As for `fit`.
    batch_size : int
        Examples that go through the model at once, at least 1: a matter of memory, the result is that of all at once.
        (Not so for a BatchNorm without running statistics, which normalises with those of whatever goes through.)

    Returns
    -------
    loss : float
        Mean over all examples.
    accuracy : float or None
        Part of the predictions that are right, for `losses.softmax_cross_entropy` (the largest output is the class)
        and `losses.sigmoid_cross_entropy` (a positive output is a yes); None for any other loss.

    Raises
    ------
    ValueError, TypeError
        No examples, or arguments that do not fit together.
    """
    if operator.index(batch_size) < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    X, y = _pair(data, "data")
    total, right, decisions = 0.0, 0, 0
    with _inference(model):
        for start in range(0, len(X), batch_size):
            x, target = X[start : start + batch_size], y[start : start + batch_size]
            prediction = model(x)
            total += float(loss(prediction, target)[0]) * len(x)
            more_right, more_decisions = _right(loss, prediction, target)
            right += more_right
            decisions += more_decisions
    return total / len(X), right / decisions if decisions else None


def _right(loss: Loss, prediction: Array, target: Array) -> tuple[int, int]:
    """Number of right decisions, and of all decisions: 0 for a loss that is none of a decision."""
    if loss is losses.softmax_cross_entropy:
        right = np.argmax(prediction, axis=1) == target
    elif loss is losses.sigmoid_cross_entropy:
        right = (prediction > 0) == (target > 0.5)
    else:
        return 0, 0
    return int(np.count_nonzero(right)), right.size


def _pair(data: tuple[ArrayLike, ArrayLike], name: str) -> tuple[Array, Array]:
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise TypeError(f"{name} must be a pair (X, y), got {type(data).__name__}")
    X, y = as_float(data[0]), np.asarray(data[1])
    if X.ndim == 0 or y.ndim == 0 or len(X) != len(y):
        raise ValueError(f"{name}: X and y must be equally long, got shapes {X.shape} and {y.shape}")
    if len(X) == 0:
        raise ValueError(f"{name}: no examples")
    if y.dtype.kind not in "biuf":
        raise TypeError(f"{name}: y must hold numbers, got {y.dtype}")
    return X, y


def _checked(model: Any, data: tuple[ArrayLike, ArrayLike], loss: Loss, name: str) -> tuple[Array, Array]:
    """The pair as arrays, once the model takes such an x and the loss takes the lowest and the highest target."""
    X, y = _pair(data, name)
    with _inference(model):
        try:
            prediction = model(np.zeros((2, *X.shape[1:]), X.dtype))
            loss(prediction, np.stack([y.min(axis=0), y.max(axis=0)]))
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{name} does not fit the model and the loss: {error}") from error
    return X, y


def _data(
    model: Any, data: tuple[ArrayLike, ArrayLike], loss: Loss, validation: Any, seed: int
) -> tuple[tuple[Array, Array], tuple[Array, Array] | None]:
    """Training and validation data, checked; the validation's are None, given, or a part of the first."""
    X, y = _checked(model, data, loss, "data")
    X = np.ascontiguousarray(X)  # take would copy a strided X whole, for every mini-batch
    if validation is None:
        return (X, y), None
    if not isinstance(validation, float):
        return (X, y), _checked(model, validation, loss, "validation")
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a pair (X, y) or a fraction between 0 and 1, got {validation}")
    labels = y if loss is losses.softmax_cross_entropy else np.zeros(len(y))
    held = held_out_rows(labels, validation, seed)
    if not held.any():
        raise ValueError(f"validation={validation} holds out no example: there is one of each class")
    return (X[~held], y[~held]), (X[held], y[held])


@contextlib.contextmanager
def _inference(model: Any) -> Iterator[None]:
    modes = [(layer, layer.training) for layer in walk([model])]
    model.train(False)
    try:
        yield
    finally:
        for layer, mode in modes:  # the outer ones first: setting theirs sets the inner ones' too
            layer.train(mode)
