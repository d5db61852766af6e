"""BatchNorm and batch_norm beside PyTorch's, option by option and step by step."""

import numpy as np
import pytest

import fastbn

torch = pytest.importorskip("torch", reason="torch is missing (pip install torch)")

SHAPES = [(32, 6), (100, 1), (8, 3, 5), (4, 16, 7, 7), (2, 3, 4, 5, 6), (64, 100)]
TOLERANCE = {"float32": 2e-5, "float64": 1e-11}
MODULES = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


def close(ours, theirs, dtype):
    theirs = theirs.detach().numpy()
    size = np.abs(theirs).max() if theirs.size else 0
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE[dtype] * max(size, 1))


def pair(shape, dtype, **options):
    theirs = getattr(torch.nn, MODULES[len(shape)])(shape[1], dtype=getattr(torch, dtype), **options)
    ours = fastbn.BatchNorm(shape[1], dtype=dtype, **options)
    if ours.weight is not None:
        rng = np.random.default_rng(0)
        ours.weight[...], ours.bias[...] = rng.standard_normal((2, shape[1]))
        with torch.no_grad():
            theirs.weight.copy_(torch.from_numpy(ours.weight))
            theirs.bias.copy_(torch.from_numpy(ours.bias))
    return ours, theirs


def step(ours, theirs, x, dy, dtype):
    tx = torch.from_numpy(x).requires_grad_()
    ty = theirs(tx)
    close(ours(x), ty, dtype)
    ty.backward(torch.from_numpy(dy))
    close(ours.backward(dy), tx.grad, dtype)
    for name, grad in ours.grads.items():
        close(grad, getattr(theirs, name).grad, dtype)
    theirs.zero_grad()
    for name in ("running_mean", "running_var"):
        if getattr(theirs, name) is None:
            assert getattr(ours, name) is None
        else:
            close(getattr(ours, name), getattr(theirs, name), dtype)
    if theirs.num_batches_tracked is not None:
        assert ours.num_batches_tracked == int(theirs.num_batches_tracked)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.7, "eps": 1e-2},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False, "momentum": None},
    ],
    ids=str,
)
def test_training_then_inference(shape, dtype, options):
    ours, theirs = pair(shape, dtype, **options)
    rng = np.random.default_rng(1)
    for k in range(4):
        x, dy = rng.standard_normal((2, *shape)).astype(dtype)
        step(ours, theirs, x * (k + 1) + k, dy, dtype)
    ours.eval()
    theirs.eval()
    step(ours, theirs, x, dy, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_fused_activations(dtype, activation):
    ours, theirs = pair((64, 10), dtype)
    fused = fastbn.BatchNorm(10, dtype=dtype, activation=activation)
    fused.load_state_dict(ours.state_dict())
    x, dy = np.random.default_rng(2).standard_normal((2, 64, 10)).astype(dtype)
    tx = torch.from_numpy(x).requires_grad_()
    ty = getattr(torch.nn.functional, activation)(theirs(tx))
    ty.backward(torch.from_numpy(dy))
    close(fused(x), ty, dtype)
    close(fused.backward(dy), tx.grad, dtype)
    close(fused.grads["weight"], theirs.weight.grad, dtype)
    close(fused.grads["bias"], theirs.bias.grad, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_function_in_torchs_order(shape, dtype, training):
    rng = np.random.default_rng(3)
    x = rng.standard_normal(shape).astype(dtype)
    weight, bias = rng.standard_normal((2, shape[1])).astype(dtype)
    mean, var = rng.standard_normal(shape[1]), rng.uniform(0.5, 2, shape[1])
    tmean, tvar = (torch.from_numpy(a.astype(dtype)) for a in (mean, var))
    expected = torch.nn.functional.batch_norm(
        torch.from_numpy(x), tmean, tvar, torch.from_numpy(weight), torch.from_numpy(bias), training, 0.3, 1e-3
    )
    close(fastbn.batch_norm(x, mean, var, weight, bias, training, 0.3, 1e-3), expected, dtype)
    close(mean, tmean, dtype)
    close(var, tvar, dtype)


def test_channels_last_is_read_as_it_lies():
    x = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    y, _ = fastbn.batch_norm_forward(x.numpy())
    assert y.strides == x.numpy().strides
    close(y, torch.nn.functional.batch_norm(x, None, None, training=True), "float32")


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_state_dicts_travel_both_ways(options):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((30, 6)).astype("float32")
    ours, theirs = pair((30, 6), "float32", **options)
    theirs(torch.from_numpy(x))
    theirs.eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    ours.eval()
    close(ours(x), theirs(torch.from_numpy(x)), "float32")
    back = torch.nn.BatchNorm1d(6, **options).eval()
    back.load_state_dict({k: torch.from_numpy(v) for k, v in ours.state_dict().items()})
    close(ours(x), back(torch.from_numpy(x)), "float32")


def test_the_sentence_for_a_single_value_is_torchs():
    x = np.zeros((1, 64), "float32")
    with pytest.raises(ValueError, match="Expected more") as theirs:
        torch.nn.BatchNorm1d(64)(torch.from_numpy(x))
    with pytest.raises(ValueError, match="Expected more") as ours:
        fastbn.BatchNorm(64)(x)
    assert str(ours.value) == str(theirs.value).replace("torch.Size([1, 64])", "(1, 64)")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(32, 6), (8, 3, 5), (9, 16, 7, 7)], ids=str)
def test_ghost_batches_are_pytorchs_batches(shape, dtype):
    ours, theirs = pair(shape, dtype)
    ours = fastbn.BatchNorm(**{**ours.config(), "ghost_size": 4})
    ours.weight, ours.bias = (p.detach().numpy() for p in theirs.parameters())
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    # PyTorch's chunks of 9 examples would leave one alone.
    sizes = [4] * (len(x) // 4 - (len(x) % 4 == 1)) + [5] * (len(x) % 4 == 1)
    tx = torch.from_numpy(x).requires_grad_()
    ty = torch.cat([theirs(part) for part in tx.split(sizes)])
    ty.backward(torch.from_numpy(dy))
    close(ours(x), ty, dtype)
    close(ours.backward(dy), tx.grad, dtype)
    for name in ("weight", "bias"):
        close(ours.grads[name], getattr(theirs, name).grad, dtype)
    close(ours.running_mean, theirs.running_mean, dtype)
    close(ours.running_var, theirs.running_var, dtype)
    assert ours.num_batches_tracked == int(theirs.num_batches_tracked)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(32, 6), (8, 3, 5), (4, 16, 7, 7)], ids=str)
def test_frozen_statistics_are_a_layer_in_eval_within_training(shape, dtype):
    ours, theirs = pair(shape, dtype)
    rng = np.random.default_rng(4)
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    step(ours, theirs, 2 * x, dy, dtype)
    ours.freeze().train()
    theirs.eval()
    step(ours, theirs, x, dy, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_masked_positions_are_left_out_as_by_indexing(dtype):
    ours, theirs = pair((8, 6, 5), dtype)
    theirs = torch.nn.BatchNorm1d(6, dtype=getattr(torch, dtype))
    theirs.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in ours.state_dict().items()})
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((2, 8, 6, 5)).astype(dtype)
    mask = rng.random((8, 5)) < 0.7
    for training in (True, False):
        theirs.train(training)
        ours.train(training)
        tx = torch.from_numpy(x).requires_grad_()
        ty = torch.zeros((8, 5, 6), dtype=tx.dtype)
        ty[mask] = theirs(tx.movedim(1, -1)[mask])
        ty.movedim(-1, 1).backward(torch.from_numpy(dy))
        close(ours(x, mask=mask), ty.movedim(-1, 1), dtype)
        close(ours.backward(dy), tx.grad, dtype)
        for name in ("weight", "bias"):
            close(ours.grads[name], getattr(theirs, name).grad, dtype)
        theirs.zero_grad()
        close(ours.running_var, theirs.running_var, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("limits", [(1.1, 0.2), (3, 5)], ids=str)
def test_renormalisation_is_the_papers_with_r_and_d_detached(dtype, limits):
    ours = fastbn.BatchNorm(5, dtype=dtype, renorm=limits)
    rng = np.random.default_rng(6)
    ours.weight, ours.bias = rng.standard_normal((2, 5)).astype(dtype)
    ours.running_mean, ours.running_var = rng.standard_normal(5), rng.uniform(0.5, 2, 5)
    x, dy = rng.standard_normal((2, 40, 5)).astype(dtype)
    tx, weight, bias = (torch.from_numpy(np.array(a)).requires_grad_() for a in (x, ours.weight, ours.bias))
    mean, std = torch.from_numpy(ours.running_mean.copy()), torch.from_numpy(np.sqrt(ours.running_var + 1e-5))
    batch_std = torch.sqrt(tx.var(0, correction=0) + 1e-5)
    r = (batch_std / std).clamp(1 / limits[0], limits[0]).detach()
    d = ((tx.mean(0) - mean) / std).clamp(-limits[1], limits[1]).detach()
    ty = ((tx - tx.mean(0)) / batch_std * r.to(tx.dtype) + d.to(tx.dtype)) * weight + bias
    ty.backward(torch.from_numpy(dy))
    close(ours(x), ty, dtype)
    close(ours.backward(dy), tx.grad, dtype)
    close(ours.grads["weight"], weight.grad, dtype)
    close(ours.grads["bias"], bias.grad, dtype)


@pytest.mark.parametrize("change", ["missing", "half", "1-d"])
def test_states_that_pytorchs_strict_load_takes(change):
    theirs = torch.nn.BatchNorm1d(3)
    theirs(torch.randn(5, 3))
    state = dict(theirs.state_dict())
    if change == "missing":
        del state["num_batches_tracked"]
    elif change == "half":
        state = {key: value.half() for key, value in state.items()}
    else:
        state["num_batches_tracked"] = state["num_batches_tracked"].reshape(1)
    ours, again = fastbn.BatchNorm(3), torch.nn.BatchNorm1d(3)
    again.load_state_dict(state)
    ours.load_state_dict(state)
    for key, value in again.state_dict().items():
        np.testing.assert_array_equal(ours.state_dict()[key], value)
