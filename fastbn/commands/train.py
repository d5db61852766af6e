"""`fastbn train`: a network with batch normalization and its twin without, side by side."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fastbn
from fastbn import checkpoint, data, losses, nn, optim, plots, schedules, training

from .common import add_data, check_out, folder, load, need
from .resume import same_options

ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
FUSED = ("relu", "leaky_relu")  # what BatchNorm does in the same pass
RATES = {"sgd": 0.05, "rmsprop": 1e-3, "adam": 1e-3}
SCHEDULES = {
    "constant": lambda epochs: None,
    "step": lambda epochs: schedules.step(max(epochs, 1) / 3, 0.1),
    "cosine": lambda epochs: schedules.cosine(),
    "inverse-time": lambda epochs: schedules.inverse_time(1),
}
WITH, WITHOUT = "with batch normalization", "without batch normalization"


def add_to(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add_parser(
        "train",
        help="train a network with batch normalization and its twin without",
        description="Train a network with batch normalization, and its twin without from the same seed and "
        "mini-batches; report both on held-out data; write model, picture and figures.",
    )
    add_data(parser)
    add = parser.add_argument
    rates = ", ".join(f"{rate} for {name}" for name, rate in RATES.items())
    add("--out", type=folder, default="fastbn-run", help="the folder to write into (default: %(default)s)")
    add("--hidden", type=hidden_widths, default="100,100", help="widths of the hidden layers (default: %(default)s)")
    add("--activation", choices=ACTIVATIONS, default="relu", help="of the hidden layers (default: %(default)s)")
    add("--optimizer", choices=RATES, default="adam", help="how steps are taken (default: %(default)s)")
    add("--lr", type=float, help=f"learning rate (default: {rates})")
    add("--momentum", type=float, help="of sgd (default: 0.9)")
    add("--bn-momentum", type=float, default=0.1,
        help="weight of the newest mini-batch in the running averages (default: %(default)s)")  # fmt: skip
    add("--schedule", choices=SCHEDULES, default="constant",
        help="of the learning rate: a tenth after every third of the epochs, half a cosine, or 1/(1 + epochs done) "
        "(default: %(default)s)")  # fmt: skip
    add("--clip-norm", type=float, help="the largest norm of all gradients together, to which larger ones are scaled")
    add("--epochs", type=int, default=20, help="passes over the training data (default: %(default)s)")
    add("--patience", type=int, help="stop after so many epochs without a lower loss on a tenth of the training data, "
        "left out for that, and keep the best")  # fmt: skip
    add("--batch-size", type=int, default=32, help="examples in a mini-batch (default: %(default)s)")
    add("--seed", type=int, default=0, help="of split, start values and mini-batches (default: %(default)s)")
    add("--no-batchnorm", action="store_true", help="train only the network without")
    add("--resume", action="store_true", help="go on with a training that was interrupted, with the same options")
    parser.set_defaults(run=run)


def hidden_widths(text: str) -> list[int]:
    try:
        widths = [int(width) for width in text.split(",")]
    except ValueError:
        widths = []
    if not widths or min(widths) < 1:
        raise argparse.ArgumentTypeError(f"expected widths such as 100,100, got {text!r}")
    return widths


def run(args: argparse.Namespace) -> None:
    """Train, print, write."""
    need({"safetensors": "saving the model needs", "matplotlib": "learning curves need"})
    if not 0 <= args.bn_momentum <= 1:
        raise ValueError(f"--bn-momentum must lie between 0 and 1, got {args.bn_momentum}")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {args.seed}")
    if args.momentum is not None and args.optimizer != "sgd":
        raise ValueError(f"--momentum is for --optimizer sgd, got {args.optimizer}")
    dataset = load(args)
    if dataset.y is None or dataset.classes is None:
        columns = f": name their column with --target, one of {', '.join(dataset.features)}" if dataset.features else ""
        raise ValueError(f"{args.data}: no labels to learn{columns}")
    train, held_out = data.split(dataset, seed=args.seed)
    if train.y is None or held_out.y is None:
        raise ValueError(f"{args.data}: no labels for the t10k images")
    names = [args.out / name for name in ("model.safetensors", "learning-curves.png", "metrics.json")]
    unfinished = {name: args.out / f"unfinished-{name.split()[0]}.safetensors" for name in (WITH, WITHOUT)}
    if not args.resume and (found := next((path for path in unfinished.values() if path.exists()), None)):
        raise ValueError(f"{found}: an interrupted training, give --resume to go on with it or delete it to begin anew")
    check_out(args.out, names)
    n_features, n_classes = train.X.shape[1], len(dataset.classes)
    print(f"{dataset.name}: {len(train.X)} training examples, {len(held_out.X)} held out, "
          f"{n_features} features, {n_classes} classes", flush=True)  # fmt: skip

    begun_with = args.out / "unfinished.json"
    with (
        _unfinished_in(args.out, [*unfinished.values(), begun_with]),
        same_options(args, begun_with, unfinished.values()),
    ):
        results, histories, saved = _train_networks(args, train, held_out, n_classes, unfinished)
        alone = _one_at_a_time(saved[0], held_out.X)
        _print_results(results, alone)

        metadata = {"fastbn": fastbn.__version__, "data": dataset.name, "classes": dataset.classes.tolist(),
                    "inputs": n_features, "columns": dataset.features}  # fmt: skip
        checkpoint.save(names[0], *saved, metadata=metadata)
        plots.learning_curves(histories, names[1])
        options = {key: value for key, value in vars(args).items() if key not in ("run", "out", "resume")}
        metrics = {"fastbn": fastbn.__version__, "data": dataset.name, "training_examples": len(train.X),
                   "held_out_examples": len(held_out.X), "options": options, "held_out": results,
                   "one_at_a_time": alone,
                   "epochs": {name: dataclasses.asdict(history) for name, history in histories.items()}}  # fmt: skip
        names[2].write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print("wrote", ", ".join(map(str, names)))


@contextlib.contextmanager
def _unfinished_in(folder: Path, files: Collection[Path]) -> Iterator[None]:
    """Make the folder for these files, which go when all is done; after an error, a new folder goes if it is empty."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
        for path in files:
            path.unlink(missing_ok=True)
    except KeyboardInterrupt:
        if any(path.exists() for path in files):
            raise KeyboardInterrupt(": the same command with --resume goes on where it stopped") from None
        raise
    finally:
        if new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _train_networks(
    args: argparse.Namespace, train: data.Dataset, held_out: data.Dataset, n_classes: int, unfinished: dict[str, Path]
) -> tuple[dict[str, dict[str, Any]], dict[str, training.History], tuple[Any, Any]]:
    """Results and histories by name, and the first network with its optimizer."""
    assert train.y is not None
    assert held_out.y is not None
    results: dict[str, dict[str, Any]] = {}
    histories: dict[str, training.History] = {}
    saved = None
    for name in (WITHOUT,) if args.no_batchnorm else (WITH, WITHOUT):
        print(f"training {name}", flush=True)
        model = _network([train.X.shape[1], *args.hidden, n_classes], args, batchnorm=name == WITH)
        optimizer = _optimizer(model, args)
        try:
            histories[name] = training.fit(
                model, (train.X, train.y), losses.softmax_cross_entropy, optimizer, epochs=args.epochs,
                batch_size=args.batch_size, seed=args.seed, patience=args.patience, clip_norm=args.clip_norm,
                validation=(held_out.X, held_out.y) if args.patience is None else 0.1,  # held-out data must not choose
                schedule=SCHEDULES[args.schedule](args.epochs), checkpoint=unfinished[name], resume=args.resume,
            )  # fmt: skip
        except FloatingPointError as error:
            unfinished[name].unlink(missing_ok=True)
            if saved is None:
                raise FloatingPointError(f"{name}, {error}: try a smaller --lr") from error
            results[name] = {"diverged": str(error)}
            continue
        loss, accuracy = training.evaluate(model, (held_out.X, held_out.y), losses.softmax_cross_entropy)
        if not math.isfinite(loss):
            raise FloatingPointError(f"{name}, the loss on held-out data is {loss}: try a smaller --lr")
        results[name] = {"accuracy": accuracy, "loss": loss, "seconds": sum(histories[name].seconds)}
        saved = saved or (model.eval(), optimizer)
    assert saved is not None
    return results, histories, saved


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


def _optimizer(model: nn.Sequential, args: argparse.Namespace) -> optim.SGD | optim.RMSprop | optim.Adam:
    lr = RATES[args.optimizer] if args.lr is None else args.lr
    if args.optimizer == "sgd":
        return optim.SGD(model, lr, momentum=0.9 if args.momentum is None else args.momentum)
    return optim.RMSprop(model, lr) if args.optimizer == "rmsprop" else optim.Adam(model, lr)


def _one_at_a_time(model: Any, X: np.ndarray) -> dict[str, Any]:
    """Compare outputs for examples that go through the model alone with those of the batch; 1,000 at most."""
    X = X[:1000]
    batch = model(X)
    alone = np.concatenate([model(X[i : i + 1]) for i in range(len(X))])
    return {
        "examples": len(X),
        "largest_difference": float(np.abs(alone - batch).max()),
        "other_predictions": int(np.count_nonzero(alone.argmax(axis=1) != batch.argmax(axis=1))),
    }


def _print_results(results: dict[str, dict[str, Any]], alone: dict[str, Any]) -> None:
    print(f"\n{'held-out data, running averages':<32}{'accuracy':>9}{'loss':>9}{'seconds':>9}")
    for name, row in results.items():
        if "diverged" in row:
            print(f"{name:<32}diverged: {row['diverged']}")
        else:
            print(f"{name:<32}{row['accuracy']:>8.2%} {row['loss']:>8.4f}{row['seconds']:>9.1f}")
    other = alone["other_predictions"]
    print(f"\none example at a time agrees with the batch: {alone['examples']} examples, largest difference of an "
          f"output {alone['largest_difference']:.1e}, {f'{other} other' if other else 'same'} predictions")  # fmt: skip
