from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import disjoint_base

_Float64 = NDArray[np.float64]
# A mean's high and low part, and the sum of weighted squared deviations from it.
_Part = Sequence[_Float64] | _Float64

def merge(into: _Part, weight: float, part: _Part, part_weight: float) -> None: ...
def averaged(
    average: tuple[_Float64, _Float64],
    numbers: ArrayLike,
    counts: ArrayLike,
    momentum: float | None,
    tracked: int,
    unbiased: bool,
) -> tuple[_Float64, _Float64, int]: ...
def merged(numbers: ArrayLike, counts: ArrayLike) -> BatchStats: ...

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
