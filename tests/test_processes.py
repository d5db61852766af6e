"""The same bits in other processes, however they were begun, and in threads with small stacks; no hang."""

import multiprocessing

import pytest

PROGRAM = """
import faulthandler, hashlib, multiprocessing, signal, sys, threading, warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
faulthandler.dump_traceback_later(250, exit=True)
import numpy as np, fastbn
from fastbn import nn, optim

def step(seed):
    if hasattr(signal, "alarm"):
        signal.alarm(250)  # in a child too, where faulthandler's thread is not
    rng = np.random.default_rng(seed)
    h = hashlib.sha256()
    with fastbn.threads(2):
        for shape in ((3, 2), (4000, 100), (8, 64, 20, 20), (16, 300, 7, 7)):
            x = rng.standard_normal(shape).astype("float32")
            bn = fastbn.BatchNorm(shape[1], activation="relu")
            for a in (bn(x), bn.backward(x), bn.running_var, bn.eval()(x), fastbn.moments(x).var):
                h.update(a.tobytes())
        # No products of matrices: BLAS has other bits for other numbers of threads.
        layer = nn.Dense(600, 500, seed=seed)
        layer.grads["weight"][...] = layer.params["weight"] * 3
        optim.Adam(layer).step()
        h.update(layer.params["weight"].tobytes())
    return h.hexdigest()

def in_processes(method):
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        return list(pool.map(step, range(4)))

def in_loky(_):
    from joblib import Parallel, delayed
    return Parallel(n_jobs=2, backend="loky")(delayed(step)(seed) for seed in range(4))

def in_threads(stack):
    threading.stack_size(int(stack))
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(step, [*range(4)] * 4))

if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside OpenMP's threads, which is the point
    expected = [step(seed) for seed in range(4)]
    way, argument = sys.argv[1:]
    found = globals()["in_" + way](argument)
    assert found == expected * (len(found) // 4) and len(found) >= 4
    assert [step(seed) for seed in range(4)] == expected
    print("same")
"""


@pytest.fixture
def same(python, tmp_path):
    """Runs the program one way; True where it found the same bits."""

    def run(way, argument, program=PROGRAM):
        (tmp_path / "program.py").write_text(program)
        done = python(str(tmp_path / "program.py"), way, argument)
        assert done.returncode == 0 or "AssertionError" in done.stderr, done.stderr
        return done.stdout.split() == ["same"]

    return run


@pytest.mark.parametrize("method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.long)])
def test_processes(same, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"{method} is missing on this platform")
    assert same("processes", method)


def test_joblibs_processes(same):
    pytest.importorskip("joblib")
    assert same("loky", "")


@pytest.mark.parametrize("stack", [65536])
def test_threads_with_small_stacks(same, stack):
    """Half of what musl gives."""
    assert same("threads", str(stack))


def test_another_digest_would_be_seen(same):
    assert not same("threads", "131072", PROGRAM.replace("expected * (len", "expected[::-1] * (len"))
