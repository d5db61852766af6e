"""The training loop: seeded shuffled mini-batches, a progress bar, a history; and evaluation at test time."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import losses
from .averaging import Average
from .data import minibatches
from .history import History
from .nn import leaves
from .pairs import Loss, check_finite, inference, pair, with_validation
from .parallel import Ranks
from .recalibration import recalibrate, retake, tracking
from .runstate import RunFile, RunState
from .schedules import Schedule
from .state import Array, whole
from .terminal import CtrlC, epoch_line, progress_bar

__all__ = ["History", "Loss", "evaluate", "fit", "recalibrate"]

EVALUATED_AT_ONCE = 1024


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
    average: float | str | None = None,
    average_from: int | None = None,
    on_step: Callable[[int, float], Any] | None = None,
    on_epoch: Callable[[int, History], Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    verbose: bool = False,
    comm: Any = None,
) -> History:
    """Train a model by mini-batches, and leave it in training mode.

    Parameters
    ----------
    model : nn.Sequential, BatchNorm or any layer
        Model, which is changed in place.
    data : (X, y)
        Examples X, (N, ...), float32 or float64, and their targets y, (N, ...), as the loss takes them. All numbers
        must be finite.
    loss : callable
        Function of (prediction, target) that returns the mean loss and its gradient with respect to the prediction, as
        those of `fastbn.losses` do.
    optimizer : SGD, RMSprop, Adam, or anything with a ``step()``
        Optimizer that was made for this model.
    epochs : int
        Number of passes over the data, at least 1. Every epoch visits all examples in a fresh order.
    batch_size : int
        Number of examples in a mini-batch, at least 2. A last, shorter mini-batch is kept, but dropped if it would hold
        a single example, which has no variance.
    seed : int
        Seed of the order of the examples. The same seed, data and batch size give the same mini-batches.
    validation : (X, y) or float, optional
        Data that are evaluated after every epoch. A fraction within (0, 1) holds out that part of the data, drawn by
        the seed: of every class for `fastbn.losses.softmax_cross_entropy`, of all examples for another loss.
    patience : int, optional
        Number of epochs in a row without a lower validation loss after which training stops. Wherever training ends,
        the model then gets the weights and running averages of ``history.best_epoch``.
    schedule : callable, optional
        Function of (t, epochs) that returns a factor of the optimizer's rate for the next step. t is the number of
        epochs done, a float. See `fastbn.schedules`. After the training, the rate is what it was before.
    clip_norm : float, optional
        Largest Euclidean norm of all gradients together, taken in float64. Larger gradients are scaled down to it, as
        by PyTorch's ``clip_grad_norm_``.
    average : float within (0, 1) or "swa", optional
        When training ends, the model gets an average of its weights in the place of the last ones. A float d, such as
        0.999: the exponentially weighted average over all steps, in which a step has d times the weight of the next
        one, divided by the sum of these weights. "swa": the mean over the ends of epochs (Izmailov et al. 2018). The
        running averages of BatchNorm are then taken anew from X, as by `recalibrate`; those of a layer that is frozen
        or in inference mode stay. The history, validation included, is of the weights that are trained: `evaluate`
        tells what the average is worth. It cannot be combined with `patience`, which restores other weights.
    average_from : int, optional
        For average="swa", the first epoch, counted from 1, whose weights are averaged. The model keeps its last weights
        where training stops before the end of that epoch.
    on_step : callable, optional
        Function that is called as ``on_step(step, loss)`` after every update. Steps are counted from 1 over all epochs.
    on_epoch : callable, optional
        Function that is called as ``on_epoch(epoch, history)`` after every epoch and its validation. Training ends if
        either callback returns True, Python's or NumPy's. Any other value does not end it, such as the count that a
        file's ``write`` returns. The ``update`` of a tqdm bar does return True when it has drawn: do not return it.
    checkpoint : path, optional
        A file from which training can go on, written after every epoch and where training stops: by a callback, or
        by Ctrl-C. `fastbn.checkpoint.load` reads it as the model as it was after its last step.
    resume : bool
        Go on from that file, with results that are bit-identical to an uninterrupted run; from the beginning where
        there is no such file. A run that is finished is only read. What callbacks may have changed is restored from
        the file: the layers' modes, `frozen`, `renorm`, Dropout's p, and the optimizer's numbers. `epochs`,
        `patience`, `loss`, `schedule` and `clip_norm` are not compared and may be others than before. So may the
        optimizer's numbers: one that is neither what the run began with nor what it stopped with holds from here on.
        What callbacks keep elsewhere is theirs to restore.
    progress : bool
        Show a bar with loss, accuracy and examples per second, in notebooks and where standard error is a terminal, if
        tqdm is installed.
    verbose : bool
        Print a line after every epoch, where no bar is shown.
    comm : mpi4py communicator, or `fastbn.distributed.Communicator`, optional
        Processes, or ranks, that train together. Each calls fit with the same arguments and takes its part of every
        mini-batch, and of the validation data. The mini-batches are those of one process, whose training this one is,
        but for rounding. Every BatchNorm must be a `fastbn.distributed.SyncBatchNorm` of this comm, be frozen, or have
        ghost_size and no running averages. The loss must be a mean over examples. See Notes.

    Returns
    -------
    History

    Raises
    ------
    ValueError, TypeError
        Before the first step, for arguments that do not fit together, a NaN or infinity in the data (the message names
        array and row), and a checkpoint that is damaged or of another run: data, seed, batch size, model, kind of
        optimizer, its exclude, average, validation (the message has what was and what is). Nothing has been changed
        then.
    FloatingPointError
        The loss, or with `clip_norm` the norm of the gradients, is no longer finite; names epoch and step. The
        parameters are those that gave this loss. Or a parameter, a running average or the validation loss is no longer
        finite after an epoch, which is named.

    Notes
    -----
    Ctrl-C in the main thread acts after the current step: the checkpoint is written, KeyboardInterrupt raised. A
    second one acts at once.

    With `comm`, parameters, running averages and decisions are the same on all ranks, bit for bit, and the same number
    of ranks gives the same bits every time. A gradient is the sum of the ranks' gradients in float64, rounded once.
    Each rank draws Dropout's random numbers from a stream of its own. Rank 0 alone shows progress and writes the
    checkpoint, which all ranks read; another number of ranks, or one process, may go on with it. Callbacks are called
    on every rank. Where one of them returns True, or somebody presses Ctrl-C, all ranks end after the same step. An
    error on one rank is raised there, and the others raise a `fastbn.distributed.RankError` with its words. Where data,
    model, optimizer or arguments differ between ranks, or a BatchNorm is none of those above, all raise a ValueError.

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
    with Ranks(comm) as ranks:
        epochs, batch_size, seed = whole(epochs, "epochs"), whole(batch_size, "batch_size"), whole(seed, "seed")
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        if batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (one example has no variance), got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be non-negative, got {seed}")
        if patience is not None and whole(patience, "patience") < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if patience is not None and validation is None:
            raise ValueError("patience needs validation data")
        if schedule is not None and not hasattr(optimizer, "lr"):
            raise TypeError(f"a schedule needs an optimizer with lr, got {type(optimizer).__name__}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, got {clip_norm}")
        if resume and checkpoint is None:
            raise ValueError("resume needs the checkpoint to go on from")
        _check_functions(loss, schedule, on_step, on_epoch)
        if isinstance(optimizer, type):
            made = f"{optimizer.__name__}(model, ...)"
            raise TypeError(f"expected an optimizer that was made for this model, as {made}, got the class itself")
        if not callable(getattr(optimizer, "step", None)):
            raise TypeError(f"expected an object with a step method as optimizer, got {optimizer!r}")
        changed = getattr(getattr(optimizer, "model", None), "params", {}).values()
        if changed and {*map(id, changed)}.isdisjoint(map(id, model.params.values())):
            raise ValueError(
                "expected an optimizer that was made for this model, got one that changes no parameter of it"
            )
        mean = _average(model, average, average_from, epochs, patience)
        (X, y), held_out = with_validation(model, data, loss, validation, seed)
        if len(X) < 2:
            raise ValueError(f"training needs at least 2 examples, got {len(X)}")
        steps = len(X) // batch_size + (len(X) % batch_size > 1)
        state = RunState()
        drawn = validation if validation is None or isinstance(validation, Real) else "a pair (X, y)"
        arguments = {
            "batch_size": batch_size, "seed": seed, "average": average, "average_from": average_from,
            "validation": drawn,
        }  # fmt: skip
        arrays = {"X": X, "y": y, "validation X": held_out and held_out[0], "validation y": held_out and held_out[1]}
        if checkpoint is not None:
            file = RunFile(checkpoint, model, optimizer, mean, arguments | arrays)
        resumed = resume and checkpoint is not None and os.path.exists(checkpoint)
        alike = arguments | {
            "epochs": epochs, "patience": patience, "clip_norm": clip_norm, "schedule": schedule is None,
            "checkpoint": checkpoint is None, "resume": resume,
        }  # fmt: skip
        ranks.begin(model, optimizer, arrays, alike, checkpoint if resumed else None)
        if resumed:
            state = file.load(best_wanted=patience is not None)

        shown = progress and ranks.rank == 0
        rate: Any = getattr(optimizer, "lr", None)
        # The rate of a step of the epoch, counted from 0.
        rate_of = None if schedule is None else lambda step: rate * schedule(state.epoch - 1 + step / steps, epochs)
        # One buffer for all mini-batches: layers refer to x only until the next forward.
        buffer = np.empty((min(batch_size, len(X)), *X.shape[1:]), X.dtype)
        with (
            CtrlC() as ctrl_c,
            progress_bar(state, epochs=epochs, examples=len(X) - (len(X) % batch_size == 1), progress=shown) as bar,
            contextlib.ExitStack() as afterwards,
            np.errstate(over="ignore", invalid="ignore"),  # every loss is looked at: a warning before it would say less
        ):
            if rate_of is not None:
                afterwards.callback(setattr, optimizer, "lr", rate)
            if not resumed:
                model.train()
            stopped = False
            while not (stopped or state.finished(epochs, patience)):
                state.begin_epoch()
                started = time.perf_counter() - state.seconds
                batches = minibatches(len(X), batch_size, np.random.default_rng([seed, state.epoch]))
                for rows in itertools.islice(batches, state.step, None):
                    if rate_of is not None:
                        optimizer.lr = rate_of(state.step)
                    # mode="clip" lets take write into the buffer directly; the rows are in range by construction
                    own = rows[ranks.part(len(rows))]
                    x = np.take(X, own, axis=0, out=buffer[: len(own)], mode="clip")
                    value = _step(model, x, y[own], loss, optimizer, clip_norm, state, ranks)
                    if mean is not None and average_from is None:
                        mean.update()
                    if bar is not None:
                        bar.update(len(rows))
                    stopped = on_step is not None and _stops(on_step((state.epoch - 1) * steps + state.step, value))
                    stopped = ranks.stops(stopped, ctrl_c)
                    if stopped:
                        state.seconds = time.perf_counter() - started
                        break
                else:
                    state.seconds = time.perf_counter() - started
                    lr = getattr(optimizer, "lr", None) if rate_of is None else rate_of(steps - 1)
                    state.end_epoch(lr, _after_epoch(model, held_out, loss, state.epoch, ranks))
                    if patience is not None and state.history.best_epoch == state.epoch:
                        state.best = model.state_dict()
                    if mean is not None and average_from is not None and state.epoch >= average_from:
                        mean.update()
                    if verbose and bar is None and ranks.rank == 0:
                        print(epoch_line(state.history, epochs), flush=True)
                    stopped = on_epoch is not None and _stops(on_epoch(state.epoch, state.history))
                    stopped = ranks.stops(stopped, ctrl_c)
                if rate_of is not None:
                    optimizer.lr = rate  # the state of the run; the schedule gives the rest
                if checkpoint is not None and ranks.rank == 0:
                    file.save(state)
        if patience is not None and state.best:
            model.load_state_dict(state.best)
        if mean is not None and mean.count:
            _give(mean, model, X)
            ranks.take_first(model)
        return state.history


def _check_functions(loss: Any, schedule: Any, on_step: Any, on_epoch: Any) -> None:
    """TypeError for what `fit` could not call."""
    if not callable(loss):
        raise TypeError(f"expected loss to be a function, as those of fastbn.losses, got {loss!r}")
    if schedule is not None and not callable(schedule):
        raise TypeError(f"expected schedule to be a function, as those of fastbn.schedules, got {schedule!r}")
    for name, function in (("on_step", on_step), ("on_epoch", on_epoch)):
        if function is not None and not callable(function):
            raise TypeError(f"expected {name} to be a function, got {function!r}")


def _stops(answer: Any) -> bool:
    """Whether a callback's answer is True itself; a comparison of NumPy's numbers gives NumPy's."""
    return answer is True or (isinstance(answer, np.bool_) and bool(answer))


def _average(
    model: Any, average: float | str | None, average_from: int | None, epochs: int, patience: int | None
) -> Average | None:
    """What `fit` averages, once its arguments are right and `_give` can do what it does."""
    if average != "swa" and average_from is not None:
        raise ValueError(f'average_from needs average="swa", got average={average!r}')
    if average is None:
        return None
    if isinstance(average, str) and average != "swa":
        raise ValueError(f'average must be a number between 0 and 1 or "swa", got {average!r}')
    if average == "swa" and average_from is None:
        raise ValueError('average="swa" needs average_from, the first epoch whose weights are averaged')
    if average_from is not None and not 1 <= whole(average_from, "average_from") <= epochs:
        raise ValueError(f"average_from must be an epoch from 1 to {epochs}, got {average_from}")
    if not isinstance(average, str) and not 0 < average < 1:
        raise ValueError(f'average must be a number between 0 and 1 or "swa", got {average!r}')
    if patience is not None:
        raise ValueError("patience restores the weights of the best epoch, average gives averaged ones: expected one")
    tracking(model)
    return Average(model.params, None if isinstance(average, str) else float(average))


def _give(mean: Average, model: Any, X: Array) -> None:
    """Give the averaged weights to the model, and running averages that are theirs; after an error all is as before."""
    before = model.state_dict()
    layers = [*leaves([model])]
    moving = [i for i in tracking(model) if layers[i].training and not layers[i].frozen]
    try:
        mean.give()
        if moving:
            retake(model, moving, X)
    except BaseException:
        model.load_state_dict(before)
        raise


def _after_epoch(
    model: Any, held_out: tuple[Array, Array] | None, loss: Loss, epoch: int, ranks: Ranks
) -> tuple[float, float | None] | None:
    """Loss and accuracy of the validation data; FloatingPointError where they, or the model, are not finite."""
    try:
        for name, a in model.state_dict().items():
            check_finite(a, f"the model's {name!r}")
    except ValueError as error:
        raise FloatingPointError(f"after epoch {epoch}, {error}") from None
    ranks.check_same(model, epoch)
    if held_out is None:
        return None
    X, y = (a[ranks.part(len(a))] for a in held_out)
    value, _, right, decisions = ranks.mean(*_evaluated(model, X, y, loss, EVALUATED_AT_ONCE))
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss of the validation data is {value} after epoch {epoch}")
    return value, right / decisions if decisions else None


def _step(
    model: Any,
    x: Array,
    target: Array,
    loss: Loss,
    optimizer: Any,
    clip_norm: float | None,
    state: RunState,
    ranks: Ranks,
) -> float:
    """One mini-batch, or a rank's part of it: forward, loss, backward, update. Returns the loss of the whole; the state
    counts it."""
    with ranks.streams(model):
        prediction = model(x)
    value, gradient = loss(prediction, target) if len(x) else (0.0, np.zeros_like(prediction))
    value, n, right, decisions = ranks.mean(value, len(x), *_right(loss, prediction, target))
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} at epoch {state.epoch}, step {state.step + 1}")
    ranks.backward(model, gradient if n == len(x) else gradient * (len(x) / n))
    if clip_norm is not None:
        norm = _clip(model.grads, clip_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradients' norm is {norm} at epoch {state.epoch}, step {state.step + 1}")
    optimizer.step()
    state.step += 1
    state.seen += n
    state.total += float(value) * n
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
    model: Any, data: tuple[ArrayLike, ArrayLike], loss: Loss, batch_size: int = EVALUATED_AT_ONCE
) -> tuple[float, float | None]:
    """Return loss and accuracy in inference mode, that is with the running averages.

    Afterwards every layer is in the mode in which it was before, even after an error.

    Parameters
    ----------
    model, data, loss
        The same as in `fit`.
    batch_size : int
        Number of examples that go through the model at once, at least 1. It is a matter of memory: the result is that
        of all examples at once.
        (Not so for a BatchNorm without running statistics, which normalises with those of whatever goes through.)

    Returns
    -------
    loss : float
        Mean over all examples.
    accuracy : float or None
        Part of the predictions that are right. With `fastbn.losses.softmax_cross_entropy` the largest output is the
        predicted class, with `fastbn.losses.sigmoid_cross_entropy` a positive output is a yes. None for any other loss.

    Raises
    ------
    ValueError, TypeError
        No examples, or arguments that do not fit together.
    """
    if whole(batch_size, "batch_size") < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    X, y = pair(data, "data")
    value, _, right, decisions = _evaluated(model, X, y, loss, batch_size)
    return value, right / decisions if decisions else None


def _evaluated(model: Any, X: Array, y: Array, loss: Loss, batch_size: int) -> tuple[float, int, int, int]:
    """The loss of these examples, how many they are, and how many decisions are right, of how many."""
    total, right, decisions = 0.0, 0, 0
    with inference(model):
        for start in range(0, len(X), batch_size):
            x, target = X[start : start + batch_size], y[start : start + batch_size]
            prediction = model(x)
            total += float(loss(prediction, target)[0]) * len(x)
            more_right, more_decisions = _right(loss, prediction, target)
            right += more_right
            decisions += more_decisions
    return total / max(len(X), 1), len(X), right, decisions


def _right(loss: Loss, prediction: Array, target: Array) -> tuple[int, int]:
    """Number of right decisions, and of all decisions: 0 for a loss that is none of a decision."""
    if loss is losses.softmax_cross_entropy:
        right = np.argmax(prediction, axis=1) == target
    elif loss is losses.sigmoid_cross_entropy:
        right = (prediction > 0) == (target > 0.5)
    else:
        return 0, 0
    return int(np.count_nonzero(right)), right.size
