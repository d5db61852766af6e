"""Whole trainings beside other libraries: python -m bench.training [--data FOLDER]

1. scikit-learn's digits, 5-fold: BatchNormClassifier and MLPClassifier, all parameters as they come.
2. With --data, a folder of idx files (Fashion-MNIST): 784-256-128-10, 10 epochs of mini-batches of 200, Adam, float32:
   BatchNormClassifier, MLPClassifier, and PyTorch (eager) with batch normalization in a plain loop.

Every training is a fresh process; the libraries take turns, round after round; medians of ratios. The seconds are those
of the training, without imports, reading the data, and the test.
"""

import argparse
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from bench import machine, results
from bench.workers import environ, environment
from fastbn import data

HIDDEN, EPOCHS, BATCH = (256, 128), 10, 200
Result = tuple[float, float]  # seconds, accuracy


def _estimator(name: str, **parameters: object) -> object:
    if name == "fastbn":
        from fastbn.estimators import BatchNormClassifier as Classifier
    else:
        from sklearn.neural_network import MLPClassifier as Classifier
    return Classifier(**parameters)


def digits(name: str, seed: int) -> Result:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import StratifiedKFold, cross_validate

    X, y = load_digits(return_X_y=True)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    scores = cross_validate(_estimator(name, random_state=seed), X, y, cv=folds, error_score="raise")
    return float(scores["fit_time"].sum()), float(scores["test_score"].mean())


def images(name: str, seed: int, folder: str, epochs: int) -> Result:
    train, test = data.split(data.load(folder))
    classifier = _estimator(name, hidden_layer_sizes=HIDDEN, max_iter=epochs, batch_size=BATCH, random_state=seed)
    started = time.perf_counter()
    classifier.fit(train.X, train.y)
    seconds = time.perf_counter() - started
    return seconds, float(np.mean(classifier.predict(test.X) == test.y))


def images_torch(name: str, seed: int, folder: str, epochs: int) -> Result:
    import torch
    from torch import nn

    train, test = data.split(data.load(folder))
    torch.manual_seed(seed)
    started = time.perf_counter()
    X, y = torch.from_numpy(train.X), torch.from_numpy(train.y)
    layers, width = [], X.shape[1]
    for n in HIDDEN:
        layers += [nn.Linear(width, n, bias=False), nn.BatchNorm1d(n), nn.ReLU()]
        width = n
    model = nn.Sequential(*layers, nn.Linear(width, len(train.classes)))
    optimizer, loss = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()
    for _ in range(epochs):
        for rows in torch.randperm(len(X)).split(BATCH):
            optimizer.zero_grad()
            loss(model(X[rows]), y[rows]).backward()
            optimizer.step()
    seconds = time.perf_counter() - started
    model.eval()
    with torch.inference_mode():
        chosen = model(torch.from_numpy(test.X)).argmax(dim=1).numpy()
    return seconds, float(np.mean(chosen == test.y))


def alone(threads: int, function: Callable[..., Result], *arguments: object) -> Result:
    """The function's result in a fresh process with that many threads."""
    with environ(environment(threads)), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_quietly, function, *arguments).result()


def _quietly(function: Callable[..., Result], *arguments: object) -> Result:
    warnings.simplefilter("ignore")  # MLPClassifier warns that ten epochs were not enough
    return function(*arguments)


def compare(title: str, threads: int, rounds: int, contestants: dict[str, tuple[Callable[..., Result], tuple]]) -> None:
    found: dict[str, list[Result]] = {name: [] for name in contestants}
    for seed in range(rounds):
        for name, (function, arguments) in contestants.items():
            found[name].append(alone(threads, function, name, seed, *arguments))
    print(f"\n{title}, threads: {threads}, rounds: {rounds}\n{'':24}seconds   fastbn is   accuracy (lowest)")
    first = [seconds for seconds, _ in found["fastbn"]]
    for name, values in found.items():
        seconds, accuracies = zip(*values, strict=True)
        faster = results.ratio(list(seconds), first)
        print(f"{name:22}{statistics.median(seconds):9.2f}{faster:10.2f} x"
              f"{statistics.mean(accuracies):11.2%} ({min(accuracies):.2%})", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder of idx files, as Fashion-MNIST comes")
    parser.add_argument("--threads", type=int, nargs="+", default=[machine.processors()])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    print(machine.in_words(machine.describe()))
    for threads in options.threads:
        compare("digits, 5-fold", threads, options.rounds, {"fastbn": (digits, ()), "MLPClassifier": (digits, ())})
        if options.data is not None:
            rest = options.data, options.epochs
            contestants = {"fastbn": (images, rest), "MLPClassifier": (images, rest), "PyTorch": (images_torch, rest)}
            compare(options.data, threads, options.rounds, contestants)


if __name__ == "__main__":
    main()
