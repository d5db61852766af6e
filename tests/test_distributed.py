"""SyncBatchNorm over ranks that are threads: every part of a batch, merged, is the batch. tests/mpi has processes."""

import copy
import gc
import itertools
import pickle
import re
import threading
import time
import weakref

import numpy as np
import pytest
import twin
from conftest import LAYOUTS
from test_exactness import GRADIENT
from twin import within

import fastbn
from fastbn import BatchNorm, checkpoint, nn
from fastbn.distributed import SyncBatchNorm, convert
from fastbn.ranks import Group, in_pairs

RANKS = [1, 2, 3, 4, 7]


class Thread:
    """A rank that is a thread of this process; an allgather that not all come to is a BrokenBarrierError."""

    def __init__(self, rank, size, barrier, places):
        self.rank, self.size, self._barrier, self._places = rank, size, barrier, places
        self.bytes = []

    def allgather(self, array):
        self._places[self.rank] = array.copy()
        self._barrier.wait()
        gathered = [a.copy() for a in self._places]
        self._barrier.wait()
        assert len({a.shape for a in gathered}) == 1
        self.bytes.append(array.nbytes)
        return gathered

    def abort(self, code):
        self._barrier.abort()


class Slicing(Thread):
    """A rank with the fifth member, too."""

    def alltoall(self, array):
        assert len(array) == self.size
        return [gathered[self.rank] for gathered in self.allgather(array)]


def together(size, program, seconds=60, broken=False, rank_of=Thread):
    """program(comm) on each rank; what each returned or raised. Only where it may break does one wait in vain."""
    barrier, places = threading.Barrier(size, timeout=seconds), [None] * size
    results = [None] * size

    def run(rank):
        try:
            results[rank] = program(rank_of(rank, size, barrier, places))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert broken or not any(isinstance(result, threading.BrokenBarrierError) for result in results), results
    return results


def cuts(n, size, uneven=False):
    """Where each rank's part of n examples begins and ends."""
    if not uneven:
        return [(n * r // size, n * (r + 1) // size) for r in range(size)]
    ends = sorted(np.random.default_rng(size).integers(0, n + 1, size - 1).tolist())
    return list(itertools.pairwise([0, *ends, n]))


def step(layer, x, dy, mask=None):
    y = layer(x, mask=mask)
    return y, layer.backward(dy), *(layer.grads[k].copy() for k in layer.grads), layer.running_mean, layer.running_var


SETTINGS = [{}, {"activation": "relu"}, {"affine": False}, {"renorm": (2, 1)}, {"momentum": None}, {"unbiased": False}]


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(40, 5), (14, 3, 6, 5), (21, 64)], ids=str)
def test_the_parts_are_the_whole(shape, dtype, size, uneven):
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((2, *shape)) * 3 + 10).astype(dtype)
    u = twin.unit(dtype)
    weight, bias = rng.uniform(-2, 2, (2, shape[1]))

    def program(comm):
        a, b = cuts(shape[0], size, uneven)[comm.rank]
        layer = SyncBatchNorm(shape[1], comm=comm, dtype=dtype)
        layer.weight, layer.bias = weight, bias
        return step(layer, x[a:b], dy[a:b])

    results = together(size, program)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    weight, bias = weight.astype(dtype), bias.astype(dtype)
    expected, scale = twin.forward(x, twin.statistics(x), weight, bias)
    within(np.concatenate([r[0] for r in results]), expected, 5 * u * scale)
    gradients, sizes = twin.backward(dy, x, twin.statistics(x), weight)
    got = np.concatenate([r[1] for r in results]), results[0][2], results[0][3]
    for g, true, scale in zip(got, gradients, sizes, strict=True):
        within(g, true, GRADIENT[dtype] * u * scale)
    for other in results[1:]:  # all ranks have the same gradients and averages, bit for bit
        assert all(a.tobytes() == b.tobytes() for a, b in zip(results[0][2:], other[2:], strict=True))
    whole = BatchNorm(shape[1], dtype=dtype)
    whole(x)
    np.testing.assert_allclose(results[0][4], whole.running_mean, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(results[0][5], whole.running_var, rtol=1e-13)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_every_setting_over_ranks_is_one_process(settings, size, masked):
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((2, 3, 30, 4, 6))  # three steps
    masks = rng.random((3, 30, 6)) < 0.7
    whole = BatchNorm(4, dtype="float64", **settings)
    expected = [
        [np.copy(a) for a in step(whole, *three)] for three in zip(x, dy, masks if masked else [None] * 3, strict=True)
    ]

    def program(comm):
        a, b = cuts(30, size, True)[comm.rank]
        layer = SyncBatchNorm(4, comm=comm, dtype="float64", **settings)
        return [
            [np.copy(v) for v in step(layer, x[i, a:b], dy[i, a:b], masks[i, a:b] if masked else None)]
            for i in range(3)
        ]

    results = together(size, program)
    for i in range(3):
        got = [r[i] for r in results]
        for k in (0, 1):
            np.testing.assert_allclose(np.concatenate([g[k] for g in got]), expected[i][k], rtol=1e-10, atol=1e-11)
        for k in range(2, len(expected[i])):
            for g in got:
                np.testing.assert_allclose(g[k], expected[i][k], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("settings", [*SETTINGS, {"renorm": (3, 5), "affine": False}, {"ghost_size": 8}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(48, 7), (24, 3, 70)], ids=str)
def test_one_rank_has_the_bits_of_batch_norm(settings, masked, shape):
    rng = np.random.default_rng(2)
    x, dy = (rng.standard_normal((2, *shape)) * 3 + 7).astype(np.float32)
    mask = rng.random(shape[:1] + shape[2:]) < 0.7 if masked else None
    weight, bias = rng.uniform(-2, 2, (2, shape[1]))

    def two_steps(layer):
        if settings.get("affine", True):
            layer.weight, layer.bias = weight, bias
        return [np.copy(a) for _ in range(2) for a in step(layer, x, dy, mask)]

    expected = two_steps(BatchNorm(shape[1], **settings))
    (got,) = together(1, lambda comm: two_steps(SyncBatchNorm(shape[1], comm=comm, **settings)))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, expected, strict=True))


def test_a_mask_of_nothing_but_true_is_none():
    x, dy = np.random.default_rng(8).standard_normal((2, 30, 4, 6))

    def program(comm):
        rows = slice(*cuts(30, 2)[comm.rank])
        mask = np.ones((15, 6), bool)
        return [step(SyncBatchNorm(4, comm=comm), x[rows], dy[rows], m) for m in (None, mask)]

    for without, masked in together(2, program):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(without, masked, strict=True))


def test_ghost_batches_are_local_and_the_averages_are_of_all():
    x = np.random.default_rng(3).standard_normal((24, 5))
    whole = BatchNorm(5, ghost_size=4, dtype="float64")
    y = whole(x)

    def program(comm):
        layer = SyncBatchNorm(5, ghost_size=4, dtype="float64", comm=comm)
        a, b = [(0, 8), (8, 8), (8, 24)][comm.rank]
        part = layer(x[a:b])
        dx = layer.backward(np.ones((b - a, 5)))
        return part, dx, layer.running_mean, layer.running_var, layer.num_batches_tracked

    results = together(3, program)
    assert np.concatenate([r[0] for r in results]).tobytes() == y.tobytes()
    for r in results:
        assert (r[2].tobytes(), r[3].tobytes(), r[4]) == (whole.running_mean.tobytes(), whole.running_var.tobytes(), 6)


@pytest.mark.parametrize("mode", ["eval", "frozen"])
def test_inference_and_frozen_layers_exchange_nothing(mode):
    def program(comm):
        layer = SyncBatchNorm(3, comm=comm)
        layer = layer.eval() if mode == "eval" else layer.freeze()
        y = layer(np.ones((2, 3)))
        layer.backward(y)
        return comm.bytes

    assert together(2, program) == [[], []]


@pytest.mark.parametrize(("size", "order"), [(1, "0"), (3, "(01)2"), (4, "(01)(23)"), (7, "((01)(23))((45)6)")])
def test_sums_over_ranks_are_trees_of_pairs(size, order):
    parts = np.random.default_rng(size).standard_normal((size, 1000))
    expression = re.sub(r"(?<=[\d)])(?=[\d(])", "+", order)
    assert in_pairs(parts).tobytes() == eval(re.sub(r"(\d)", r"parts[\1]", expression)).tobytes()


@pytest.mark.parametrize("num_features", [1, 2, 5, 13])
@pytest.mark.parametrize("size", RANKS)
def test_merging_in_slices_gives_the_same_bits(monkeypatch, size, num_features):
    rng = np.random.default_rng(num_features)
    x, dy = rng.standard_normal((2, 40, num_features)) * 3 + 1e6
    x[3, 0], dy[5, -1] = np.inf, np.nan

    def program(comm):
        start, stop = cuts(40, size, uneven=True)[comm.rank]
        layer = SyncBatchNorm(num_features, comm=comm)
        return [a.tobytes() for a in step(layer, x[start:stop], dy[start:stop])], comm.bytes

    gathered = together(size, program)
    monkeypatch.setattr("fastbn.ranks.SLICED_FROM", 0)
    sliced = together(size, program, rank_of=Slicing)
    assert [bits for bits, _ in sliced] == [bits for bits, _ in gathered]
    assert all(of_one != of_other for (_, of_one), (_, of_other) in zip(sliced, gathered, strict=True))


def test_an_error_while_merging_a_slice_ends_all_ranks(monkeypatch):
    monkeypatch.setattr("fastbn.ranks.SLICED_FROM", 0)
    layers = []

    def program(comm):
        layer = SyncBatchNorm(5, comm=comm)
        layers.append(layer)
        if comm.rank == 1:
            comm.alltoall = lambda array: [][1]
        layer(np.arange(20.0).reshape(4, 5))

    results = together(3, program, broken=True, rank_of=Slicing)
    assert sorted(type(result).__name__ for result in results) == ["BrokenBarrierError"] * 2 + ["IndexError"]
    assert all(not layer.running_mean.any() and layer.num_batches_tracked == 0 for layer in layers)


def test_what_is_exchanged():
    def program(comm):
        layer = SyncBatchNorm(100, comm=comm)
        layer.backward(layer(np.random.default_rng(comm.rank).standard_normal((5, 100))))
        return comm.bytes

    assert together(2, program) == [[512, 2400, 512, 1600]] * 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out", ["fresh", "given", "strided", "in_place"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_layout_is_one_process(layout, out, masked):
    """One rank has the batch as it is, the other one part of it in this layout."""
    axis, lay = LAYOUTS[layout]
    rng = np.random.default_rng(5)
    a, dy = np.moveaxis(rng.standard_normal((2, 9, 4, 6)), 2, axis + 1 if axis >= 0 else axis)
    n = 1 if axis == 0 else 0  # the axis of examples
    mask = (rng.random((9, 6)) < 0.6) if masked else None
    whole = BatchNorm(4, axis=axis, dtype="float64")
    expected = whole(a, mask=mask), whole.backward(dy)

    def program(comm):
        rows = slice(0, 3) if comm.rank else slice(3, 9)
        part = np.take(a, np.arange(9)[rows], n)
        x = np.ascontiguousarray(part)
        if comm.rank:
            x = lay(np.ascontiguousarray(np.moveaxis(part, axis, 1)))
        given = {"fresh": None, "in_place": x}.get(out)
        if out in ("given", "strided"):
            given = np.empty((*x.shape[:-1], 2 * x.shape[-1]))[..., :: 1 + (out == "strided")][..., : x.shape[-1]]
        if out == "in_place" and layout in ("readonly", "swapped") and comm.rank:
            given = None
        layer = SyncBatchNorm(4, axis=axis, dtype="float64", comm=comm)
        y = layer(x, given, mask=None if mask is None else mask[rows])
        assert given is None or y is given
        y = y.copy()
        if out == "in_place":
            with pytest.raises(RuntimeError, match="did not overwrite x"):  # or RankError, with the other's words
                layer.backward(y)
            return y, None, layer.running_var
        gradient = np.take(dy, np.arange(9)[rows], n).copy()
        dx = layer.backward(gradient, gradient if out == "given" else None)
        return y, dx, layer.running_var

    results = together(2, program)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    y, dx = (np.concatenate([results[1][k], results[0][k]], n) if results[0][k] is not None else None for k in (0, 1))
    np.testing.assert_allclose(y, expected[0], rtol=1e-11, atol=1e-12)
    if dx is not None:
        np.testing.assert_allclose(dx, expected[1], rtol=1e-10, atol=1e-11)
    assert results[0][2].tobytes() == results[1][2].tobytes()


def test_a_mean_far_from_zero_costs_no_digits():
    rng = np.random.default_rng(6)
    x = (rng.standard_normal((64, 5)) + 1e6).astype(np.float32)
    parts = cuts(64, 4, True)
    results = together(4, lambda comm: SyncBatchNorm(5, comm=comm)(x[slice(*parts[comm.rank])]))
    expected, scale = twin.forward(x, twin.statistics(x), np.ones(5, np.float32), np.zeros(5, np.float32))
    within(np.concatenate(results), expected, 5 * twin.unit("float32") * scale)


def test_a_constant_feature_is_its_bias_on_all_ranks():
    def program(comm):
        layer = SyncBatchNorm(2, comm=comm)
        layer.bias = [0.3, -7]
        return layer(np.full((3 + comm.rank, 2), 0.1, np.float32))

    for y in together(3, program):
        assert (y == np.float32([0.3, -7])).all()


def test_a_single_example_in_inference():
    def program(comm):
        layer = SyncBatchNorm(3, axis=0, comm=comm)
        layer(np.arange(3.0) * comm.rank)  # (C,): one value of each feature on each rank
        return layer.eval()(np.ones(3)).shape, layer.running_mean.tolist()

    shape, mean = together(3, program)[0]
    assert shape == (3,)
    np.testing.assert_allclose(mean, [0, 0.1, 0.2])


def test_without_running_statistics_inference_is_of_the_rank_alone():
    def program(comm):
        layer = SyncBatchNorm(3, track_running_stats=False, comm=comm)
        x = np.random.default_rng(comm.rank).standard_normal((4, 3)) + comm.rank
        y = layer(x)
        n = len(comm.bytes)
        alone = layer.eval()(x)
        return y.mean(), alone.mean(), len(comm.bytes) - n

    for y, alone, exchanges in together(2, program):
        assert abs(y) > 0.1
        assert abs(alone) < 1e-12
        assert exchanges == 0


# --- faults


def errors(size, program):
    results = together(size, program)
    assert all(isinstance(r, BaseException) for r in results), results
    return results


def test_empty_ranks_and_single_examples():
    x = np.random.default_rng(4).standard_normal((6, 3))

    def program(comm):
        layer = SyncBatchNorm(3, comm=comm, dtype="float64")
        part = x[[0, 1, 5][comm.rank] : [1, 1, 6][comm.rank]]  # one, none, one
        y = layer(part)
        return y, layer.backward(y), layer.running_var, layer.num_batches_tracked

    results = together(3, program)
    expected = BatchNorm(3, dtype="float64")
    y = expected(x[[0, 5]])
    np.testing.assert_allclose(np.concatenate([r[0] for r in results]), y, rtol=1e-12)
    assert [r[0].shape for r in results] == [(1, 3), (0, 3), (1, 3)]
    assert [r[3] for r in results] == [1, 1, 1]


@pytest.mark.parametrize("ghost_size", [None, 4])
def test_nothing_on_all_ranks_changes_nothing(ghost_size):
    def program(comm):
        layer = SyncBatchNorm(3, comm=comm, ghost_size=ghost_size)
        y = layer(np.empty((0, 3), np.float32))
        dx = layer.backward(y)
        return y.shape, dx.shape, layer.num_batches_tracked, layer.running_var.tolist(), layer.grads["weight"].tolist()

    assert together(2, program) == [((0, 3), (0, 3), 0, [1, 1, 1], [0, 0, 0])] * 2


def test_one_example_in_all_is_the_same_error_on_all():
    found = errors(3, lambda comm: SyncBatchNorm(3, comm=comm)(np.ones((int(comm.rank == 1), 3))))
    assert {str(e) for e in found} == {
        "Expected more than 1 value per channel when training, got 1 on 3 ranks together"
    }
    assert {type(e) for e in found} == {ValueError}


@pytest.mark.parametrize(
    ("layer", "x", "words"),
    [
        (lambda r: (3 + r,), lambda r: np.ones((2, 3 + r)), "the same num_features on all ranks, got [3, 4]"),
        (lambda r: (3,), lambda r: np.ones((2, 3, 4)[: 2 + r]), "the same dimensions of x on all ranks, got [2, 3]"),
        (
            lambda r: (3,),
            lambda r: np.ones((2, 3), f"f{4 + 4 * r}"),
            "the same bytes of an element on all ranks, got [4, 8]",
        ),
    ],
)
def test_ranks_that_differ_raise_the_same_everywhere(layer, x, words):
    found = errors(2, lambda comm: SyncBatchNorm(*layer(comm.rank), comm=comm)(x(comm.rank)))
    assert all(isinstance(e, ValueError) and words in str(e) for e in found)


def test_an_error_on_one_rank_is_raised_on_all_and_changes_nothing():
    layers = {}

    def program(comm):
        layer = layers[comm.rank] = SyncBatchNorm(3, comm=comm)
        layer(np.ones((4, 3)) * comm.rank)
        before = layer.state_dict()
        x = np.ones((4, 3 + (comm.rank == 1)))
        try:
            layer(x)
        except BaseException as error:
            after = layer.state_dict()
            assert all((before[k] == after[k]).all() for k in before)
            y = layer(np.full((4, 3), comm.rank))  # and the ranks go on
            assert np.isfinite(y).all()
            return error

    found = together(3, program)
    assert isinstance(found[1], ValueError)
    for rank in (0, 2):
        assert isinstance(found[rank], RuntimeError)
        assert str(found[rank]).startswith("rank 1 of 3 failed: ValueError: expected x with 3 features")


@pytest.mark.parametrize("lost", ["no forward", "x overwritten"])
def test_a_backward_without_x_on_one_rank_is_raised_on_all(lost):
    def program(comm):
        layer = SyncBatchNorm(3, comm=comm)
        x = np.random.default_rng(0).standard_normal((4, 3))
        if lost == "x overwritten" or comm.rank != 1:
            layer(x, x if comm.rank == 1 else None)
        layer.backward(np.ones((4, 3)))

    found = errors(3, program)
    words = "expected a forward before backward, and one that did not overwrite x"
    assert (type(found[1]), str(found[1])) == (RuntimeError, words)
    assert {str(found[r]) for r in (0, 2)} == {f"rank 1 of 3 failed: RuntimeError: {words}"}


@pytest.mark.parametrize("ghost_size", [None, 2])
@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({}, {"momentum": 0.2}), ({"momentum": None}, {"momentum": 0.1}), ({}, {"eps": 1e-3}), ({}, {"affine": False}),
        ({}, {"track_running_stats": False}), ({}, {"activation": "relu"}), ({}, {"unbiased": False}),
        ({}, {"renorm": (2, 1)}),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_differ_raise_the_same_everywhere(here, there, ghost_size):
    layers = {}

    def program(comm):
        options = here if comm.rank == 0 else there
        layer = layers[comm.rank] = SyncBatchNorm(3, comm=comm, ghost_size=ghost_size, **options)
        layer(np.random.default_rng(0).standard_normal((4, 3)))

    found = errors(3, program)
    assert len({str(e) for e in found}) == 1
    assert "expected the same settings of SyncBatchNorm (their checksum) on all ranks, got [" in str(found[0])
    assert all(layer.num_batches_tracked == 0 for layer in layers.values())


def test_numbers_of_threads_may_differ():
    together(2, lambda comm: SyncBatchNorm(3, comm=comm, num_threads=1 + comm.rank)(np.eye(3)))


def test_an_error_in_backward_is_raised_on_all():
    def program(comm):
        layer = SyncBatchNorm(3, comm=comm)
        layer(np.random.default_rng(0).standard_normal((4, 3)))
        layer.backward(np.ones((4 - comm.rank, 3)))

    found = errors(2, program)
    assert "rank 1 of 2 failed: ValueError: expected dy" in str(found[0])


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_ctrl_c_within_the_layer_is_told(direction, monkeypatch):
    """As it arrives in the arithmetic, on one rank."""
    from fastbn import calls

    half = "moments" if direction == "forward" else "gradients"
    real = getattr(calls, half)
    pressed = threading.local()

    def interrupted(*args):
        if getattr(pressed, "now", False):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(calls, half, interrupted)

    def program(comm):
        layer = SyncBatchNorm(3, comm=comm)
        x = np.random.default_rng(comm.rank).standard_normal((4, 3))
        y = layer(x)
        before = layer.state_dict(), {k: g.copy() for k, g in layer.grads.items()}
        pressed.now = comm.rank == 1
        try:
            layer.backward(y) if direction == "backward" else layer(x)
        except BaseException as error:
            after = layer.state_dict(), layer.grads
            assert all((one[k] == other[k]).all() for one, other in zip(before, after, strict=True) for k in one)
            pressed.now = False
            assert np.isfinite(layer.backward(layer(x))).all()
            return error

    found = together(3, program)
    assert isinstance(found[1], KeyboardInterrupt)
    assert {str(found[r]) for r in (0, 2)} == {"rank 1 of 3 failed: KeyboardInterrupt: "}


@pytest.mark.parametrize("number", range(4))
def test_an_exchange_that_is_broken_off_ends_all_ranks(number):
    """Ctrl-C, or no memory, within one of the four exchanges of a step: the others cannot go on, and do not wait."""

    def program(comm):
        real = comm.allgather

        def broken_off(array):
            gathered = real(array)
            if comm.rank == 1 and len(comm.bytes) == number + 1:
                raise MemoryError
            return gathered

        comm.allgather = broken_off
        layer = SyncBatchNorm(3, comm=comm)
        for _ in range(2):
            layer.backward(layer(np.random.default_rng(0).standard_normal((4, 3))))

    started = time.monotonic()
    found = together(3, program, broken=True)
    assert time.monotonic() - started < 30  # half of what a rank waits
    assert isinstance(found[1], MemoryError)
    assert all(isinstance(found[rank], threading.BrokenBarrierError) for rank in (0, 2))


@pytest.mark.thread_unsafe(reason="the garbage collector is the process's")
def test_an_error_keeps_no_batch():
    def program(comm):
        layer = SyncBatchNorm(3, comm=comm)
        x = np.random.default_rng(0).standard_normal((4, 3 + (comm.rank == 1)))
        seen = weakref.ref(x)
        for call in (layer, layer.forward):
            with pytest.raises((ValueError, RuntimeError)):
                call(x)
        del x
        return seen() is None

    gc.collect()
    gc.disable()
    try:
        assert together(2, program) == [True, True]
    finally:
        gc.enable()


def test_long_words_of_an_error_are_cut():
    def program(comm):
        if comm.rank:
            Group(comm).tell(ValueError("ü" * 1000))
        else:
            Group(comm).exchange("somewhere")

    found = together(2, program)
    assert str(found[0]).startswith("rank 1 of 2 failed: ValueError: üü")
    assert len(str(found[0])) < 250


class Wordless(Exception):
    def __str__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "error", [Wordless(), ValueError("\udcff in a name"), KeyError()], ids=lambda e: type(e).__name__
)
def test_an_error_that_cannot_be_worded_is_told(error):
    def program(comm):
        if comm.rank:
            Group(comm).tell(error)
        else:
            Group(comm).exchange("somewhere")

    assert str(together(2, program)[0]).startswith(f"rank 1 of 2 failed: {type(error).__name__}")


def test_whole_numbers_on_one_rank_are_float64_there():
    found = errors(2, lambda comm: SyncBatchNorm(3, comm=comm)(np.ones((2, 3), np.float32 if comm.rank else int)))
    assert {str(e) for e in found} == {"expected the same bytes of an element on all ranks, got [8, 4]"}


def test_ghost_batches_on_some_ranks_are_told():
    def program(comm):
        layer = SyncBatchNorm(64, ghost_size=2 if comm.rank else None, comm=comm)
        layer(np.random.default_rng(0).standard_normal((4, 64)))

    assert all("expected all ranks in a forward" in str(e) for e in errors(2, program))


def test_the_end_is_the_same_for_all():
    """Whoever comes to the end of what was done together waits for the others, or hears of their errors."""

    def program(comm):
        group = Group(comm)
        try:
            for _ in range(3):
                group.exchange("a step")
                if comm.rank == 2:
                    raise OSError("no space left")
        except BaseException as error:
            group.end(error)
            raise
        group.end(None)

    found = errors(4, program)
    assert isinstance(found[2], OSError)
    assert {str(found[r]) for r in (0, 1, 3)} == {"rank 2 of 4 failed: OSError: no space left"}
    assert together(3, lambda comm: Group(comm).end(None)) == [None] * 3
    last = together(3, lambda comm: Group(comm).end(ZeroDivisionError("x") if comm.rank == 2 else None))
    assert [str(e) for e in last] == ["rank 2 of 3 failed: ZeroDivisionError: x"] * 2 + ["None"]

    def one_is_done(comm):
        group = Group(comm)
        try:
            if comm.rank:
                group.exchange("a step")
        except BaseException as error:
            group.end(error)
            raise
        group.end(None)

    here, there = errors(2, one_is_done)
    assert "expected all ranks in the end of what the ranks do together, got rank 1 in a step" in str(here)
    assert "expected all ranks in a step, got rank 0 in the end" in str(there)


def test_ranks_in_different_places_are_told():
    def program(comm):
        layer = SyncBatchNorm(3, comm=comm)
        y = layer(np.random.default_rng(0).standard_normal((4, 3)))
        layer(y) if comm.rank else layer.backward(y)

    assert all("expected all ranks in a" in str(e) for e in errors(2, program))


def test_nan_stays_in_its_feature():
    def program(comm):
        layer = SyncBatchNorm(3, comm=comm)
        x = np.random.default_rng(comm.rank).standard_normal((4, 3))
        x[0, 1] = np.nan if comm.rank else 0
        return layer(x), layer.running_mean

    for y, mean in together(2, program):
        assert np.isnan(y[:, 1]).all()
        assert np.isfinite(y[:, [0, 2]]).all()
        assert np.isnan(mean).tolist() == [False, True, False]


# --- convert, copies


def test_convert_keeps_layers_and_arrays():
    model = nn.Sequential(nn.Dense(4, 3), nn.Sequential(BatchNorm(3, eps=1e-3)), BatchNorm(3))
    arrays = {k: id(p) for k, p in model.params.items()}
    layers = [model[1][0], model[2]]

    def program(comm):
        assert convert(model, comm) is model
        return None

    together(1, program)
    assert [type(layer) for layer in layers] == [SyncBatchNorm] * 2
    assert {k: id(p) for k, p in model.params.items()} == arrays
    assert repr(model[1][0]) == "SyncBatchNorm(3, eps=0.001)"
    convert(model, None)
    assert [type(layer) for layer in layers] == [BatchNorm] * 2
    assert repr(model[2]) == "BatchNorm(3)"


def test_copies_and_pickles():
    def program(comm):
        layer = SyncBatchNorm(3, comm=comm)
        x = np.random.default_rng(comm.rank).standard_normal((4, 3))
        copied = copy.deepcopy(layer)
        same = copied(x).tobytes() == layer(x).tobytes()
        return same, pickle.dumps(layer)

    for same, pickled in together(2, program):
        assert same
        alone = pickle.loads(pickled)
        x = np.random.default_rng(9).standard_normal((4, 3))
        other = BatchNorm(3)
        other.load_state_dict(alone.state_dict())
        assert alone(x).tobytes() == other(x).tobytes()


def test_a_subclass_is_not_converted():
    class Own(BatchNorm):
        pass

    model = nn.Sequential(BatchNorm(3), Own(3))

    def program(comm):
        convert(model, comm)

    (error,) = together(1, program)
    assert isinstance(error, TypeError)
    assert "subclass Own" in str(error)
    assert type(model[0]) is BatchNorm


def test_files_and_folded_networks_have_a_batch_norm(tmp_path):
    pytest.importorskip("safetensors")
    model = nn.Sequential(
        nn.Dense(4, 3, seed=0), BatchNorm(3, eps=1e-3), nn.Dense(3, 3, seed=1), nn.ReLU(), BatchNorm(3)
    )
    x = np.random.default_rng(0).standard_normal((8, 4), np.float32)
    model(x)
    folded, expected = model.folded(), model.eval()(x)

    def program(comm):
        convert(model, comm)
        checkpoint.save(tmp_path / "model.safetensors", model)
        return model.folded()

    (of_sync,) = together(1, program)
    loaded = checkpoint.load(tmp_path / "model.safetensors")
    assert [type(layer) for layer in loaded][1] is BatchNorm
    assert loaded(x).tobytes() == expected.tobytes()
    assert repr(of_sync[0]) == repr(folded[0])
    assert of_sync(x).tobytes() == folded(x).tobytes()
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert model[1].config() == loaded[1].config()
    checkpoint.save(tmp_path / "folded.safetensors", of_sync)
    assert checkpoint.load(tmp_path / "folded.safetensors")(x).tobytes() == folded(x).tobytes()

    class Own(SyncBatchNorm):
        pass

    model[1].__class__ = Own
    with pytest.raises(TypeError, match="cannot save a Own"):
        checkpoint.save(tmp_path / "model.safetensors", model)
    assert type(model.folded()[1]) is Own


def test_bad_communicators_are_refused():
    for rank, size in ((-1, -1), (2, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank from 0 on, below size, got {rank} of {size}"):
            convert(BatchNorm(3), Thread(rank, size, None, None))
    with pytest.raises(TypeError, match="comm with rank, size, allgather and abort, got int without rank"):
        SyncBatchNorm(3, comm=1)
    with pytest.raises(TypeError):
        SyncBatchNorm(3)
    assert fastbn.BatchNorm(3)(np.ones((2, 3))).shape == (2, 3)
