"""Arrays as they come: shapes, strides, dtypes, byte orders, alignments, overlaps, NaN and infinities, parameters of
any type. A call gives what the oracle gives, or the documented error with everything as it was.

FASTBN_FUZZ is the number of examples of each test: 40 by default, more on demand.
"""

import os

import numpy as np
import pytest
import twin
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from twin import within

import fastbn
from fastbn.kernels import machine

EXAMPLES = int(os.environ.get("FASTBN_FUZZ", "40"))
FUZZED = settings(max_examples=EXAMPLES)
GRADIENT = {"float32": 8, "float64": 16}  # units of rounding, as tests/test_exactness.py has them
NUMBERS = ["f4", "f4", "f4", "f8", "f8", ">f4", ">f8", "i1", "u2", "i8", "?"]
OTHERS = ["f2", "c8", "c16", "O", "S3", "U2", "M8[s]", "longdouble", "V4"]
SIZES = st.one_of(st.integers(0, 9), st.sampled_from([1, 2, 3, 16, 17, 33, 63, 64, 65, 130, 300]))


class Subclass(np.ndarray):
    pass


@pytest.fixture(scope="module", autouse=True)
def threads_for_all():
    """The arrays are small: no threshold keeps them on one thread."""
    before = machine.set_settings(parallel_from_elements=1)
    yield
    machine.set_settings(**before)


@st.composite
def values(draw, shape, dtype):
    """Numbers of one size or of many, with special ones among them, in C order."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(shape) * draw(st.sampled_from([1, 1, 1e-3, 1e3])) + draw(st.sampled_from([0, 0, 1, 1e4]))
    if draw(st.booleans()) and x.size:
        few = rng.random(x.shape) < 0.02
        kind = draw(st.sampled_from(["nan", "inf", "constant", "huge", "tiny", "zero"]))
        x[few] = {"nan": np.nan, "inf": np.inf, "huge": 1e30, "tiny": 1e-42, "zero": 0}.get(kind, 7)
        if kind == "constant":
            x[...] = 7
    with np.errstate(all="ignore"):
        return x.astype(dtype) if np.dtype(dtype).kind == "f" else (100 + 9 * np.nan_to_num(x, posinf=9)).astype(dtype)


@st.composite
def laid_out(draw, a):
    """The same numbers in memory of another kind: permuted, strided, backwards, off any boundary, read-only, mapped."""
    if a.dtype.hasobject:
        return a, np.zeros(0, np.uint8)
    order = draw(st.permutations(range(a.ndim)))
    steps = [draw(st.sampled_from([1, 1, 1, 2, -1, -3])) for _ in order]
    lies = [a.shape[i] for i in order]
    room = [max(1, n) * abs(step) for n, step in zip(lies, steps, strict=True)]
    nbytes = int(np.prod(room)) * a.itemsize
    offset = draw(st.sampled_from([0, 0, a.itemsize, 16, 1, 4]))
    buffer = np.full(nbytes + 192, 0xA5, np.uint8)
    start = 64 + (-buffer.ctypes.data) % 64 + offset
    whole = buffer[start : start + nbytes].view(a.dtype).reshape(room)
    placed = whole[tuple(slice(None, None, step) for step in steps)]
    placed = placed[tuple(slice(0, n) for n in lies)].transpose(np.argsort(order)) if a.ndim else whole.reshape(())
    placed[...] = a
    kind = draw(st.sampled_from(["plain"] * 5 + ["subclass", "memmap", "read-only"]))
    if kind == "subclass":
        placed = placed.view(Subclass)
    elif kind == "memmap":
        placed = placed.view(np.memmap)
    elif kind == "read-only":
        placed.flags.writeable = False
    return placed, buffer


@st.composite
def shapes(draw):
    shape = draw(st.lists(SIZES, min_size=1, max_size=4))
    while np.prod(shape) > 40_000:
        shape[int(np.argmax(shape))] //= 2
    return tuple(shape)


@st.composite
def parameters(draw, c, name, wrong=True):
    """(C,) numbers, None, or what is neither."""
    kinds = [None, None, "f4", "f8", ">f8", "i4", "list", "strided", "tuple"]
    kind = draw(st.sampled_from(kinds + ["wrong"] * wrong))
    if kind is None:
        return None
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    a = rng.standard_normal(c) + 1
    if name == "var":
        a = np.square(a) + 0.1
    if kind == "wrong":
        return draw(st.sampled_from([np.ones(c + 1), np.ones((1, c)), "ones", np.ones(c, complex), np.ma.ones(c), 1.5]))
    if kind in ("list", "tuple"):
        return a.tolist() if kind == "list" else tuple(a.tolist())
    return np.repeat(a, 2)[::2] if kind == "strided" else (a * (3 if kind == "i4" else 1)).astype(kind)


def fits(p, c):
    """Whether p is a parameter of c features, by the documentation."""
    if p is None:
        return True
    a = np.asarray(p)
    return not isinstance(p, np.ma.MaskedArray) and a.dtype.kind in "fiub" and a.dtype.itemsize != 2 and a.shape == (c,)


@st.composite
def targets(draw, x):
    """What is given as out=, whether it may be, and the buffer that it lies in."""
    kind = draw(st.sampled_from(["none"] * 3 + ["fresh", "fresh", "itself", "overlapping", "shape", "dtype", "list"]))
    if kind == "none":
        return None, True, None
    if kind == "itself":
        return x, x.flags.writeable and x.dtype.kind == "f" and x.dtype.isnative, None
    if kind == "overlapping" and x.ndim and x.shape[0] > 1 and x.size:
        return x[::-1], False, None  # the same memory in another order
    if kind == "shape":
        return np.empty((*x.shape, 1), x.dtype), False, None
    if kind == "dtype":
        return np.empty(x.shape, "f2"), False, None
    if kind == "list":
        return x.tolist(), False, None
    out, buffer = draw(laid_out(np.zeros(x.shape, x.dtype)))
    return out, out.flags.writeable and x.dtype.kind == "f" and x.dtype.isnative, buffer


def outside(buffer, a):
    """The bytes of the buffer that do not belong to a."""
    inside = np.zeros(len(buffer), bool)
    if a.size and len(buffer):
        first = a.__array_interface__["data"][0] - buffer.ctypes.data
        where = sum(
            np.ix_(*(np.arange(n) * s for n, s in zip(a.shape, a.strides, strict=True))), np.zeros(a.shape, int)
        )
        for byte in range(a.itemsize):
            inside[(where + first + byte).ravel()] = True
    return buffer[~inside].copy()


class Call:
    """One drawn call: what it is given, whether the documentation allows it, and what must not change."""

    def __init__(self, data, *, wrong=True):
        """wrong: whether arguments, but for out, may be what is refused."""
        self.data = data
        shape = data.draw(shapes())
        dtype = data.draw(st.sampled_from(NUMBERS * 3 + OTHERS * wrong))
        self.known = dtype in NUMBERS
        plain = data.draw(values(shape, dtype if self.known else "f8"))
        if self.known:
            pass
        elif dtype == "O":
            plain = plain.astype(object)
        elif dtype == "V4":
            plain = np.zeros(shape, "V4")
        elif dtype == "M8[s]":
            plain = np.zeros(shape, dtype)
        else:
            with np.errstate(all="ignore"):
                plain = plain.astype(dtype)
        self.x, self.buffer = data.draw(laid_out(plain))
        self.axis = data.draw(st.integers(-len(shape) - wrong, len(shape) - 1 + wrong))
        self.axis_fits = -len(shape) <= self.axis < len(shape)
        self.c = shape[self.axis] if self.axis_fits else 3
        self.count = self.x.size // self.c if self.c else int(np.prod(np.delete(shape, self.axis % len(shape))))
        self.activation = data.draw(st.sampled_from([None, None, "relu", "leaky_relu", *["gelu"] * wrong]))
        self.eps = data.draw(st.sampled_from([1e-5, 1e-5, 1e-3, 1e-12, *[0.0, -1.0, float("nan")] * wrong]))
        self.weight, self.bias = (data.draw(parameters(self.c, name, wrong)) for name in ("weight", "bias"))
        self.threads = data.draw(st.sampled_from([None, 1, 2, 3]))
        self.out, self.out_fits, self.out_buffer = data.draw(targets(self.x))
        self.allowed = (
            self.known
            and self.axis_fits
            and self.activation != "gelu"
            and self.eps > 0
            and fits(self.weight, self.c)
            and fits(self.bias, self.c)
            and self.out_fits
        )
        note(
            f"x {self.x.dtype} {self.x.shape} {self.x.strides} axis {self.axis}, out {type(self.out)}, {self.allowed=}"
        )
        self.given = self.x.copy()
        self.before = self.state()

    def state(self):
        """What an error must leave, and what lies around the arrays."""
        arrays = [self.x, self.out, self.weight, self.bias]
        whole = [a.tobytes() for a in arrays if isinstance(a, np.ndarray) and not a.dtype.hasobject]
        return whole, self.around()

    def around(self):
        around = [outside(self.buffer, self.x).tobytes()]
        if self.out_buffer is not None:
            around.append(outside(self.out_buffer, self.out).tobytes())
        return around

    def made(self, call, allowed):
        """The result, or None where the call is refused, which must be so where it is not allowed."""
        try:
            result = call()
        except (ValueError, TypeError, np.exceptions.AxisError) as error:
            refused = error
        else:
            refused = None
        assert (refused is None) == allowed, refused
        if refused is not None:
            assert self.state() == self.before
            return None
        assert self.around() == self.before[1]
        return result

    @property
    def result_dtype(self):
        return np.dtype("f4" if self.given.dtype.kind == "f" and self.given.itemsize == 4 else "f8")

    def check(self, y, truth, training):
        """y against the oracle, in the features that hold numbers of everyday sizes."""
        assert y.dtype == self.result_dtype
        assert y.shape == self.given.shape
        assert self.out is None or y is self.out
        x = self.given.astype(self.result_dtype)
        rows = np.moveaxis(np.asarray(x), self.axis, 0).reshape(self.c, -1)
        usual = (abs(rows) < 1e9).all(1)
        assume(usual.any() and x.size)
        x = np.moveaxis(x, self.axis, 0)[usual]
        weight, bias = (None if p is None else np.asarray(p, np.float64)[usual] for p in (self.weight, self.bias))
        stats = twin.statistics(x, 0) if training else twin.given(*(p[usual] for p in truth))
        options = {"eps": self.eps, "axis": 0, "activation": self.activation}
        expected, size = twin.forward(x, stats, weight, bias, **options)
        bound = 5 * twin.unit(self.result_dtype) * size
        # Far from 0 the oracle's own mean is no better than its digits.
        spare = 1 + np.abs(stats.mean) / np.sqrt(stats.var + self.eps) / 1e9
        got = np.moveaxis(np.asarray(y), self.axis, 0)[usual]
        within(got, expected, bound * spare.reshape(-1, *[1] * (x.ndim - 1)).astype(float))
        return usual, x, got


@FUZZED
@given(st.data())
def test_forward(data):
    call = Call(data)
    options = {"eps": call.eps, "axis": call.axis, "activation": call.activation, "num_threads": call.threads}
    result = call.made(
        lambda: fastbn.batch_norm_forward(call.x, call.weight, call.bias, out=call.out, **options),
        call.allowed and (call.count != 1 or not call.c),
    )
    if result is None:
        return
    y, stats = result
    assert stats.count == call.count
    if call.out is not call.x:
        assert call.x.tobytes() == call.given.tobytes()
    if call.c and call.count:
        call.check(y, None, True)


@FUZZED
@given(st.data())
def test_inference(data):
    call = Call(data)
    mean, var = (data.draw(parameters(call.c, name)) for name in ("mean", "var"))
    allowed = call.allowed and mean is not None and var is not None and fits(mean, call.c) and fits(var, call.c)
    options = {"eps": call.eps, "axis": call.axis, "activation": call.activation, "num_threads": call.threads}
    y = call.made(
        lambda: fastbn.batch_norm(call.x, mean, var, call.weight, call.bias, out=call.out, **options), allowed
    )
    if y is not None and call.c and call.count:
        truth = np.asarray(mean, np.float64), np.asarray(var, np.float64)
        assume((truth[1] > 0).all())
        call.check(y, truth, False)


@FUZZED
@given(st.data())
def test_backward(data):
    call = Call(data, wrong=False)
    assume(call.count != 1 or not call.c)
    options = {"eps": call.eps, "axis": call.axis, "activation": call.activation}
    y, stats = fastbn.batch_norm_forward(call.given, call.weight, call.bias, **options)
    dy, dy_buffer = data.draw(
        laid_out(data.draw(values(call.x.shape, data.draw(st.sampled_from(["f4", "f8", ">f4"])))))
    )
    dy_before = dy.tobytes()
    into = data.draw(st.sampled_from(["drawn", "dy"]))
    out = dy if into == "dy" else call.out
    x_is_out = out is call.x and call.x.size > 0
    fitting = dy.flags.writeable and dy.dtype == call.result_dtype if into == "dy" else call.out_fits and not x_is_out
    around = outside(dy_buffer, dy).tobytes()
    result = call.made(
        lambda: fastbn.batch_norm_backward(
            dy, call.x, stats, call.weight, call.bias, out=out, num_threads=call.threads, **options
        ),
        fitting,
    )
    assert outside(dy_buffer, dy).tobytes() == around
    if result is None or out is not dy:
        assert dy.tobytes() == dy_before
    if result is None or not call.c or not call.count:
        return
    dx, dweight, dbias = result
    assert dx.dtype == call.result_dtype
    assert out is None or dx is out
    assert dweight.dtype == dbias.dtype == np.float64
    dy = np.frombuffer(dy_before, dy.dtype).reshape(call.x.shape).astype(call.result_dtype)
    x = call.given.astype(call.result_dtype)
    rows, dy_rows = (np.moveaxis(np.asarray(a), call.axis, 0).reshape(call.c, -1) for a in (x, dy))
    usual = (abs(rows) < 1e9).all(1) & (abs(dy_rows) < 1e9).all(1) & (rows != rows[:, :1]).any(1)
    assume(usual.any())
    x, dy, y, dx = (np.moveaxis(np.asarray(a), call.axis, 0)[usual] for a in (x, dy, y, dx))
    weight = None if call.weight is None else np.asarray(call.weight, np.float64)[usual]
    stats = twin.statistics(x, 0)
    far = np.abs(stats.mean) / np.sqrt(stats.var + call.eps)
    assume((far < 1e6).all())
    expected, sizes = twin.backward(dy, x, stats, weight, call.eps, 0, call.activation, y)
    u = twin.unit(call.result_dtype)
    bound = GRADIENT[call.result_dtype.name] * u * sizes[0]
    # means of gradients below 1e-30 count as that (docs/explanation/numerics.md)
    floor = 1e-30 * np.abs(1 if weight is None else weight).max() / np.sqrt(call.eps)
    within(dx, expected[0], bound + floor)
    sums = 1e-6 if call.result_dtype == np.float32 else 1e-14
    for got, truth, size in zip((dweight[usual], dbias[usual]), expected[1:], sizes[1:], strict=True):
        within(got, truth, sums * size)


def test_the_guards_are_seen():
    """What the tests above look at: a byte that is written outside an array."""
    buffer = np.zeros(100, np.uint8)
    a = buffer[10:50].view("f4")[::2]
    before = outside(buffer, a).tobytes()
    a[...] = 1
    assert outside(buffer, a).tobytes() == before
    for at in (9, 14, 50):
        buffer[at] = 1
        assert outside(buffer, a).tobytes() != before
        buffer[at] = 0


@pytest.mark.parametrize("wrong", OTHERS)
def test_other_dtypes_are_refused(wrong):
    with pytest.raises(TypeError, match="expected x of dtype float32 or float64"):
        fastbn.moments(np.zeros((3, 2), wrong))
