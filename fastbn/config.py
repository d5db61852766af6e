"""What is installed, and what it uses here."""

import os

import numpy as np

from . import kernels
from .kernels import machine, threads


def show_config() -> None:
    """Print versions, the build of the loops in use, threads, processor and settings, as a bug report needs them.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.show_config()  # doctest: +ELLIPSIS
    fastbn ...
    """
    import platform  # what takes time, and inference does without
    from importlib.metadata import version

    openmp = machine.openmp_version()
    rows = {
        "fastbn": version("fastbn"),
        "numpy": np.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "kernels": f"{kernels.BUILD} (this processor runs {', '.join(kernels.BUILDS)}; FASTBN_ISA forces one)",
        "openmp": str(openmp) if openmp else "none: built serial",
        "threads": f"{threads.get_num_threads()} of {os.cpu_count()} processors",
        "cpu": "{} family {} model {}".format(*machine.processor()),
        "caches": _in_words(machine.caches()),
        "family": f"{kernels.FAMILY}, whose settings are in force (FASTBN_FAMILY forces one)",
    }
    for name, value in rows.items():
        print(f"{name:<8} {value}")
    settings = machine.get_settings()
    width = max(map(len, settings))
    for name, number in settings.items():
        print(f"  {name:<{width}} {_size(number) if name.endswith('_bytes') else number}")


def _size(nbytes: int) -> str:
    """A number of bytes in the largest unit of 1024 that leaves no long fraction."""
    if nbytes >= 2**50:
        return "no limit"
    for unit, letters in ((2**20, "MB"), (2**10, "KB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.4g} {letters}"
    return str(nbytes)


def _in_words(caches: dict[str, int]) -> str:
    """What the system says of the caches."""
    sizes = [f"L{n} {_size(caches[f'l{n}_bytes'])}" for n in (1, 2, 3) if caches[f"l{n}_bytes"]]
    shared = f", shared by {caches['l3_sharers']} processors" if caches["l3_sharers"] else ""
    return f"{', '.join(sizes)}{shared}" if sizes else "unknown"
