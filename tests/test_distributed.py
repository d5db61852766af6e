"""SyncBatchNorm over ranks that are threads: every part of a batch, merged, is the batch. tests/mpi has processes."""

import copy
import itertools
import pickle
import threading

import numpy as np
import pytest
import twin
from test_exactness import GRADIENT
from twin import within

import fastbn
from fastbn import BatchNorm, nn
from fastbn.distributed import SyncBatchNorm, convert

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


def together(size, program, seconds=20):
    """program(comm) on each rank; what each returned or raised."""
    barrier, places = threading.Barrier(size, timeout=seconds), [None] * size
    results = [None] * size

    def run(rank):
        try:
            results[rank] = program(Thread(rank, size, barrier, places))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(isinstance(result, threading.BrokenBarrierError) for result in results), results
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


def test_one_rank_has_the_bits_of_batch_norm():
    x, dy = np.random.default_rng(2).standard_normal((2, 50, 7)).astype(np.float32)
    whole = BatchNorm(7)
    expected = step(whole, x, dy)
    (got,) = together(1, lambda comm: step(SyncBatchNorm(7, comm=comm), x, dy))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, expected, strict=True))


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


def test_what_is_exchanged():
    def program(comm):
        layer = SyncBatchNorm(100, comm=comm)
        layer.backward(layer(np.random.default_rng(comm.rank).standard_normal((5, 100))))
        return comm.bytes

    assert together(2, program) == [[512, 2400, 512, 1600]] * 2


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


def test_nothing_on_all_ranks_changes_nothing():
    def program(comm):
        layer = SyncBatchNorm(3, comm=comm)
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


def test_an_error_in_backward_is_raised_on_all():
    def program(comm):
        layer = SyncBatchNorm(3, comm=comm)
        layer(np.random.default_rng(0).standard_normal((4, 3)))
        layer.backward(np.ones((4 - comm.rank, 3)))

    found = errors(2, program)
    assert "rank 1 of 2 failed: ValueError: expected dy" in str(found[0])


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


def test_bad_communicators_are_refused():
    with pytest.raises(TypeError, match="comm with rank, size, allgather and abort, got int without rank"):
        SyncBatchNorm(3, comm=1)
    with pytest.raises(TypeError):
        SyncBatchNorm(3)
    assert fastbn.BatchNorm(3)(np.ones((2, 3))).shape == (2, 3)
