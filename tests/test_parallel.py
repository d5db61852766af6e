"""`fit` over ranks that are threads: it is the training of one process. tests/mpi has processes."""

import itertools
import math
import os
import pickle
import threading
from dataclasses import asdict

import numpy as np
import pytest
from test_distributed import Slicing, Thread, errors, together

from fastbn import BatchNorm, losses, nn, optim, parallel, schedules, training
from fastbn.distributed import SyncBatchNorm, convert

X = np.random.default_rng(0).standard_normal((103, 6))
LABELS = (X.sum(axis=1) > 0).astype(int) + (X[:, 0] > 1)
DATA = X, LABELS


def network(dropout=0.0, dtype="float64", seed=5, **options):
    return nn.Sequential(
        nn.Dense(6, 12, bias=False, seed=0, dtype=dtype), BatchNorm(12, dtype=dtype, activation="relu", **options),
        nn.Dense(12, 8, bias=False, seed=1, dtype=dtype), BatchNorm(8, dtype=dtype), nn.ReLU(),
        nn.Dropout(dropout, seed=seed), nn.Dense(8, 3, seed=2, dtype=dtype),
    )  # fmt: skip


def trained(
    comm,
    *,
    model=None,
    make=network,
    data=DATA,
    loss=losses.softmax_cross_entropy,
    optimizer=optim.SGD,
    lr=0.1,
    **options,
):
    """The history without times, the state of the model, and that of the optimizer."""
    model = make() if model is None else model
    if comm is not None:
        convert(model, comm)
    made = optimizer(model, lr)
    options = {"epochs": 2, "batch_size": 32, "progress": False} | options
    history = training.fit(model, data, loss, made, comm=comm, **options)
    return asdict(history) | {"seconds": None}, model.state_dict(), made.state_dict()


def well(results):
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def same_bits(one, other):
    return one[0] == other[0] and all(
        a[k].tobytes() == b[k].tobytes() for a, b in zip(one[1:], other[1:], strict=True) for k in a
    )


WAYS = {
    "sgd": {},
    "adam": {"optimizer": optim.Adam, "lr": 0.01},
    "clipped": {"clip_norm": 0.5, "schedule": lambda t, epochs: 1 / (1 + t)},
    "held out": {"validation": 0.3, "patience": 1, "epochs": 3},
    "averaged": {"average": 0.9},
    "swa": {"average": "swa", "average_from": 1},
    "tiny batches": {"batch_size": 3, "epochs": 1, "validation": (X[:4], LABELS[:4])},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 3, *(pytest.param(size, marks=pytest.mark.long) for size in (2, 7))])
def test_it_is_the_training_of_one_process(size, way):
    alone = trained(None, **WAYS[way])
    results = well(together(size, lambda comm: trained(comm, **WAYS[way])))
    assert all(same_bits(results[0], other) for other in results)
    if size == 1:
        assert same_bits(results[0], alone)
    for name, values in alone[0].items():
        if values is not None:
            np.testing.assert_allclose(results[0][0][name], values, rtol=1e-9)
    for name, a in alone[1].items():
        np.testing.assert_allclose(results[0][1][name], a, rtol=1e-7, atol=1e-9, err_msg=name)


def test_the_same_number_of_ranks_has_the_same_bits():
    def program(comm):
        return trained(comm, model=network(0.3, "float32"), data=(X.astype(np.float32), LABELS), validation=0.2)

    first, again = (well(together(3, program)) for _ in range(2))
    assert all(same_bits(first[0], other) for other in first + again)


@pytest.mark.parametrize("loss", ["mse", "sigmoid_cross_entropy"])
def test_other_losses(loss):
    y = np.column_stack([LABELS > 0, LABELS > 1, X[:, 1] > 0]).astype(np.float64)
    options = {"data": (X, y), "loss": getattr(losses, loss), "validation": 0.1}
    alone, (first, *_) = trained(None, **options), well(together(3, lambda comm: trained(comm, **options)))
    for name, values in alone[0].items():
        if values is not None:
            np.testing.assert_allclose(first[0][name], values, rtol=1e-9)


def test_gradients_travel_in_pieces(monkeypatch):
    whole = well(together(2, trained))
    monkeypatch.setattr(parallel, "ROOM", 10)
    assert same_bits(whole[0], well(together(2, trained))[0])


@pytest.mark.parametrize("rank_of", [Thread, Slicing])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "float64"), ("float64", "float64")], ids=str)
def test_gradients_are_summed_in_float64_and_rounded_once(monkeypatch, dtypes, rank_of):
    monkeypatch.setattr("fastbn.ranks.SLICED_FROM", 0)
    rng = np.random.default_rng(0)
    parts = [
        (rng.standard_normal((3, *shape)) * 1e3).astype(d) for d, shape in zip(dtypes, [(5, 3), (4,)], strict=True)
    ]
    parts[0][1, 2, 2], parts[1][0, 1], parts[0][2, 0, :2] = np.nan, np.inf, 3e38

    def program(comm):
        gradients = [part[comm.rank].copy() for part in parts]
        parallel.Ranks(comm).add(gradients)
        return [gradient.tobytes() for gradient in gradients]

    with np.errstate(all="ignore"):
        wide = [part.astype(np.float64) for part in parts]
        expected = [((w[0] + w[1]) + w[2]).astype(part.dtype).tobytes() for w, part in zip(wide, parts, strict=True)]
    assert well(together(3, program, rank_of=rank_of)) == [expected] * 3


def test_gradients_merged_in_slices_have_the_same_bits(monkeypatch):
    gathered = well(together(3, trained))
    monkeypatch.setattr("fastbn.ranks.SLICED_FROM", 0)
    assert same_bits(gathered[0], well(together(3, trained, rank_of=Slicing))[0])
    monkeypatch.setattr("fastbn.parallel.ROOM", 7)
    assert same_bits(gathered[0], well(together(3, trained, rank_of=Slicing))[2])


def test_each_rank_evaluates_its_part():
    def program(comm):
        examples = []

        def loss(prediction, target):
            examples.append(len(prediction))
            return losses.softmax_cross_entropy(prediction, target)

        trained(comm, loss=loss, validation=(X[:50], LABELS[:50]), epochs=1, batch_size=50)
        return examples[-1]

    assert well(together(3, program)) == [16, 17, 17]


def test_averages_that_a_rank_takes_otherwise_are_those_of_the_first(monkeypatch):
    """Matrix products of one and the same numbers may differ from machine to machine."""
    real, off = training.retake, itertools.count()

    def retake(model, moving, data):
        real(model, moving, data)
        model[1].running_mean += next(off)

    monkeypatch.setattr(training, "retake", retake)
    results = well(together(3, lambda comm: trained(comm, average=0.9)))
    assert all(same_bits(results[0], other) for other in results)


@pytest.mark.parametrize("kind", ["frozen", "frozen plain", "ghosts"])
def test_gradients_of_layers_that_exchange_nothing_are_added_up(kind):
    """The weights and biases of batch normalization too, which are the rank's own there."""

    def model():
        made = network(**({"ghost_size": 8} if kind == "ghosts" else {}))
        if kind != "ghosts":
            for layer in (made[1], made[3]):
                layer.running_var = np.linspace(0.5, 2, layer.num_features)
                layer.freeze()
        return made

    def program(comm):
        made = model()
        if kind != "frozen plain" or comm is None:
            return trained(comm, model=made, data=(X[:96], LABELS[:96]), epochs=1)
        optimizer = optim.SGD(made, 0.1)
        training.fit(made, (X[:96], LABELS[:96]), losses.softmax_cross_entropy, optimizer, epochs=1, batch_size=32,
                     progress=False, comm=comm)  # fmt: skip
        return None, made.state_dict()

    alone, results = program(None), well(together(2, program))
    for name, a in alone[1].items():
        assert results[0][1][name].tobytes() == results[1][1][name].tobytes()
        np.testing.assert_allclose(results[0][1][name], a, rtol=1e-7, atol=1e-9, err_msg=name)


class Residual:
    """A layer of one's own, which holds batch normalization where `convert` and `fit` do not look."""

    def __init__(self, norm):
        self.inner = nn.Sequential(nn.Dense(12, 12, bias=False, seed=3, dtype="float64"), norm)
        self.params, self.grads = self.inner.params, self.inner.grads
        self.training, self.state_dict, self.train = True, self.inner.state_dict, self.inner.train

    def __call__(self, x):
        return x + self.inner(x)

    def backward(self, dy):
        return dy + self.inner.backward(dy, input_grad=True)


def test_gradients_within_a_layer_of_ones_own_are_added_up_once():
    def program(comm):
        norm = BatchNorm(12, dtype="float64") if comm is None else SyncBatchNorm(12, dtype="float64", comm=comm)
        first, last = network()[0], nn.Dense(12, 3, seed=2, dtype="float64")
        return trained(comm, model=nn.Sequential(first, Residual(norm), last))

    alone, results = program(None), well(together(3, program))
    assert all(same_bits(results[0], other) for other in results)
    np.testing.assert_allclose(results[0][0]["loss"], alone[0]["loss"], rtol=1e-9)
    for name, a in alone[1].items():
        np.testing.assert_allclose(results[0][1][name], a, rtol=1e-7, atol=1e-9, err_msg=name)


def test_the_loss_of_all_is_a_mean_in_float64():
    def loss(prediction, target):
        return np.float32(0.1), losses.softmax_cross_entropy(prediction, target)[1]

    for history, *_ in well(together(3, lambda comm: trained(comm, loss=loss))):
        np.testing.assert_allclose(history["loss"], np.float32(0.1), rtol=1e-12)


# --- Dropout, and trainings that go on


def test_each_rank_drops_others_and_goes_on_alike():
    def program(comm):
        model = nn.Sequential(nn.Dense(6, 40, seed=0), nn.Dropout(0.5, seed=1))
        dropped = []

        def loss(prediction, target):
            dropped.append(prediction == 0)
            return 0.0, np.zeros_like(prediction)

        same = np.ones((40, 6), np.float32)
        training.fit(model, (same, np.zeros(40)), loss, optim.SGD(model, 0.1), epochs=1, batch_size=20, progress=False,
                     comm=comm)  # fmt: skip
        return np.stack([d for d in dropped if d.shape[0] == 10]), model[1].rng.random()

    (first, a), (second, b) = well(together(2, program))
    assert a == b
    patterns = [first[0], first[1], second[0], second[1]]
    assert all((one != other).mean() > 0.3 for one, other in itertools.combinations(patterns, 2))


@pytest.mark.parametrize("stop", [2, 4, 5, 8])
def test_a_training_goes_on_with_the_same_bits(tmp_path, stop):
    pytest.importorskip("safetensors")
    path = tmp_path / "run.safetensors"
    options = {"epochs": 2, "validation": 0.1, "patience": 2, "optimizer": optim.Adam, "lr": 0.01}

    def program(comm, **more):
        return trained(comm, model=network(0.4), checkpoint=path, **options, **more)

    whole = well(together(3, program))
    path.unlink()
    # Only one of the ranks ends it.
    well(together(3, lambda comm: program(comm, on_step=lambda step, loss: step == stop and comm.rank == 1)))
    assert all(same_bits(whole[0], other) for other in well(together(3, lambda comm: program(comm, resume=True))))


@pytest.mark.parametrize("sizes", [(None, 3), (2, 4), (4, None)])
def test_another_number_of_ranks_goes_on(tmp_path, sizes):
    pytest.importorskip("safetensors")
    path = tmp_path / "run.safetensors"

    def run(size, **options):
        if size is None:
            return trained(None, checkpoint=path, **options)
        return well(together(size, lambda comm: trained(comm, checkpoint=path, **options)))[0]

    alone = trained(None)
    run(sizes[0], on_step=lambda step, loss: step == 5)
    history, state, _ = run(sizes[1], resume=True)
    np.testing.assert_allclose(history["loss"], alone[0]["loss"], rtol=1e-9)
    for name, a in alone[1].items():
        np.testing.assert_allclose(state[name], a, rtol=1e-7, atol=1e-9, err_msg=name)


# --- what must be alike


DIFFERENT = {
    "checksum of X": {"data": (X + 1e-9, LABELS)},
    "checksum of y": {"data": (X, np.roll(LABELS, 1))},
    "checksum of validation X": {"validation": (X[:7], LABELS[:7])},
    "checksum of the model": {"make": lambda: network(momentum=0.2)},
    "checksum of the model ": {"make": lambda: network(seed=6)},
    "checksum of the optimizer": {"lr": 0.2},
    "epochs of fit (its checksum)": {"epochs": 3},
    "seed of fit (its checksum)": {"seed": 3},
    "schedule of fit (its checksum)": {"schedule": schedules.cosine()},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named_on_all_ranks(name):
    options = {"validation": (X[:5], LABELS[:5])}

    def program(comm):
        return trained(comm, **options | (DIFFERENT[name] if comm.rank == 1 else {}))

    found = errors(3, program)
    assert {type(e) for e in found} == {ValueError}
    assert len({str(e) for e in found}) == 1
    assert f"expected the same {name.strip()} on all ranks, got [" in str(found[0])


@pytest.mark.parametrize("what", ["weight", "running_var", "stream", "mode"])
def test_start_values_must_be_alike(what):
    def program(comm):
        model = network()
        if comm.rank:
            match what:
                case "weight":
                    model[0].params["weight"] += 1
                case "running_var":
                    model[3].running_var += 1
                case "stream":
                    model[5].rng.random()
                case "mode":
                    model[4].eval()
        return trained(comm, model=model)

    assert all("checksum of the model" in str(e) for e in errors(2, program))


def test_numbers_of_threads_may_differ():
    well(together(2, lambda comm: trained(comm, model=network(num_threads=1 + comm.rank))))


def test_a_callback_of_one_rank_that_changes_the_model_is_found():
    def program(comm):
        model = network()

        def on_step(step, loss):
            if comm.rank == 1 and step == 6:
                model[0].params["weight"] *= 1.5

        return trained(comm, model=model, on_step=on_step)

    found = errors(2, program)
    assert {type(e) for e in found} == {ValueError}
    assert "expected the same model after epoch 2 (its checksum) on all ranks" in str(found[0])


def test_a_checkpoint_that_not_all_can_see(tmp_path):
    pytest.importorskip("safetensors")
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    well(together(2, lambda comm: trained(comm, checkpoint=tmp_path / str(comm.rank) / "run", epochs=1)))
    assert os.listdir(tmp_path / "0") == ["run"]
    assert os.listdir(tmp_path / "1") == []

    found = errors(2, lambda comm: trained(comm, checkpoint=tmp_path / str(comm.rank) / "run", epochs=1, resume=True))
    assert all("the same checksum of the checkpoint on all ranks" in str(e) for e in found)


def test_batch_norm_of_one_rank_alone_is_refused():
    def fit(model, comm):
        before = model.state_dict()
        with pytest.raises(ValueError, match=r"distributed\.convert\(model, comm\)") as error:
            training.fit(model, DATA, losses.softmax_cross_entropy, optim.SGD(model, 0.1), epochs=1, batch_size=32,
                         progress=False, comm=comm)  # fmt: skip
        assert all((before[k] == a).all() for k, a in model.state_dict().items())
        return str(error.value)

    for options in ({}, {"track_running_stats": False}):
        said = well(together(2, lambda comm, options=options: fit(network(**options), comm)))
        assert "expected SyncBatchNorm with comm, got BatchNorm(12" in said[0]

    def unpickled(comm):
        return fit(pickle.loads(pickle.dumps(convert(network(), comm))), comm)

    assert "expected SyncBatchNorm with comm, got SyncBatchNorm" in well(together(2, unpickled))[1]

    def of_another_group(comm):
        other = Thread(comm.rank, comm.size, comm._barrier, comm._places)
        return fit(convert(network(), other), comm)

    assert "to have the comm of fit" in well(together(2, of_another_group))[0]


def test_ghost_batches_without_averages_exchange_gradients_alone():
    def program(comm):
        options = {"ghost_size": 8, "track_running_stats": False, "dtype": "float64"}
        model = nn.Sequential(
            nn.Dense(6, 12, seed=0, dtype="float64"), BatchNorm(12, **options), nn.Dense(12, 3, seed=1)
        )
        training.fit(model, DATA, losses.softmax_cross_entropy, optim.SGD(model, 0.1), epochs=1, batch_size=32,
                     progress=False, comm=comm)  # fmt: skip
        return model.state_dict()

    first, other = well(together(2, program))
    assert all((first[k] == a).all() for k, a in other.items())


def test_fit_without_the_comm_of_its_layers_is_refused():
    def program(comm):
        return trained(None, model=convert(network(), comm))

    for error in errors(3, program):
        assert str(error).startswith("expected comm, the processes that SyncBatchNorm(12, ")
        assert str(error).endswith(" is for, got comm=None")
    well(together(1, program))


# --- what ends a training


def raising(comm, rank, error):
    """A loss that fails on one rank, in its fifth step."""
    calls = itertools.count()

    def loss(prediction, target):
        if next(calls) == 5 and comm.rank == rank:
            raise error
        return losses.softmax_cross_entropy(prediction, target)

    return loss


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt(), MemoryError("of all")], ids=repr)
def test_an_error_on_one_rank_ends_all(rank, error):
    found = errors(3, lambda comm: trained(comm, loss=raising(comm, rank, error), epochs=9))
    assert found[rank] is error
    words = {str(e) for e in found if e is not error}
    assert words == {f"rank {rank} of 3 failed: {type(error).__name__}: {error}"}


@pytest.mark.parametrize("callback", ["on_step", "on_epoch"])
@pytest.mark.parametrize("last", [False, True])
def test_an_error_of_a_callback_ends_all(callback, last):
    at = {"on_step": 8 if last else 3, "on_epoch": 2 if last else 1}[callback]

    def program(comm):
        def call(number, *_):
            if number == at and comm.rank == 1:
                raise OSError("no space left")

        return trained(comm, **{callback: call})

    found = errors(3, program)
    assert isinstance(found[1], OSError)
    assert {str(found[rank]) for rank in (0, 2)} == {"rank 1 of 3 failed: OSError: no space left"}


def test_an_error_before_the_first_step_ends_all():
    found = errors(2, lambda comm: trained(comm, epochs=comm.rank))
    assert str(found[0]) == "epochs must be at least 1, got 0"
    assert str(found[1]) == "rank 0 of 2 failed: ValueError: epochs must be at least 1, got 0"


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_checkpoint_that_cannot_be_written_ends_all(tmp_path, epoch):
    pytest.importorskip("safetensors")
    path = tmp_path / "folder" / "run"
    path.parent.mkdir()

    def program(comm):
        def remove(number, history):
            if number == epoch and comm.rank == 0:
                for file in path.parent.iterdir():
                    file.unlink()
                path.parent.rmdir()

        return trained(comm, checkpoint=path, on_epoch=remove)

    found = errors(3, program)
    assert isinstance(found[0], FileNotFoundError)
    assert all(str(e).startswith("rank 0 of 3 failed: FileNotFoundError") for e in found[1:])


def test_a_loss_that_is_nan_on_one_rank_is_the_same_error_on_all():
    def program(comm):
        calls = itertools.count()

        def loss(prediction, target):
            value, gradient = losses.softmax_cross_entropy(prediction, target)
            return (math.nan if next(calls) == 6 and comm.rank == 1 else value), gradient

        return trained(comm, loss=loss)

    found = errors(3, program)
    assert {(type(e), str(e)) for e in found} == {(FloatingPointError, "the loss is nan at epoch 2, step 2")}


def test_true_of_one_callback_ends_all_after_the_same_step():
    steps = []

    def program(comm):
        def on_step(step, loss):
            steps.append(step)
            return comm.rank == 2 and step == 3

        return trained(comm, on_step=on_step)

    results = well(together(3, program))
    assert sorted(steps) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(same_bits(results[0], other) for other in results)


def test_ctrl_c_on_one_rank_is_ctrl_c_on_all(monkeypatch, tmp_path):
    pytest.importorskip("safetensors")
    local = threading.local()

    class CtrlC(training.CtrlC):
        def __enter__(self):
            local.it = super().__enter__()
            return self

    monkeypatch.setattr(training, "CtrlC", CtrlC)
    steps = []

    def program(comm):
        def on_step(step, loss):
            steps.append(step)
            local.it.pressed |= comm.rank == 1 and step == 5

        return trained(comm, on_step=on_step, checkpoint=tmp_path / "run")

    assert {type(e) for e in errors(3, program)} == {KeyboardInterrupt}
    assert max(steps) == 5
    assert len(steps) == 15
    resumed = well(together(3, lambda comm: trained(comm, checkpoint=tmp_path / "run", resume=True)))
    assert same_bits(resumed[0], well(together(3, trained))[0])


def test_rank_0_alone_prints(capsys):
    well(together(3, lambda comm: trained(comm, verbose=True)))
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["epoch 1/2", "epoch 2/2"]
