"""How many threads a call may use: process-wide, as BLAS and OpenMP have it, and the guard for forked children."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import machine


def _cgroup_quota() -> int | None:
    """Processors that the Linux control group grants this process, or None where it sets no limit."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    granted = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = Path("/sys/fs/cgroup"), ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, files = Path("/sys/fs/cgroup/cpu"), ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        # A limit anywhere above counts; within a container the path may not be there, and the root speaks for it.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                quota, period = " ".join((folder / name).read_text().strip() for name in files).split()
            except (OSError, ValueError):
                continue
            if quota not in ("max", "-1"):
                granted.append(max(1, -(-int(quota) // int(period))))
    return min(granted, default=None)


def get_num_threads() -> int:
    """Return the number of threads that a large call uses.

    This is the number that was set with `set_num_threads`. By default it is the smallest of OpenMP's limit
    (``OMP_NUM_THREADS``, or threadpoolctl's), the processors that this process may run on, and the quota of its control
    group. It is 1 in a forked child and in a serial build. Results have the same bits for every number.

    Examples
    --------
    >>> import fastbn
    >>> before = fastbn.set_num_threads(1)
    >>> fastbn.get_num_threads()
    1
    >>> _ = fastbn.set_num_threads(before)
    """
    return machine.current_threads()


def set_num_threads(n: int) -> int:
    """Set the number of threads for the whole process, and return the number before.

    Parameters
    ----------
    n : int
        Number of threads, at least 1, and at most 64 or four times the number of processors, whichever is more. After
        this call the number no longer follows OpenMP's limit. Use `threads` if it shall do so again.

    Returns
    -------
    int
        The number before.

    Raises
    ------
    ValueError, TypeError
        n is not an integer within these bounds.
    """
    count = machine.checked_threads(n)
    before = get_num_threads()
    machine.set_requested(count)
    return before


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Use n threads in the whole process, for the time of a ``with`` block.

    Parameters
    ----------
    n : int
        Number of threads, as for `set_num_threads`.

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.threads(1):
    ...     fastbn.get_num_threads()
    1
    """
    count = machine.checked_threads(n)
    before = machine.get_requested()
    machine.set_requested(count)
    try:
        yield
    finally:
        machine.set_requested(before)


_quota = _cgroup_quota()
if _quota is not None:
    machine.set_quota(_quota)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=machine.after_fork_in_child)
