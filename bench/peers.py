"""The peers by name: what each library offers, and the passes over memory that all are measured against."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from bench import calls, calls_numba, calls_torch, machine
from bench.cases import Arrays, Case, arrays
from bench.workers import Cold
from fastbn import kernels

# XLA takes vectors of 256 bits where it is not told otherwise.
WIDE_VECTORS = "--xla_cpu_prefer_vector_width=512"


@dataclass(frozen=True)
class Peer:
    name: str
    modules: Sequence[str]  # what it imports; the first is its library
    make: Callable[[Case, Arrays], calls.Timed]
    preallocated: Sequence[bool] = (True, False)  # whether it writes into given arrays, into new ones, or into either
    fits: Callable[[Case], bool] = lambda case: True
    offset: int | None = 0  # of its arrays in a report; None: its users' are NumPy's own
    xla_flags: str = ""  # read when its process starts

    @property
    def library(self) -> str:
        return self.modules[0]

    @property
    def process(self) -> str:
        """Those with the same one share a process in a report."""
        return f"{self.library} {self.xla_flags}".rstrip()

    @property
    def missing(self) -> str | None:
        """Why it cannot be measured here."""
        if not all(map(find_spec, self.modules)):
            return f"{' or '.join(self.modules)} is not installed"
        return "the processor has no AVX-512" if self.xla_flags and "v4" not in kernels.BUILDS else None

    def exactly(self, case: Case) -> Case | None:
        """The case, or None where the peer does not have it."""
        return case if case.preallocated in self.preallocated and self.fits(case) else None

    def at_its_best(self, case: Case) -> Case | None:
        """The case, or the same with new outputs for a peer that cannot have them given, or None."""
        return self.exactly(case) or self.exactly(replace(case, preallocated=False))


def one_table(case: Case) -> bool:
    return len(case.shape) == 2 or case.channels_last


PEERS = {
    peer.name: peer
    for peer in (
        Peer("fastbn", ["fastbn"], calls.layer),
        Peer("NumPy", ["numpy"], calls.numpy_ufuncs, offset=None),
        Peer("numba", ["numba"], calls_numba.loops, [True], offset=None),
        Peer("numexpr", ["numexpr"], calls.numexpr_line, fits=lambda case: case.operation == "infer", offset=None),
        Peer("PyTorch F.batch_norm", ["torch"], calls_torch.functional, [False]),
        Peer("PyTorch native", ["torch"], calls_torch.native, [True]),
        Peer(
            "PyTorch oneDNN", ["torch"], partial(calls_torch.functional, mkldnn=True), [False],
            lambda case: len(case.shape) == 4 and not case.channels_last and case.dtype == "float32",
        ),
        Peer("JAX", ["jax"], calls.jax_jit),
        Peer(
            "JAX, fast variance", ["jax"], partial(calls.jax_jit, fast_variance=True),
            fits=lambda case: case.operation == "train",
        ),
        Peer("JAX, 512 bits", ["jax"], calls.jax_jit, xla_flags=WIDE_VECTORS),
        Peer(
            "JAX, fast variance, 512 bits", ["jax"], partial(calls.jax_jit, fast_variance=True),
            fits=lambda case: case.operation == "train", xla_flags=WIDE_VECTORS,
        ),
        Peer(
            "ONNX Runtime", ["onnxruntime", "onnx"], calls.onnxruntime_session,
            fits=lambda case: case.operation == "infer",
        ),
        Peer(
            "scikit-learn StandardScaler", ["sklearn"], calls.standard_scaler, [False],
            lambda case: one_table(case) and case.operation != "backward",
        ),
    )
}  # fmt: skip


def prepare(name: str, case: Case) -> Callable[[], Any]:
    """What is timed, after a check of its result: AssertionError where it is wrong."""
    a = arrays(case)
    call, convert = PEERS[name].make(case, a)
    a.y.fill(np.nan)  # so that nothing right is left of the peer before
    a.dx.fill(np.nan)
    a.check(case.operation, convert(call()))
    return cold(call) if case.cold else call


def cold(call: Callable[[], Any]) -> Cold:
    """With more than the last-level cache touched before it, whoever else it is that shares it."""
    known = machine.caches()
    return Cold(call, (known["l3_bytes"] or known["usable_bytes"]) + 64 * 2**20)


def largest(x: np.ndarray) -> Any:
    """NumPy compares integers faster than floats, which have NaN."""
    return np.max(x.view(f"i{x.itemsize}"))


PASSES = {"copy": np.copyto, "read (np.dot)": np.dot, "read (np.max)": largest}


def prepare_pass(name: str, case: Case) -> Callable[[], Any]:
    """A copy of x to y, or a read of x: NumPy's call, or with several threads one on each thread, each on its part."""
    a, call = arrays(case), PASSES[name]
    given = {"copy": (a.y, a.x), "read (np.dot)": (a.x, a.x), "read (np.max)": (a.x,)}[name]
    parts = list(zip(*(np.array_split(array.ravel(), case.threads) for array in given), strict=True))
    if case.threads == 1:
        return cold(partial(call, *parts[0])) if case.cold else partial(call, *parts[0])
    pool = ThreadPoolExecutor(case.threads)
    return lambda: list(pool.map(lambda part: call(*part), parts))
