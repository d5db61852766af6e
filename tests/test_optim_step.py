"""An optimizer's step to the bit against plain NumPy, whatever the layout, thread count and build; errors and overlaps.

As a script it prints one digest: `python tests/test_optim_step.py THREADS`. It must be the same everywhere. A size
behind it is that of the large parameter, which is shared among the threads whatever its size.
"""

import hashlib
import math
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from fastbn import kernels, optim
from fastbn.kernels import machine

DTYPES = ["float32", "float64"]
LARGE = 530_001  # above the threshold for threads
BUFFERS = {"sgd": ("momentum_buffer",), "rmsprop": ("square_avg", "momentum_buffer"), "adam": ("exp_avg", "exp_avg_sq")}
CLASSES = {"sgd": optim.SGD, "rmsprop": optim.RMSprop, "adam": optim.Adam}


class Twin:
    """The same optimizers in plain NumPy, which rounds scalars to the array's dtype, and after each operation."""

    def __init__(self, name, **options):
        self.update, self.o, self.t = getattr(self, name), SimpleNamespace(**options), 0
        self.buffers = {}

    def step(self, params, grads):
        self.t += 1
        for k, p in params.items():
            buffers = self.buffers.setdefault(k, [np.zeros(p.shape, p.dtype) for _ in range(2)])
            p[...] = self.update(p.copy(), grads[k].astype(p.dtype), buffers)

    def sgd(self, p, g, buffers):
        o, v = self.o, buffers[0]
        if o.weight_decay:
            g = p * o.weight_decay + g
        if o.momentum:
            v[...] = v * o.momentum + g
            g = v * o.momentum + g if o.nesterov else v
        return p - g * o.lr

    def rmsprop(self, p, g, buffers):
        o, (s, v) = self.o, buffers
        if o.weight_decay:
            g = p * o.weight_decay + g
        s[...] = s * o.alpha + g * g * (1 - o.alpha)
        u = g / (np.sqrt(s) + o.eps)
        if o.momentum:
            v[...] = u = v * o.momentum + u
        return p - u * o.lr

    def adam(self, p, g, buffers):
        o, (m, v), (b1, b2) = self.o, buffers, self.o.betas
        if o.weight_decay:
            p = p * (1 - o.lr * o.weight_decay)
        m[...] = m + (g - m) * (1 - b1)
        v[...] = v * b2 + g * g * (1 - b2)
        power1, power2 = math.prod([b1] * self.t), math.prod([b2] * self.t)
        u = m / (np.sqrt(v) / math.sqrt(1 - power2) + o.eps)
        return p - u * (o.lr / (1 - power1))


RATES = st.floats(1e-4, 1)
WEIGHTS = st.one_of(st.just(0.0), st.floats(0.01, 0.999))
OPTIONS = {
    "sgd": st.fixed_dictionaries(
        {"lr": RATES, "momentum": WEIGHTS, "nesterov": st.booleans(), "weight_decay": WEIGHTS}
    ).map(lambda o: o | {"nesterov": o["nesterov"] and o["momentum"] > 0}),
    "rmsprop": st.fixed_dictionaries(
        {"lr": RATES, "momentum": WEIGHTS, "alpha": WEIGHTS, "eps": RATES, "weight_decay": WEIGHTS}
    ),
    "adam": st.fixed_dictionaries(
        {"lr": RATES, "betas": st.tuples(WEIGHTS, WEIGHTS), "eps": RATES, "weight_decay": WEIGHTS}
    ),
}
EVERY = [
    ("sgd", {"lr": 0.1, "momentum": 0, "nesterov": False, "weight_decay": 0}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("rmsprop", {"lr": 0.1, "momentum": 0.9, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.01}),
    ("adam", {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}),
]


def values(n, seed, dtype):
    """Multiples of 1/512, made of integers alone, so that every machine makes the same ones."""
    return ((np.arange(1, n + 1) * (7919 + 104729 * seed) % 1999 - 999) / 512).astype(dtype)


def laid_out(a, offset, stride, swapped):
    """a's values at an address `offset` elements past another, `stride` elements apart, in either byte order."""
    dtype = a.dtype.newbyteorder() if swapped else a.dtype
    placed = np.full(offset + a.size * abs(stride) + 3, 7, dtype)[offset:][::stride][: a.size]
    placed[...] = a
    return placed


def same(params, others):
    return all(p.tobytes() == others[k].astype(p.dtype).tobytes() for k, p in params.items())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_setting_and_layout_is_numpys_to_the_bit(name, dtype, data):
    options = data.draw(OPTIONS[name])
    layout = st.tuples(st.integers(0, 9), st.sampled_from([1, 1, 2, -1]), st.booleans())
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 7, 8, 9, 1000]), min_size=1, max_size=3))
    twin = {str(i): values(n, i, dtype) for i, n in enumerate(sizes)}
    params = {k: laid_out(p, *data.draw(layout)) for k, p in twin.items()}
    arrays = dict(params)
    surroundings = {k: p.base for k, p in params.items()}
    model = SimpleNamespace(params=params, grads={})
    optimizer, expected = CLASSES[name](model, **options), Twin(name, **options)
    for step in range(3):
        plain = {k: values(p.size, 5 + step, dtype) for k, p in twin.items()}
        model.grads = {k: laid_out(g, *data.draw(layout)) for k, g in plain.items()}  # looked up at each step
        optimizer.step()
        expected.step(twin, plain)
        assert same(model.grads, plain)
    assert same(params, twin)
    assert all(params[k] is a for k, a in arrays.items())
    for k, whole in surroundings.items():
        params[k][...] = 7
        assert (whole == 7).all()  # nothing was written beside the parameter
    state = optimizer.state_dict()
    used = sum(key.startswith("0.") for key in state)
    for k in params:
        for buffer, a in zip(BUFFERS[name][:used], expected.buffers[k], strict=False):
            assert state[f"{k}.{buffer}"].tobytes() == a.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, -0.0, 1e-40])
def test_special_values_stay_in_their_own_element(name, dtype, special):
    options = next(o for n, o in reversed(EVERY) if n == name)
    p, g = values(40, 0, dtype), values(40, 1, dtype)
    twin = {"p": p.copy()}
    p[3] = twin["p"][3] = g[17] = special
    CLASSES[name](SimpleNamespace(params={"p": p}, grads={"p": g}), **options).step()
    with np.errstate(all="ignore"):
        Twin(name, **options).step(twin, {"p": g})
    np.testing.assert_array_equal(p, twin["p"])
    assert np.isfinite(np.delete(p, [3, 17])).all()


def digest(threads, size=LARGE):
    h = hashlib.sha256()
    with fastbn.threads(threads):
        for dtype in DTYPES:
            for name, options in EVERY:
                params = {"a": values(size, 0, dtype), "b": values(77, 1, dtype)}
                model = SimpleNamespace(params=params, grads={k: values(p.size, 2, dtype) for k, p in params.items()})
                optimizer = CLASSES[name](model, **options)
                optimizer.step()
                optimizer.step()
                for a in (*params.values(), *optimizer.state_dict().values()):
                    h.update(a.tobytes())
    return h.hexdigest()


@pytest.fixture(scope="module")
def digest_here():
    return digest(1)


def test_large_parameters_are_numpys_to_the_bit():
    for name, options in EVERY:
        p, g = {"a": values(LARGE, 0, "float32")}, {"a": values(LARGE, 2, "float32")}
        twin = {"a": p["a"].copy()}
        with fastbn.threads(3):
            CLASSES[name](SimpleNamespace(params=p, grads=g), **options).step()
        Twin(name, **options).step(twin, g)
        assert same(p, twin)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads, digest_here):
    assert digest(threads) == digest_here


@pytest.mark.parametrize("build", kernels.BUILDS)
def test_every_build_gives_the_same_bits(build, digest_here, python):
    done = python(__file__, "2", FASTBN_ISA=build)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest_here]


def test_many_optimizers_at_once():
    """Each with its own model, from threads of Python's; long updates release the GIL."""
    models = [SimpleNamespace(params={"a": values(LARGE, i, "float32")}, grads={"a": values(LARGE, 9, "float32")})
              for i in range(4)]  # fmt: skip
    expected = [m.params["a"].copy() for m in models]
    workers = [threading.Thread(target=optim.Adam(m).step) for m in models]
    for p, worker in zip(expected, workers, strict=True):
        Twin("adam", lr=0.001, betas=(0.9, 0.999), eps=1e-8, weight_decay=0).step({"a": p}, models[0].grads)
        worker.start()
    for worker in workers:
        worker.join()
    assert all((m.params["a"] == p).all() for m, p in zip(models, expected, strict=True))


@pytest.mark.parametrize(("name", "options"), EVERY)
@pytest.mark.parametrize(("p_start", "g_start"), [(0, 0), (0, 3), (1, 0), (3, 0)])
@pytest.mark.parametrize("n", [9, 1000])
def test_a_gradient_that_overlaps_its_parameter(name, options, p_start, g_start, n):
    memory = values(n + 3, 0, "float32")
    p, g = memory[p_start:][:n], memory[g_start:][:n]
    twin = {"p": p.copy()}
    Twin(name, **options).step(twin, {"p": g.copy()})
    CLASSES[name](SimpleNamespace(params={"p": p}, grads={"p": g}), **options).step()
    assert p.tobytes() == twin["p"].tobytes()


@pytest.mark.parametrize(("name", "options"), EVERY)
@pytest.mark.parametrize("stride", [1, 2])
def test_two_names_of_one_parameter_are_two_updates(name, options, stride):
    p, g = values(20, 0, "float64")[::stride], values(20, 1, "float64")[::stride]
    twin = p.copy()
    Twin(name, **options).step({"one": twin, "two": twin}, {"one": g, "two": g})
    CLASSES[name](SimpleNamespace(params={"one": p, "two": p}, grads={"one": g, "two": g}), **options).step()
    assert p.tobytes() == twin.tobytes()


def read_only(a):
    a.flags.writeable = False
    return a


@pytest.mark.parametrize(("name", "options"), EVERY)
@pytest.mark.parametrize(
    ("where", "make", "error", "message"),
    [("grads", lambda a: None, KeyError, "a gradient of 'b', got none"),
     ("grads", lambda a: a.astype("float64"), TypeError, "gradient of 'b' of dtype float32, got float64"),
     ("grads", lambda a: a.astype("int64"), TypeError, "gradient of 'b' of dtype float32 or float64, got int64"),
     ("grads", lambda a: a[1:], ValueError, r"gradient of 'b' of shape \(12,\), got \(11,\)"),
     ("grads", lambda a: a.reshape(3, 4), ValueError, r"gradient of 'b' of shape \(12,\), got \(3, 4\)"),
     ("grads", lambda a: [1.0] * 12, TypeError, "gradient of 'b' as a NumPy array, got list"),
     ("grads", np.ma.array, TypeError, "gradient of 'b' as a NumPy array, got MaskedArray"),
     ("params", read_only, ValueError, "parameter 'b' to be writeable"),
     ("params", lambda a: a.astype("float16"), TypeError, "parameter 'b' of dtype float32 or float64, got float16"),
     ("params", lambda a: 3.0, TypeError, "parameter 'b' as a NumPy array, got float"),
     ("params", lambda a: np.zeros((12, 1), "f"), ValueError, r"'b' of shape \(12, 1\), got \(12,\)|"
                                                              r"parameter 'b' of shape \(12,\), got \(12, 1\)")],
)  # fmt: skip
def test_an_error_changes_nothing(name, options, where, make, error, message):
    model = SimpleNamespace(
        params={k: values(12, i, "float32") for i, k in enumerate("abc")},
        grads={k: values(12, 5, "float32") for k in "abc"},
    )
    optimizer = CLASSES[name](model, **options)
    optimizer.step()
    params, state = {k: p.copy() for k, p in model.params.items()}, optimizer.state_dict()
    arrays = getattr(model, where)
    good = arrays["b"].copy()
    arrays["b"] = make(arrays["b"])
    with pytest.raises(error, match=message):
        optimizer.step()
    arrays["b"] = good
    assert same(model.params, params)
    assert optimizer.state_dict().keys() == state.keys()
    assert same(state, optimizer.state_dict())
    optimizer.step()
    assert optimizer.state_dict()["step"] == 2
    assert all((p != params[k]).all() for k, p in model.params.items())


def test_parameters_that_came_later_or_are_of_another_type():
    model = SimpleNamespace(params={"a": np.ones(2)}, grads={"a": np.ones(2), "b": np.ones(2)})
    optimizer = optim.SGD(model, 0.5)
    model.params["b"] = np.ones(2)
    with pytest.raises(KeyError, match=r"made for, \['a'\], got 'b' too"):
        optimizer.step()
    assert (model.params["a"] == 1).all()
    with pytest.raises(TypeError, match="parameter 'c' of dtype float32 or float64, got int64"):
        optim.SGD(SimpleNamespace(params={"c": np.ones(2, np.int64)}, grads={}), 0.5)
    with pytest.raises(TypeError, match="parameter 'd' as an array, got list"):
        optim.SGD(SimpleNamespace(params={"d": [1.0]}, grads={}), 0.5)


def test_scalar_parameters_take_scalar_gradients():
    model = SimpleNamespace(params={"a": np.ones((), "f")}, grads={"a": np.float32(0.5)})
    optim.SGD(model, 0.5).step()
    assert model.params["a"] == 0.75


if __name__ == "__main__":
    machine.set_settings(parallel_from_elements=0)
    print(digest(*map(int, sys.argv[1:])))
