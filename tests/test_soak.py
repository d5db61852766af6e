"""Everything at once: every call has the bits that it has alone, and nothing piles up.

FASTBN_SOAK is for how many seconds, 1 by default.
"""

import gc
import hashlib
import os
import random
import signal
import tempfile
import threading
import time

import numpy as np
import pytest
from test_leaks import c_librarys_bytes

import fastbn
from fastbn import checkpoint, losses, nn, optim, training

pytest.importorskip("safetensors")
SECONDS = float(os.environ.get("FASTBN_SOAK", "1"))
SHAPES = [
    (2, 3),
    (64, 100),
    (3, 5, 7),
    (0, 4),
    (777, 333),
    (8, 64, 28, 28),
    (3, 7, 100, 101),
    (9000, 100),
    (4, 300_001),
]


def digest(*arrays):
    h = hashlib.sha256()
    for a in arrays:
        h.update(np.ascontiguousarray(a))
    return h.hexdigest()


def data(shape, seed, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def layer(shape, seed):
    x = data(shape, seed, ("float32", "float64")[seed % 2])
    if seed % 3 == 0:
        x = x[..., ::-1]
    bn = fastbn.BatchNorm(shape[1], activation=(None, "relu", "leaky_relu")[seed % 3], dtype=x.dtype)
    return digest(
        bn(x), bn.backward(x), bn.running_mean, bn.running_var, bn.eval()(x), bn.backward(x), *bn.grads.values()
    )


def functions(shape, seed):
    x = data(shape, seed)
    running = fastbn.RunningStats(shape[1])
    y, stats = fastbn.batch_norm_forward(x, running=running)
    dx, dweight, dbias = fastbn.batch_norm_backward(x, x, stats, out=np.empty_like(x))
    moments = fastbn.moments(x)
    return digest(
        y, dx, dweight, dbias, moments.mean, moments.var, fastbn.batch_norm(x, running.mean, running.var, out=y)
    )


def refused(shape, seed):
    x = data(shape, seed)
    with pytest.raises(ValueError, match="expected"):
        fastbn.batch_norm_forward(x, np.ones(shape[1] + 1))
    with pytest.raises((ValueError, TypeError), match="expected"):
        fastbn.batch_norm_backward(x, x[..., :0], fastbn.moments(x))
    return digest(x)


def trained(shape, seed):
    """Small products of matrices only: BLAS does not divide them among its threads."""
    model = nn.Sequential(
        nn.Dense(2, 3, bias=False, seed=seed), fastbn.BatchNorm(3), nn.ReLU(), nn.Dense(3, 2, seed=seed)
    )
    x = data((24, 2), seed)
    pairs = (x, (x[:, 0] > 0).astype(int))
    training.fit(model, pairs, losses.softmax_cross_entropy, optim.Adam(model), epochs=2, batch_size=8, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(f"{folder}/model.safetensors", model)
        found = checkpoint.load(f"{folder}/model.safetensors")
    return digest(model.eval()(x), found.eval()(x))


def in_child(act, shape, seed):
    """The act in a forked child, which has 60 seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        try:
            os.write(writer, act(shape, seed).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        found = file.read()
    assert os.waitpid(child, 0)[1] == 0
    return found


ACTS = [(act, shape, seed) for act in (layer, functions, refused) for shape in SHAPES for seed in range(3)]
ACTS += [(trained, (), seed) for seed in range(3)]


def resident():
    """MiB of memory that the process has, but for what was freed: malloc keeps some for each thread."""
    gc.collect()
    fastbn.clear_pool()
    with open("/proc/self/statm") as file:
        nbytes = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return (nbytes - c_librarys_bytes()[1]) / 2**20


def files():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def as_before():
    limit, threads = fastbn.get_pool_limit(), fastbn.get_num_threads()
    yield
    fastbn.set_pool_limit(limit)
    fastbn.set_num_threads(threads)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not say what memory a process has")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_everything_at_once(as_before):
    expected = [act(shape, seed) for act, shape, seed in ACTS]
    signals, wrong, calls = [], [], [0] * 6
    end = time.monotonic() + SECONDS

    def worker(k):
        rng = random.Random(k)
        while time.monotonic() < end and not wrong:
            n = rng.randrange(len(ACTS))
            act, shape, seed = ACTS[n]
            try:
                if act(shape, seed) != expected[n]:
                    wrong.append(f"{act.__name__} of {shape}, {seed}: other bits")
            except BaseException as error:
                wrong.append(error)
                raise
            calls[k] += 1

    def disturb(rng):
        """What others in the process may do at any time."""
        fastbn.set_pool_limit(rng.choice([0, 2**20, 2**24, 2**26]))
        fastbn.set_num_threads(rng.choice([1, 2, 3, 4]))
        if rng.random() < 0.1:
            fastbn.clear_pool()
            gc.collect()
        if rng.random() < 0.1:
            # Not `trained`: tqdm has a lock, which a fork takes along as it is.
            n = rng.choice([n for n, (act, *_) in enumerate(ACTS) if act in (layer, functions)])
            assert in_child(*ACTS[n]) == expected[n]

    before = signal.signal(signal.SIGALRM, lambda *_: signals.append(1))
    workers = [threading.Thread(target=worker, args=(k,)) for k in range(len(calls))]
    rng, at_first = random.Random(0), (resident(), files())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        for thread in workers:
            thread.start()
        while any(thread.is_alive() for thread in workers):
            disturb(rng)
            time.sleep(0.001)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        for thread in workers:
            thread.join()
    print(f"{calls} calls, {len(signals)} signals, {at_first} to {resident(), files()} MiB and open files")
    assert not wrong
    assert all(calls)
    assert resident() < at_first[0] + 64
    assert files() <= at_first[1]
