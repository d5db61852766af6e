from typing import Any

from numpy.typing import ArrayLike, NDArray

def floating(a: ArrayLike, name: str = "x") -> NDArray[Any]: ...
