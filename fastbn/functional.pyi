from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .running import RunningStats

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Activation = Literal["relu", "leaky_relu"]

class BatchStats:
    @property
    def count(self) -> int: ...
    def __init__(self, mean: ArrayLike, var: ArrayLike, count: int, mean_low: ArrayLike | None = None) -> None: ...
    @property
    def mean(self) -> Float64: ...
    @property
    def mean_low(self) -> Float64: ...
    @property
    def var(self) -> Float64: ...

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

# What BatchNorm and batches call; all arguments by position.
class Constants:
    @property
    def mean(self) -> Array | None: ...
    @property
    def var(self) -> Array | None: ...
    @property
    def axis(self) -> int: ...
    renorm: tuple[float, float] | None
    def __init__(
        self,
        features: int = -1,
        weight: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        eps: float = 1e-5,
        *,
        mean: ArrayLike | None = None,
        var: ArrayLike | None = None,
        unbiased: bool = True,
        axis: int = 1,
        activation: str | None = None,
        num_threads: int | None = None,
        renorm: tuple[float, float] | None = None,
    ) -> None: ...
    def like(self, mean: Array | None, var: Array | None, axis: int) -> Constants: ...

def forward(constants: Constants, x: ArrayLike, out: Array | None, factor: float) -> tuple[Array, BatchStats, bool]: ...
def infer(constants: Constants, x: ArrayLike, out: Array | None) -> tuple[Array, BatchStats, bool]: ...
def backward_into(
    constants: Constants,
    dy: ArrayLike,
    x: ArrayLike,
    stats: BatchStats,
    training: bool,
    out: Array | None,
    dweight: Array | None,
    dbias: Array | None,
) -> Array: ...
def arrays_of_forward(
    constants: Constants, x: ArrayLike, out: Array | None, training: bool
) -> tuple[Array, Array, Array, bool]: ...
def arrays_of_backward(
    constants: Constants,
    dy: ArrayLike,
    x: ArrayLike,
    out: Array | None,
    dweight: Array | None,
    dbias: Array | None,
) -> tuple[Array, Array, Array, Array]: ...
