"""`fastbn experiment`: the claims of fastbn.experiments."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from fastbn.experiments.common import check_pixels

from .common import add_data, check_out, folder, load, need

EXPERIMENTS = ("speed", "shift", "noise", "testtime")


def add_to(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add_parser(
        "experiment",
        help="try what the lectures claim about batch normalization",
        description="Try a claim of the lectures on data, with several seeds: print a table, write NAME.json and "
        "NAME.png. speed: steps to an accuracy, with and without; shift: how much a hidden layer's inputs move, and "
        "a shifted domain; noise: the gap between training and test against mini-batch size, beside dropout; "
        "testtime: one example at a time, and the running averages beside the exact statistics.",
    )
    add = parser.add_argument
    add("name", metavar="NAME", choices=(*EXPERIMENTS, "all"), help=f"{', '.join(EXPERIMENTS)} or all")
    add_data(parser)
    add("--seeds", type=int, help="runs with another split, start and order (default: the experiment's own number)")
    add("--out", type=folder, default="fastbn-experiments", help="the folder to write into (default: %(default)s)")
    add("--quick", action="store_true", help="the same code in seconds, on too little to conclude from")
    add("--paper", action="store_true", help="of speed: section 4.1 of Ioffe and Szegedy, 2015, at full length")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run, print, write, one after the other."""
    need(dict.fromkeys(("joblib", "matplotlib", "tqdm"), "experiments need"))
    if args.seeds is not None and args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
    if args.paper and args.name != "speed":
        raise ValueError(f"--paper is for the experiment speed, got {args.name}")
    names = EXPERIMENTS if args.name == "all" else ("paper",) if args.paper else (args.name,)
    check_out(args.out, [args.out / f"{name}{suffix}" for name in names for suffix in (".json", ".png")])
    dataset = load(args)
    if dataset.y is None:
        raise ValueError(
            f"{args.data}: no labels to learn" + (" (--target names their column)" * bool(dataset.features))
        )
    if {"shift", "paper"} & {*names}:
        check_pixels(dataset.X, args.data)
    options = {} if args.seeds is None else {"seeds": args.seeds}
    for name in names:
        module = importlib.import_module(f"fastbn.experiments.{name}")
        try:
            result = module.run(dataset, quick=args.quick, **options)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f" in {name}, which is not written") from None
        print(result.table(), flush=True)
        print("wrote", ", ".join(map(str, result.save(args.out))), end="\n\n", flush=True)
