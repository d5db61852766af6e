"""The training loop: seeded shuffled mini-batches, a progress bar, a history; and evaluation at test time."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from . import losses
from .data import held_out_rows, minibatches
from .history import History
from .nn import Sequential
from .recalibration import recalibrate
from .runstate import RunState
from .state import Array, as_float
from .terminal import CtrlC, progress_bar

__all__ = ["History", "evaluate", "fit", "recalibrate"]

Loss = Callable[[Array, Array], tuple[float, Array]]


class Optimizer(Protocol):
    """What `fit` asks of an optimizer; for a schedule also the attribute `lr`."""

    def step(self) -> Any: ...


def fit(
    model: Any,
    data: tuple[ArrayLike, ArrayLike],
    loss: Loss,
    optimizer: Optimizer,
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    validation: tuple[ArrayLike, ArrayLike] | float | None = None,
    patience: int | None = None,
    on_step: Callable[[int, float], Any] | None = None,
    on_epoch: Callable[[int, History], Any] | None = None,
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
    on_step : callable, optional
        on_step(step, loss) after every update; steps are counted from 1 over all epochs.
    on_epoch : callable, optional
        on_epoch(epoch, history) after every epoch and its validation. A true result of either ends training there.
    progress : bool
        Show a bar with loss, accuracy and examples per second, where standard error is a terminal and tqdm is
        installed.

    Returns
    -------
    History

    Raises
    ------
    ValueError, TypeError
        Before the first step, for arguments that do not fit together: nothing has been changed then.
    FloatingPointError
        The loss is no longer finite; names epoch and step. The parameters are those that gave this loss.

    Notes
    -----
    Ctrl-C in the main thread acts after the current step: KeyboardInterrupt. A second one acts at once.

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
    if operator.index(epochs) < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if operator.index(batch_size) < 2:
        raise ValueError(f"batch_size must be at least 2 (one example has no variance), got {batch_size}")
    if patience is not None and operator.index(patience) < 1:
        raise ValueError(f"patience must be at least 1, got {patience}")
    if patience is not None and validation is None:
        raise ValueError("patience needs validation data")
    (X, y), held_out = _data(model, data, loss, validation, seed)
    if len(X) < 2:
        raise ValueError(f"training needs at least 2 examples, got {len(X)}")
    steps = len(X) // batch_size + (len(X) % batch_size > 1)
    np.random.default_rng([seed, 0])  # a seed that is none is an error before the first step
    state = RunState()
    # One buffer for all mini-batches: layers refer to x only until the next forward.
    buffer = np.empty((min(batch_size, len(X)), *X.shape[1:]), X.dtype)
    bar_of = progress_bar(state, epochs=epochs, examples=len(X) - (len(X) % batch_size == 1), progress=progress)
    # The loss is looked at in every step: numpy's warnings on the way to a NaN would say less.
    with CtrlC() as ctrl_c, bar_of as bar, np.errstate(over="ignore", invalid="ignore"):
        model.train()
        stopped = False
        while not stopped and not state.finished(epochs, patience):
            state.begin_epoch()
            started = time.perf_counter() - state.seconds
            batches = minibatches(len(X), batch_size, np.random.default_rng([seed, state.epoch]))
            for rows in itertools.islice(batches, state.step, None):
                # mode="clip" lets take write into the buffer directly; the rows are in range by construction
                x = np.take(X, rows, axis=0, out=buffer[: len(rows)], mode="clip")
                target = y[rows]
                prediction = model(x)
                value, gradient = loss(prediction, target)
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at epoch {state.epoch}, step {state.step + 1}")
                model.backward(gradient)
                optimizer.step()
                state.step += 1
                state.total += float(value) * len(rows)
                state.seen += len(rows)
                right, decisions = _right(loss, prediction, target)
                state.right += right
                state.decisions += decisions
                if bar is not None:
                    bar.update(len(rows))
                if on_step is not None and on_step((state.epoch - 1) * steps + state.step, value):
                    stopped = True
                if stopped or ctrl_c.pressed:
                    break
            state.seconds = time.perf_counter() - started
            if not stopped and not ctrl_c.pressed:
                state.end_epoch()
                if held_out is not None:
                    val_loss, val_accuracy = evaluate(model, held_out, loss)
                    state.history.val_loss.append(val_loss)
                    if val_accuracy is not None:
                        state.history.val_accuracy.append(val_accuracy)
                    if patience is not None and state.history.best_epoch == state.epoch:
                        state.best = model.state_dict()
                stopped = on_epoch is not None and bool(on_epoch(state.epoch, state.history))
            if ctrl_c.pressed:
                raise KeyboardInterrupt
    if state.best:
        model.load_state_dict(state.best)
    return state.history


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
    modes = [(layer, layer.training) for layer in _walk(model)]
    model.train(False)
    try:
        yield
    finally:
        for layer, mode in modes:  # the outer ones first: setting theirs sets the inner ones' too
            layer.train(mode)


def _walk(model: Any) -> Iterator[Any]:
    yield model
    if isinstance(model, Sequential):
        for layer in model:
            yield from _walk(layer)
