"""fastbn.interop.dask: a dask array gives what exact arithmetic and fastbn itself give for the whole array."""

import math
import os
import pickle
import signal
import time
import weakref
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import twin
from hypothesis import given
from hypothesis import strategies as st
from sklearn.pipeline import make_pipeline

import fastbn
from fastbn import BatchNorm, BatchStats, RunningStats
from fastbn.estimators import BatchNormTransformer
from fastbn.interop.dask import batch_norm, moments

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
distributed = pytest.importorskip("distributed")

PLACES = {
    "one thread": {"scheduler": "synchronous"},
    "two threads": {"scheduler": "threads", "num_workers": 2},
    "eight threads": {"scheduler": "threads", "num_workers": 8},
    "processes": {"scheduler": "processes", "num_workers": 2},
}


@pytest.fixture(scope="module")
def cluster():
    with new_cluster() as made:
        yield made


def new_cluster():
    return distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    )


@pytest.fixture(autouse=True)
def one_thread():
    """Unless a test asks for another scheduler."""
    with dask.config.set(scheduler="synchronous"):
        yield


@st.composite
def chunked(draw, dtypes=("float32", "float64"), ratios=(0, 1, 1e6), smallest=0):
    """An array in memory, the same as a dask array in any chunks, and the feature axis."""
    ndim = draw(st.integers(1, 4))
    sizes = st.lists(st.integers(smallest, 3), min_size=1, max_size=4).map(tuple)
    chunks = tuple(draw(sizes) for _ in range(ndim))
    axis = draw(st.integers(-ndim, ndim - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = tuple(map(sum, chunks))
    of_feature = [1] * ndim
    of_feature[axis] = shape[axis]
    spread = rng.uniform(0.5, 3, of_feature)
    a = (rng.standard_normal(shape) * spread + spread * draw(st.sampled_from(ratios))).astype(
        draw(st.sampled_from(dtypes))
    )
    return a, da.from_array(a, chunks=chunks), axis


def bits(stats):
    return [a.tobytes() for a in (stats.mean, stats.mean_low, stats.var)], stats.count


def exact(a, axis):
    """Mean and variance of each feature as fractions."""
    for values in np.moveaxis(a, axis, 0):
        values = [Fraction(float(v)) for v in values.ravel()]
        mean = sum(values) / len(values)
        yield mean, sum((v - mean) ** 2 for v in values) / len(values)


# --- moments


@given(chunked(ratios=(0, 1, 1e6, 1e12), smallest=1))
def test_moments_are_those_of_exact_arithmetic(made):
    a, x, axis = made
    stats = moments(x, axis).compute()
    assert isinstance(stats, BatchStats)
    assert stats.count == a.size // a.shape[axis]
    for c, (mean, var) in enumerate(exact(a, axis)):
        std = math.sqrt(var)
        assert abs(Fraction(stats.mean[c]) + Fraction(stats.mean_low[c]) - mean) <= 2e-15 * std + 1e-31 * abs(mean)
        assert abs(Fraction(stats.var[c]) - var) <= 1e-14 * var + (std and 1e-15 * std * std)


@given(chunked())
def test_moments_of_any_chunks_are_moments(made):
    """The same as of the whole array, empty blocks and empty arrays among them."""
    a, x, axis = made
    stats, whole = moments(x, axis).compute(), fastbn.moments(a, axis)
    assert stats.mean.shape == whole.mean.shape
    if stats.mean.size:
        assert stats.count == whole.count
    if whole.count:
        off = (stats.mean - whole.mean) + (stats.mean_low - whole.mean_low)
        assert (abs(off) <= 4e-15 * np.sqrt(whole.var) + 1e-30).all()
    np.testing.assert_allclose(stats.var, whole.var, rtol=2e-14)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "bool", ">f4", ">f8"])
@pytest.mark.parametrize("shape", [(300, 7), (4, 5, 6, 7), (1, 3)], ids=str)
def test_one_block_has_the_bits_of_moments(shape, dtype, axis):
    a = (np.random.default_rng(0).standard_normal(shape) * 3 + 5).astype(dtype)
    assert bits(moments(da.from_array(a, chunks=-1), axis).compute()) == bits(fastbn.moments(a, axis))
    if a.size > a.shape[axis]:
        y = batch_norm(da.from_array(a, chunks=-1), training=True, axis=axis).compute()
        expected = fastbn.batch_norm_forward(a, axis=axis)[0]
        assert y.dtype == expected.dtype
        assert y.tobytes() == expected.tobytes()


@pytest.mark.parametrize("ratio", [1, 1e6, 1e12])
@pytest.mark.parametrize("sizes", [(100,) * 10, (1,) * 16, (1, 500, 3, 40), (0, 7, 0, 0, 9, 0)], ids=str)
def test_blocks_are_merged_in_their_order(sizes, ratio):
    """As RunningStats merges them, as long as they are merged in one task."""
    a = np.random.default_rng(0).standard_normal((sum(sizes), 5)) + ratio
    stats = moments(da.from_array(a, chunks=(sizes, (2, 3)))).compute()
    for features in (slice(2), slice(2, 5)):
        running = RunningStats(len(a[0, features]), momentum=None, unbiased=False)
        for part in np.split(a[:, features], np.cumsum(sizes)[:-1]):
            running.update(fastbn.moments(part))
        for name in ("mean", "mean_low", "var"):
            assert getattr(stats, name)[features].tobytes() == getattr(running, name).tobytes()
        assert stats.count == running.count


def test_blocks_along_two_axes_are_merged_in_the_order_of_their_positions():
    a = np.random.default_rng(0).standard_normal((40, 5, 30)) + 1e6
    running = RunningStats(5, momentum=None, unbiased=False)
    for row in np.split(a, 4):
        for part in np.split(row, 3, axis=2):
            running.update(fastbn.moments(part))
    stats = moments(da.from_array(a, chunks=(10, 5, 10))).compute()
    for name in ("mean", "mean_low", "var"):
        assert getattr(stats, name).tobytes() == getattr(running, name).tobytes()


@pytest.mark.parametrize(("shape", "chunks"), [((1000, 2), (1, 2)), ((20, 2, 24), 1), ((5, 6, 2, 5), 1)], ids=str)
@pytest.mark.parametrize("split_every", [2, 1000])
def test_no_task_gathers_many_results(shape, chunks, split_every):
    """And dask's own setting for reductions changes no bit."""
    axis = shape.index(2)
    a = np.random.default_rng(0).standard_normal(shape) + 1e6
    expected = bits(moments(da.from_array(a, chunks=chunks), axis).compute())
    with dask.config.set(split_every=split_every):
        lazy = moments(da.from_array(a, chunks=chunks), axis)
        assert bits(lazy.compute()) == expected
    needs = lazy.__dask_graph__().get_all_dependencies()
    assert max(map(len, needs.values())) <= 16


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("where", [*PLACES, "cluster"])
def test_every_scheduler_gives_the_same_bits(where, dtype, cluster):
    a = (np.random.default_rng(0).standard_normal((500, 6, 11)) * 3 + 1e4).astype(dtype)
    x = da.from_array(a, chunks=(29, 4, 6))
    lazy = moments(x), batch_norm(x, weight=np.arange(6), training=True, activation="relu")
    stats, y = dask.compute(*lazy)
    if where == "cluster":
        with distributed.Client(cluster):
            again = dask.compute(*lazy, scheduler="distributed")
    else:
        again = dask.compute(*lazy, **PLACES[where])
    assert bits(again[0]) == bits(stats)
    assert again[1].tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", ["f4", "f8", ">f8"])
@pytest.mark.parametrize("order", [(0, 2, 1), (2, 0, 1)])
def test_a_block_that_has_been_sent_gives_the_same_bits(order, dtype):
    """Its axes may lie in memory in another order then: in C order, if they lay neither so nor in Fortran's."""
    a = (np.random.default_rng(0).standard_normal((60, 40, 50)) + 1e6).astype(dtype)
    x = da.from_array(a, chunks=(30, 40, 20)).transpose(order)
    sent = x.map_blocks(
        lambda block: distributed.protocol.deserialize(*distributed.protocol.serialize(block)), dtype=dtype
    )
    assert bits(moments(x).compute()) == bits(moments(sent).compute())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_not_finite_stays_in_its_feature(value, dtype):
    a = np.random.default_rng(0).standard_normal((90, 4)).astype(dtype)
    clean = da.from_array(a.copy(), chunks=(7, 3))
    a[50, 2] = value
    x = da.from_array(a, chunks=(7, 3))
    stats, expected = dask.compute(moments(x), moments(clean))
    for name in ("mean", "mean_low", "var"):
        np.testing.assert_array_equal(np.delete(getattr(stats, name), 2), np.delete(getattr(expected, name), 2))
    assert not np.isfinite(stats.mean[2])
    y, expected = dask.compute(batch_norm(x, training=True), batch_norm(clean, training=True))
    np.testing.assert_array_equal(np.delete(y, 2, axis=1), np.delete(expected, 2, axis=1))
    assert np.isnan(y[50, 2])


@pytest.mark.parametrize("chunks", [((0, 0), (2, 1)), ((0,), (3,))], ids=str)
def test_no_values_at_all(chunks):
    x = da.from_array(np.zeros((0, 3), np.float32), chunks=chunks)
    stats = moments(x).compute()
    assert stats.count == 0
    assert np.isnan([stats.mean, stats.var]).all()
    y = batch_norm(x, training=True).compute()
    assert y.shape == (0, 3)
    assert y.dtype == np.float32


def test_chunks_of_unknown_size():
    a = np.random.default_rng(0).standard_normal((50, 4))
    x = da.from_array(a, chunks=(10, 2))
    some = x[x[:, 0] > 0]
    assert np.isnan(some.shape[0])
    valid = a[a[:, 0] > 0]
    stats = moments(some).compute()
    assert stats.count == len(valid)
    np.testing.assert_allclose(stats.mean, valid.mean(0), rtol=1e-13)
    expected, scale = twin.forward(valid, twin.statistics(valid))
    twin.within(batch_norm(some, training=True).compute(), expected, 5 * twin.unit("f8") * scale)
    y = batch_norm(some, np.ones(4), np.ones(4)).compute()
    assert y.tobytes() == fastbn.batch_norm(valid, np.ones(4), np.ones(4)).tobytes()
    with pytest.raises(ValueError, match=r"^expected a known number of features along axis 0 of x, got "):
        moments(some, axis=0)


# --- batch_norm


@given(chunked(dtypes=("f4", "f8", "i4", "?", ">f4")), st.sampled_from([None, "relu", "leaky_relu"]), st.data())
def test_given_statistics_give_the_bits_of_the_whole(made, activation, data):
    a, x, axis = made
    c = a.shape[axis]
    rng = np.random.default_rng(0)
    mean, var, weight, bias = rng.uniform(0.1, 2, (4, c))
    weight = weight.astype("f4")
    weight, bias = data.draw(st.sampled_from([(None, None), (weight, None), (None, bias), (weight, bias)]))
    expected = fastbn.batch_norm(a, mean, var, weight, bias, axis=axis, activation=activation)
    if data.draw(st.booleans()):  # lazy ones, cut in another way
        mean, var, weight, bias = (None if v is None else da.from_array(v, chunks=2) for v in (mean, var, weight, bias))
    y = batch_norm(x, mean, var, weight, bias, axis=axis, activation=activation)
    assert y.chunks == x.chunks
    assert y.dtype == expected.dtype
    got = y.compute()
    assert got.dtype == expected.dtype
    assert got.tobytes() == np.ascontiguousarray(expected).tobytes()


@given(chunked(smallest=1), st.sampled_from([None, "relu", "leaky_relu"]), st.booleans())
def test_training_holds_the_numerics_contract(made, activation, affine):
    a, x, axis = made
    if a.size == a.shape[axis]:
        return
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(1, 1, (2, a.shape[axis])) if affine else (None, None)
    y = batch_norm(x, None, None, weight, bias, True, axis=axis, activation=activation)
    assert y.chunks == x.chunks
    assert y.dtype == a.dtype
    expected, scale = twin.forward(a, twin.statistics(a, axis), weight, bias, axis=axis, activation=activation)
    twin.within(y.compute(), expected, 5 * twin.unit(a.dtype) * scale)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ratio", [1, 1e6])
def test_training_over_many_blocks(ratio, dtype):
    """Three levels of merges, an outlier, a constant feature."""
    a = (np.random.default_rng(0).standard_normal((6000, 5)) + ratio).astype(dtype)
    a[0, 1] *= 1e3
    a[:, 2] = ratio / 3
    y = batch_norm(da.from_array(a, chunks=(20, 3)), training=True).compute(scheduler="threads")
    expected, scale = twin.forward(a, twin.statistics(a))
    twin.within(y, expected, 5 * twin.unit(dtype) * scale)
    assert (y[:, 2] == 0).all()


def test_the_low_part_of_the_mean_counts():
    a = np.random.default_rng(0).standard_normal((60, 3)) + 1e12
    y = batch_norm(da.from_array(a, chunks=(7, 2)), training=True, eps=1e-300).compute()
    for c, (mean, var) in enumerate(exact(a, 1)):
        expected = [float(Fraction(v) - mean) / math.sqrt(var) for v in a[:, c]]
        np.testing.assert_allclose(y[:, c], expected, rtol=1e-14, atol=1e-15)


def test_statistics_are_those_of_the_call():
    """Not those that a layer has when y is computed."""
    a = np.random.default_rng(0).standard_normal((20, 4)).astype("f4")
    bn = BatchNorm(4)
    y = batch_norm(da.from_array(a, chunks=5), bn.running_mean, bn.running_var, bn.weight, bn.bias)
    expected = bn.eval()(a)
    bn.train()(a + 9)
    bn.weight *= 2
    assert y.compute().tobytes() == expected.tobytes()


class Source:
    """An array whose blocks are made when they are read; how many there are at once, and how often each was read."""

    dtype, ndim = np.dtype("f4"), 2

    def __init__(self, rows, columns):
        self.shape, self.alive, self.most, self.reads = (rows, columns), 0, 0, 0

    def __getitem__(self, index):
        block = np.random.default_rng(0).standard_normal(self.shape, dtype="f4")[index].copy()
        self.alive, self.reads = self.alive + 1, self.reads + 1
        self.most = max(self.most, self.alive)
        weakref.finalize(block, self.gone)
        return block

    def gone(self):
        self.alive -= 1


def test_nothing_is_read_before_the_result_is_computed_and_no_more_than_a_few_blocks_stand_in_memory():
    source = Source(640, 3)
    x = da.from_array(source, chunks=(10, 3))
    source.reads = 0  # dask has asked for what an empty block is
    means, y = moments(x).mean, batch_norm(x, training=True)
    assert source.reads == 0
    y.max().compute()
    assert source.reads == 128
    assert source.most <= 3
    source.reads = 0
    dask.compute(moments(x), batch_norm(x, training=True))  # which have the statistics in common
    assert source.reads == 128
    source.most = source.reads = 0
    da.from_delayed(means, (3,), float).compute()
    assert source.reads == 64
    assert source.most <= 2


STEPS = {
    "slice": lambda x: x[5:-3],
    "backwards": lambda x: x[::-1, ::-1],
    "index": lambda x: x[:, [2, 0]],
    "mask": lambda x: x[x[:, 0] > 0],
    "rechunk": lambda x: x.rechunk((25, 3)),
    "reshape": lambda x: x.reshape(320, 2, 3),
    "concatenate": lambda x: da.concatenate([x[:320], x[320:]]),
    "stack": lambda x: da.stack([x, x + 1], axis=2),
    "where": lambda x: da.where(x > 0, x, 0),
    "overlap": lambda x: x.map_overlap(lambda block: block * 2, depth=1, dtype=x.dtype),
    "product": lambda x: x @ da.ones((3, 4), chunks=2, dtype=x.dtype),
    "optimized": lambda x: dask.optimize(x[5:-3])[0],
    "batch_norm": lambda x: batch_norm(x, np.ones(3), np.ones(3))[1:],
    "two": lambda x: batch_norm(x[5:-3], training=True)[1:],
}


@pytest.mark.parametrize("step", STEPS)
def test_what_stands_between_a_file_and_batch_norm_keeps_no_blocks_either(step):
    source = Source(640, 3)
    x = STEPS[step](da.from_array(source, chunks=(10, 3)))
    source.most = source.reads = 0
    y = batch_norm(x, training=True)
    y.sum().compute()
    assert source.reads >= 126
    assert source.most <= 16  # of 64
    np.testing.assert_allclose(y.compute(), fastbn.batch_norm_forward(x.compute())[0], atol=3e-6)


def test_a_graph_travels_by_pickle():
    a = np.random.default_rng(0).standard_normal((50, 4))
    x = da.from_array(a, chunks=(10, 3))
    lazy = moments(x), batch_norm(x, training=True), batch_norm(x, a.mean(0), a.var(0))
    for one, other in zip(dask.compute(*lazy), dask.compute(*pickle.loads(pickle.dumps(lazy))), strict=True):
        assert (bits(one) == bits(other)) if isinstance(one, BatchStats) else (one == other).all()


def test_the_same_call_has_the_same_name():
    """So that dask finds what it has computed already."""
    x = da.ones((8, 3), chunks=4)
    assert moments(x).key == moments(x).key != moments(x, axis=0).key
    names = [batch_norm(x, training=True, eps=eps).name for eps in (1, 1, 2)]
    assert names[0] == names[1] != names[2]


def test_blocks_that_stand_in_the_memory_of_workers(cluster):
    a = np.random.default_rng(0).standard_normal((90, 4)).astype("f4")
    x = da.from_array(a, chunks=(10, 3))
    expected, stats = dask.compute(batch_norm(x, training=True), moments(x))
    with distributed.Client(cluster) as client:
        there = client.persist(x)
        assert batch_norm(there, training=True).compute(scheduler="distributed").tobytes() == expected.tobytes()
        scaler = BatchNormTransformer()
        with dask.config.set(scheduler="distributed"):
            assert scaler.fit(there).mean_.tobytes() == stats.mean.tobytes()


def test_blocks_that_workers_send_to_one_another(cluster):
    """P2P rechunking, which dask chooses for large arrays on a cluster, has keys that nobody may rename."""
    a = np.random.default_rng(0).standard_normal((90, 4)) + 1e6
    x = da.from_array(a, chunks=(10, 3))
    with distributed.Client(cluster), dask.config.set({"array.rechunk.method": "p2p", "scheduler": "distributed"}):
        lazy = moments(x.rechunk((90, 1)).rechunk((37, 2))), batch_norm(x.rechunk((37, 2)), training=True)
        stats, y = dask.compute(*lazy)
        fitted = BatchNormTransformer().fit(x.rechunk((37, 2)))
    expected = dask.compute(moments(x.rechunk((37, 2))), batch_norm(x.rechunk((37, 2)), training=True))
    assert bits(stats) == bits(expected[0])
    assert y.tobytes() == expected[1].tobytes()
    assert fitted.mean_.tobytes() == stats.mean.tobytes()


@pytest.mark.parametrize("broken", ["moments", "batch_norm"])
def test_a_worker_that_is_killed_changes_nothing(broken, tmp_path):
    a = np.random.default_rng(0).standard_normal((400, 6)) + 1e6
    killed, started = tmp_path / "killed", time.monotonic()

    def block_of(x, block_info=None):
        if block_info[0]["chunk-location"] == (25, 0) and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return x

    def lazy(x):
        return moments(x) if broken == "moments" else batch_norm(x, training=True)

    x = da.from_array(a, chunks=(10, 6))
    expected = lazy(x).compute()
    with new_cluster() as cluster, distributed.Client(cluster) as client:
        before = {worker["pid"] for worker in client.run(lambda: {"pid": os.getpid()}).values()}
        got = client.compute(lazy(x.map_blocks(block_of, dtype=a.dtype))).result(timeout=50)
        after = {worker["pid"] for worker in client.run(lambda: {"pid": os.getpid()}).values()}
    assert killed.exists()
    assert before != after
    assert (bits(got) == bits(expected)) if broken == "moments" else got.tobytes() == expected.tobytes()
    assert time.monotonic() - started < 60


def test_recipes_of_the_bench_run(tmp_path, monkeypatch):
    pytest.importorskip("zarr")
    larger = pytest.importorskip("bench.larger")
    monkeypatch.setenv("PYTHONPATH", str(Path(fastbn.__file__).parents[1]))
    larger.write_files(tmp_path, larger.BLOCK + 1)
    for name in ("moments, Zarr", "batch_norm, npy to npy stack", "a loop without dask, npy to npy"):
        seconds, most = larger.measure(name, tmp_path, 10**9)
        assert 0 < seconds < 30
        assert 3e7 < most < 1e9


# --- errors


class OnDevice:
    """A block's type as CuPy has one."""

    shape, dtype, ndim = (0, 0), np.dtype("f4"), 2

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self):
        raise AssertionError("nothing is fetched")


def foreign(meta):
    x = da.ones((4, 3), chunks=2)
    x._meta = meta
    return x


def said(call, *arguments, **options):
    """The error that a call raises, in words."""
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("dtype", ["float16", "longdouble", "complex64", "complex128", "object", "U3", "M8[s]"])
def test_dtypes_that_moments_refuses(dtype):
    a = np.zeros((4, 3)).astype(dtype)
    x = da.from_array(a, chunks=2)
    assert said(moments, x) == said(batch_norm, x, training=True) == said(fastbn.moments, a)


def test_blocks_that_numpy_does_not_hold():
    masked = np.ma.masked_array(np.zeros((4, 3)), mask=np.eye(4, 3))
    for x in (da.from_array(masked, chunks=2), da.ma.masked_less(da.ones((4, 3), chunks=2), 0)):
        assert said(moments, x) == said(batch_norm, x, training=True) == said(fastbn.moments, masked)
    assert said(moments, foreign(OnDevice())).startswith(
        "TypeError: expected x in the memory of the CPU, got a OnDevice"
    )
    hidden = da.ones((4, 3), chunks=2).map_blocks(np.ma.masked_array, dtype=float, meta=np.empty((0, 0)))
    assert said(moments(hidden).compute) == said(fastbn.moments, masked)


ONE = np.ones(3)
REFUSED = {
    "array": (lambda x: moments(np.zeros((4, 3))), "TypeError: expected x to be a dask array, got ndarray"),
    "axis": (lambda x: moments(x, axis=2), "AxisError: axis 2 is out of bounds for array of dimension 2"),
    "axis below": (lambda x: moments(x, axis=-3), "AxisError: axis -3 is out of bounds for array of dimension 2"),
    "no axis": (lambda x: moments(x.sum()), "AxisError: axis 1 is out of bounds for array of dimension 0"),
    "axis of text": (lambda x: moments(x, axis="a"), "TypeError: 'str' object cannot be interpreted as an integer"),
    "eps": (lambda x: batch_norm(x, training=True, eps=0), "ValueError: expected eps to be positive and finite, got 0"),
    "activation": (
        lambda x: batch_norm(x, training=True, activation="gelu"),
        "ValueError: expected activation None, 'relu' or 'leaky_relu', got 'gelu'",
    ),
    "nothing": (batch_norm, "ValueError: expected running_mean and running_var where training=False, got None"),
    "one": (
        lambda x: batch_norm(x, ONE, training=True),
        "ValueError: expected both running_mean and running_var or neither, got one of them",
    ),
    "both": (
        lambda x: batch_norm(x, ONE, ONE, training=True),
        "ValueError: expected no running_mean and running_var where training=True: nothing is updated in place",
    ),
    "shape": (lambda x: batch_norm(x, ONE, np.ones(4)), "ValueError: expected running_var of shape (3,), got (4,)"),
    "weight": (lambda x: batch_norm(x, ONE, ONE, ONE[None]), "ValueError: expected weight of shape (3,), got (1, 3)"),
    "lazy weight": (
        lambda x: batch_norm(x, ONE, ONE, da.ones(4)),
        "ValueError: expected weight of shape (3,), got (4,)",
    ),
    "lazy dtype": (
        lambda x: batch_norm(x, ONE, ONE, da.ones(3, dtype="f2")),
        "TypeError: expected weight of dtype float32 or float64 (or integers), got float16",
    ),
    "momentum": (lambda x: batch_norm(x, None, None, None, None, True, 0.1), "TypeError: "),
    "one value": (
        lambda x: batch_norm(x[:1], training=True).compute(),
        "ValueError: Expected more than 1 value per channel when training, got 1 in all blocks together",
    ),
    "one dimension": (
        lambda x: batch_norm(x[0], training=True, axis=0).compute(),
        "ValueError: Expected more than 1 value per channel when training, got 1 in all blocks together",
    ),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_one_sentence(call, words):
    assert said(call, da.ones((4, 3), chunks=2)).startswith(words)


def test_an_error_names_the_extra_where_dask_is_missing(python):
    program = """
import sys, numpy
sys.modules["dask"] = sys.modules["dask.array"] = None
from fastbn.interop.dask import moments
try:
    moments(numpy.zeros((3, 2)))
except ImportError as error:
    print(error)
"""
    assert python("-c", program).stdout == 'this needs dask: pip install "fastbn[dask]"\n'


# --- BatchNormTransformer


def table(rows=200, columns=5, dtype="float64"):
    return (np.random.default_rng(0).standard_normal((rows, columns)) * 3 + 1e6).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize("chunks", [-1, (37, 2)], ids=str)
def test_the_transformer_takes_dask_arrays_as_arrays(chunks, momentum, dtype):
    a = table(dtype=dtype)
    ours, theirs = BatchNormTransformer(momentum), BatchNormTransformer(momentum)
    for part in np.split(a, 4):
        ours.partial_fit(da.from_array(part, chunks=chunks))
        theirs.partial_fit(part)
    for name in ("mean_", "var_", "scale_"):
        assert type(getattr(ours, name)) is np.ndarray
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-13)
    assert ours.n_samples_seen_ == theirs.n_samples_seen_ == 200
    x = da.from_array(a, chunks=chunks)
    y = ours.transform(x)
    assert isinstance(y, da.Array)
    assert y.chunks == x.chunks
    expected = ours.transform(a)
    assert y.dtype == expected.dtype
    assert y.compute().tobytes() == expected.tobytes()
    back = ours.inverse_transform(y)
    assert isinstance(back, da.Array)
    assert back.compute().tobytes() == ours.inverse_transform(expected).tobytes()
    if chunks == -1:
        assert {name: v.tobytes() for name, v in vars(ours).items() if isinstance(v, np.ndarray)} == {
            name: v.tobytes() for name, v in vars(theirs).items() if isinstance(v, np.ndarray)
        }
    assert pickle.loads(pickle.dumps(ours)).transform(a).tobytes() == expected.tobytes()


def test_the_transformer_in_a_pipeline():
    a = table()
    pipeline = make_pipeline(BatchNormTransformer(), BatchNormTransformer(0.5))
    y = pipeline.fit_transform(da.from_array(a, chunks=(30, 2)))
    assert isinstance(y, da.Array)
    np.testing.assert_allclose(y.compute(), pipeline.fit_transform(a), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(pipeline.inverse_transform(y).compute(), a, rtol=1e-13)


def test_what_the_transformer_refuses_leaves_it_as_it_was():
    a = table(columns=3)
    x = da.from_array(a, chunks=(30, 2))
    wrong = a.copy()
    wrong[77, 1] = np.inf
    new, fitted = BatchNormTransformer(), BatchNormTransformer().fit(x)
    before = {name: np.array(v) for name, v in vars(fitted).items()}
    words = "ValueError: expected finite numbers in X, got NaN or an infinity in column 1"
    for scaler in (new, fitted):
        for fit in (scaler.fit, scaler.partial_fit):
            assert said(fit, da.from_array(wrong, chunks=(30, 2))) == words
            assert said(fit, x[:0]) == "ValueError: expected X with at least 1 sample, got none"
            assert said(scaler.fit, x[:, :0]) == "ValueError: expected X with at least 1 feature, got none"
            assert said(fit, x[:, 0]) == "ValueError: expected X of shape (n_samples, n_features), got shape (200,)"
            assert said(fit, x.astype("f2")).startswith("TypeError: expected x of dtype float32 or float64")
    assert vars(new) == {"momentum": None}
    assert before.keys() == vars(fitted).keys()
    assert all((vars(fitted)[name] == v).all() for name, v in before.items() if v.dtype != object)
    seen = "X has 2 features, but BatchNormTransformer is expecting 3 features as input"
    for call in (fitted.partial_fit, fitted.transform):
        assert seen in said(call, x[:, :2])
    assert said(fitted.inverse_transform, x[:, :2]) == "ValueError: expected X with 3 features, got 2"
    assert said(new.transform, x).startswith("NotFittedError")
    assert fitted.fit(x[:, :2]).n_features_in_ == 2


def test_nothing_of_dask_is_imported_for_numpy(python):
    program = """
import sys, numpy
from fastbn.estimators import BatchNormTransformer
scaler = BatchNormTransformer().fit(numpy.eye(3))
scaler.inverse_transform(scaler.transform(numpy.eye(3)))
print([name for name in sys.modules if name.split(".")[0] in ("dask", "distributed")])
"""
    assert python("-c", program).stdout == "[]\n"
