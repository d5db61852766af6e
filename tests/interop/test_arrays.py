"""Tensors of PyTorch and JAX as arguments: read where they lie, with the bits of NumPy's arrays."""

import gc
import weakref

import numpy as np
import pytest

import fastbn
from fastbn import BatchNorm, losses, nn, optim, training
from fastbn.arguments import as_array

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

SHAPES = [(8, 5), (4, 5, 6, 7), (2, 5, 3, 4, 2)]


def channels_last(t):
    if t.ndim < 4:
        return t
    return t.contiguous(memory_format=torch.channels_last if t.ndim == 4 else torch.channels_last_3d)


def padded(t):
    """Every other element of the last axis: strided, and no multiple of a line from where the memory begins."""
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype)
    view = wide[..., 1::2]
    return view.copy_(t)


TENSORS = {
    "contiguous": lambda a: torch.from_numpy(a.copy()),
    "channels last": lambda a: channels_last(torch.from_numpy(a.copy())),
    "strided": lambda a: padded(torch.from_numpy(a)),
    "transposed": lambda a: torch.from_numpy(a.T.copy()).permute(*range(a.ndim - 1, -1, -1)),
    "shared": lambda a: torch.from_numpy(a.copy()).share_memory_(),
    "detached": lambda a: torch.from_numpy(a.copy()).requires_grad_().detach(),
}


def data(shape, dtype="float32"):
    x, dy = np.random.default_rng(0).standard_normal((2, *shape)).astype(dtype)
    return x, dy


def results(x, dy, **options):
    bn = BatchNorm(5, activation="leaky_relu", **options)
    y = bn(x)
    return [y, bn.backward(dy), *bn.grads.values(), bn.running_mean, bn.running_var, bn.eval()(x)]


def same(given, expected):
    for a, b in zip(given, expected, strict=True):
        assert type(a) is np.ndarray
        assert a.strides == b.strides
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
@pytest.mark.parametrize("lies", TENSORS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"ghost_size": 2}], ids=str)
def test_a_tensor_of_pytorch_is_its_array(shape, lies, dtype, options):
    if lies == "detached" and dtype == "int32":
        pytest.skip("integers have no gradient")
    x, dy = data(shape, "float64" if dtype == "int32" else dtype)
    if dtype == "int32":
        x = np.round(10 * x).astype(np.int32)
    tensor, gradient = TENSORS[lies](x), torch.from_numpy(dy)
    before = tensor.clone()
    same(results(tensor, gradient, **options), results(tensor.numpy(), dy, **options))
    assert torch.equal(tensor, before)
    assert as_array(tensor, "x").ctypes.data == tensor.data_ptr()


@pytest.mark.parametrize("shape", SHAPES)
def test_an_array_of_jax_is_its_array(shape):
    x, dy = data(shape)
    theirs, gradient = jax.numpy.asarray(x), jax.numpy.asarray(dy)
    same(results(theirs, gradient), results(x, dy))
    given = as_array(theirs, "x")
    assert not given.flags.writeable
    assert given.ctypes.data == theirs.unsafe_buffer_pointer()


@pytest.mark.parametrize("make", [torch.from_numpy, jax.numpy.asarray], ids=["torch", "jax"])
def test_everything_else_takes_them_too(make):
    x, dy = data((8, 5))
    mask, row, labels = np.arange(8) < 6, np.linspace(1, 2, 5, dtype=np.float32), np.arange(8) % 5
    bn, theirs = BatchNorm(5), BatchNorm(5)
    same([theirs(make(x), mask=make(mask)), theirs.backward(make(dy))], [bn(x, mask=mask), bn.backward(dy)])
    arguments = [x, row, row, row, row]
    same([fastbn.batch_norm(*map(make, arguments))], [fastbn.batch_norm(*arguments)])
    same([fastbn.moments(make(x), mask=make(mask)).mean], [fastbn.moments(x, mask=mask).mean])
    for layer in (nn.Dense(5, 3, seed=0), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3).eval(), nn.Softmax()):
        expected = layer(x)
        same([layer(make(x))], [expected])
        out = np.ones_like(expected)
        same([layer.backward(make(out))], [layer.backward(out)])
    for loss, target in ((losses.mse, dy), (losses.softmax_cross_entropy, labels)):
        (value, gradient), (expected, right) = loss(make(x), make(target), make(row[:1].repeat(8))), loss(x, target)
        assert value == expected
        same([gradient], [right])
    models = [nn.Sequential(nn.Standardize(5), nn.Dense(5, 6, seed=0), BatchNorm(6), nn.Dense(6, 5)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, of in zip(models, (np.asarray, make), strict=True):
        model[0].fit(of(x))
        pair = of(x), of(labels)
        training.fit(model, pair, losses.softmax_cross_entropy, optim.Adam(model), epochs=2, batch_size=4)
        training.recalibrate(model, of(x))
        state = model.state_dict()  # JAX has no float64 unless it is told to
        model.load_state_dict({key: of(a) if a.dtype == np.float32 else a for key, a in state.items()})
    same(models[1].state_dict().values(), models[0].state_dict().values())
    scores = [
        training.evaluate(models[0], (of(x), of(labels)), losses.softmax_cross_entropy) for of in (np.asarray, make)
    ]
    assert scores[0] == scores[1]


def test_a_list_of_tensors():
    x, dy = data((8, 5))
    same(results([*torch.from_numpy(x)], [*jax.numpy.asarray(dy)]), results(x, dy))


def test_out_is_the_memory_of_a_tensor():
    x, dy = data((4, 5, 6, 7))
    tensor, bn = torch.from_numpy(x.copy()), BatchNorm(5)
    expected = bn(x)
    out = tensor.numpy()
    assert bn(tensor, out=out) is out
    assert tensor.numpy().tobytes() == expected.tobytes()
    with pytest.raises(RuntimeError, match="did not overwrite x"):
        bn.backward(dy)
    with pytest.raises(TypeError, match=r"^expected out to be a NumPy array, got Tensor$"):
        bn(x, out=tensor)
    bn(tensor)
    with pytest.raises(ValueError, match="expected out to share no memory with x"):
        bn.backward(dy, out=tensor.numpy())


CSR = pytest.mark.filterwarnings("ignore:Sparse")
REFUSED = {
    "bfloat16": lambda x: x.bfloat16(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "meta": lambda x: x.to("meta"),
    "jax bfloat16": lambda x: jax.numpy.asarray(x.numpy()).astype(jax.numpy.bfloat16),
    "half": lambda x: x.half(),
    "jax half": lambda x: jax.numpy.asarray(x.numpy()).astype(jax.numpy.float16),
    "complex": lambda x: x + 1j,
}


@CSR
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_one_type_error(kind):
    bn, x = BatchNorm(5), REFUSED[kind](torch.ones(8, 5))
    before = bn.state_dict()
    for call in (bn, fastbn.moments, nn.Dense(5, 2), nn.ReLU(), nn.Standardize(5).fit):
        with pytest.raises(TypeError, match=r"^expected [xX] (of dtype float32 or float64|as an array that NumPy can)"):
            call(x)
    same(bn.state_dict().values(), before.values())


def test_a_tensor_that_requires_a_gradient_keeps_pytorchs_sentence():
    x = torch.ones(8, 5, requires_grad=True)
    sentences = [r"requires grad\. Use tensor\.detach\(\)"] * 3
    for call, sentence in zip((BatchNorm(5), nn.Dense(5, 2), fastbn.moments), sentences, strict=True):
        with pytest.raises(RuntimeError, match=sentence):
            call(x)
    with torch.no_grad():
        assert BatchNorm(5)(x.detach()).shape == (8, 5)


def test_a_traced_and_a_deleted_array_of_jax():
    with pytest.raises(TypeError, match=r"expected x as an array that NumPy can read, .*traced array"):
        jax.jit(lambda x: BatchNorm(5)(x).sum())(jax.numpy.ones((8, 5)))
    gone = jax.numpy.ones((8, 5))
    gone.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        BatchNorm(5)(gone)


@pytest.mark.parametrize("make", [lambda a: torch.from_numpy(a).clone(), jax.numpy.array], ids=["torch", "jax"])
@pytest.mark.parametrize("layer", [BatchNorm(64), BatchNorm(64, ghost_size=9), nn.Dense(64, 64)], ids=repr)
def test_a_tensor_that_is_saved_for_backward_lives_as_long(layer, make):
    x, dy = np.random.default_rng(0).standard_normal((2, 256, 64)).astype(np.float32)
    layer(x)
    expected = layer.backward(dy)
    tensor = make(x)
    watched = weakref.ref(tensor)
    layer(tensor)
    del tensor
    gc.collect()
    assert watched() is not None or not isinstance(layer, BatchNorm)
    noise = [make(np.full_like(x, np.nan)) for _ in range(20)]  # takes the memory, where it is free
    same([layer.backward(dy)], [expected])
    layer(np.zeros((0, 64), np.float32))
    gc.collect()
    assert watched() is None
    assert len(noise) == 20


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.bool_])
@pytest.mark.parametrize("wrap", [torch.from_numpy, memoryview, lambda a: a], ids=["tensor", "buffer", "array"])
def test_out_over_the_memory_of_integers_forgets_x(wrap, dtype):
    """x is converted, so that the array that the kernels read is not the memory that out overwrites."""
    memory = np.zeros((8, 5))
    x = memory.reshape(-1).view(dtype)[:40].reshape(8, 5)
    x[:] = np.arange(40).reshape(8, 5) % 2
    bn, plain = BatchNorm(5), BatchNorm(5)
    expected = plain(x)
    assert bn(wrap(x), out=memory).tobytes() == expected.tobytes()
    with pytest.raises(RuntimeError, match="did not overwrite x"):
        bn.backward(np.ones((8, 5)))
