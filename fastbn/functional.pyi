from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .batchstats import BatchStats as BatchStats
from .running import RunningStats

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Activation = Literal["relu", "leaky_relu"]

def moments(x: ArrayLike, axis: int = 1, *, mask: ArrayLike | None = None) -> BatchStats: ...
def batch_norm(
    x: ArrayLike,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    activation: Activation | None = None,
    unbiased: bool = True,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array: ...
def batch_norm_forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    running: RunningStats | None = None,
    axis: int = 1,
    activation: Activation | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, BatchStats]: ...
def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    stats: BatchStats,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    training: bool = True,
    axis: int = 1,
    activation: Activation | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Float64, Float64]: ...
