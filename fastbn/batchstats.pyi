import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import disjoint_base

_Float64 = NDArray[np.float64]

@disjoint_base
class BatchStats:
    @property
    def count(self) -> int: ...
    def __init__(self, mean: ArrayLike, var: ArrayLike, count: int, mean_low: ArrayLike | None = None) -> None: ...
    @property
    def mean(self) -> _Float64: ...
    @property
    def mean_low(self) -> _Float64: ...
    @property
    def var(self) -> _Float64: ...
