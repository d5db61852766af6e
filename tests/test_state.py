"""Arrays that a caller can reach stay the layer's own, and nothing is written through ones that do not fit."""

import copy
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest

import fastbn
from fastbn import losses, nn, optim, training
from fastbn.state import Arrays


def model_after_backward():
    model = nn.Sequential(nn.Dense(3, 4, bias=False, seed=0), fastbn.BatchNorm(4))
    rng = np.random.default_rng(0)
    model(rng.standard_normal((8, 3)))
    model.backward(rng.standard_normal((8, 4)))
    return model


def test_assignment_copies_into_the_layers_own_array():
    model = model_after_backward()
    clipped = {key: np.clip(grad, -1e-3, 1e-3) for key, grad in model.grads.items()}
    own = {key: id(grad) for key, grad in model.grads.items()}
    for key in model.grads:
        model.grads[key] = clipped[key]
    model.params |= {"1.weight": np.full(4, 2.0)}
    model.params.update({"1.bias": 3})
    model.params["0.weight"] *= 2
    assert {key: id(grad) for key, grad in model.grads.items()} == own
    assert all((model.grads[key] == clipped[key]).all() for key in clipped)
    assert (model[1].weight == 2).all()
    assert (model[1].bias == 3).all()
    assert (model[1].grads["weight"] == clipped["1.weight"]).all()
    before = model.grads["1.bias"].copy()
    model.backward(np.ones((8, 4)))
    assert (model.grads["1.bias"] != before).all()


def test_keys_stay():
    params = fastbn.BatchNorm(2).params
    with pytest.raises(KeyError, match="gamma"):
        params["gamma"] = np.ones(2)
    for change in (params.clear, params.popitem, lambda: params.pop("bias"), lambda: params.__delitem__("bias")):
        with pytest.raises(TypeError, match="to stay"):
            change()
    assert sorted(params) == ["bias", "weight"]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (np.ones(3), ValueError),
        (None, TypeError),
        (np.ones(2, complex), TypeError),
        (["1", "2"], TypeError),
        (np.ma.masked_array([1.0, 2.0], [True, False]), TypeError),
        (np.array([1, None]), TypeError),
    ],
)
def test_assigning_what_does_not_fit(value, error):
    bn = fastbn.BatchNorm(2)
    for name in ("weight", "bias", "running_mean", "running_var"):
        before = getattr(bn, name).copy()
        with pytest.raises(error):
            setattr(bn, name, value)
        assert (getattr(bn, name) == before).all()
    with pytest.raises(error):
        bn.params["weight"] = value


def test_copies_of_the_dict():
    arrays = Arrays({"a": np.arange(3.0)})
    for twin in (copy.deepcopy(arrays), pickle.loads(pickle.dumps(arrays))):
        assert type(twin) is Arrays
        assert (twin["a"] == arrays["a"]).all()
        assert not np.shares_memory(twin["a"], arrays["a"])


@pytest.mark.parametrize("spoil", ["grad", "running_mean"])
def test_read_only_arrays_are_not_written(spoil):
    bn = fastbn.BatchNorm(3)
    x = np.random.default_rng(0).standard_normal((6, 3))
    bn(x)
    array = bn.grads["bias"] if spoil == "grad" else bn.running_mean
    array.flags.writeable = False
    state, grads = bn.state_dict(), copy.deepcopy(bn.grads)
    with pytest.raises(ValueError, match="writeable"):
        bn.backward(x) if spoil == "grad" else bn(x)
    assert all((bn.state_dict()[key] == state[key]).all() for key in state)
    assert all((bn.grads[key] == grads[key]).all() for key in grads)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, ">f8"])
def test_running_averages_of_another_dtype(dtype):
    running = Running()
    running.mean, running.var = np.zeros(3, dtype), np.ones(3, dtype)
    with pytest.raises(TypeError, match="expected running_mean of dtype float64"):
        fastbn.batch_norm_forward(np.eye(3), running=running)


class Running:
    num_features, momentum, debias, unbiased = 3, 0.1, False, True

    count, num_batches, _rest = 0, 0, 1.0


class Subclass(np.ndarray):
    pass


@pytest.mark.parametrize("kind", [np.memmap, Subclass])
def test_running_averages_of_a_subclass_are_updated_in_place(kind):
    x, running, plain = np.random.default_rng(0).standard_normal((8, 3)), Running(), Running()
    plain.mean, plain.var = np.zeros(3), np.ones(3)
    running.mean, running.var = np.zeros(3).view(kind), np.ones(3).view(kind)
    assert type(running.mean) is kind
    for one in (running, plain):
        fastbn.batch_norm_forward(x, running=one)
    assert (running.mean == plain.mean).all()
    assert (running.var == plain.var).all()
    running.mean = np.ma.masked_array(np.zeros(3), [True, False, False])
    with pytest.raises(TypeError, match=r"^expected running_mean to be a NumPy array, .* got MaskedArray$"):
        fastbn.batch_norm_forward(x, running=running)


def example_of_training():
    model = nn.Sequential(
        nn.Standardize(6).fit(np.arange(12.0).reshape(2, 6)), nn.Dense(6, 8, bias=False, seed=0),
        fastbn.BatchNorm(8, activation="relu", renorm=(3, 5)), nn.Dropout(0.1, seed=0), nn.Dense(8, 8, seed=1),
        fastbn.BatchNorm(8, ghost_size=8), nn.Dense(8, 3, seed=2),
    )  # fmt: skip
    return model, optim.Adam(model), fastbn.BatchNorm(6)


def trained(model, optimizer, norm):
    x = np.random.default_rng(0).standard_normal((40, 6))
    training.fit(model, (x, np.arange(40) % 3), losses.softmax_cross_entropy, optimizer, epochs=2, batch_size=20)
    norm(x, mask=x[:, 0] > 0)
    norm.backward(x)
    arrays = model.state_dict() | {f"norm.{k}": a for k, a in (norm.state_dict() | norm.grads).items()}
    return {key: array.tobytes() for key, array in arrays.items()}


@pytest.mark.parametrize("made", [lambda e: e, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_memory_maps_are_trained_in_place(made, tmp_path):
    joblib.dump(example_of_training(), tmp_path / "model")
    expected = trained(*example_of_training())
    for mode in ("c", "r+"):
        assert trained(*made(joblib.load(tmp_path / "model", mmap_mode=mode))) == expected


def test_read_only_memory_maps_are_read(tmp_path):
    joblib.dump(example_of_training(), tmp_path / "model")
    model, _, norm = joblib.load(tmp_path / "model", mmap_mode="r")
    x = np.random.default_rng(0).standard_normal((40, 6))
    assert (model.eval()(x) == example_of_training()[0].eval()(x)).all()
    with pytest.raises(ValueError, match=r"^expected running_mean to be writeable, got a read-only array$"):
        norm(x)
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("x", [np.arange(32.0, dtype=">f4").reshape(8, 4), np.arange(32).reshape(8, 4)])
def test_a_converted_x_that_out_overwrites_is_gone(x):
    bn = fastbn.BatchNorm(4)
    bn(x, out=x.view("<f4") if x.dtype.kind == "f" else x.view("f8"))
    with pytest.raises(RuntimeError, match="overwrite"):
        bn.backward(np.ones((8, 4)))


def test_backward_never_writes_into_x():
    x = np.random.default_rng(0).standard_normal((8, 4))
    bn, before = fastbn.BatchNorm(4), x.copy()
    bn(x)
    with pytest.raises(ValueError, match="no memory with x"):
        bn.backward(x, out=x)
    assert (x == before).all()


def test_statistics_of_another_batch():
    x = np.random.default_rng(0).standard_normal((8, 4))
    with pytest.raises(ValueError, match=r"8 values.*those of 6"):
        fastbn.batch_norm_backward(x, x, fastbn.moments(x[:6]))
    fastbn.batch_norm_backward(x, x, fastbn.moments(x[:6]), training=False)


@pytest.mark.parametrize("value", [3.5, -1, 2**64 - 1, 2.0**63, np.nan, np.inf, True, 1j, [1, 2], [[3]]])
def test_a_counter_that_is_none_leaves_the_model_as_it_was(value):
    model = model_after_backward()
    state, before = model.state_dict(), model.state_dict()
    state["0.weight"] = np.full((4, 3), 9.0)
    state["1.num_batches_tracked"] = np.array(value)
    with pytest.raises(ValueError, match="num_batches_tracked"):
        model.load_state_dict(state)
    assert all((model.state_dict()[key] == before[key]).all() for key in before)


def nested():
    return nn.Sequential(nn.Dense(3, 4, seed=0), nn.Sequential(fastbn.BatchNorm(4, momentum=None), nn.ReLU()))


def used(seed=0):
    model, rng = nested(), np.random.default_rng(seed)
    for _ in range(3):
        model(rng.standard_normal((8, 3)))
    return model


def test_a_state_without_the_number_of_batches_is_of_0_batches(tmp_path):
    """As from PyTorch before 0.4.1, and from layers that do not count (InPlaceABN, FrozenBatchNorm2d)."""
    state = used().state_dict()
    del state["1.0.num_batches_tracked"]
    inner = {key.removeprefix("1.0."): a for key, a in state.items() if key.startswith("1.0.")}
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(state, tmp_path / "theirs")
    for load, other in (
        (lambda model: model.load_state_dict(state), nested()),
        (lambda model: model.load_state_dict(state), used(5)),  # whatever it counted: these averages are others
        (lambda model: model[1][0].load_state_dict(inner), used(5)),
        (lambda model: fastbn.checkpoint.restore(tmp_path / "theirs", model), used(5)),
    ):
        load(other)
        assert other[1][0].num_batches_tracked == 0
        assert all((other[1].state_dict()["0." + key] == a).all() for key, a in inner.items())
    # Only that key: the number of values that Standardize has seen says whether it was fitted.
    fitted = nn.Standardize(2).fit(np.eye(2)).state_dict()
    del fitted["count"]
    with pytest.raises(ValueError, match="missing key 'count'"):
        nn.Standardize(2).load_state_dict(fitted)
    plain = fastbn.BatchNorm(2, track_running_stats=False)
    with pytest.raises(ValueError, match="unexpected key 'num_batches_tracked'"):
        plain.load_state_dict(plain.state_dict() | {"num_batches_tracked": 0})


@pytest.mark.parametrize(
    "kept",
    [np.int32, np.uint8, np.uint64, ">i8", np.float16, np.float32, lambda a: a.reshape(1), lambda a: a.item(), list],
    ids=str,
)
def test_a_count_may_be_kept_as_any_number(kept):
    """``{k: v.half() for k, v in state.items()}``, and the (1,) of formats without 0-d arrays."""
    state = used().state_dict()
    key = "1.0.num_batches_tracked"
    state[key] = [3] if kept is list else state[key].astype(kept) if isinstance(kept, type | str) else kept(state[key])
    other = nested()
    other.load_state_dict(state)
    assert other[1][0].num_batches_tracked == 3
    assert type(other[1][0].num_batches_tracked) is int


def test_states_of_pytorch_in_half_precision_and_other_byte_orders():
    state = used().state_dict()
    for change in (np.float16, ">f4", ">f8", np.float64):
        other = nested()
        other.load_state_dict({key: a.astype(change) for key, a in state.items()})
        for key, a in other.state_dict().items():
            assert (a == state[key].astype(change)).all()
            assert a.dtype == state[key].dtype


def test_states_whose_keys_have_a_prefix_are_named():
    for state in (
        {f"module.{key}": a for key, a in used().state_dict().items()},
        {"state_dict": used().state_dict(), "epoch": 3},
    ):
        with pytest.raises(ValueError, match=r"missing key '0\.bias': expected \['0\.bias'.*got \['"):
            nested().load_state_dict(state)
    state = used().state_dict()
    state["0.bias"] = np.ma.masked_array(state["0.bias"], [True, False, False, False])
    with pytest.raises(TypeError, match=r"expected '0\.bias' without a mask, got a masked array"):
        nested().load_state_dict(state)


def test_scales_that_float32_cannot_hold():
    rng = np.random.default_rng(0)
    assert (fastbn.batch_norm_forward(np.full((8, 2), 3, "f4"), None, [7.0, -1.0], 1e-80)[0] == [7, -1]).all()
    for std, weight in ((1e-3, 2e36), (1e30, 1e-20)):
        x = (rng.standard_normal((50, 3)) * std).astype("f4")
        dy = (rng.standard_normal((50, 3)) * 1e-3).astype("f4")
        w = np.full(3, weight)
        y, stats = fastbn.batch_norm_forward(x, w, activation="relu", eps=1e-12)
        wide, wide_stats = fastbn.batch_norm_forward(x.astype("f8"), w, activation="relu", eps=1e-12)
        np.testing.assert_allclose(y, wide, rtol=1e-6)
        got = fastbn.batch_norm_backward(dy, x, stats, w, activation="relu", eps=1e-12)
        expected = fastbn.batch_norm_backward(
            dy.astype("f8"), x.astype("f8"), wide_stats, w, activation="relu", eps=1e-12
        )
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=float(abs(b).max()) * 1e-6 + 1e-44)
        assert (got[2] != 0).all()


def test_a_tree_that_has_not_been_built_says_so(tmp_path):
    source = Path(fastbn.__file__).parent
    shutil.copytree(source, tmp_path / "fastbn", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    # -S and a path of its own: an installed fastbn must not fill in what is missing here.
    numpy_folder = str(Path(np.__file__).parents[1])
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {numpy_folder!r}]; import fastbn"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: fastbn is not built here: run `python -m pip")
