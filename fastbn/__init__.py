"""Batch normalization for NumPy on CPUs: fast, accurate to a few units of rounding, the same bits on every machine.

`BatchNorm` is the layer. `batch_norm`, `batch_norm_forward`, `batch_norm_backward` and `moments` are functions of
arrays. `nn`, `losses`, `optim`, `training` and `checkpoint` are the system around the layer; `data`, `schedules` and
`estimators` are imported by name, as in ``from fastbn import data``.

An ``array_like`` is what NumPy makes an array of, such as a list or a data frame, and any array with ``__array__`` or
``__dlpack__`` in the memory of the CPU, such as a tensor of PyTorch or JAX. Its memory is read where it lies if its
library allows that. Results are NumPy's arrays, and so is what is written into, such as ``out``.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from . import kernels  # isort: skip  # first: it says what to do where nothing has been built
from . import checkpoint, nn
from .batchnorm import BatchNorm
from .config import show_config
from .functional import BatchStats, batch_norm, batch_norm_backward, batch_norm_forward, moments
from .kernels.memory import clear_pool, get_pool_limit, set_pool_limit
from .kernels.threads import get_num_threads, set_num_threads, threads
from .running import RunningStats

if _TYPE_CHECKING:
    from . import losses, optim, training

    __version__: str

__all__ = [
    "BatchNorm",
    "BatchStats",
    "RunningStats",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "checkpoint",
    "clear_pool",
    "get_num_threads",
    "get_pool_limit",
    "kernels",
    "losses",
    "moments",
    "nn",
    "optim",
    "set_num_threads",
    "set_pool_limit",
    "show_config",
    "threads",
    "training",
]

# What inference does without is imported when somebody asks for it.
_LATER = ("losses", "optim", "training")


def __getattr__(name: str) -> _Any:
    if name in _LATER:
        return _import_module(f".{name}", __name__)
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, "__version__"})
