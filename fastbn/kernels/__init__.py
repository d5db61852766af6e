"""The compiled loops. Chooses, at import, the build for this processor; FASTBN_ISA forces one.

Attributes
----------
BUILDS : tuple of str
    Builds that are installed and that this processor runs, best last. All give the same bits.
BUILD : str
    The one in use.
"""

import os
from importlib import import_module
from importlib.util import find_spec

if find_spec(f"{__name__}.cpu") is None:
    raise ImportError("fastbn is not built here: run `python -m pip install -e .` in this source tree, or leave it")

from . import cpu

BUILDS = tuple(name for name in cpu.builds() if find_spec(f"{__name__}.batchnorm_{name}"))
BUILD = os.environ.get("FASTBN_ISA") or BUILDS[-1]
if BUILD not in BUILDS:
    raise ImportError(f"FASTBN_ISA must name a build that this processor runs: expected one of {BUILDS}, got {BUILD!r}")

table = import_module(f"{__name__}.batchnorm_{BUILD}").table
updates = import_module(f"{__name__}.optim_{BUILD}").updates
