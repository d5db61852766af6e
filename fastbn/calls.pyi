from collections.abc import Callable as Function
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .batchstats import BatchStats

Array = NDArray[Any]
Float64 = NDArray[np.float64]

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
        lasting: bool = False,
    ) -> None: ...
    def like(self, mean: Array | None, var: Array | None, axis: int) -> Constants: ...

class Callable:
    training: bool
    frozen: bool
    num_batches_tracked: int
    grads: dict[str, Array]
    _momentum: float | None
    _ghost_size: int | None
    _constants: Constants
    # The function that goes back, x, the statistics that it was normalised with, and whether they are its own.
    _saved: tuple[Function[..., Array], ArrayLike, Any, bool] | None
    def __call__(self, x: ArrayLike, out: Array | None = None, *, mask: ArrayLike | None = None) -> Array: ...
    def backward(self, dy: ArrayLike, out: Array | None = None) -> Array: ...

# The functions take all arguments by position.
def moments(constants: Constants, x: ArrayLike) -> BatchStats: ...
def forward(constants: Constants, x: ArrayLike, out: Array | None, factor: float) -> tuple[Array, BatchStats, bool]: ...
def infer(constants: Constants, x: ArrayLike, out: Array | None) -> tuple[Array, BatchStats, bool]: ...
def backward(
    constants: Constants, dy: ArrayLike, x: ArrayLike, stats: BatchStats, training: bool, out: Array | None
) -> tuple[Array, Float64, Float64]: ...
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
def normalize(constants: Constants, x: ArrayLike, stats: BatchStats, out: Array | None) -> Array: ...
def gradients(constants: Constants, dy: ArrayLike, x: ArrayLike, stats: BatchStats) -> tuple[Float64, Float64]: ...
def input_gradient(
    constants: Constants,
    dy: ArrayLike,
    x: ArrayLike,
    stats: BatchStats,
    dweight: ArrayLike,
    dbias: ArrayLike,
    out: Array | None,
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
