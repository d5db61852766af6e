"""Arrays of other libraries as arguments: read where they lie, through __array__, __dlpack__ or a buffer."""

import gc
import re
import weakref

import numpy as np
import pytest

import fastbn
from fastbn import BatchNorm, BatchStats, losses, nn, optim, training
from fastbn.arguments import as_array

RNG = np.random.default_rng(0)
X, DY = RNG.standard_normal((2, 8, 3)).astype(np.float32)
ROW = RNG.uniform(1, 2, 3)
Y = np.arange(8) % 3
MASK = np.arange(8) < 6
# NumPy before 2.1 has no word for a read-only array in DLPack, and refuses it.
SAYS_READ_ONLY = np.lib.NumpyVersion(np.__version__) >= "2.1.0"


class Array:
    """An array with nothing but __array__, as xarray's."""

    def __init__(self, a):
        self.a = a

    def __array__(self, dtype=None, copy=None):
        return self.a if dtype is None else self.a.astype(dtype)


class DLPack:
    """An array with nothing but DLPack's two methods; CUDA is kind 2 in its numbers."""

    def __init__(self, a, kind=1):
        self.a, self.kind = a, kind

    def __dlpack_device__(self):
        return self.kind, 0

    def __dlpack__(self, **options):
        return self.a.__dlpack__(**options)


class Tensor(DLPack):
    """An array on another device, as PyTorch, CuPy and JAX have them: some fetch it without a word."""

    device = "cuda:0"

    def __init__(self, a):
        super().__init__(a, kind=2)

    def __array__(self, dtype=None, copy=None):
        return self.a


class Refusing:
    """What cannot become an array says so in its own words."""

    def __init__(self, error):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error


class Subclass(np.ndarray):
    pass


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return DLPack(a)


WRAPPED = {
    "array": Array,
    "dlpack": DLPack,
    "pinned": lambda a: DLPack(a, kind=3),
    "buffer": memoryview,
    "subclass": lambda a: a.view(Subclass),
    "strided": lambda a: DLPack(np.repeat(a, 2, axis=-1)[..., ::2]),
    "transposed": lambda a: DLPack(np.asfortranarray(a)),
}
if SAYS_READ_ONLY:
    WRAPPED["read only"] = read_only


def trained(**arguments):
    """What a forward and a backward of a new layer with these arguments give."""
    x, dy, mask = (arguments.get(name) for name in ("x", "dy", "mask"))
    bn = BatchNorm(3, activation="relu")
    y = bn(X if x is None else x, mask=mask)
    return [y, bn.backward(DY if dy is None else dy), *bn.grads.values(), bn.running_mean, bn.running_var]


def around(layer, x=X, dy=DY):
    return [layer(x), layer.backward(dy), *layer.grads.values()]


def loaded(layer, **state):
    layer.load_state_dict(layer.state_dict() | state)
    return [*layer.state_dict().values()]


def assigned(name, a):
    bn = BatchNorm(3)
    setattr(bn, name, a)
    bn.grads["weight"] = a
    return [getattr(bn, name), bn.grads["weight"]]


def fitted(X, y, **options):
    model = nn.Sequential(nn.Dense(3, 4, seed=0), BatchNorm(4), nn.Dense(4, 3, seed=1))
    training.fit(model, (X, y), losses.softmax_cross_entropy, optim.SGD(model, 0.1), epochs=1, batch_size=4, **options)
    return [*model.state_dict().values(), training.evaluate(model, (X, y), losses.softmax_cross_entropy)]


def stats_of(mean, var, low=None):
    stats = BatchStats(mean, var, 8, low)
    return [stats.mean, stats.var, stats.mean_low]


def functional(x=X, weight=None, bias=None, mean=ROW, var=ROW):
    return [fastbn.batch_norm(x, mean, var, weight, bias), fastbn.batch_norm_forward(x, weight, bias)[0]]


# Every argument that takes an array: the name that errors have for it, an array that fits, and a call with it.
ARGUMENTS = {
    "x of a layer": ("x", X, lambda a: trained(x=a)),
    "x in inference": ("x", X, lambda a: [BatchNorm(3).eval()(a)]),
    "dy": ("dy", DY, lambda a: trained(dy=a)),
    "mask": ("mask", MASK, lambda a: trained(mask=a)),
    "x with a mask": ("x", X, lambda a: trained(x=a, mask=MASK)),
    "x of moments": ("x", X, lambda a: [fastbn.moments(a).mean]),
    "mask of moments": ("mask", MASK, lambda a: [fastbn.moments(X, mask=a).mean]),
    "x of functions": ("x", X, lambda a: functional(a)),
    "weight": ("weight", ROW, lambda a: functional(weight=a)),
    "bias": ("bias", ROW, lambda a: functional(bias=a)),
    "running_mean": ("running_mean", ROW, lambda a: functional(mean=a)),
    "running_var": ("running_var", ROW, lambda a: functional(var=a)),
    "mean": ("mean", ROW, lambda a: stats_of(a, ROW)),
    "var": ("var", ROW, lambda a: stats_of(ROW, a)),
    "mean_low": ("mean_low", ROW, lambda a: stats_of(ROW, ROW, a)),
    "state": ("'running_var'", ROW, lambda a: loaded(BatchNorm(3), running_var=a)),
    "state of a network": ("'0.weight'", X, lambda a: loaded(nn.Sequential(nn.Dense(3, 8, seed=0)), **{"0.weight": a})),
    "assigned": ("running_mean", ROW, lambda a: assigned("running_mean", a)),
    "x of Dense": ("x", X, lambda a: around(nn.Dense(3, 3, seed=0), x=a)),
    "dy of Dense": ("dy", DY, lambda a: around(nn.Dense(3, 3, seed=0), dy=a)),
    "x of ReLU": ("x", X, lambda a: around(nn.ReLU(), x=a)),
    "dy of Softmax": ("dy", DY, lambda a: around(nn.Softmax(), dy=a)),
    "x of Dropout": ("x", X, lambda a: around(nn.Dropout(0.5).eval(), x=a)),
    "x of Flatten": ("x", X, lambda a: around(nn.Flatten(), x=a)),
    "x of Sequential": ("x", X, lambda a: [nn.Sequential(nn.Identity(), BatchNorm(3)).eval()(a)]),
    "X of Standardize": ("X", X, lambda a: [nn.Standardize(3).fit(a)(X)]),
    "X of recalibrate": ("X", X, lambda a: [training.recalibrate(BatchNorm(3), a).running_var]),
    "data": ("data: X", X, lambda a: fitted(a, Y)),
    "labels": ("data: y", Y, lambda a: fitted(X, a)),
    "validation": ("validation: X", X, lambda a: fitted(X, Y, validation=(a, Y))),
    "logits": ("prediction", X, lambda a: losses.softmax_cross_entropy(a, Y)),
    "targets": ("target", Y, lambda a: losses.softmax_cross_entropy(X, a)),
    "predictions": ("prediction", X, lambda a: losses.mse(a, DY)),
    "numbers": ("target", DY, lambda a: losses.mse(X, a)),
    "weights": ("sample_weight", MASK, lambda a: losses.sigmoid_cross_entropy(X, np.abs(np.tanh(DY)), a)),
}  # fmt: skip


def same(given, expected):
    assert len(given) == len(expected)
    for a, b in zip(given, expected, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_every_argument_takes_any_array(argument, wrapped, unchanged):
    _, a, call = ARGUMENTS[argument]
    unchanged(a)
    if wrapped == "transposed" and a.ndim == 2:  # sums in the order of memory: other bits
        same(call(WRAPPED[wrapped](a)), call(np.asfortranarray(a)))
    else:
        same(call(WRAPPED[wrapped](a)), call(a))


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_an_array_on_another_device_is_one_sentence(argument):
    name, a, call = ARGUMENTS[argument]
    sentence = f"expected {name} in the memory of the CPU, got a Tensor on device cuda:0: copy it to the CPU first"
    with pytest.raises(TypeError, match=f"^{re.escape(sentence)}$"):
        call(Tensor(a))


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_what_refuses_to_be_an_array_is_named(argument):
    """CuPy's arrays, sparse ones and bfloat16 raise a TypeError; a tensor that requires a gradient a RuntimeError."""
    name, _, call = ARGUMENTS[argument]
    sentence = f"expected {name} as an array that NumPy can read, got a Refusing: use .get()"
    with pytest.raises(TypeError, match=f"^{re.escape(sentence)}$"):
        call(Refusing(TypeError("use .get()")))
    with pytest.raises(RuntimeError, match=r"^use tensor\.detach"):
        call(Refusing(RuntimeError("use tensor.detach()")))


@pytest.mark.parametrize("wrap", [Array, DLPack, memoryview, lambda a: a.view(Subclass)])
@pytest.mark.parametrize("shape", [(), (0, 3), (4,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i8", "?"])
def test_memory_is_shared(wrap, shape, dtype):
    a = np.ones(shape, dtype)
    given = as_array(wrap(a), "x")
    assert type(given) is np.ndarray
    assert (given.shape, given.dtype) == (a.shape, a.dtype)
    if a.size:
        assert given.ctypes.data == a.ctypes.data


def test_arrays_of_numpy_are_handed_on():
    assert as_array(X, "x") is X
    assert nn.Identity()(X) is X


@pytest.mark.skipif(not SAYS_READ_ONLY, reason="this NumPy does not say in DLPack that an array is read-only")
def test_read_only_stays_read_only():
    assert not as_array(read_only(X), "x").flags.writeable


@pytest.mark.parametrize("kind", [2, 4, 7, 8, 9, 10, 12, 14, 15, 16])
def test_devices_without_a_name_have_dlpacks_number(kind):
    with pytest.raises(TypeError, match=f"got a DLPack on device 0 of DLPack's kind {kind}: copy it"):
        BatchNorm(3)(DLPack(X, kind))


@pytest.mark.parametrize("error", [BufferError("several devices"), ValueError("unknown device"), RuntimeError("gone")])
def test_a_device_that_dlpack_has_no_number_for_is_left_to_the_array(error):
    class Unknown(Array):
        def __dlpack_device__(self):
            raise error

    same([BatchNorm(3)(Unknown(X))], [BatchNorm(3)(X)])


def test_a_dtype_that_dlpack_or_fastbn_has_not_is_a_type_error():
    class Half(DLPack):
        def __dlpack__(self, **options):
            raise RuntimeError("Unsupported dtype in DLTensor.")

    with pytest.raises(TypeError, match=r"expected x as an array that NumPy can read, got a Half: Unsupported dtype"):
        BatchNorm(3)(Half(X))
    for wrap in (Array, DLPack):
        with pytest.raises(TypeError, match=r"^expected x of dtype float32 or float64 \(or integers\), got float16$"):
            BatchNorm(3)(wrap(X.astype(np.float16)))


def test_an_old_exporter_without_options():
    class Old(DLPack):
        def __dlpack__(self, stream=None):
            return self.a.__dlpack__()

    same([BatchNorm(3)(Old(X))], [BatchNorm(3)(X)])


@pytest.mark.parametrize("wrap", [Array, DLPack, Tensor, memoryview])
def test_what_is_written_into_is_numpys(wrap):
    kind = type(wrap(X)).__name__
    for call in (BatchNorm(3), BatchNorm(3).eval()):
        with pytest.raises(TypeError, match=f"^expected out to be a NumPy array, got {kind}$"):
            call(X, out=wrap(np.empty_like(X)))
    with pytest.raises(TypeError, match=f"expected running_mean to be a .* NumPy array, .*, got {kind}$"):
        fastbn.batch_norm(X, wrap(ROW.copy()), ROW.copy(), training=True)


def test_a_masked_array_is_refused_behind_every_wrapper_that_shows_it():
    with pytest.raises(TypeError, match="masked array: its mask would be lost"):
        BatchNorm(3)(np.ma.masked_array(X))
    with pytest.raises(TypeError, match="masked array: its own mask would be lost"):
        BatchNorm(3)(X, mask=np.ma.masked_array(MASK))


@pytest.mark.parametrize("wrap", [Array, DLPack])
@pytest.mark.parametrize("make", [lambda: BatchNorm(3), lambda: BatchNorm(3, ghost_size=4), lambda: nn.Dense(3, 3)])
def test_memory_that_is_saved_for_backward_outlives_its_owner(make, wrap):
    """And no longer than that."""
    layer = make()
    owner = X.copy()
    watched, expected = weakref.ref(owner), around(layer)
    layer(wrap(owner))
    del owner
    gc.collect()
    assert watched() is not None
    same([layer.backward(DY), *layer.grads.values()], expected[1:])
    layer(np.zeros((0, 3), np.float32))
    gc.collect()
    assert watched() is None
