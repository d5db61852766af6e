"""Fair ratios: each library in a process of its own, one of them at a time in short bursts, round after round.

A library cannot disturb another one's threads, caches of memory, or settings, and what else the machine does at some
moment weighs on all that are measured around it: so figures of one round are divided by each other, and the median of
such ratios is what counts. Between its bursts a process sleeps, waiting for the next request.
"""

import gc
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

# Seconds that the next process waits, until the threads of the one before, which go on spinning after a call, sleep.
SETTLE = 0.01


def environment(threads: int, xla_flags: str = "") -> dict[str, str]:
    """What makes a library use this many threads, as far as it is read when a process starts."""
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "NUMBA_NUM_THREADS": count,
        "NUMEXPR_MAX_THREADS": count,
        "NUMEXPR_NUM_THREADS": count,
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'} {xla_flags}".rstrip(),
    }


def in_turn(first: Callable[[], float], second: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    """The medians of what two functions measure, in turn, and the median of their ratios round by round."""
    before, after = zip(*((first(), second()) for _ in range(rounds)), strict=True)
    ratio = statistics.median(a / b for a, b in zip(before, after, strict=True))
    return statistics.median(before), statistics.median(after), ratio


@contextmanager
def environ(changes: Mapping[str, str]):
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Worker:
    """A process that prepares functions and times them on request. `threads`: the processors that it may run on."""

    def __init__(self, threads: int, variables: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")  # a fresh process, which reads its environment
        self.threads = threads
        self._connection, theirs = context.Pipe()
        with environ(variables):
            self._process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
            self._process.start()
        theirs.close()

    def ask(self, *request: Any) -> None:
        self._connection.send(request)

    def answer(self) -> Any:
        """What the process answers to the last request; an exception that it met is raised here."""
        try:
            value = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a worker ended with exit code {self._process.exitcode}") from None
        if isinstance(value, Exception):
            raise value
        return value

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, threads: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    prepared: dict[Any, tuple[Callable[[], Any], int]] = {}
    while True:
        try:
            word, *arguments = connection.recv()
        except EOFError:
            return
        try:
            if word == "prepare":
                key, seconds, factory, *rest = arguments
                call = factory(*rest)
                prepared[key] = call, repeats(call, seconds)
                answer = None
            elif word == "burst":
                answer = burst(*prepared[arguments[0]])
            elif word == "warm up":
                answer = warm_up(*arguments)
            elif word == "forget":
                prepared.clear()
                answer = None
        except Exception as error:  # sent to who asked
            answer = RuntimeError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        connection.send(answer)


def repeats(call: Callable[[], Any], seconds: float) -> int:
    """How many calls last about so long."""
    call()
    count, elapsed = 1, 0.0
    while True:
        start = time.perf_counter()
        for _ in range(count):
            call()
        elapsed = time.perf_counter() - start
        if elapsed > seconds / 4:
            return max(1, round(seconds * count / elapsed))
        count *= 2


def elapsed(call: Callable[[], Any], count: int) -> float:
    """Seconds of so many calls."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def burst(call: Callable[[], Any], count: int) -> float:
    """Seconds of one call, the mean of so many, after some that fill the caches again.

    What has a method `seconds`, of so many calls, times itself.
    """
    seconds = getattr(call, "seconds", partial(elapsed, call))
    gc.disable()
    try:
        seconds(1 + count // 8)
        return seconds(count) / count
    finally:
        gc.enable()


def warm_up(seconds: float) -> None:
    """Work on every thread of NumPy's matrix product, until the processor runs at the clock that it will keep."""
    a = np.ones((512, 512), np.float32)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        a @ a


@cache
def other_arrays(nbytes: int) -> np.ndarray:
    return np.zeros(nbytes // 8)


class Cold:
    """A call before each of which other arrays than its own are touched, of so many bytes; it times itself."""

    def __init__(self, call: Callable[[], Any], nbytes: int) -> None:
        self._call, self._others = call, other_arrays(nbytes)

    def __call__(self) -> None:
        self.seconds(1)

    def seconds(self, count: int) -> float:
        total = 0.0
        for _ in range(count):
            self._others += 1
            total += elapsed(self._call, 1)
        return total


@dataclass(frozen=True)
class Entrant:
    """One that is measured: a worker, and the factory of what that worker is to time."""

    worker: Worker
    factory: Callable[..., Callable[[], Any]]
    arguments: tuple[Any, ...]
    # Of those with the same word here, one leaves after two rounds that takes more than twice the time of the fastest.
    leaves: str = ""


def contest(
    entrants: Mapping[str, Entrant], rounds: int, seconds: float, settle: float = SETTLE
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of a call of each entrant in each round, and what went wrong with those that could not be measured.

    One that left has fewer rounds than the others; all have been in the first ones.
    """
    settle = settle if any(e.worker.threads > 1 for e in entrants.values()) else 0
    failed: dict[str, str] = {}
    for name, e in entrants.items():
        e.worker.ask("prepare", name, seconds, e.factory, *e.arguments)
    for name, e in entrants.items():
        try:
            e.worker.answer()
        except RuntimeError as error:
            failed[name] = str(error)
    times: dict[str, list[float]] = {name: [] for name in entrants if name not in failed}
    running, order = list(times), random.Random(0)
    for turn in range(rounds):
        order.shuffle(running)
        for name in running:
            time.sleep(settle)
            entrants[name].worker.ask("burst", name)
            times[name].append(entrants[name].worker.answer())
        if turn == 1:
            middle = {name: statistics.median(times[name]) for name in running}
            fastest: dict[str, float] = {}
            for name, taken in middle.items():
                like = entrants[name].leaves
                fastest[like] = min(taken, fastest.get(like, taken))
            running = [n for n in running if not entrants[n].leaves or middle[n] <= 2 * fastest[entrants[n].leaves]]
    for worker in {e.worker for e in entrants.values()}:
        worker.ask("forget")
        worker.answer()
    return times, failed
