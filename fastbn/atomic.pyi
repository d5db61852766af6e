from typing import Any

from numpy.typing import ArrayLike, NDArray

def change(arrays: list[tuple[NDArray[Any], ArrayLike]], owner: object = None, **attributes: Any) -> None: ...
