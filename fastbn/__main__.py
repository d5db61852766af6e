"""The command line: `fastbn train`, `fastbn predict`, `fastbn experiment`, `fastbn info`; also `python -m fastbn`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import fastbn
from fastbn.commands import experiment, predict, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 after one sentence on standard error."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, say `head`, has seen enough; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if isinstance(error, OSError) and error.errno and not error.filename and "out" in args:
            error.filename = os.fspath(args.out)  # a full disk is an error without a name
        print(f"fastbn: error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"fastbn: error: not enough memory{f': {error}' if str(error) else ''}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"fastbn: interrupted{str(interrupt) or ', nothing written'}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbn", description="Batch normalization for NumPy on CPUs.")
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, predict, experiment):
        command.add_to(commands)
    info = commands.add_parser("info", help="print the configuration")
    info.set_defaults(run=lambda args: fastbn.show_config())
    return parser


if __name__ == "__main__":
    sys.exit(main())
