"""Optimizers against their textbook formulas in long double, with pow, and to the bit against themselves."""

import copy
import hashlib
import inspect
import pickle
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from fastbn import BatchNorm, losses, nn, optim

LD = np.longdouble
CASES = [
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "weight_decay": 0.02}),
    (optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    (optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.02}),
    (optim.SGD, {"lr": 0.05, "momentum": 0.8, "nesterov": True}),
    (optim.SGD, {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02}),
    (optim.RMSprop, {}),
    (optim.RMSprop, {"lr": 0.003, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.02}),
    (optim.RMSprop, {"lr": 0.003, "momentum": 0.7}),
    (optim.RMSprop, {"lr": 0.003, "momentum": 0.7, "weight_decay": 0.02}),
    (optim.Adam, {}),
    (optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3}),
    (optim.Adam, {"lr": 0.01, "weight_decay": 0.05}),
]
IDS = [f"{c.__name__}-{'-'.join(map(str, k.items()))}" for c, k in CASES]


def numbers(shape, seed):
    """Multiples of 1/512 from -1.95 to 1.95, the same wherever integers multiply alike."""
    count = np.arange(1, 1 + np.prod(shape, dtype=np.int64), dtype=np.int64)
    return ((count * (7919 + 104729 * seed) % 1999 - 999) / 512).reshape(shape)


def model(dtype, shapes=((4, 5), (3,), (1,), (2, 3, 2))):
    params = {str(i): numbers(shape, i).astype(dtype) for i, shape in enumerate(shapes)}
    return SimpleNamespace(params=params, grads={k: np.zeros_like(p) for k, p in params.items()})


def gradients(m, step):
    for i, g in enumerate(m.grads.values()):
        g[...] = numbers(g.shape, 11 * step + i + 5)


def textbook(cls, lr=None, momentum=0, nesterov=False, weight_decay=0, alpha=0.99, eps=1e-8, betas=(0.9, 0.999)):
    """One parameter's rule, (p, g, t) -> p, in long double."""
    lr = LD({optim.RMSprop: 0.01, optim.Adam: 0.001}[cls] if lr is None else lr)
    momentum, decay, alpha, eps, b1, b2 = map(LD, (momentum, weight_decay, alpha, eps, *betas))
    v = m = s = LD(0)

    def sgd(p, g, t):
        nonlocal v
        g = g + decay * p
        v = momentum * v + g
        return p - lr * (g + momentum * v if nesterov else v)

    def rmsprop(p, g, t):
        nonlocal v, s
        g = g + decay * p
        s = alpha * s + (1 - alpha) * g**2
        v = momentum * v + g / (np.sqrt(s) + eps)
        return p - lr * v

    def adam(p, g, t):
        nonlocal m, s
        p = p - lr * decay * p
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * g**2
        return p - lr * (m / (1 - b1**t)) / (np.sqrt(s / (1 - b2**t)) + eps)

    return {optim.SGD: sgd, optim.RMSprop: rmsprop, optim.Adam: adam}[cls]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("cls", "kwargs"), CASES, ids=IDS)
def test_steps_are_the_textbooks(cls, kwargs, dtype):
    m = model(dtype)
    arrays = dict(m.params)
    expected = {k: p.astype(LD) for k, p in m.params.items()}
    rules = {k: textbook(cls, **kwargs) for k in m.params}
    optimizer = cls(m, **kwargs)
    for step in range(1, 51):
        gradients(m, step)
        before = {k: g.copy() for k, g in m.grads.items()}
        optimizer.step()
        for k, p in m.params.items():
            expected[k] = rules[k](expected[k], m.grads[k].astype(LD), LD(step))
            np.testing.assert_allclose(p.astype(LD), expected[k], rtol=0, atol=80 * np.finfo(dtype).eps)
            assert p is arrays[k]
            assert (m.grads[k] == before[k]).all()


@pytest.mark.parametrize("cls", [optim.SGD, optim.RMSprop])
def test_momentum_may_change_but_not_begin(cls):
    with_buffers, without = cls(model("float64"), 0.1, momentum=0.5), cls(model("float64"), 0.1)
    with_buffers.momentum = 0
    with_buffers.momentum = 0.9
    assert copy.deepcopy(with_buffers).momentum == 0.9
    with pytest.raises(ValueError, match=rf"expected momentum 0, with which this {cls.__name__} was made .*, got 0\.9"):
        without.momentum = 0.9
    for optimizer, kept in ((with_buffers, 0.9), (without, 0)):
        with pytest.raises(ValueError, match="expected a finite momentum of at least 0, got -1"):
            optimizer.momentum = -1
        assert optimizer.momentum == kept


def test_defaults_are_pytorchs():
    # written down from torch.optim's documentation; tests/parity compares the steps themselves
    def defaults(cls):
        return {k: p.default for k, p in inspect.signature(cls).parameters.items() if p.default is not p.empty}

    own = {"exclude": ()}
    assert defaults(optim.SGD) == {"momentum": 0, "nesterov": False, "weight_decay": 0} | own
    assert defaults(optim.RMSprop) == {"lr": 0.01, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0} | own
    assert defaults(optim.Adam) == {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0} | own


def digest(cls, kwargs, dtype):
    m = model(dtype)
    optimizer = cls(m, **kwargs)
    for step in range(20):
        gradients(m, step)
        optimizer.step()
    h = hashlib.sha256()
    for a in (*m.params.values(), *optimizer.state_dict().values()):
        h.update(a.astype(a.dtype.newbyteorder("<")).tobytes())
    return h.hexdigest()[:12]


GOLDEN = {  # of the steps in plain NumPy; a change here is a change of everybody's results
    "float32": (
        "cb621ed996f4 3dc1d7caee2f a4664b2d378d 120a9028c0e4 3520ab8ba224 "
        "dd77f4dc7402 3778827575cf e4c1c4eb965e 67f79f7cf3dd 5599c89817af "
        "82f449567a1f c3859fd1780b a1a6116ee65b"
    ),
    "float64": (
        "2775e63f76ed 61e9ca6acbc0 bd767c96c6dc 82ebdd89ef27 9e1f5cee58dc "
        "d6ffdc0795b5 74f7ce7bb186 f6253fc8d085 351c14d9c68c 5c7977f72174 "
        "43c211285b83 7814c45bab88 efe7d2997438"
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("which", range(len(CASES)), ids=IDS)
def test_the_bits_are_the_same_everywhere(which, dtype):
    assert digest(*CASES[which], dtype) == GOLDEN[dtype].split()[which]


@pytest.mark.parametrize(("cls", "kwargs"), CASES, ids=IDS)
@pytest.mark.parametrize("fresh", ["load", "deepcopy", "pickle"])
def test_a_resumed_run_has_the_same_bits(cls, kwargs, fresh):
    m = model("float32")
    optimizer = cls(m, **kwargs)
    for step in range(5):
        gradients(m, step)
        optimizer.step()
    if fresh == "load":
        other = copy.deepcopy(m)
        resumed = cls(other, **kwargs)
        resumed.load_state_dict(optimizer.state_dict())
    else:
        both = (m, optimizer)
        other, resumed = copy.deepcopy(both) if fresh == "deepcopy" else pickle.loads(pickle.dumps(both))
    for step in range(5, 10):
        for o, mm in ((optimizer, m), (resumed, other)):
            gradients(mm, step)
            o.step()
    assert all((other.params[k] == p).all() for k, p in m.params.items())
    ours, theirs = optimizer.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all((ours[k] == theirs[k]).all() for k in ours)
    assert ours["step"] == 10


def test_state_keys():
    layer = nn.Sequential(nn.Dense(3, 2, bias=False))
    assert optim.SGD(layer, 0.1).state_dict().keys() == {"step"}
    assert optim.SGD(layer, 0.1, momentum=0.9).state_dict().keys() == {"step", "0.weight.momentum_buffer"}
    assert optim.RMSprop(layer).state_dict().keys() == {"step", "0.weight.square_avg"}
    assert optim.RMSprop(layer, momentum=0.9).state_dict().keys() == {
        "step", "0.weight.square_avg", "0.weight.momentum_buffer",
    }  # fmt: skip
    state = optim.Adam(layer).state_dict()
    assert state.keys() == {"step", "beta1_power", "beta2_power", "0.weight.exp_avg", "0.weight.exp_avg_sq"}
    assert state["0.weight.exp_avg"].shape == (2, 3)
    assert all(isinstance(a, np.ndarray) for a in state.values())


def test_states_are_copies_and_bad_ones_change_nothing():
    m = model("float64")
    optimizer = optim.Adam(m)
    gradients(m, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    for a in optimizer.state_dict().values():
        a[...] = 9
    good = {k: v + 1 for k, v in before.items()}
    for change, message in [
        ({"0.exp_avg": np.zeros((5, 4))}, r"'0.exp_avg': expected float64 of shape \(4, 5\), got .* \(5, 4\)"),
        ({"4.exp_avg": np.zeros(1)}, "unexpected key '4.exp_avg'"),
        ({"3.exp_avg_sq": np.zeros((2, 3, 2), complex)}, "complex"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(good | change)
    good.pop("step")
    with pytest.raises(ValueError, match="missing key 'step'"):
        optimizer.load_state_dict(good)
    after = optimizer.state_dict()
    assert all((after[k] == v).all() for k, v in before.items())


@pytest.mark.parametrize(("cls", "kwargs"), CASES, ids=IDS)
def test_a_schedule_may_set_the_rate(cls, kwargs):
    m, rate = model("float32"), kwargs.get("lr", 0.01)
    optimizer = cls(m, **{**kwargs, "lr": rate})
    gradients(m, 0)
    optimizer.lr = 0
    start = {k: p.copy() for k, p in m.params.items()}
    optimizer.step()
    assert all((p == start[k]).all() for k, p in m.params.items())
    twin, other = copy.deepcopy((m, optimizer))
    optimizer.lr = rate
    other.lr = np.float64(rate)  # must not lift float32 arithmetic to float64
    optimizer.step()
    other.step()
    assert all((p != start[k]).any() for k, p in m.params.items())
    assert all((p == twin.params[k]).all() for k, p in m.params.items())


@pytest.mark.thread_unsafe(reason="it counts what all threads allocate")
@pytest.mark.parametrize(("cls", "kwargs"), CASES, ids=IDS)
def test_a_step_allocates_nothing(cls, kwargs):
    m = model("float32", shapes=((300, 400), (400,)))
    optimizer = cls(m, **kwargs)
    optimizer.step()
    tracemalloc.start()
    try:
        optimizer.step()
        assert tracemalloc.get_traced_memory()[1] < 8192  # the smaller parameter has 1600 bytes, the larger 480,000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("cls", [optim.SGD, optim.RMSprop, optim.Adam])
def test_real_models_learn(cls):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 5))
    t = (x[:, 0] > x[:, 1]).astype(int)
    net = nn.Sequential(nn.Dense(5, 16, bias=False, seed=0), BatchNorm(16), nn.ReLU(), nn.Dense(16, 2, seed=1))
    optimizer = cls(net, lr=0.5 if cls is optim.SGD else 0.02)
    history = []
    for _ in range(60):
        loss, g = losses.softmax_cross_entropy(net(x), t)
        net.backward(g)
        optimizer.step()
        history.append(loss)
    assert history[-1] < 0.2 * history[0]
    single = nn.Dense(5, 1, seed=0)
    before = single.params["weight"].copy()
    single(x)
    single.backward(np.ones((200, 1)))
    cls(single, lr=0.1).step()
    assert (single.params["weight"] != before).all()
    # mixed dtypes in one model
    mixed = nn.Sequential(nn.Dense(5, 3, seed=0), nn.Dense(3, 2, dtype="float64", seed=0))
    mixed.backward(mixed(x))
    optimizer = cls(mixed, lr=0.1)
    optimizer.step()
    assert [p.dtype.name for p in mixed.params.values()] == ["float32"] * 2 + ["float64"] * 2


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [(c, {n: v}, rf"{n} of at least 0, got {v}")
     for c, names in [(optim.SGD, ("lr", "momentum", "weight_decay")),
                      (optim.RMSprop, ("lr", "alpha", "eps", "weight_decay", "momentum")),
                      (optim.Adam, ("lr", "eps", "weight_decay"))]
     for n in names for v in (-0.1, np.nan, np.inf)]
    + [(optim.SGD, {"nesterov": True}, "momentum above 0, got momentum=0"),
       (optim.Adam, {"betas": (1.0, 0.9)}, r"betas\[0\] within \[0, 1\), got 1.0"),
       (optim.Adam, {"betas": (0.9, -0.5)}, r"betas\[1\] within \[0, 1\), got -0.5"),
       (optim.Adam, {"betas": (0.9, np.nan)}, r"betas\[1\]")],
)  # fmt: skip
def test_argument_errors(cls, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cls(model("float32"), **{"lr": 0.1, **kwargs})


@pytest.mark.parametrize("cls", [optim.SGD, optim.RMSprop, optim.Adam])
def test_what_is_no_model_and_no_number(cls):
    with pytest.raises(TypeError, match="expected a model first, with params and grads, got float"):
        cls(0.1, model("float32"))
    with pytest.raises(TypeError, match="expected a model first, with params and grads, got dict_values"):
        cls(model("float32").params.values(), 0.1)
    with pytest.raises(TypeError, match="expected lr as a number, got str"):
        cls(model("float32"), "0.1")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("excluded", [["0"], ["1", "2"], ["0", "1", "2", "3"]])
@pytest.mark.parametrize(("cls", "kwargs"), [c for c in CASES if "weight_decay" in c[1]])
def test_what_is_excluded_steps_as_without_decay(cls, kwargs, excluded, dtype):
    """Parameters do not meet, so each has the bits that it has in a model without, or with, decay on everything."""
    plain, decayed, mixed = (model(dtype) for _ in range(3))
    without = {key: value for key, value in kwargs.items() if key != "weight_decay"}
    optimizers = cls(plain, **without), cls(decayed, **kwargs), cls(mixed, **kwargs, exclude=excluded)
    for step in range(1, 8):
        for m, optimizer in zip((plain, decayed, mixed), optimizers, strict=True):
            gradients(m, step)
            optimizer.step()
    for name, p in mixed.params.items():
        like, unlike = (plain, decayed) if name in excluded else (decayed, plain)
        assert p.tobytes() == like.params[name].tobytes() != unlike.params[name].tobytes()


@pytest.mark.parametrize(
    ("exclude", "error", "message"),
    [
        (["1", "bias"], ValueError, r"some of \['0', '1', '2', '3'\], got \['bias'\]"),
        ([0], ValueError, r"got \[0\]"),
        ("0", TypeError, "names, got the text '0'"),
    ],
)
def test_exclude_takes_names_of_parameters(exclude, error, message):
    for cls in (optim.SGD, optim.RMSprop, optim.Adam):
        with pytest.raises(error, match=message):
            cls(model("float32"), lr=0.1, exclude=exclude)


def test_repr_shows_the_numbers():
    m = model("float32")
    optimizer = optim.SGD(m, 0.1, 0.9, exclude=("3", "1"))
    optimizer.lr = 0.05
    assert repr(optimizer) == "SGD(lr=0.05, momentum=0.9, nesterov=False, weight_decay=0.0, exclude=['1', '3'])"
    assert repr(optim.RMSprop(m)) == "RMSprop(lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0.0, momentum=0.0)"
    assert repr(optim.Adam(m)) == "Adam(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0)"


def test_a_model_without_parameters():
    with pytest.raises(ValueError, match="with parameters, got none"):
        optim.Adam(nn.Sequential(nn.ReLU()))
