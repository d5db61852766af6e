"""What `fastbn train` was begun with, so that --resume can say which option is another one."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fastbn.files import write_whole

# Data are compared by what they hold, when training goes on; epochs and processes may be more, or fewer.
_NOT_COMPARED = ("out", "resume", "data", "epochs", "mpi")
# Stored as the opposite of what is written: --no-standardize.
_OPPOSITE = ("standardize",)


@contextlib.contextmanager
def same_options(args: argparse.Namespace, path: Path, unfinished: Collection[Path]) -> Iterator[None]:
    """Keep the options in a file, which goes after an error where none of the unfinished trainings' files is left; with
    --resume, ValueError with the first one that was another before."""
    options = {k: v for k, v in vars(args).items() if k not in _NOT_COMPARED and not callable(v)}
    options = json.loads(json.dumps(options))  # as the file will have them: lists instead of tuples
    if args.resume and path.exists():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: damaged, delete it to go on without a look at the options ({error})") from error
        for name, value in options.items():
            was = before.get(name)
            if was != value:
                negative = name in _OPPOSITE
                raise ValueError(
                    f"{path}: --resume needs the options of the interrupted training, "
                    f"--{'no-' * negative}{name.replace('_', '-')} was {_shown(was, negative)}, "
                    f"is {_shown(value, negative)}"
                )
    if not (args.resume and any(file.exists() for file in unfinished)):
        write_whole(path, json.dumps(options).encode())
    try:
        yield
    finally:
        if not any(file.exists() for file in unfinished):
            path.unlink(missing_ok=True)


def _shown(value: Any, negative: bool) -> Any:
    if value is None or isinstance(value, bool):
        return "given" if bool(value) != negative else "not given"
    return ",".join(map(str, value)) if isinstance(value, list) else value
