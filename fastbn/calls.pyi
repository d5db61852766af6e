from collections.abc import Callable as Function
from typing import Any, TypeVar, final, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import disjoint_base

from .batchstats import BatchStats

_Array = NDArray[Any]
_Float64 = NDArray[np.float64]
_Float = TypeVar("_Float", bound=np.floating[Any])

UNMADE: str

@disjoint_base
class Constants:
    @property
    def mean(self) -> _Array | None: ...
    @property
    def var(self) -> _Array | None: ...
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
    def like(self, mean: _Array | None, var: _Array | None, axis: int) -> Constants: ...

@final
class Call: ...

@final
class Prepared: ...

@disjoint_base
class Callable:
    training: bool
    frozen: bool
    num_batches_tracked: int
    grads: dict[str, _Array]
    _momentum: float | None
    _ghost_size: int | None
    _constants: Constants
    # The function that goes back, x, the statistics that it was normalised with, and whether they are its own.
    _saved: tuple[Function[..., _Array], ArrayLike, Any, bool] | None
    @overload
    def __call__(
        self, x: NDArray[_Float], out: NDArray[_Float] | None = None, *, mask: ArrayLike | None = None
    ) -> NDArray[_Float]: ...
    @overload
    def __call__(self, x: ArrayLike, out: _Array | None = None, *, mask: ArrayLike | None = None) -> _Array: ...
    def backward(self, dy: ArrayLike, out: _Array | None = None) -> _Array: ...

# The functions take all arguments by position.
def moments(constants: Constants, x: ArrayLike) -> BatchStats: ...
def forward(
    constants: Constants, x: ArrayLike, out: _Array | None, factor: float
) -> tuple[_Array, BatchStats, bool]: ...
def infer(constants: Constants, x: ArrayLike, out: _Array | None) -> tuple[_Array, BatchStats, bool]: ...
def backward(
    constants: Constants, dy: ArrayLike, x: ArrayLike, stats: BatchStats, training: bool, out: _Array | None
) -> tuple[_Array, _Float64, _Float64]: ...
def backward_into(
    constants: Constants,
    dy: ArrayLike,
    x: ArrayLike,
    stats: BatchStats,
    training: bool,
    out: _Array | None,
    dweight: _Array | None,
    dbias: _Array | None,
) -> _Array: ...
def normalize(constants: Constants, x: ArrayLike, stats: BatchStats, out: _Array | None) -> _Array: ...
def gradients(constants: Constants, dy: ArrayLike, x: ArrayLike, stats: BatchStats) -> tuple[_Float64, _Float64]: ...
def input_gradient(
    constants: Constants,
    dy: ArrayLike,
    x: ArrayLike,
    stats: BatchStats,
    dweight: ArrayLike,
    dbias: ArrayLike,
    out: _Array | None,
) -> _Array: ...
def arrays_of_forward(
    constants: Constants, x: ArrayLike, out: _Array | None, training: bool
) -> tuple[_Array, _Array, _Array, bool]: ...
def arrays_of_backward(
    constants: Constants,
    dy: ArrayLike,
    x: ArrayLike,
    out: _Array | None,
    dweight: _Array | None,
    dbias: _Array | None,
) -> tuple[_Array, _Array, _Array, _Array]: ...
