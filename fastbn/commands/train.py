"""`fastbn train`: a network with batch normalization and its twin without, side by side."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fastbn
from fastbn import checkpoint, data, distributed, nn, optim, schedules, training
from fastbn.files import write_whole
from fastbn.parallel import Ranks

from .common import add_data, aligned, folder, load, making, naming, need, processes, real_number, say, whole_number
from .resume import same_options
from .tasks import Classification, Regression, kind_of, task_of

ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
FUSED = ("relu", "leaky_relu")  # what BatchNorm does in the same pass
RATES = {"sgd": 0.05, "rmsprop": 1e-3, "adam": 1e-3}
SCHEDULES: dict[str, Callable[[int], schedules.Schedule | None]] = {
    "constant": lambda epochs: None,
    "step": lambda epochs: schedules.step(max(epochs, 1) / 3, 0.1),
    "cosine": lambda epochs: schedules.cosine(),
    "inverse-time": lambda epochs: schedules.inverse_time(1),
}
WITH, WITHOUT = "with batch normalization", "without batch normalization"
# An output of one example differs from the batch's by rounding: 1e-6 of the largest output where training went well.
AGREES = 1e-4
READY = "fastbn train, before its first step: folder and options are right"
VALIDATION = 0.1  # what --patience leaves out of the training data

Task = Classification | Regression


def add_to(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add_parser(
        "train",
        help="train a network with batch normalization and its twin without",
        description="Train a network with batch normalization, and its twin without from the same seed and "
        "mini-batches; report both on held-out data; write model, pictures and figures.",
    )
    add_data(parser)
    add: Any = parser.add_argument
    rates = ", ".join(f"{rate} for {name}" for name, rate in RATES.items())
    positive = real_number("a number above 0", lambda value: value > 0)
    fraction = real_number("a number from 0 to 1", lambda value: 0 <= value <= 1)
    add("--task", choices=("auto", "classification", "regression"), default="auto",
        help="whether the target holds classes or numbers; auto: numbers where one has a fraction, or where more than "
        "20 different ones have fewer than 10 examples each in the mean (text among these is refused), else classes "
        "(default: %(default)s)")  # fmt: skip
    add("--no-standardize", dest="standardize", action="store_false",
        help="leave inputs, and the targets of a regression, as they are: by default every column gets mean 0 and "
        "variance 1; pixels of images have mean 0 each, and variance 1 all together")  # fmt: skip
    out = add("--out", type=folder, default="fastbn-run", help="the folder to write into (default: %(default)s)")
    out.complete = "directory"
    add("--hidden", type=hidden_widths, default="100,100", help="widths of the hidden layers (default: %(default)s)")
    add("--activation", choices=ACTIVATIONS, default="relu", help="of the hidden layers (default: %(default)s)")
    add("--optimizer", choices=RATES, default="adam", help="how steps are taken (default: %(default)s)")
    add("--lr", type=positive, help=f"learning rate (default: {rates})")
    add("--momentum", type=real_number("a number from 0 to below 1", lambda value: 0 <= value < 1),
        help="of sgd (default: 0.9)")  # fmt: skip
    add("--bn-momentum", type=fraction, default=0.1,
        help="weight of the newest mini-batch in the running averages (default: %(default)s)")  # fmt: skip
    add("--schedule", choices=SCHEDULES, default="constant",
        help="of the learning rate: a tenth after every third of the epochs, half a cosine, or 1/(1 + epochs done) "
        "(default: %(default)s)")  # fmt: skip
    add("--clip-norm", type=positive,
        help="the largest norm of all gradients together, to which larger ones are scaled")  # fmt: skip
    add("--epochs", type=whole_number(1), default=20, help="passes over the training data (default: %(default)s)")
    add("--patience", type=whole_number(1), help="stop after so many epochs without a lower loss on a tenth of the "
        "training data, left out for that, and keep the best")  # fmt: skip
    add("--batch-size", type=whole_number(2), default=32, help="examples in a mini-batch (default: %(default)s)")
    add("--seed", type=whole_number(0), default=0,
        help="of split, start values and mini-batches (default: %(default)s)")  # fmt: skip
    add("--no-batchnorm", action="store_true", help="train only the network without")
    add("--resume", action="store_true", help="go on with a training that was interrupted, with the same options")
    add("--mpi", action="store_true", help="train in all processes that mpiexec started, each with its part of every "
        "mini-batch: mpiexec -n 4 python -m fastbn train --mpi (needs mpi4py)")  # fmt: skip
    parser.set_defaults(run=run, check=lambda args: check(parser, args))


def hidden_widths(text: str) -> list[int]:
    try:
        return [whole_number(1)(width.strip()) for width in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected widths such as 100,100, got {text!r}") from error


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options that do not fit together."""
    if args.momentum is not None and args.optimizer != "sgd":
        parser.error(f"argument --momentum: for --optimizer sgd alone, got {args.optimizer}")


def run(args: argparse.Namespace) -> None:
    """Train, write, print."""
    need({"safetensors": "saving the model needs", "matplotlib": "learning curves need"})
    comm = processes() if args.mpi else None
    with Ranks(comm) as ranks:  # what fails on one of them is an error of all
        printed = _run(args, comm, ranks)
    if printed is not None:
        results, detail, alone, task, files = printed
        _print_results(results, detail, alone, task)
        say(f"wrote {', '.join(str(path) for path in files if path.exists())}")


def _run(
    args: argparse.Namespace, comm: Any, ranks: Ranks
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], Task, list[Path]] | None:
    """All but what is printed in the end, which rank 0 returns. Another rank only trains, and writes nothing."""
    files = [args.out / name for name in ("model.safetensors", "metrics.json", "learning-curves.png", "confusion.png")]
    unfinished = {name: args.out / f"unfinished-{name.split()[0]}.safetensors" for name in (WITH, WITHOUT)}
    begun_with = args.out / "unfinished.json"
    with contextlib.nullcontext() if ranks.rank else making(args.out, files):
        if not args.resume and (found := [str(path) for path in unfinished.values() if path.exists()]):
            raise ValueError(
                f"{' and '.join(found)}: left by an interrupted training: the same command with --resume goes on with "
                f"it; to begin anew, delete {'them' if found[1:] else 'it'} or give another --out"
            )
        dataset = load(args, task=args.task)
        if dataset.y is None:
            names = ", ".join(dataset.features or ()) or f"1 to {dataset.X.shape[1]}" * (args.header is False)
            columns = f": name their column with --target, one of {names}" if names else ""
            raise ValueError(f"{args.data}: no labels to learn{columns}")
        train, held_out = data.split(dataset, seed=args.seed)
        task = task_of(args, train)
        say(f"{dataset.name}: {len(train.X)} training examples, {len(held_out.X)} held out, "
            f"{train.X.shape[1]} features, {task.about}")  # fmt: skip
        for note in (*dataset.notes, *[f"--task auto: {kind_of(dataset)}"] * (args.task == "auto")):
            say(note)
        inputs = _inputs(args, train)
        say(_said_of(inputs, train))

        if ranks.rank:
            ranks.wait(READY)
            _train_networks(args, task, train, held_out, inputs, unfinished, comm)
            return None
        with (
            _resumable([*unfinished.values(), begun_with]),
            same_options(args, begun_with, unfinished.values()),
        ):
            ranks.wait(READY)
            epochs, results, saved = _train_networks(args, task, train, held_out, inputs, unfinished, comm)
            detail = task.in_detail(saved[0], held_out)
            alone = _one_at_a_time(saved[0], held_out.X, task)
            metadata = {"fastbn": fastbn.__version__, "data": dataset.name, "inputs": train.X.shape[1],
                        "columns": dataset.features, **task.metadata}  # fmt: skip
            options = {key: value for key, value in vars(args).items() if key not in ("run", "check", "out", "resume")}
            metrics = {"fastbn": fastbn.__version__, "data": dataset.name, "training_examples": len(train.X),
                       "held_out_examples": len(held_out.X), "options": options, "held_out": results,
                       **detail, "one_at_a_time": alone, "epochs": epochs}  # fmt: skip
            # Before anything is printed: whoever has stopped to read the lines still gets the files.
            with naming(args.out):
                checkpoint.save(files[0], *saved, metadata=metadata)
                write_whole(files[1], f"{json.dumps(metrics, indent=2)}\n".encode())
                task.draw(epochs, detail, *files[2:])
    return results, detail, alone, task, files


def _inputs(args: argparse.Namespace, train: data.Dataset) -> nn.Standardize | None:
    """What the network gets before its first layer, with the statistics of the training data; None: X as it is."""
    if not args.standardize:
        with np.errstate(over="ignore"):
            fits = np.isfinite(train.X.astype(np.float32, copy=False)).all()
        if not fits:
            raise ValueError(f"{train.name}: holds numbers beyond float32's range, leave out --no-standardize")
        return None
    layer = nn.Standardize(train.X.shape[1], dtype="float32").fit(train.X)
    if train.images:
        # A border pixel that is bright in one of 60,000 images would be 245 standard deviations of its own. On
        # Fashion-MNIST, one scale for all is as good as one for each, and learns a little better.
        layer.var[...] = layer.var.mean()
    return layer


def _said_of(inputs: nn.Standardize | None, train: data.Dataset) -> str:
    if inputs is None:
        return "inputs as they are"
    if train.images:
        return "inputs standardized, by the mean of each pixel and one scale for all"
    constant = int(np.count_nonzero(inputs.var == 0))
    return "inputs standardized, column by column" + f", {constant} of them constant" * bool(constant)


@contextlib.contextmanager
def _resumable(files: Sequence[Path]) -> Iterator[None]:
    """These files go when all is done; after Ctrl-C, what to do with them is said."""
    try:
        yield
    except KeyboardInterrupt:
        if any(path.exists() for path in files):
            raise KeyboardInterrupt(": the same command with --resume goes on where it stopped") from None
        raise
    for path in files:
        path.unlink(missing_ok=True)


def _train_networks(
    args: argparse.Namespace,
    task: Task,
    train: data.Dataset,
    held_out: data.Dataset,
    inputs: nn.Standardize | None,
    unfinished: dict[str, Path],
    comm: Any,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], tuple[nn.Sequential, Any]]:
    """Epochs and results by name, and the first network with its optimizer."""
    # Once, not in every step; and in float32, whatever the data are.
    with np.errstate(over="ignore"):
        X, held_out_X = (
            part.X.astype(np.float32, copy=False) if inputs is None else inputs(part.X) for part in (train, held_out)
        )
    if not np.isfinite(held_out_X).all():
        column = int(np.argwhere(~np.isfinite(held_out_X))[0, 1])
        called = repr(held_out.features[column]) if held_out.features else f"number {column + 1}"
        raise ValueError(
            f"{held_out.name}: a held-out example's column {called} is too far from the training data for float32"
        )
    target = task.targets(train)
    validation = held_out_X, task.targets(held_out)
    if args.patience is not None:  # held-out data must not choose
        labels = np.zeros(len(X)) if train.classes is None or train.y is None else train.y
        held = data.held_out_rows(labels, VALIDATION, args.seed)
        if not held.any():
            raise ValueError(f"{train.name}: --patience needs 2 training examples of a class, got 1 of each")
        (X, target), validation = (X[~held], target[~held]), (X[held], target[held])
    results: dict[str, dict[str, Any]] = {}
    epochs: dict[str, Any] = {}
    saved = None
    widths = [X.shape[1], *args.hidden, task.outputs]
    names = (WITHOUT,) if args.no_batchnorm else (WITH, WITHOUT)
    networks = {name: _network(widths, args, batchnorm=name == WITH) for name in names}
    first = [] if inputs is None else [inputs]
    tables = [_summary(name, [*first, *trained]) + "\n\n" for name, trained in networks.items()]
    sys.stdout.write("".join(tables))  # at once, before the training: a reader that has seen enough does not end it
    sys.stdout.flush()
    for name, trained in networks.items():
        say(f"training {name}")
        model = trained if inputs is None else nn.Sequential(inputs, *trained)
        optimizer = _optimizer(model, args)
        if comm is not None:
            distributed.convert(trained, comm)
        try:
            history = training.fit(
                trained, (X, target), task.loss, optimizer, epochs=args.epochs,
                batch_size=args.batch_size, seed=args.seed, patience=args.patience, clip_norm=args.clip_norm,
                validation=validation, schedule=SCHEDULES[args.schedule](args.epochs), checkpoint=unfinished[name],
                resume=args.resume, comm=comm,
            )  # fmt: skip
            scores = task.scores(model, held_out)
            if not math.isfinite(scores["loss"]):
                raise FloatingPointError(f"the loss on held-out data is {scores['loss']}")
        except FloatingPointError as error:
            unfinished[name].unlink(missing_ok=True)
            if saved is None:
                raise FloatingPointError(f"{name}, {error}: try a smaller --lr") from error
            results[name] = {"diverged": str(error)}
            continue
        epochs[name] = task.epochs(history, target, validation[1])
        results[name] = scores | {"seconds": sum(history.seconds)}
        saved = saved or (model.eval(), optimizer)
    assert saved is not None
    return epochs, results, saved


def _network(widths: list[int], args: argparse.Namespace, *, batchnorm: bool) -> nn.Sequential:
    """Dense and activation for every hidden layer, batch normalization between them or not, and Dense at the end."""
    seeds = np.random.default_rng(args.seed).integers(2**31, size=len(widths)).tolist()
    layers: list[Any] = []
    for seed, (n_in, n_out) in zip(seeds, itertools.pairwise(widths[:-1]), strict=False):
        layers.append(nn.Dense(n_in, n_out, bias=not batchnorm, seed=seed))
        fused = args.activation if batchnorm and args.activation in FUSED else None
        if batchnorm:
            layers.append(fastbn.BatchNorm(n_out, momentum=args.bn_momentum, activation=fused))
        if fused is None:
            layers.append(ACTIVATIONS[args.activation]())
    return nn.Sequential(*layers, nn.Dense(widths[-2], widths[-1], seed=seeds[-1]))


def _summary(name: str, layers: Iterable[Any]) -> str:
    """A table of layers, the shapes of their outputs, and how many numbers each one learns."""
    rows, width, total = [(name, "output", "parameters")], 0, 0
    for layer in layers:
        width = layer.n_out if isinstance(layer, nn.Dense) else width or layer.num_features
        config = layer.config() if isinstance(layer, fastbn.BatchNorm) else {}
        more = "no bias" if isinstance(layer, nn.Dense) and not layer.bias else config.get("activation")
        learned = sum(array.size for array in layer.params.values())
        total += learned
        rows.append((type(layer).__name__ + f" ({more})" * bool(more), f"(N, {width})", f"{learned:,}"))
    return aligned([*rows, ("total", "", f"{total:,}")])


def _optimizer(model: nn.Sequential, args: argparse.Namespace) -> optim.SGD | optim.RMSprop | optim.Adam:
    lr = RATES[args.optimizer] if args.lr is None else args.lr
    if args.optimizer == "sgd":
        return optim.SGD(model, lr, momentum=0.9 if args.momentum is None else args.momentum)
    return optim.RMSprop(model, lr) if args.optimizer == "rmsprop" else optim.Adam(model, lr)


def _one_at_a_time(model: Any, X: np.ndarray, task: Task) -> dict[str, Any]:
    """Compare outputs for examples that go through the model alone with those of the batch; 1,000 at most."""
    X = X[:1000]
    batch = model(X)
    alone = np.concatenate([model(X[i : i + 1]) for i in range(len(X))])
    difference, largest = float(np.abs(alone - batch).max()), float(np.abs(batch).max())
    found = {"examples": len(X), "largest_difference": difference, "largest_output": largest}
    if isinstance(task, Classification):
        found["other_predictions"] = int(np.count_nonzero(alone.argmax(axis=1) != batch.argmax(axis=1)))
    return found


def _print_results(
    results: dict[str, dict[str, Any]], detail: dict[str, Any], alone: dict[str, Any], task: Task
) -> None:
    print(f"{'held-out data, running averages':<31}", *(f"{name:>9}" for name in (*task.formats, "seconds")))
    for name, row in results.items():
        if "diverged" in row:
            print(f"{name:<32}diverged: {row['diverged']}")
            continue
        cells = ["-" if row[key] is None else _short(row[key], form) for key, form in task.formats.items()]
        print(f"{name:<31}", *(f"{cell:>9}" for cell in (*cells, f"{row['seconds']:.1f}")))
    for table in task.tables(f"{next(iter(results))}, class by class", detail):
        print(f"\n{table}")
    agrees = alone["largest_difference"] <= AGREES * alone["largest_output"]
    other = alone.get("other_predictions")
    predictions = "" if other is None else f", {f'{other} other' if other else 'same'} predictions"
    print(f"\none example at a time {'agrees with' if agrees else 'DIFFERS from'} the batch: {alone['examples']} "
          f"examples, largest difference of an output {alone['largest_difference']:.1e}, largest output "
          f"{alone['largest_output']:.1e}{predictions}", flush=True)  # fmt: skip


def _short(value: float, form: str) -> str:
    return format(value, form if abs(value) < 1e5 else ".4g")
