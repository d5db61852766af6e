from collections.abc import Iterable
from typing import Any

from numpy.typing import ArrayLike, NDArray

def change(arrays: Iterable[tuple[NDArray[Any], ArrayLike]], *attributes: tuple[object, str, Any]) -> None: ...
