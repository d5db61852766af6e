from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike, NDArray

def change(arrays: Sequence[tuple[NDArray[Any], ArrayLike]], owner: object = None, **attributes: Any) -> None: ...
