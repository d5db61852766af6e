"""Networks in and out of other libraries: `fastbn.interop.torch`, `fastbn.interop.onnx`, `fastbn.interop.keras`,
`fastbn.interop.sklearn`; and arrays of `fastbn.interop.dask`.

Each imports its library when one of its functions is called, and says which extra is missing if it is not there.
"""

from importlib import import_module
from typing import Any

__all__ = ["dask", "keras", "onnx", "sklearn", "torch"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
