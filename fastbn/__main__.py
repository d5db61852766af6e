"""The command line: `fastbn train`, `fastbn predict`, `fastbn experiment`, `fastbn info`; also `python -m fastbn`."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TextIO

import fastbn
from fastbn.commands import experiment, predict, train
from fastbn.commands.common import need, processes
from fastbn.distributed import RankError
from fastbn.labels import printable

SIGPIPE_STATUS = 128 + 13  # what a shell shows of a program that SIGPIPE ends


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0; 2 after one sentence on standard error; 130 after Ctrl-C; 141 where the reader of a pipe has gone.
    """
    with _open_standard_streams() as closed:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a label that its encoding lacks is printed as an escape
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            _run(argv, closed)
        except BrokenPipeError:  # the reader, say `head`, has seen enough
            _flush_or_drop(sys.stdout, sys.stderr)
            return SIGPIPE_STATUS
        except (ValueError, OSError, ImportError, FloatingPointError, RankError) as error:
            if isinstance(error, OSError) and error.errno and not error.filename:  # what is written to files names them
                error.filename = "standard output"
            return _failed(2, f"error: {error}")
        except MemoryError as error:
            return _failed(2, f"error: not enough memory{f': {error}' if str(error) else ''}")
        except KeyboardInterrupt as interrupt:
            return _failed(130, f"interrupted{str(interrupt) or ', nothing written'}")
        return 0


def _run(argv: Sequence[str] | None, closed: set[str]) -> None:
    if "--mpi" in (sys.argv[1:] if argv is None else argv):  # before argparse prints anything
        processes()
    try:
        args = _parser().parse_args(argv)
        if "check" in args:
            args.check(args)
    finally:  # argparse has printed something, or nothing
        _flush_or_drop(sys.stderr)
        sys.stdout.flush()
    if "stdout" in closed and "output_is_all" in args:
        raise OSError("standard output is closed")
    args.run(args)
    sys.stdout.flush()


def _failed(status: int, sentence: str) -> int:
    with contextlib.suppress(OSError):
        print(f"fastbn: {printable(sentence)}", file=sys.stderr)
    _flush_or_drop(sys.stdout, sys.stderr)
    return status


@contextlib.contextmanager
def _open_standard_streams() -> Iterator[set[str]]:
    """Open what the shell has closed (`>&-`), as nothing; gives the names of what was closed.

    Else a file of ours would get its number, and what a library prints there would land in it; and Python prints on
    standard output what is meant for a standard error that is not there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    closed = {name for name in ("stdout", "stderr") if getattr(sys, name) is None}
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        for name in closed:
            setattr(sys, name, nothing)
        try:
            yield closed
        finally:
            for name in closed:
                setattr(sys, name, None)


def _flush_or_drop(*streams: TextIO) -> None:
    """Flush; what cannot be written goes to nothing, else Python complains at exit, with a status of its own."""
    for stream in streams:
        try:
            stream.flush()
        except OSError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, option_string: Any = None) -> None:
        need({"shtab": "--print-completion needs"}, "completion")
        import shtab

        if shell not in shtab.SUPPORTED_SHELLS:
            raise argparse.ArgumentError(self, f"expected {', '.join(shtab.SUPPORTED_SHELLS)}, got {shell!r}")
        print(shtab.complete(parser, shell))
        parser.exit()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastbn", description="Batch normalization for NumPy on CPUs.")
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    parser.add_argument("--print-completion", action=_Completion, metavar="SHELL",
        help="print a script for bash, zsh or more that completes commands, options, files (needs shtab)")  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, predict, experiment):
        command.add_to(commands)
    info = commands.add_parser("info", help="print the configuration")
    info.set_defaults(run=lambda args: fastbn.show_config(), output_is_all=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
