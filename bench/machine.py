"""The machine that figures were measured on, and what else it was doing."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("fastbn", "numpy", "torch", "jax", "onnxruntime", "scikit-learn")
# Where the system does not say.
USUAL_CACHE = 32 * 2**20


def processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_level_cache() -> int:
    """Bytes of the largest cache that a core has."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip()).groups()
        sizes.append(int(number) * {"": 1, "K": 2**10, "M": 2**20}[unit])
    return max(sizes, default=USUAL_CACHE)


def processor_name() -> str:
    try:
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def load() -> float | None:
    """Processes that ran in the last minute, on average; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def describe() -> dict[str, object]:
    """What a report says of the machine; prints the load, and a warning where it is not idle."""
    from fastbn import kernels

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    busy = load()
    print(f"load of the last minute: {busy}" + (" (the figures will be disturbed)" if busy and busy > 0.3 else ""))
    return {
        "processor": processor_name(),
        "processors": processors(),
        "cache": last_level_cache(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "build": kernels.BUILD,
        "versions": versions,
        "load": busy,
    }


def in_words(machine: dict) -> str:
    """Two lines of Markdown."""
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    missing = ", ".join(name for name, v in machine["versions"].items() if not v)
    load = "unknown" if machine["load"] is None else f"{machine['load']} processes"
    return (
        f"{machine['processor']}, {machine['processors']} processors, last-level cache {machine['cache'] >> 20} MB; "
        f"{machine['system']}; fastbn's build {machine['build']}; load before: {load}.\n"
        f"{versions}{'; not installed: ' + missing if missing else ''}."
    )
