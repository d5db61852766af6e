from collections.abc import Mapping
from typing import final

from numpy.typing import ArrayLike

from .state import Array

@final
class Task: ...

def sgd(
    params: Mapping[str, Array],
    grads: Mapping[str, Array],
    buffers: dict[str, list[Array]],
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    exclude: frozenset[str],
    changes: list[tuple[Array, ArrayLike]],
) -> None: ...
def rmsprop(
    params: Mapping[str, Array],
    grads: Mapping[str, Array],
    buffers: dict[str, list[Array]],
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    exclude: frozenset[str],
    changes: list[tuple[Array, ArrayLike]],
) -> None: ...
def adam(
    params: Mapping[str, Array],
    grads: Mapping[str, Array],
    buffers: dict[str, list[Array]],
    step_size: float,
    beta1: float,
    beta2: float,
    correction: float,
    eps: float,
    kept: float,
    exclude: frozenset[str],
    changes: list[tuple[Array, ArrayLike]],
) -> None: ...
