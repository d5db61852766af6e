"""What is installed, and what it uses here."""

import os
import platform
from importlib.metadata import version

import numpy as np

from . import kernels
from .kernels import cpu, threads


def show_config() -> None:
    """Print versions, the kernel build in use, and threads: what a bug report needs.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.show_config()  # doctest: +ELLIPSIS
    fastbn ...
    """
    openmp = cpu.openmp_version()
    rows = {
        "fastbn": version("fastbn"),
        "numpy": np.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "kernels": f"{kernels.BUILD} (this processor runs {', '.join(kernels.BUILDS)}; FASTBN_ISA forces one)",
        "openmp": str(openmp) if openmp else "none: built serial",
        "threads": f"{threads.get_num_threads()} of {os.cpu_count()} processors",
    }
    for name, value in rows.items():
        print(f"{name:<8} {value}")
