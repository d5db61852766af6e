"""set_num_threads, get_num_threads, threads, their defaults, forks, and calls from many Python threads."""

import os
import platform
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastbn
from fastbn.kernels import machine


@pytest.fixture(autouse=True)
def as_before():
    before = fastbn.get_num_threads()
    yield
    fastbn.set_num_threads(before)


@pytest.fixture
def printed(python):
    """The words that a piece of code prints."""

    def run(code, *options, arguments=(), **environment):
        done = python(*options, "-c", code, *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return run


def granted(n):
    """The number in force after n was set: a serial build has one thread."""
    return n if machine.openmp_version() else 1


def test_set_returns_the_number_before():
    fastbn.set_num_threads(2)
    assert fastbn.set_num_threads(3) == granted(2)
    assert fastbn.get_num_threads() == granted(3)
    assert fastbn.set_num_threads(1) == granted(3)


def test_more_threads_than_cores_are_honoured():
    n = min(2 * (os.cpu_count() or 1) + 1, machine.most_threads())
    fastbn.set_num_threads(n)
    assert fastbn.get_num_threads() == granted(n)
    x = np.random.default_rng(0).standard_normal((2000, 500)).astype("float32")
    many, _ = fastbn.batch_norm_forward(x)
    fastbn.set_num_threads(1)
    assert (fastbn.batch_norm_forward(x)[0] == many).all()


def test_the_context_manager_restores_also_after_an_error():
    fastbn.set_num_threads(2)
    with fastbn.threads(5):
        assert fastbn.get_num_threads() == granted(5)
        with fastbn.threads(1):
            assert fastbn.get_num_threads() == 1
        assert fastbn.get_num_threads() == granted(5)
    assert fastbn.get_num_threads() == granted(2)
    with pytest.raises(KeyError), fastbn.threads(4):
        raise KeyError
    assert fastbn.get_num_threads() == granted(2)


def test_the_number_is_the_processs():
    fastbn.set_num_threads(3)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fastbn.get_num_threads).result() == granted(3)
        pool.submit(fastbn.set_num_threads, 2).result()
    assert fastbn.get_num_threads() == granted(2)


SHOW = "import fastbn; print(fastbn.get_num_threads())"


def test_omp_num_threads_is_the_default(printed):
    assert printed(SHOW, OMP_NUM_THREADS="1") == ["1"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="os.sched_setaffinity is missing on this platform")
def test_the_affinity_mask_bounds_the_default(printed):
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + SHOW
    assert printed(code) == ["1"]
    # Asked at each call, not once at import.
    assert printed(SHOW + "; " + code.replace("import fastbn; ", ""))[1] == "1"


def test_the_default_is_no_more_than_the_processors(printed):
    assert 1 <= int(printed(SHOW)[0]) <= (os.cpu_count() or 1)


def test_threadpoolctl_limits_the_default(printed):
    pytest.importorskip("threadpoolctl", reason="threadpoolctl is missing")
    code = "import fastbn, threadpoolctl as t\nwith t.threadpool_limits(1): print(fastbn.get_num_threads())"
    assert printed(code) == ["1"]


FORK = """
import os, signal, sys, numpy as np, fastbn
x = np.random.default_rng(0).standard_normal((4000, 500)).astype("float32")
def step():
    bn = fastbn.BatchNorm(500)
    return bn(x).tobytes() + bn.backward(x).tobytes() + bn.running_var.tobytes()
fastbn.set_num_threads(2)
expected = step()
for _ in range(3):
    child = os.fork()
    if not child:
        signal.alarm(60)  # a hang becomes a failure
        os._exit(0 if step() == expected else 1)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status))
print(step() == expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing on this platform")
def test_a_forked_child_computes_the_same_and_does_not_hang(printed):
    assert printed(FORK, "-W", "ignore::DeprecationWarning") == ["0", "0", "0", "True"]


FORKED_BY_C = FORK.replace("os.fork()", "ctypes.PyDLL(None).fork()").replace("import os,", "import ctypes, os,")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing on this platform")
def test_a_child_that_python_did_not_fork(printed):
    """Nobody calls os.register_at_fork's hooks in it."""
    assert printed(FORKED_BY_C) == ["0", "0", "0", "True"]


# A thread's control word is one of the numbers in glibc's fenv_t; some of its bits only tell what has happened. It is
# set as a library does for itself: to flush denormals, and to round upwards.
ANOTHER_CONTROL_WORD = """
import ctypes, hashlib, platform, sys, numpy as np, fastbn
from fastbn import nn, optim
from fastbn.kernels import machine
m = ctypes.CDLL("libm.so.6")
place, happened, plain_word, *others = {
    "x86_64": (7, 63, 0x1f80, 0x9fc0, 0x5f80), "aarch64": (0, 0, 0, 1 << 24, 1 << 22)
}[platform.machine()]
def control(word):
    environment = (ctypes.c_uint32 * 8)()
    m.fegetenv(environment)
    environment[place] = word
    m.fesetenv(environment)
    m.fegetenv(environment)
    return environment[place] & ~happened == word
def bits(threads):
    with fastbn.threads(threads):
        h = hashlib.sha256()
        for x in arrays:
            for options in {}, {"renorm": (1.5, 1.0), "activation": "leaky_relu"}:
                bn = fastbn.BatchNorm(64, eps=1e-70, **options)
                for a in bn(x), bn.backward(x), bn.running_mean, bn.running_var, bn.grads["weight"], bn.eval()(x):
                    h.update(a.tobytes())
            h.update(nn.Standardize(64).fit(x)(x).tobytes())
        h.update(nn.Dense(2, 2, bias=False, seed=0)(np.zeros((1, 2))).tobytes())
        layer.params["weight"][...], layer.grads["weight"][...] = weight, gradient
        step = optim.RMSprop(layer, 1e-3)
        step.step()
        h.update(layer.params["weight"].tobytes() + step.state_dict()["weight.square_avg"].tobytes())
        return h.hexdigest()
rng = np.random.default_rng(0)
layer = nn.Dense(512, 512, seed=0)
weight = (rng.standard_normal((512, 512)) * 1e-38).astype("float32")
gradient = (rng.standard_normal((512, 512)) * 1e-20).astype("float32")
arrays = [(rng.standard_normal(shape) * scale).astype(dtype) for shape in ((2100, 64), (30, 64, 9, 8))
          for dtype, scale in (("float32", 1), ("float32", 1e-40), ("float64", 1e-310))]
machine.set_settings(parallel_from_elements=1)
expected = {bits(1)}
if sys.argv[1] == "threads first":
    bits(2)
plain = control(plain_word)
for word in (*others, plain_word):
    taken = control(word)
    found = {bits(1), bits(2)}
    after = control(word)
    control(plain_word)
    print(taken and after and plain, found == expected, len(found))
"""


@pytest.mark.skipif(
    (sys.platform, platform.libc_ver()[0]) != ("linux", "glibc") or platform.machine() not in ("x86_64", "aarch64"),
    reason="fenv_t as glibc has it on x86-64 and arm64",
)
@pytest.mark.parametrize("first", [pytest.param("threads first", marks=pytest.mark.long), "word first"])
def test_bits_do_not_depend_on_the_control_word(printed, first):
    """Flushed denormals and directed rounding, set before OpenMP's threads begin, which inherit it, or after."""
    assert printed(ANOTHER_CONTROL_WORD, arguments=[first]) == ["True", "True", "1"] * 3


def test_inference_from_many_threads_at_once():
    rng = np.random.default_rng(1)
    bn = fastbn.BatchNorm(64, activation="relu")
    batches = [rng.standard_normal((500 + k, 64)).astype("float32") for k in range(16)]
    for x in batches:
        bn(x)
    bn.eval()
    expected = [bn(x) for x in batches]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            assert all(np.array_equal(a, b) for a, b in zip(pool.map(bn, batches), expected, strict=True))


def test_functions_from_many_threads_at_once():
    rng = np.random.default_rng(2)
    batches = [rng.standard_normal((600 + 100 * k, 128)).astype("float32") for k in range(8)]

    def step(x):
        y, stats = fastbn.batch_norm_forward(x, num_threads=2)
        return y.tobytes(), stats.var.tobytes(), fastbn.batch_norm_backward(x, x, stats)[0].tobytes()

    expected = [step(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(step, batches * 3)) == expected * 3


def woken_during_a_call(rows):
    """Whether another thread wakes during one of some calls, though the interpreter would never take the GIL away."""
    x = np.ones((rows, 256), "float32")
    y = np.empty_like(x)
    inside, seen = [False], []
    interval = sys.getswitchinterval()
    for _ in range(50):
        go = threading.Event()
        worker = threading.Thread(target=lambda go=go: (go.wait(), seen.append(inside[0])))
        worker.start()
        sys.setswitchinterval(1000)
        try:
            go.set()
            inside[0] = True
            fastbn.batch_norm_forward(x, out=y, num_threads=1)
            inside[0] = False
        finally:
            sys.setswitchinterval(interval)
        worker.join()
        if seen[-1]:
            return True
    return False


def test_kernels_release_the_gil():
    # A single processor may let it wait for longer than the shorter calls take.
    assert any(map(woken_during_a_call, (4096, 65_536)))
