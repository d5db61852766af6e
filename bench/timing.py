"""Fair ratios: every candidate in turn, in one process, medians."""

import statistics
import time
from collections.abc import Callable


def interleaved(candidates: dict[str, Callable[[], object]], seconds: float = 1.0) -> dict[str, float]:
    """Median seconds of one call of each candidate, measured in turn for about `seconds` altogether.

    A turn repeats a short call until it lasts 20 microseconds, so that the clock does not weigh.
    """
    repeat = {}
    for name, call in candidates.items():
        call()
        start = time.perf_counter()
        call()
        repeat[name] = max(1, int(20e-6 / (time.perf_counter() - start + 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name, call in candidates.items():
            count = repeat[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            times[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(values) for name, values in times.items()}
