from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .batchstats import BatchStats as BatchStats
from .running import RunningStats

__all__ = ["BatchStats", "batch_norm", "batch_norm_backward", "batch_norm_forward", "moments"]

_Array = NDArray[Any]
_Float64 = NDArray[np.float64]
_Float = TypeVar("_Float", bound=np.floating[Any])
_Activation = Literal["relu", "leaky_relu"]

def moments(x: ArrayLike, axis: int = 1, *, mask: ArrayLike | None = None) -> BatchStats: ...
@overload
def batch_norm(
    x: NDArray[_Float],
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    activation: _Activation | None = None,
    unbiased: bool = True,
    out: NDArray[_Float] | None = None,
    num_threads: int | None = None,
) -> NDArray[_Float]: ...
@overload
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
    activation: _Activation | None = None,
    unbiased: bool = True,
    out: _Array | None = None,
    num_threads: int | None = None,
) -> _Array: ...
@overload
def batch_norm_forward(
    x: NDArray[_Float],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    running: RunningStats | None = None,
    axis: int = 1,
    activation: _Activation | None = None,
    out: NDArray[_Float] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[_Float], BatchStats]: ...
@overload
def batch_norm_forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    running: RunningStats | None = None,
    axis: int = 1,
    activation: _Activation | None = None,
    out: _Array | None = None,
    num_threads: int | None = None,
) -> tuple[_Array, BatchStats]: ...
@overload
def batch_norm_backward(
    dy: ArrayLike,
    x: NDArray[_Float],
    stats: BatchStats,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    training: bool = True,
    axis: int = 1,
    activation: _Activation | None = None,
    out: NDArray[_Float] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[_Float], _Float64, _Float64]: ...
@overload
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
    activation: _Activation | None = None,
    out: _Array | None = None,
    num_threads: int | None = None,
) -> tuple[_Array, _Float64, _Float64]: ...
