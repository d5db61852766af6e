"""Batch normalization for NumPy on CPUs: fast, accurate to a few units of rounding, the same bits on every machine.

`BatchNorm` is the layer. `batch_norm`, `batch_norm_forward`, `batch_norm_backward` and `moments` are functions of
arrays. `nn`, `losses`, `optim`, `training` and `checkpoint` are the system around the layer; `data`, `schedules` and
`estimators` are imported by name, as in ``from fastbn import data``.
"""

from importlib.metadata import version as _version

from . import kernels  # isort: skip  # first: it says what to do where nothing has been built
from . import checkpoint, losses, nn, optim, training
from .batchnorm import BatchNorm
from .config import show_config
from .functional import BatchStats, batch_norm, batch_norm_backward, batch_norm_forward, moments
from .kernels.memory import clear_pool, get_pool_limit, set_pool_limit
from .kernels.threads import get_num_threads, set_num_threads, threads
from .running import RunningStats

__version__ = _version("fastbn")

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
