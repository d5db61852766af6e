"""`fastbn experiment`: the claims of fastbn.experiments."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import numpy as np

from fastbn import data
from fastbn.experiments.common import check_pixels

from .common import add_data, folder, load, making, naming, need, say, whole_number

EXPERIMENTS = ("speed", "shift", "noise", "testtime")


def add_to(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add_parser(
        "experiment",
        help="try four claims about batch normalization on data",
        description="Try a claim about batch normalization on data, with several seeds: print a table, write "
        "NAME.json and NAME.png. speed: steps to an accuracy, with and without; shift: how much a hidden layer's "
        "inputs move, and a shifted domain; noise: the gap between training and test against mini-batch size, beside "
        "dropout; testtime: one example at a time, and the running averages beside the exact statistics.",
    )
    add: Any = parser.add_argument
    add("name", metavar="NAME", choices=(*EXPERIMENTS, "all"), help=f"{', '.join(EXPERIMENTS)} or all")
    add_data(parser)
    add(
        "--seeds",
        type=whole_number(1),
        help="runs with another split, start and order (default: the experiment's own number)",
    )
    out = add(
        "--out", type=folder, default="fastbn-experiments", help="the folder to write into (default: %(default)s)"
    )
    out.complete = "directory"
    add("--quick", action="store_true", help="the same code in seconds, on too little to conclude from")
    add("--paper", action="store_true", help="of speed: section 4.1 of Ioffe and Szegedy, 2015, at full length")
    parser.set_defaults(run=run, check=lambda args: check(parser, args))


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options that do not fit together."""
    if args.paper and args.name != "speed":
        parser.error(f"argument --paper: for the experiment speed, got {args.name}")


def run(args: argparse.Namespace) -> None:
    """Run, write, print, one after the other."""
    need(dict.fromkeys(("joblib", "matplotlib", "tqdm"), "experiments need"))
    names = EXPERIMENTS if args.name == "all" else ("paper",) if args.paper else (args.name,)
    with making(args.out, [args.out / f"{name}{suffix}" for name in names for suffix in (".json", ".png")]):
        dataset = load(args)
        if dataset.y is None:
            hint = " (--target names their column)" * bool(dataset.features)
            raise ValueError(f"{args.data}: no labels to learn{hint}")
        _check_classes(args.data, dataset)
        if {"shift", "paper"} & {*names}:
            check_pixels(dataset.X, args.data)
        options = {} if args.seeds is None else {"seeds": args.seeds}
        for name in names:
            module = importlib.import_module(f"fastbn.experiments.{name}")
            try:
                result = module.run(dataset, quick=args.quick, **options)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f" in {name}, which is not written") from None
            with naming(args.out):
                written = result.save(args.out)
            print(result.table(), end="\n\n", flush=True)
            say(f"wrote {', '.join(map(str, written))}")


def _check_classes(name: str, dataset: data.Dataset) -> None:
    """ValueError for numbers of which one occurs once: data.split would advise a regression, which none of these is."""
    classes, y = dataset.classes, dataset.y
    if classes is not None and y is not None and classes.dtype.kind in "iuf" and dataset.held_out is None:
        counts = np.bincount(y)
        if counts.min() < 2:
            once = classes[counts.argmin()]
            raise ValueError(
                f"{name}: experiments learn classes, of 2 examples or more each, got the number {once} once"
            )
