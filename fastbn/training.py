"""The training loop: seeded shuffled mini-batches, a progress bar, a history; and evaluation at test time."""

from __future__ import annotations

import contextlib
import math
import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from . import losses
from .data import minibatches
from .nn import Sequential
from .state import Array, as_float

__all__ = ["History", "evaluate", "fit"]

Loss = Callable[[Array, Array], tuple[float, Array]]


class Optimizer(Protocol):
    """What `fit` asks of an optimizer."""

    def step(self) -> Any: ...


@dataclass
class History:
    """What `fit` measured, one entry for each epoch.

    Attributes
    ----------
    loss, accuracy : list of float
        Means over the epoch's examples, each taken in training mode before the step that its mini-batch made.
        `accuracy` stays empty for a loss that has none (see `evaluate`).
    val_loss, val_accuracy : list of float
        Of the validation data after the epoch, in inference mode; empty without validation data.
    seconds : list of float
        Time that the epoch's training took, without the validation.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def fit(
    model: Any,
    data: tuple[ArrayLike, ArrayLike],
    loss: Loss,
    optimizer: Optimizer,
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
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
    validation : (X, y), optional
        Evaluated after every epoch.
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

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import BatchNorm, losses, nn, optim, training
    >>> X = np.random.default_rng(0).standard_normal((256, 4), dtype=np.float32)
    >>> y = (X.sum(axis=1) > 0).astype(int)
    >>> model = nn.Sequential(nn.Dense(4, 16, bias=False, seed=0), BatchNorm(16, activation="relu"),
    ...                       nn.Dense(16, 2, seed=1))
    >>> history = training.fit(model, (X, y), losses.softmax_cross_entropy, optim.Adam(model, 1e-2),
    ...                        epochs=5, batch_size=32)
    >>> history.accuracy[-1] > 0.9
    True
    """
    if operator.index(epochs) < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if operator.index(batch_size) < 2:
        raise ValueError(f"batch_size must be at least 2 (one example has no variance), got {batch_size}")
    X, y = _checked(model, data, loss, "data")
    if len(X) < 2:
        raise ValueError(f"training needs at least 2 examples, got {len(X)}")
    if validation is not None:
        validation = _checked(model, validation, loss, "validation")
    X = np.ascontiguousarray(X)  # take would copy a strided X whole, for every mini-batch
    rng = np.random.default_rng(seed)
    history = History()
    # One buffer for all mini-batches: layers refer to x only until the next forward.
    buffer = np.empty((min(batch_size, len(X)), *X.shape[1:]), X.dtype)
    examples = epochs * (len(X) - (len(X) % batch_size == 1))
    # The loss is looked at in every step: numpy's warnings on the way to a NaN would say less.
    with _progress_bar(examples, progress) as bar, np.errstate(over="ignore", invalid="ignore"):
        model.train()
        for epoch in range(1, epochs + 1):
            started = time.perf_counter()
            total, seen, right, decisions = 0.0, 0, 0, 0
            for step, rows in enumerate(minibatches(len(X), batch_size, rng), 1):
                # mode="clip" lets take write into the buffer directly; the rows are in range by construction
                x = np.take(X, rows, axis=0, out=buffer[: len(rows)], mode="clip")
                target = y[rows]
                prediction = model(x)
                value, gradient = loss(prediction, target)
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at epoch {epoch}, step {step}")
                model.backward(gradient)
                optimizer.step()
                total += float(value) * len(rows)
                seen += len(rows)
                more_right, more_decisions = _right(loss, prediction, target)
                right += more_right
                decisions += more_decisions
                if bar is not None:
                    accuracy = f", accuracy {right / decisions:.4f}" if decisions else ""
                    bar.set_description_str(f"epoch {epoch}/{epochs}", refresh=False)
                    bar.set_postfix_str(f"loss {total / seen:.4f}{accuracy}", refresh=False)
                    bar.update(len(rows))
            history.seconds.append(time.perf_counter() - started)
            history.loss.append(total / seen)
            if decisions:
                history.accuracy.append(right / decisions)
            if validation is not None:
                val_loss, val_accuracy = evaluate(model, validation, loss)
                history.val_loss.append(val_loss)
                if val_accuracy is not None:
                    history.val_accuracy.append(val_accuracy)
    return history


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


def _progress_bar(total: int, progress: bool) -> Any:
    """A context manager: a tqdm bar, or None where nobody would see it."""
    if progress:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=total, unit=" examples", unit_scale=True, disable=None)
            if not bar.disable:
                return bar
    return contextlib.nullcontext()
