"""The command line: `fastbn train`, `fastbn predict`, `fastbn experiment`, `fastbn info`; also `python -m fastbn`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

import fastbn
from fastbn.commands import experiment, predict, train

SIGPIPE_STATUS = 128 + 13  # what a shell shows of a program that SIGPIPE ends


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0; 2 after one sentence on standard error; 130 after Ctrl-C; 141 where the reader of a pipe has gone.
    """
    closed = sys.stdout is None
    _open_standard_streams()
    args = argparse.Namespace()
    try:
        try:
            args = _parser().parse_args(argv)
        finally:
            sys.stdout.flush()  # --help and --version
        if "check" in args:
            args.check(args)
        if closed and "output_is_all" in args:
            raise OSError("standard output is closed")
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        _say_no_more(sys.stdout, sys.stderr)
        return SIGPIPE_STATUS
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk is an error without a name
            flushed = _flushed()
            error.filename = (
                os.fspath(args.out) if flushed and "out" in args else None if flushed else "standard output"
            )
        return _failed(2, f"error: {error}")
    except MemoryError as error:
        return _failed(2, f"error: not enough memory{f': {error}' if str(error) else ''}")
    except KeyboardInterrupt as interrupt:
        return _failed(130, f"interrupted{str(interrupt) or ', nothing written'}")
    return 0


def _failed(status: int, sentence: str) -> int:
    try:
        print(f"fastbn: {sentence}", file=sys.stderr)
    except OSError:
        _say_no_more(sys.stderr)
    return status


def _open_standard_streams() -> None:
    """Open what the shell has closed (`>&-`), as nothing.

    Else a file of ours would get its number, and what a library prints there would land in it; and Python prints on
    standard output what is meant for a standard error that is not there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _flushed() -> bool:
    try:
        sys.stdout.flush()
    except OSError:
        _say_no_more(sys.stdout)
        return False
    return True


def _say_no_more(*streams: object) -> None:
    """Send what is still in these streams to nothing: Python would complain at exit, with a status of its own."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(nothing, stream.fileno())  # type: ignore[attr-defined]
    os.close(nothing)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbn", description="Batch normalization for NumPy on CPUs.")
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, predict, experiment):
        command.add_to(commands)
    info = commands.add_parser("info", help="print the configuration")
    info.set_defaults(run=lambda args: fastbn.show_config(), output_is_all=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
