"""The machine that figures were measured on, and what else it was doing."""

import argparse
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("fastbn", "numpy", "torch", "jax", "onnxruntime", "scikit-learn", "numba", "numexpr")


def parsed(parser: argparse.ArgumentParser, file: str | None = None) -> tuple[argparse.Namespace, Path]:
    """The options of a parser that has --quick, and the folder of the results: the processor family's, or --output's.

    With `file`, which is kept there, --redraw is an option too.
    """
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: the family's folder of bench/results")
    if file is not None:
        parser.add_argument("--redraw", action="store_true", help=f"from the {file} there, without measuring")
    options = parser.parse_args()
    if options.quick and options.output is None:
        parser.error("expected --output with --quick, whose figures must not replace the measured ones")
    folder = options.output or RESULTS / caches()["family"]
    if file is not None and options.redraw and not (folder / file).is_file():
        parser.error(f"expected a report to draw again, got no {folder / file}")
    return options, folder


def processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def caches() -> dict[str, Any]:
    """The processor's family and caches: all that the benchmarks know of them.

    "family", a name such as "zen3"; "l2_bytes", "l3_bytes" and "l3_sharers", None where nobody says; and
    "usable_bytes", what a process can count on of the last-level cache.
    """
    from fastbn import kernels

    told = {key: kernels.machine.caches()[key] or None for key in ("l2_bytes", "l3_bytes", "l3_sharers")}
    return {"family": kernels.FAMILY, **told, "usable_bytes": kernels.machine.get_settings()["l3_bytes"]}


def processor_name() -> str:
    try:
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def load() -> float | None:
    """Processes that ran in the last minute, on average; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def describe() -> dict[str, Any]:
    """What a report says of the machine; prints the load, and a warning where it is not idle."""
    from fastbn import kernels

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    busy = load()
    print(f"load of the last minute: {busy}" + (" (the figures will be disturbed)" if busy and busy > 0.3 else ""))
    return {
        "processor": processor_name(),
        "processors": processors(),
        **caches(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "build": kernels.BUILD,
        "versions": versions,
        "load": busy,
    }


def in_words(machine: Mapping[str, Any]) -> str:
    """A few lines of Markdown. What an older report did not ask is unknown."""
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    missing = ", ".join(name for name, v in machine["versions"].items() if not v)
    load = "unknown" if machine["load"] is None else f"{machine['load']} processes"
    sharers = f"shared by {machine['l3_sharers'] or 'an unknown number of'} processors"
    return (
        f"{machine['processor']}, family {machine['family']}, {machine['processors']} processors; "
        f"L2 {megabytes(machine['l2_bytes'])}, L3 {megabytes(machine['l3_bytes'])} {sharers}, "
        f"of which {megabytes(machine['usable_bytes'])} are counted on; "
        f"{machine['system']}, C library {machine['libc'] or 'unknown'}; "
        f"fastbn's build {machine['build']}; load before: {load}.\n"
        f"{versions}{'; not installed: ' + missing if missing else ''}."
    )


def megabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:g} MB"
