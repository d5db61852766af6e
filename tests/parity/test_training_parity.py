"""Training step for step with PyTorch: every optimizer, both dtypes, and each layer and loss by itself."""

import numpy as np
import pytest

import fastbn
from fastbn import losses, nn, optim, schedules, training

torch = pytest.importorskip("torch")
F = torch.nn.functional

STEPS = 200
OPTIMIZERS = {
    "sgd": (optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd decay": (optim.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 1e-2}),
    "momentum": (optim.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    "nesterov": (optim.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    "rmsprop": (optim.RMSprop, torch.optim.RMSprop, {"lr": 1e-3}),
    "rmsprop momentum": (
        optim.RMSprop, torch.optim.RMSprop,
        {"lr": 3e-4, "alpha": 0.9, "eps": 1e-6, "momentum": 0.8, "weight_decay": 1e-3},
    ),
    "adam": (optim.Adam, torch.optim.Adam, {"lr": 3e-3}),
    "adam betas": (optim.Adam, torch.optim.Adam, {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-4}),
    "adamw": (optim.Adam, torch.optim.AdamW, {"lr": 3e-3, "weight_decay": 0.02}),
}  # fmt: skip
LAYERS = {
    "dense": (lambda dt: nn.Dense(7, 4, dtype=dt, seed=0), lambda: torch.nn.Linear(7, 4)),
    "dense without bias": (lambda dt: nn.Dense(7, 4, False, dtype=dt, seed=0), lambda: torch.nn.Linear(7, 4, False)),
    "relu": (lambda dt: nn.ReLU(), torch.nn.ReLU),
    "leaky relu": (lambda dt: nn.LeakyReLU(), torch.nn.LeakyReLU),
    "leaky relu 0.3": (lambda dt: nn.LeakyReLU(0.3), lambda: torch.nn.LeakyReLU(0.3)),
    "sigmoid": (lambda dt: nn.Sigmoid(), torch.nn.Sigmoid),
    "tanh": (lambda dt: nn.Tanh(), torch.nn.Tanh),
    "dropout in eval": (lambda dt: nn.Dropout(0.5).eval(), lambda: torch.nn.Dropout(0.5).eval()),
    "batch norm": (lambda dt: fastbn.BatchNorm(7, dtype=dt), lambda: torch.nn.BatchNorm1d(7)),
}
DTYPES = ["float32", "float64"]


def tensor(a):
    return torch.from_numpy(np.array(a))


def load(theirs, ours):
    """Our state into their module, by the same keys."""
    theirs.load_state_dict({k: tensor(v) for k, v in ours.state_dict().items()})


def networks(dtype, activation):
    ours, theirs, width = [], [], 20
    for i, n in enumerate([32, 16]):
        ours += [
            nn.Dense(width, n, False, dtype=dtype, seed=i),
            fastbn.BatchNorm(n, dtype=dtype),
            getattr(nn, activation)(),
        ]
        theirs += [torch.nn.Linear(width, n, False), torch.nn.BatchNorm1d(n), getattr(torch.nn, activation)()]
        width = n
    ours = nn.Sequential(*ours, nn.Dense(width, 6, dtype=dtype, seed=9))
    theirs = torch.nn.Sequential(*theirs, torch.nn.Linear(width, 6)).to(getattr(torch, dtype))
    load(theirs, ours)
    return ours, theirs


def step(ours, theirs, our_optimizer, their_optimizer, x, t):
    """One step of both networks on the same mini-batch; the two losses."""
    their_optimizer.zero_grad()
    their_loss = F.cross_entropy(theirs(torch.from_numpy(x)), torch.from_numpy(t))
    their_loss.backward()
    their_optimizer.step()
    our_loss, dy = losses.softmax_cross_entropy(ours(x), t)
    ours.backward(dy)
    our_optimizer.step()
    return our_loss, their_loss.item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_pytorchs_way(name, dtype):
    our_class, their_class, kwargs = OPTIMIZERS[name]
    ours, theirs = networks(dtype, "Tanh")
    our_optimizer, their_optimizer = our_class(ours, **kwargs), their_class(theirs.parameters(), **kwargs)
    rng = np.random.default_rng(2)
    apart = 0.0
    for _ in range(STEPS):
        x, t = rng.standard_normal((16, 20)).astype(dtype), rng.integers(0, 6, 16)
        our_loss, their_loss = step(ours, theirs, our_optimizer, their_optimizer, x, t)
        apart = max(apart, abs(our_loss - their_loss))
    assert apart <= LOSS[dtype]
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    worst = max(abs(state[k] - v.numpy()).max() for k, v in theirs.state_dict().items())
    assert worst <= STATE[dtype]
    assert state["1.num_batches_tracked"] == STEPS
    x = rng.standard_normal((50, 20)).astype(dtype)
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(x)).numpy()
    assert abs(ours.eval()(x) - expected).max() <= STATE[dtype]
    assert our_loss < 5  # it did train on, it did not run away


LOSS = {"float32": 5e-6, "float64": 1e-13}  # ten times and more what one machine showed
STATE = {"float32": 2e-5, "float64": 1e-12}


@pytest.mark.parametrize("activation", ["ReLU", "LeakyReLU", "Sigmoid"])
def test_other_activations_train_alike(activation):
    ours, theirs = networks("float64", activation)
    our_optimizer, their_optimizer = optim.Adam(ours), torch.optim.Adam(theirs.parameters())
    rng = np.random.default_rng(3)
    for _ in range(50):
        x, t = rng.standard_normal((16, 20)), rng.integers(0, 6, 16)
        our_loss, their_loss = step(ours, theirs, our_optimizer, their_optimizer, x, t)
        assert our_loss == pytest.approx(their_loss, abs=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_fit_clips_and_schedules_pytorchs_way(dtype, clip_norm):
    ours, theirs = networks(dtype, "Tanh")
    rng = np.random.default_rng(4)
    X, y = rng.standard_normal((96, 20)).astype(dtype), rng.integers(0, 6, 96)
    seen = []
    training.fit(
        ours, (X, y), losses.softmax_cross_entropy, optim.Adam(ours, 3e-3), epochs=4, batch_size=16, seed=7,
        schedule=schedules.cosine(), clip_norm=clip_norm, on_step=lambda step, loss: seen.append(loss),
    )  # fmt: skip
    optimizer = torch.optim.Adam(theirs.parameters(), 3e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * 6)
    clipped = 0
    for step_, value in enumerate(seen):
        rows = np.random.default_rng([7, 1 + step_ // 6]).permutation(96)[16 * (step_ % 6) :][:16]
        optimizer.zero_grad()
        their_loss = F.cross_entropy(theirs(tensor(X[rows])), tensor(y[rows]))
        assert value == pytest.approx(their_loss.item(), abs=LOSS[dtype])
        their_loss.backward()
        if clip_norm is not None:
            clipped += torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm).item() > clip_norm
        optimizer.step()
        rates.step()
    assert len(seen) == 4 * 6
    assert (clipped > 10) == (clip_norm is not None)
    state = ours.state_dict()
    assert max(abs(state[k] - v.numpy()).max() for k, v in theirs.state_dict().items()) <= STATE[dtype]


def fit(ours, X, y, our_optimizer, **options):
    """A training of 4 epochs of 6 steps; returns the rows of each of its steps."""
    training.fit(
        ours, (X, y), losses.softmax_cross_entropy, our_optimizer, epochs=4, batch_size=16, seed=7, **options
    )  # fmt: skip
    orders = [np.random.default_rng([7, epoch]).permutation(96) for epoch in range(1, 5)]
    return [order[start : start + 16] for order in orders for start in range(0, 96, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, (_, _, kwargs) in OPTIMIZERS.items() if "weight_decay" in kwargs])
def test_what_is_excluded_is_a_group_without_decay(name, dtype):
    """With schedule and clipping over both groups."""
    our_class, their_class, kwargs = OPTIMIZERS[name]
    kwargs = kwargs | {"weight_decay": 0.3}
    ours, theirs = networks(dtype, "Tanh")
    rng = np.random.default_rng(6)
    X, y = rng.standard_normal((96, 20)).astype(dtype), rng.integers(0, 6, 96)
    vectors = [key for key, p in ours.params.items() if p.ndim == 1]
    assert 0 < len(vectors) < len(ours.params)
    steps = fit(
        ours, X, y, our_class(ours, **kwargs, exclude=vectors), schedule=schedules.cosine(), clip_norm=0.5
    )  # fmt: skip
    groups = [[p for key, p in theirs.named_parameters() if (key in vectors) == excluded] for excluded in (False, True)]
    optimizer = their_class([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0}], **kwargs)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    for rows in steps:
        optimizer.zero_grad()
        F.cross_entropy(theirs(tensor(X[rows])), tensor(y[rows])).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        rates.step()
    state = ours.state_dict()
    assert max(abs(state[k] - v.numpy()).max() for k, v in theirs.state_dict().items()) <= STATE[dtype]


@pytest.mark.parametrize("average", [0.8, "swa"])
def test_averages_are_those_of_swa_utils(average):
    utils = pytest.importorskip("torch.optim.swa_utils")
    ours, theirs = networks("float64", "Tanh")
    rng = np.random.default_rng(8)
    X, y = rng.standard_normal((96, 20)), rng.integers(0, 6, 96)
    steps = fit(
        ours, X, y, optim.SGD(ours, 0.1, 0.9), average=average, average_from=2 if average == "swa" else None
    )  # fmt: skip
    decay = utils.get_ema_multi_avg_fn(average) if average != "swa" else None
    averaged = utils.AveragedModel(theirs, multi_avg_fn=decay)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, 0.9)
    first = None
    for i, rows in enumerate(steps, 1):
        optimizer.zero_grad()
        F.cross_entropy(theirs(tensor(X[rows])), tensor(y[rows])).backward()
        optimizer.step()
        if average != "swa" or (i % 6 == 0 and i >= 12):
            averaged.update_parameters(theirs)
        if first is None:
            first = {k: p.detach().clone() for k, p in theirs.named_parameters()}
    if average != "swa":  # theirs begins with the first weights where ours begins with 0 and divides the start out
        left = average ** len(steps)
        for k, p in averaged.module.named_parameters():
            p.data = (p.data - left * first[k]) / (1 - left)
    utils.update_bn([tensor(X)], averaged)
    state = ours.state_dict()
    for k, v in averaged.module.state_dict().items():
        if "num_batches" not in k:
            np.testing.assert_allclose(state[k], v.numpy(), rtol=1e-9, atol=1e-11, err_msg=k)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, dtype, training):
    training &= name != "dropout in eval"  # in training the two random streams differ
    make_ours, make_theirs = LAYERS[name]
    ours, theirs = make_ours(dtype).train(training), make_theirs().to(getattr(torch, dtype)).train(training)
    rng = np.random.default_rng(1)
    for p in ours.params.values():
        p += 0.1 * rng.standard_normal(p.shape)
    if name == "batch norm":
        ours(rng.standard_normal((50, 7)))
    load(theirs, ours)
    x = (3 * rng.standard_normal((33, 7))).astype(dtype)
    tx = tensor(x).requires_grad_()
    y, ty = ours(x), theirs(tx)
    dy = rng.standard_normal(y.shape).astype(dtype)
    dx = ours.backward(dy)
    ty.backward(tensor(dy))
    grads = {f"d{k}": (ours.grads[k], p.grad) for k, p in theirs.named_parameters()}
    units = 16 * np.finfo(dtype).eps
    assert len(grads) == len(ours.grads)
    for what, (a, b) in {"y": (y, ty.detach()), "dx": (dx, tx.grad), **grads}.items():
        assert a.dtype == dtype
        assert a.shape == tuple(b.shape)
        np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=units * max(1, abs(a).max()), err_msg=what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ours", "theirs", "labels"),
    [
        (losses.softmax_cross_entropy, F.cross_entropy, lambda rng, s: rng.integers(0, s[1], s[0])),
        (losses.mse, F.mse_loss, lambda rng, s: rng.standard_normal(s)),
        (losses.sigmoid_cross_entropy, F.binary_cross_entropy_with_logits, lambda rng, s: rng.random(s)),
    ],
    ids=["softmax", "mse", "sigmoid"],
)
def test_loss(ours, theirs, labels, dtype):
    rng = np.random.default_rng(0)
    z = (5 * rng.standard_normal((40, 6))).astype(dtype)
    t = labels(rng, z.shape)
    t = t if t.dtype == np.int64 else t.astype(dtype)
    tz = tensor(z).requires_grad_()
    expected = theirs(tz, tensor(t))
    expected.backward()
    loss, gradient = ours(z, t)
    u = float(np.finfo(dtype).eps)
    assert loss == pytest.approx(expected.item(), rel=8 * u)
    np.testing.assert_allclose(gradient, tz.grad.numpy(), rtol=0, atol=4 * u * abs(gradient).max())


def test_dense_starts_within_pytorchs_bounds():
    ours, theirs = nn.Dense(50, 400, seed=0), torch.nn.Linear(50, 400)
    for key, p in theirs.named_parameters():
        assert abs(ours.params[key]).max() == pytest.approx(p.abs().max().item(), rel=0.02)
        assert ours.params[key].std() == pytest.approx(p.std().item(), rel=0.1)


@pytest.mark.parametrize(
    ("ours", "theirs", "bad"),
    [(o, t, {k: v}) for o, t, names in [
        (optim.SGD, torch.optim.SGD, ("lr", "momentum", "weight_decay")),
        (optim.RMSprop, torch.optim.RMSprop, ("lr", "alpha", "eps", "momentum", "weight_decay")),
        (optim.Adam, torch.optim.AdamW, ("lr", "eps", "weight_decay")),
    ] for k in names for v in (-1.0, -1e-9)]
    + [(optim.SGD, torch.optim.SGD, {"nesterov": True}), (optim.Adam, torch.optim.Adam, {"betas": (1.0, 0.9)}),
       (optim.Adam, torch.optim.Adam, {"betas": (0.9, 1.0)}), (optim.Adam, torch.optim.Adam, {"betas": (-0.1, 0.9)})],
)  # fmt: skip
def test_both_refuse(ours, theirs, bad):
    arguments = {"lr": 0.1, **bad}
    with pytest.raises(ValueError, match=r"."):
        theirs([torch.zeros(1, requires_grad=True)], **arguments)
    with pytest.raises(ValueError, match=r"."):
        ours(nn.Dense(1, 1), **arguments)
