"""The compiled loops. Chooses, at import, the processor's family, its settings, and the build.

Attributes
----------
FAMILY : str
    Family of this processor, whose settings are in force; FASTBN_FAMILY forces one. All give the same bits.
BUILDS : tuple of str
    Builds that are installed and that this processor runs, in the order of levels. All give the same bits.
BUILD : str
    The one in use: the family's choice; FASTBN_ISA forces one.
"""

import os
from importlib import import_module
from importlib.util import find_spec

if find_spec(f"{__name__}.machine") is None:
    raise ImportError("fastbn is not built here: run `python -m pip install -e .` in this source tree, or leave it")

from . import families, machine

_levels = machine.builds()
_caches = machine.caches()
FAMILY = os.environ.get("FASTBN_FAMILY") or families.recognised(*machine.processor(), _levels, _caches["l2_bytes"]).name
if FAMILY not in families.FAMILIES:
    raise ImportError(
        f"FASTBN_FAMILY must name a processor family: expected one of {tuple(families.FAMILIES)}, got {FAMILY!r}"
    )
_family = families.FAMILIES[FAMILY]
# Only a guest has strangers beside it in the cache: elsewhere all that share it are this machine's own processors.
_sharers = _caches["l3_sharers"] if machine.virtual() else 0
machine.set_settings(**_family.settings(_caches["l2_bytes"], _caches["l3_bytes"], _sharers, os.cpu_count() or 1))

BUILDS = tuple(name for name in _levels if find_spec(f"{__name__}.batchnorm_{name}"))
BUILD = os.environ.get("FASTBN_ISA") or families.build_of(_family, BUILDS)
if BUILD not in BUILDS:
    raise ImportError(f"FASTBN_ISA must name a build that this processor runs: expected one of {BUILDS}, got {BUILD!r}")

table = import_module(f"{__name__}.batchnorm_{BUILD}").table_of_kernels
updates = import_module(f"{__name__}.optim_{BUILD}").updates
