from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

def floating(a: ArrayLike, name: str = "x") -> NDArray[Any]: ...
def checked_mask(mask: ArrayLike, x: NDArray[Any], axis: int) -> NDArray[np.bool_]: ...
