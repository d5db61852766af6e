"""An exception from a signal's handler, at any moment: state changes as a whole or not at all."""

import signal

import numpy as np
import pytest

import fastbn
from fastbn import nn, optim

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signal.setitimer is missing on this platform")
TIMES, STEPS = 300, 3000
X = np.random.default_rng(0).standard_normal((12, 5)) + 3


class Interrupt(Exception):
    pass


def interrupted(begin, act, count, held):
    """After an interruption, what is `held` must be what it was after `count` undisturbed acts."""

    def handler(*_):
        if armed:
            armed.clear()
            raise Interrupt

    # In a function: CPython 3.13 does not count the jump at the end of a loop to the try that the loop stands in.
    def act_until_interrupted():
        armed.append(True)
        while armed:
            act()

    begin()
    ages = [held()]
    for _ in range(STEPS):
        act()
        ages.append(held())
    armed, looked_at = [], 0
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0005)
        for _ in range(TIMES):
            begin()
            try:
                act_until_interrupted()
            except Interrupt:
                if count() < STEPS:
                    looked_at += 1
                    assert held() == ages[count()]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert looked_at > TIMES // 2


@pytest.mark.parametrize("how", ["plain", "ghosts", "mask", "renorm"])
def test_running_averages_and_their_count(how):
    """378 of 1,548 interruptions fell between the two."""
    options = {"ghosts": {"ghost_size": 4}, "renorm": {"renorm": (2, 1)}}.get(how, {})
    call = {"mask": np.arange(12) < 9} if how == "mask" else {}
    bn = fastbn.BatchNorm(5, momentum=0.01, **options)
    batches = 3 if how == "ghosts" else 1
    interrupted(
        bn.reset_running_stats,
        lambda: bn(X, **call),
        lambda: bn.num_batches_tracked // batches,
        lambda: (bn.running_mean.tobytes(), bn.running_var.tobytes(), bn.num_batches_tracked),
    )


@pytest.mark.parametrize("momentum", [0.01, None])
@pytest.mark.parametrize("through", ["update", "batch_norm_forward", "merge"])
def test_running_stats(momentum, through):
    if through == "merge" and momentum is not None:
        pytest.skip("averages that fade have no merge")
    stats, running, part = fastbn.moments(X), fastbn.RunningStats(5, momentum), fastbn.RunningStats(5, None)
    part.update(stats)
    act = {
        "update": lambda: running.update(stats),
        "merge": lambda: running.merge(part),
        "batch_norm_forward": lambda: fastbn.batch_norm_forward(X, running=running),
    }[through]

    def held():
        return running.mean.tobytes(), running.mean_low.tobytes(), running.var.tobytes(), running.num_batches

    interrupted(running.reset, act, lambda: running.count // len(X), held)


@pytest.mark.parametrize("cls", [optim.SGD, optim.RMSprop, optim.Adam])
def test_an_optimizers_step(cls):
    layer = nn.Dense(3, 2, seed=0)
    optimizer = cls(layer, lr=1e-3)
    start, fresh = layer.state_dict(), optimizer.state_dict()
    for g in layer.grads.values():
        g[...] = 1e-4

    def begin():
        layer.load_state_dict(start)
        optimizer.load_state_dict(fresh)

    def held():
        return [a.tobytes() for a in (*layer.params.values(), *optimizer.state_dict().values())]

    interrupted(begin, optimizer.step, lambda: int(optimizer.state_dict()["step"]), held)


def test_the_transformer():
    pytest.importorskip("sklearn")
    from fastbn.estimators import BatchNormTransformer

    transformer = BatchNormTransformer()

    def held():
        state = vars(transformer).items()
        return {name: a.tobytes() if isinstance(a, np.ndarray) else a for name, a in state}

    interrupted(
        lambda: transformer.fit(X),
        lambda: transformer.partial_fit(X),
        lambda: transformer.n_samples_seen_ // len(X) - 1,
        held,
    )
