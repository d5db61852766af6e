"""No call keeps memory, the refused ones among them: blocks of Python's allocator, and bytes of the C library's.

FASTBN_CALLS is how many calls of each there are: 300 by default, 20,000 in `.ci/run`.
"""

import copy
import ctypes
import gc
import os
import pickle
import sys

import numpy as np
import pytest

import fastbn
from fastbn import losses, nn, optim, schedules, training

CALLS = int(os.environ.get("FASTBN_CALLS", "300"))

rng = np.random.default_rng(0)
X = rng.standard_normal((12, 5)).astype("float32")
DY = rng.standard_normal((12, 5)).astype("float32")
Y = np.arange(12) % 3
MASK = np.arange(12) < 9
STRIDED = rng.standard_normal((24, 10)).astype("float32")[::2, ::2]
BIG = rng.standard_normal((700, 100)).astype("float32")  # its outputs come from the pool
STATS = fastbn.moments(X)
BN, GHOSTS = fastbn.BatchNorm(5), fastbn.BatchNorm(5, ghost_size=6, renorm=(2, 1))
MODEL = nn.Sequential(nn.Dense(5, 4, bias=False, seed=0), fastbn.BatchNorm(4), nn.Dropout(0.5, seed=0), nn.Tanh())
RUNNING, EXACT = fastbn.RunningStats(5), fastbn.RunningStats(5, momentum=None)
STEPS = [cls(MODEL, 1e-9) for cls in (optim.SGD, optim.RMSprop, optim.Adam)]


def refused(call):
    try:
        call()
    except (ValueError, TypeError, RuntimeError):
        return
    raise AssertionError("expected an error")


def through(model):
    model.backward(model(X))


ACTS = {
    "moments": lambda: fastbn.moments(X),
    "moments, strided": lambda: fastbn.moments(STRIDED),
    "moments, masked": lambda: fastbn.moments(X, mask=MASK),
    "forward": lambda: fastbn.batch_norm_forward(X, running=RUNNING),
    "forward, exact": lambda: fastbn.batch_norm_forward(X, running=EXACT),
    "forward, lists": lambda: fastbn.batch_norm_forward(X.tolist(), [1, 2, 3, 4, 5]),
    "forward, pool": lambda: fastbn.batch_norm_forward(BIG, num_threads=2),
    "batch_norm": lambda: fastbn.batch_norm(X, np.zeros(5), np.ones(5)),
    "backward": lambda: fastbn.batch_norm_backward(DY, X, STATS),
    "backward, pool": lambda: fastbn.batch_norm_backward(BIG, BIG, fastbn.moments(BIG)),
    "layer": lambda: through(BN.train()),
    "layer, inference": lambda: through(BN.eval()),
    "layer, strided": lambda: BN(STRIDED),
    "layer, parts": lambda: (GHOSTS(X, mask=MASK), GHOSTS.backward(DY)),
    "layer, new": lambda: through(fastbn.BatchNorm(5, activation="relu")),
    "layer, copied": lambda: copy.deepcopy(BN),
    "layer, pickled": lambda: pickle.loads(pickle.dumps(BN)),
    "state": lambda: BN.load_state_dict(BN.state_dict()),
    "statistics, pickled": lambda: pickle.loads(pickle.dumps(STATS)).mean,
    "merged": lambda: (EXACT.reset(), EXACT.update(STATS), EXACT.merge(EXACT)),
    "model": lambda: through(MODEL),
    "model, folded": lambda: MODEL.folded()(X),
    "recalibrate": lambda: training.recalibrate(MODEL, X),
    "steps": lambda: [optimizer.step() for optimizer in STEPS],
    "steps, state": lambda: [optimizer.load_state_dict(optimizer.state_dict()) for optimizer in STEPS],
    "losses": lambda: (losses.softmax_cross_entropy(X, Y), losses.mse(X, DY), losses.sigmoid_cross_entropy(X, DY > 0)),
    "schedules": lambda: (schedules.cosine()(1, 3), schedules.step(2, 0.1)(1, 3)),
    "evaluate": lambda: training.evaluate(MODEL, (X, DY[:, :4]), losses.mse),
    "threads": lambda: fastbn.threads(2).__enter__(),
    "limit": lambda: fastbn.set_pool_limit(fastbn.get_pool_limit()),
    "refused: shape": lambda: refused(lambda: fastbn.batch_norm_forward(X, np.ones(4))),
    "refused: dtype": lambda: refused(lambda: BN(X.astype("f2"))),
    "refused: out": lambda: refused(lambda: fastbn.batch_norm_forward(X, out=X[:3])),
    "refused: mask": lambda: refused(lambda: GHOSTS(X, mask=MASK[:3])),
    "refused: state": lambda: refused(lambda: BN.load_state_dict({})),
    "refused: step": lambda: refused(lambda: optim.SGD(MODEL, -1)),
    "refused: before": lambda: refused(lambda: fastbn.BatchNorm(5).backward(DY)),
}


class Mallinfo(ctypes.Structure):
    """glibc's mallinfo2."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "keep")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def c_librarys_bytes():
    """Bytes in use, and bytes that were freed but are kept; 0 where the C library is not glibc."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, TypeError, OSError):
        return 0, 0
    mallinfo.restype = Mallinfo
    found = mallinfo()
    return found.used + found.hblkhd, found.free


def growth(act):
    """Blocks and bytes a call, the least of three times: a cache may be filled in one of them."""
    for _ in range(30):
        act()
    least = [float("inf")] * 2
    for _ in range(3):
        gc.collect()
        blocks, nbytes = sys.getallocatedblocks(), c_librarys_bytes()[0]
        for _ in range(CALLS):
            act()
        gc.collect()
        more = sys.getallocatedblocks() - blocks, c_librarys_bytes()[0] - nbytes
        least = [min(pair) for pair in zip(least, more, strict=True)]
        if least[0] < 0.5 * CALLS and least[1] < CALLS:
            break
    return least[0] / CALLS, least[1] / CALLS


@pytest.fixture(scope="module", autouse=True)
def as_before():
    threads = fastbn.get_num_threads()
    gc.freeze()
    yield
    gc.unfreeze()
    fastbn.set_num_threads(threads)


@pytest.mark.parametrize("name", ACTS)
def test_nothing_is_kept(name):
    blocks, nbytes = growth(ACTS[name])
    assert blocks < 0.5
    assert nbytes < 1


def test_a_leak_would_be_seen():
    kept = []
    assert growth(lambda: kept.append(object()))[0] > 0.9
    if c_librarys_bytes()[0]:
        assert growth(lambda: kept.append(np.empty(2000, np.uint8)))[1] > 900
