"""The same bits for every thread count, build, alignment, and with out= or without.

As a script it prints one digest, which must be the same everywhere:
`python tests/test_reproducible.py THREADS OFFSET CACHE`.
"""

import contextlib
import hashlib
import sys

import numpy as np
import pytest

import fastbn
from fastbn import kernels
from fastbn.kernels import families, machine

# Rows, folded rows, several blocks of wide rows, short planes, long planes, planes in pieces; small ones, some that
# stay in cache between one pass and the next, and some above every threshold for opening threads.
SHAPES = [(3, 2), (40, 3), (300, 64), (110_000, 5), (33, 1000), (700, 1000), (40, 2500)]
SHAPES += [(16, 32, 9, 9), (6, 70, 7), (30, 90, 5, 7), (9, 70, 900), (2, 3, 90_000), (1000, 3, 2)]
# What is written past the cache has corners of its own: a last chunk that is less than one row of lanes; rows too wide
# to be written whole, whose last block is a single lane; planes whose last piece is less than a line.
PAST = [*SHAPES, (126_977, 5), (3, 64_513), (2, 3, 16_389)]
HUGE = 2**40  # a cache that everything fits into
# Every kind of loop, small enough to be tried under every setting.
KINDS = [(3, 2), (40, 3), (300, 64), (33, 1000), (40, 2500), (16, 32, 9, 9), (6, 70, 7), (30, 9, 5, 7), (3, 7, 900)]
KINDS += [(5, 6, 14, 14), (2, 3, 16_389), (1000, 3, 2)]


def values(shape, seed, dtype):
    """Numbers made of integers alone, so that every machine makes the same ones (a libm might not)."""
    state = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(seed << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return (((state >> np.uint64(40)).astype(np.float64) / 2**22 - 2) * 3 + 40).reshape(shape).astype(dtype)


def place(a, offset):
    """a copied to an address that is `offset` elements past a multiple of 64."""
    buffer = np.empty(a.nbytes + 256, np.uint8)
    start = (-buffer.ctypes.data) % 64 + offset * a.itemsize
    placed = buffer[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    placed[...] = a
    return placed


def results(shape, dtype, activation, threads=None, offset=0, given=False, order="C"):
    """Every number that fastbn makes of one batch, by name."""
    c = shape[1]

    def array(seed):
        a = values(shape, seed, dtype)
        return place(a, offset) if order == "C" else np.asarray(a, order=order)

    def out(like):
        return (np.full_like(like, np.nan) if order != "C" else place(np.zeros_like(like), offset)) if given else None

    x, dy = array(1), array(2)
    dy -= 40
    bn = fastbn.BatchNorm(c, dtype=dtype, activation=activation, num_threads=threads)
    bn.weight[...], bn.bias[...] = (values((c,), seed, dtype) - 40 for seed in (3, 4))
    found = {"y": bn(x, out=out(x)), "dx": bn.backward(dy, out=out(x))}
    found |= {f"grad {k}": g.copy() for k, g in bn.grads.items()}
    found |= {"mean": bn.running_mean.copy(), "var": bn.running_var.copy()}
    stats = fastbn.moments(x)
    found |= {"moments": np.stack([stats.mean, stats.mean_low, stats.var])}
    bn.eval()
    found |= {"eval y": bn(x, out=out(x)), "eval dx": bn.backward(dy, out=out(x))}
    found |= {f"eval grad {k}": g.copy() for k, g in bn.grads.items()}
    for options in ({"momentum": None}, {"debias": True}):
        running = fastbn.RunningStats(c, **options)
        for part in np.array_split(x, 2) if len(x) > 3 else [x]:
            fastbn.batch_norm_forward(part, running=running)
        found[f"running {options}"] = np.stack([running.mean, running.var])
    return {k: np.ascontiguousarray(v).tobytes() for k, v in found.items()}


@contextlib.contextmanager
def settings(**numbers):
    before = machine.set_settings(**numbers)
    try:
        yield
    finally:
        machine.set_settings(**before)


def cache_of(nbytes, batched=0):
    streams = {"stream_from_bytes": nbytes, "stream_inference_from_bytes": nbytes}
    return settings(**streams, batched_runs_below_elements=batched)


def digest(threads, offset, given):
    h = hashlib.sha256()
    for dtype in ("float32", "float64"):
        for k, shape in enumerate(SHAPES):
            activation = ("relu", None, "leaky_relu")[k % 3]
            for part in results(shape, dtype, activation, threads, offset, given).values():
                h.update(part)
    return h.hexdigest()


def same(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if a[k] != b[k]] == []


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("order", ["C", pytest.param("F", marks=pytest.mark.long)])
def test_threads_alignment_and_out_change_no_bit(shape, dtype, order):
    expected = results(shape, dtype, "relu", 1, order=order)
    for threads in (2, 3, 40):
        same(results(shape, dtype, "relu", threads, order=order), expected)
    same(results(shape, dtype, "relu", 1, offset=1, given=True, order=order), expected)
    same(results(shape, dtype, "relu", 3, offset=3, order=order), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(40, 3), (700, 100), (8, 16, 49), (2, 3, 3136)], ids=str)
def test_in_place_changes_no_bit(shape, dtype):
    x, dy = values(shape, 1, dtype), values(shape, 2, dtype) - 40
    y, stats = fastbn.batch_norm_forward(x)
    dx, _, _ = fastbn.batch_norm_backward(dy, x, stats)
    assert fastbn.batch_norm_backward(dy, x, stats, out=dy)[0].tobytes() == dx.tobytes()
    assert fastbn.batch_norm_forward(x, out=x)[0].tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(700, 24), (40, 1100), (1000, 3), (6, 24, 7), (3, 24, 5000)], ids=str)
def test_a_feature_does_not_depend_on_its_neighbours(shape, dtype):
    """Those whose mean is far away are summed twice, and with them what stands beside them."""
    x, dy = values(shape, 1, dtype) - 40, values(shape, 2, dtype) - 40
    near = results_of(x, dy)
    x[:, ::2] += np.asarray(3000, dtype)
    x[:, 1::4] *= np.asarray(0.25, dtype)
    far = results_of(x, dy)
    for name in near:
        assert (near[name].take(range(3, shape[1], 4), -1) == far[name].take(range(3, shape[1], 4), -1)).all(), name
    alone = results_of(np.ascontiguousarray(x[:, :1]), np.ascontiguousarray(dy[:, :1]))
    for name in near:
        # Another number of features is another cut into chunks, which float64 alone can tell.
        rtol = 1e-5 if dtype == "float32" else 1e-12
        np.testing.assert_allclose(far[name].take([0], -1), alone[name], rtol, atol=1e-5)


def results_of(x, dy):
    """Results with the features last."""
    y, stats = fastbn.batch_norm_forward(x)
    dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, stats)
    return {
        "y": np.moveaxis(y, 1, -1),
        "dx": np.moveaxis(dx, 1, -1),
        "mean": stats.mean,
        "low": stats.mean_low,
        "var": stats.var,
        "dweight": dweight,
        "dbias": dbias,
    }


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_copied_layouts_change_no_bit(dtype):
    """A strided or byte-swapped x is copied; what is then computed is what its plain copy gives."""
    x = values((64, 24), 1, dtype)
    y = fastbn.batch_norm_forward(np.ascontiguousarray(x[::2, ::3]))[0]
    assert (fastbn.batch_norm_forward(x[::2, ::3])[0] == y).all()
    assert (fastbn.batch_norm_forward(x[::2, ::3].astype(x.dtype.newbyteorder()))[0] == y).all()


def test_the_process_wide_count_changes_no_bit():
    x = values((700, 1000), 1, "float32")
    with fastbn.threads(1):
        y, stats = fastbn.batch_norm_forward(x)
    for n in (2, 3):
        with fastbn.threads(n):
            again, other = fastbn.batch_norm_forward(x)
        assert again.tobytes() == y.tobytes()
        assert other.var.tobytes() == stats.var.tobytes()


@pytest.fixture(scope="module")
def digest_here():
    with cache_of(HUGE):
        return digest(2, 0, False)


@pytest.mark.parametrize("build", kernels.BUILDS)
@pytest.mark.parametrize(
    ("threads", "offset", "cache", "family"),
    [
        (3, 1, 0, "zen1"),
        pytest.param(1, 0, HUGE, "zen3", marks=pytest.mark.long),
        pytest.param(2, 4, 0, "sapphire-rapids", marks=pytest.mark.long),
    ],
)
def test_every_build_gives_the_same_bits(build, threads, offset, cache, family, digest_here, python):
    done = python(__file__, str(threads), str(offset), str(cache), FASTBN_ISA=build, FASTBN_FAMILY=family)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest_here]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", PAST, ids=str)
@pytest.mark.parametrize("batched", [0, pytest.param(HUGE, marks=pytest.mark.long)])
def test_the_size_of_the_cache_changes_no_bit(shape, dtype, batched):
    """Outputs that do not fit are written past it, by other instructions."""
    with cache_of(HUGE):
        expected = results(shape, dtype, "relu", 2)
    if batched and len(shape) == 2:
        pytest.skip("rows have no runs")
    with cache_of(0, batched):
        for offset in (0, 1, 3):
            same(results(shape, dtype, "relu", 2, offset=offset, given=True), expected)


def beside(like, behind):
    """An array at an address that is so many bytes behind that of `like`, modulo 4096."""
    buffer = np.empty(like.nbytes + 4096, np.uint8)
    start = (like.ctypes.data + behind - buffer.ctypes.data) % 4096
    return buffer[start : start + like.nbytes].view(like.dtype).reshape(like.shape)


def into(array, values):
    array[...] = values
    return array


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(700, 100), (40, 2500), (300, 7), (9, 40, 33), (6, 70, 70), (4, 3, 5001)], ids=str)
@pytest.mark.parametrize("batched", [0, HUGE])
def test_lines_streamed_downwards_change_no_bit(shape, dtype, batched):
    """Which way they go depends on where the output lies beside the input."""
    x, dy = values(shape, 1, dtype), values(shape, 2, dtype) - 40
    with cache_of(HUGE):
        y, stats = fastbn.batch_norm_forward(x)
        dx, _, _ = fastbn.batch_norm_backward(dy, x, stats)
    with cache_of(0, batched):
        for behind in (-2048, -512, -16, 0, 16, 64, 1000):
            assert fastbn.batch_norm_forward(x, out=beside(x, behind))[0].tobytes() == y.tobytes(), behind
            for first in (x, dy):
                found, _, _ = fastbn.batch_norm_backward(dy, x, stats, out=beside(first, behind))
                assert found.tobytes() == dx.tobytes(), behind
        # dx between x and dy: loads would wait either way.
        found, _, _ = fastbn.batch_norm_backward(into(beside(x, 32), dy), x, stats, out=beside(x, 16))
        assert found.tobytes() == dx.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_more_blocks_than_rows_past_the_cache(dtype):
    """Many threads cut wide rows into many blocks, but write whole rows: some threads get none."""
    with cache_of(HUGE):
        expected = results((40, 14_000), dtype, "leaky_relu", 1)
    with cache_of(0):
        same(results((40, 14_000), dtype, "leaky_relu", 40, offset=1, given=True), expected)


# --- the settings of a processor family -------------------------------------------------------------------------------

# Everything that can be done at every size, on all threads, into the caches.
ALL_ON = dict.fromkeys(machine.get_settings(), 0) | {
    "l2_bytes": HUGE,
    "l3_bytes": HUGE,
    "rows_at_once": 4,
    "rows_at_once_to_bytes": HUGE,
    "read_ahead_bytes": 16384,
    "read_ahead_in_planes_bytes": 1024,
    "write_ahead_bytes": 1024,
    "write_ahead_to_bytes": HUGE,
    "stream_from_bytes": HUGE,
    "stream_inference_from_bytes": HUGE,
    "batched_runs_below_elements": HUGE,
}
STREAMS = {"stream_from_bytes": 0, "stream_inference_from_bytes": 0}
EXTREMES = (0, 1, HUGE)


def one_at_its_extremes():
    for name in ALL_ON:
        for value in (1, 4) if name == "rows_at_once" else EXTREMES:
            yield pytest.param({name: value}, id=f"{name}={value}", marks=pytest.mark.long)
    for value in EXTREMES:
        yield pytest.param(STREAMS | {"batched_runs_below_elements": value}, id=f"streams, batches={value}")


def mixtures():
    """Numbers drawn from the extremes and what lies between them."""
    rng = np.random.default_rng(0)
    for k in range(8):
        numbers = {name: int(rng.choice([*EXTREMES, 100, 4096, 60_000])) for name in ALL_ON}
        marks = [pytest.mark.long] if k > 2 else []
        yield pytest.param(numbers | {"rows_at_once": (1, 4)[k % 2]}, id=f"mixture {k}", marks=marks)


def small_results(threads, offset):
    """Results of all kinds, each by shape, dtype and name."""
    found = {}
    for dtype in ("float32", "float64"):
        for k, shape in enumerate(KINDS):
            activation = ("relu", None, "leaky_relu")[k % 3]
            part = results(shape, dtype, activation, threads, offset, given=offset > 0)
            found |= {f"{shape} {dtype} {name}": value for name, value in part.items()}
    return found


@pytest.fixture(scope="module")
def small_here():
    return small_results(1, 0)


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("threads", [*(pytest.param(n, marks=pytest.mark.long) for n in (1, 2)), 3])
def test_no_familys_settings_change_a_bit(family, threads, small_here):
    caches = ("l2_bytes", "l3_bytes", "l3_sharers")
    numbers = families.FAMILIES[family].settings(*(machine.caches()[name] for name in caches), 2)
    with settings(**numbers | {"parallel_from_elements": 0}):
        same(small_results(threads, (0, 1, 4)[threads - 1]), small_here)


@pytest.mark.parametrize("numbers", [*one_at_its_extremes(), *mixtures()])
def test_no_setting_changes_a_bit(numbers, small_here):
    with settings(**ALL_ON | numbers):
        for threads, offset in ((1, 4), (3, 1)):
            same(small_results(threads, offset), small_here)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", PAST, ids=str)
def test_no_mixture_of_settings_changes_a_bit_of_larger_shapes(shape, dtype):
    expected = results(shape, dtype, "relu", 1)
    mixed = [{}, *(part.values[0] for part in mixtures())]
    for k, numbers in enumerate(mixed):
        with settings(**ALL_ON | numbers):
            same(results(shape, dtype, "relu", 1 + k % 3, offset=(0, 1, 4)[k // 3], given=k % 2 == 1), expected)


if __name__ == "__main__":
    count, past, size = map(int, sys.argv[1:])
    with cache_of(size):
        print(digest(count, past, past % 2 == 1))
