"""BatchNorm, the layer: against the twin over every pair of settings, its averages, its state, its copies."""

import copy
import inspect
import json
import pickle

import numpy as np
import pytest
import twin
from test_functional import STD_RTOL, bounded
from twin import within

import fastbn
from fastbn.kernels import machine

EPS64 = 2.0**-52


def layer(case, **options):
    affine = case.affine != "none"
    bn = fastbn.BatchNorm(case.c, affine=affine, dtype=case.param_dtype, **case.options, **options)
    if case.weight is not None:
        bn.weight = case.weight
    if case.bias is not None:
        bn.bias = case.bias
    return bn


def check_backward(bn, case, x, y, stats, training):
    dy = case.dy.copy()
    out = dy if case.out == "in_place" else case.where_to(x)
    dx = bn.backward(dy, out=out)
    assert dx.dtype == np.dtype(case.dtype)
    assert out is None or dx is out
    (dx_true, dw, db), (dx_size, dw_size, db_size) = twin.backward(
        case.dy, case.x, stats, bn.weight, y=y, training=training, **case.options
    )
    within(dx, dx_true, 8 * case.u * dx_size)
    assert bn.grads.keys() == bn.params.keys() == ({"weight", "bias"} if bn.weight is not None else set())
    for name, true, size in (("weight", dw, dw_size), ("bias", db, db_size)):
        if name in bn.grads:
            assert bn.grads[name].dtype == np.dtype(case.param_dtype)
            within(bn.grads[name], true, 8 * max(case.u, twin.unit(case.param_dtype)) * size)
    return dx


def test_layer_step_by_step(case, unchanged):
    """Training forward and backward, then inference forward and backward, from one layer."""
    bn = layer(case, momentum=0.25)
    grads = dict(bn.grads)
    assert all((g == 0).all() for g in grads.values())
    x = case.fresh_x()
    unchanged(bn.weight, bn.bias, None if case.out == "in_place" else x)

    out = case.where_to(x)
    y = bn(x, out=out)
    case.check_result(y, out, case.x)
    truth = twin.statistics(case.x, case.axis)
    within(y, *bounded(5 * case.u, twin.forward(case.x, truth, bn.weight, bn.bias, **case.options)))
    assert bn.num_batches_tracked == 1
    rtol, std = STD_RTOL[case.dtype], np.sqrt(truth.var)
    within(bn.running_mean, twin.averaged(0, truth.mean, 0.25), rtol * std + EPS64 * abs(truth.mean))
    batch_var = twin.unbiased(truth)
    within(bn.running_var, twin.averaged(1, batch_var, 0.25), 2 * rtol * batch_var + EPS64 * (1 + batch_var))

    if case.out == "in_place":
        with pytest.raises(RuntimeError):
            bn.backward(case.dy)
        assert all((g == 0).all() for g in bn.grads.values())
        x = case.fresh_x()
        y = bn(x)
    dx = check_backward(bn, case, x, y, truth, training=True)
    assert all(bn.grads[k] is grads[k] for k in grads), "gradients are written in place"
    kept = dx.copy(), {k: g.copy() for k, g in bn.grads.items()}
    again = bn.backward(case.dy)
    assert (again == kept[0]).all()
    assert all((bn.grads[k] == g).all() for k, g in kept[1].items())

    mean, var = bn.running_mean.copy(), bn.running_var.copy()
    assert bn.eval() is bn
    assert bn.training is False
    x = case.fresh_x()
    y = bn(x, out=None if case.out == "in_place" else case.where_to(x))
    stats = twin.given(mean, var)
    within(y, *bounded(5 * case.u, twin.forward(case.x, stats, bn.weight, bn.bias, **case.options)))
    check_backward(bn, case, x, y, stats, training=False)
    assert (bn.running_mean == mean).all()
    assert (bn.running_var == var).all()


def test_empty_batches_leave_the_layer_as_it_was(empty_case):
    case = empty_case
    bn = layer(case)
    before = pickle.dumps(bn.state_dict())
    for _ in range(2):
        out = case.where_to(case.x)
        case.check_result(bn(case.x, out=out), out, case.x)
        assert pickle.dumps(bn.state_dict()) == before
        assert bn.backward(case.dy).shape == case.x.shape
        assert all((g == 0).all() for g in bn.grads.values())
        bn.eval()


def test_an_inference_keeps_nothing_that_another_one_must_not_use():
    """Whatever differs from the call before: the batch's size, dtype and place, how y is written, the parameters."""
    rng = np.random.default_rng(0)
    for c, s in ((3, 1), (9, 40), (70, 1), (5, 70)):
        bn = fastbn.BatchNorm(c).eval()
        for step in range(60):
            changed = [bn.weight, bn.bias, bn.running_mean, bn.running_var][step % 4]
            if step % 3 == 0:
                changed[rng.integers(c)] = rng.uniform(0.5, 2)
            dtype = ("float32", "float64")[step // 7 % 2]
            shape = (rng.choice([1, 2, 7, 40]), c, s)
            x, y = (np.empty(np.prod(shape) + 16, dtype)[k : k - 16].reshape(shape) for k in rng.integers(16, size=2))
            x[...] = rng.standard_normal(shape)
            expected, measure = twin.forward(x, twin.given(bn.running_mean, bn.running_var), bn.weight, bn.bias)
            limit = int(rng.choice([0, 1 << 40]))
            before = machine.set_settings(stream_inference_from_bytes=limit)
            bn(x, out=x if step % 5 == 0 else y)
            machine.set_settings(**before)
            within(x if step % 5 == 0 else y, *bounded(5 * twin.unit(dtype), (expected, measure)))


def test_an_inference_sees_that_an_array_was_resized():
    bn = fastbn.BatchNorm(64, dtype="float64").eval()
    x = np.ones((2, 64))
    for array in (bn.running_mean, bn.weight):
        bn(x)
        array.resize(1000, refcheck=False)
        with pytest.raises(ValueError, match=r"\(64,\)"):
            bn(x)
        array.resize(64, refcheck=False)


def test_averages_follow_the_exponentially_weighted_formula():
    """running = sum over batches of momentum (1 - momentum)^(t - k) batch_k, plus what is left of the start."""
    rng = np.random.default_rng(0)
    momentum, steps = 0.1, 50
    for unbiased in (True, False):
        bn = fastbn.BatchNorm(4, momentum=momentum, dtype="float64", unbiased=unbiased)
        means, variances = [], []
        for t in range(steps):
            x = rng.standard_normal((8 + t, 4)) * (1 + t) + t
            bn(x)
            means.append(x.mean(0))
            variances.append(x.var(0, ddof=int(unbiased)))
        weights = momentum * (1 - momentum) ** np.arange(steps)[::-1, None]
        np.testing.assert_allclose(bn.running_mean, (weights * means).sum(0), rtol=1e-13)
        start = (1 - momentum) ** steps
        np.testing.assert_allclose(bn.running_var, start + (weights * variances).sum(0), rtol=1e-13)
        assert bn.num_batches_tracked == steps


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_running_statistics_are_float64_and_carry_the_formula_to_its_last_bits(dtype):
    rng = np.random.default_rng(1)
    bn = fastbn.BatchNorm(5, momentum=0.1, dtype=dtype)
    assert bn.running_mean.dtype == bn.running_var.dtype == np.float64
    assert (bn.running_mean == 0).all()
    assert (bn.running_var == 1).all()
    for _ in range(5):
        x = (rng.standard_normal((40, 5)) * 3 + 10).astype(dtype)
        mean, var, stats = bn.running_mean.copy(), bn.running_var.copy(), fastbn.moments(x)
        bn(x)
        within(bn.running_mean, twin.averaged(mean, stats.mean, 0.1), 2 * EPS64 * (abs(mean) + abs(stats.mean)))
        batch = stats.var * 40 / 39
        within(bn.running_var, twin.averaged(var, batch, 0.1), 2 * EPS64 * (var + batch))


def test_momentum_none_is_the_plain_average_of_batches():
    rng = np.random.default_rng(2)
    bn = fastbn.BatchNorm(3, momentum=None, dtype="float64")
    means, variances = [], []
    for n in (4, 30, 7, 2, 100):
        x = rng.standard_normal((n, 3)) * n + n
        bn(x)
        means.append(x.mean(0))
        variances.append(x.var(0, ddof=1))
        np.testing.assert_allclose(bn.running_mean, np.mean(means, 0), rtol=1e-14)
        np.testing.assert_allclose(bn.running_var, np.mean(variances, 0), rtol=1e-14)
    assert bn.num_batches_tracked == 5


def test_eval_neither_updates_nor_counts():
    bn = fastbn.BatchNorm(3)
    x = np.random.default_rng(3).standard_normal((10, 3)).astype("float32")
    bn(x)
    before = pickle.dumps(bn.state_dict())
    bn.eval()
    bn(x + 5)
    assert pickle.dumps(bn.state_dict()) == before
    assert bn.train() is bn
    assert bn.training is True
    assert bn.train(False) is bn
    assert bn.training is False


@pytest.mark.parametrize("shape", [(64, 3), (64, 100), (16, 5, 7, 7), (8, 3, 3136)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_one_example_at_a_time_agrees_with_the_batch_to_the_bit(shape, activation):
    rng = np.random.default_rng(4)
    bn = fastbn.BatchNorm(shape[1], activation=activation)
    bn.weight[...], bn.bias[...] = rng.standard_normal((2, shape[1]))
    x = (rng.standard_normal(shape) * 3 + 5).astype("float32")
    bn(x)
    bn.eval()
    y = bn(x)
    for i in (0, 5, len(x) - 1):
        assert (bn(x[i : i + 1])[0] == y[i]).all()


def test_an_axis_0_layer_takes_a_single_example_in_eval():
    bn = fastbn.BatchNorm(5, axis=0)
    x = np.random.default_rng(5).standard_normal((5, 40)).astype("float32")
    bn(x)
    bn.eval()
    expected = bn(x)[:, 7]
    y = bn(np.ascontiguousarray(x[:, 7]))
    assert y.shape == (5,)
    assert (y == expected).all()
    assert bn.backward(np.ones(5, "float32")).shape == (5,)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bn.train()(x[:, 7])


def test_without_tracking_the_batch_is_used_in_eval_too():
    x = np.random.default_rng(6).standard_normal((20, 3)).astype("float32")
    bn = fastbn.BatchNorm(3, track_running_stats=False)
    assert bn.running_mean is None
    assert bn.running_var is None
    assert bn.state_dict().keys() == {"weight", "bias"}
    y = bn(x)
    assert (bn.eval()(x) == y).all()
    (dx, _, _), (size, _, _) = twin.backward(x, x, twin.statistics(x))
    within(bn.backward(x), dx, 8 * twin.unit("float32") * size)


def test_without_affine():
    bn = fastbn.BatchNorm(3, affine=False)
    assert bn.weight is None
    assert bn.bias is None
    assert bn.params == {}
    assert bn.grads == {}
    assert bn.state_dict().keys() == {"running_mean", "running_var", "num_batches_tracked"}
    assert fastbn.BatchNorm(3, affine=False, track_running_stats=False).state_dict() == {}


@pytest.mark.parametrize("name", ["eps", "momentum", "axis", "activation", "unbiased", "num_threads", "ghost_size"])
def test_what_is_no_longer_looked_at_cannot_be_assigned(name):
    bn = fastbn.BatchNorm(3, activation="relu", num_threads=1, ghost_size=4)
    assert getattr(bn, name) == bn.config()[name]
    with pytest.raises(AttributeError):
        setattr(bn, name, 2)


def test_attributes_and_their_starts():
    bn = fastbn.BatchNorm(3, 1e-3, 0.2, axis=-1, dtype="float64")
    assert (bn.num_features, bn.eps, bn.momentum, bn.axis, bn.dtype) == (3, 1e-3, 0.2, -1, np.dtype("float64"))
    assert (bn.weight == 1).all()
    assert (bn.bias == 0).all()
    assert bn.weight.dtype == bn.bias.dtype == np.float64
    assert bn.params["weight"] is bn.weight
    assert bn.params["bias"] is bn.bias
    assert bn.training is True
    assert bn.num_batches_tracked == 0
    assert fastbn.BatchNorm(3).weight.dtype == np.float32


def test_assignment_copies_into_the_array():
    bn = fastbn.BatchNorm(3)
    weight, new = bn.weight, np.array([1.0, 2.0, 3.0])
    bn.weight = new
    assert bn.weight is weight is bn.params["weight"]
    assert (weight == [1, 2, 3]).all()
    new[0] = 9
    assert weight[0] == 1
    bn.bias = 0.5
    assert (bn.params["bias"] == 0.5).all()


def test_changed_parameters_are_seen_at_once():
    x = np.random.default_rng(7).standard_normal((20, 3)).astype("float32")
    bn = fastbn.BatchNorm(3)
    y = bn(x)
    bn.params["weight"] *= 2
    bn.params["bias"] += 1
    np.testing.assert_allclose(bn(x), 2 * y + 1, rtol=0, atol=2e-6)


def test_resets():
    bn = fastbn.BatchNorm(3)
    arrays = bn.running_mean, bn.running_var, bn.weight, bn.bias
    bn(np.random.default_rng(8).standard_normal((20, 3)).astype("float32"))
    bn.weight[...] = 5
    bn.reset_running_stats()
    assert (bn.running_mean == 0).all()
    assert (bn.running_var == 1).all()
    assert bn.num_batches_tracked == 0
    assert (bn.weight == 5).all()
    bn.bias[...] = 5
    bn.reset_parameters()
    assert (bn.weight == 1).all()
    assert (bn.bias == 0).all()
    assert all(a is b for a, b in zip(arrays, (bn.running_mean, bn.running_var, bn.weight, bn.bias), strict=True))


def test_fold():
    rng = np.random.default_rng(9)
    x = (rng.standard_normal((50, 6)) * 3 + 2).astype("float32")
    for affine in (True, False):
        bn = fastbn.BatchNorm(6, affine=affine)
        if affine:
            bn.weight[...], bn.bias[...] = rng.standard_normal((2, 6))
        bn(x)
        scale, shift = bn.fold()
        assert scale.dtype == shift.dtype == np.float64
        assert scale.shape == shift.shape == (6,)
        y, measure = twin.forward(x, twin.given(bn.running_mean, bn.running_var), bn.weight, bn.bias)
        within((x * scale + shift), y, 1e-14 * measure)


def used():
    """A layer with its state, gradients and saved batch, and that batch."""
    rng = np.random.default_rng(10)
    bn = fastbn.BatchNorm(4, 1e-4, 0.3, axis=1, activation="leaky_relu", unbiased=False)
    bn.weight[...], bn.bias[...] = rng.standard_normal((2, 4))
    x, dy = rng.standard_normal((2, 30, 4)).astype("float32")
    bn(x)
    bn.backward(dy)
    return bn, x, dy


def arrays_of(bn):
    return [bn.running_mean, bn.running_var, *bn.params.values(), *bn.grads.values()]


def test_state_dict_has_pytorchs_keys_and_copies():
    bn, _, _ = used()
    state = bn.state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert all((state[k] == getattr(bn, k)).all() for k in ("weight", "bias", "running_mean", "running_var"))
    count = state["num_batches_tracked"]
    assert isinstance(count, np.ndarray)
    assert count.shape == ()
    assert count.dtype == np.int64
    assert count == 1
    assert not any(np.shares_memory(v, a) for v in state.values() for a in arrays_of(bn))


def test_load_state_dict_copies_in_place():
    bn, x, _ = used()
    other = fastbn.BatchNorm(4, 1e-4, 0.3, activation="leaky_relu", unbiased=False)
    arrays, state = arrays_of(other), bn.state_dict()
    other.load_state_dict(state)
    assert all(a is b for a, b in zip(arrays, arrays_of(other), strict=True))
    assert not any(np.shares_memory(v, a) for v in state.values() for a in arrays)
    assert other.num_batches_tracked == 1
    assert (bn.eval()(x) == other.eval()(x)).all()
    # PyTorch's averages are float32.
    other.load_state_dict({k: v.astype(np.float32) if v.ndim else v for k, v in state.items()})
    assert other.running_mean.dtype == np.float64
    assert other.num_batches_tracked == 1


def pickled(bn):
    return pickle.loads(pickle.dumps(bn))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_whole_and_share_nothing(copied):
    bn, x, dy = used()
    other = copied(bn)
    assert pickle.dumps(other.state_dict()) == pickle.dumps(bn.state_dict())
    assert repr(other) == repr(bn)
    assert other.training is bn.training
    assert not any(np.shares_memory(a, b) for a in arrays_of(bn) for b in arrays_of(other))
    assert other.params["weight"] is other.weight
    with pytest.raises(RuntimeError):
        other.backward(dy)
    assert (other(x) == bn(x)).all()
    assert (other.backward(dy) == bn.backward(dy)).all()
    assert (other.running_mean == bn.running_mean).all()
    assert other.num_batches_tracked == bn.num_batches_tracked == 2
    assert (other.grads["weight"] == bn.grads["weight"]).all()
    assert (other.eval()(x) == bn.eval()(x)).all()


def test_a_pickle_holds_no_batch():
    bn = fastbn.BatchNorm(2)
    bn(np.random.default_rng(0).standard_normal((100_000, 2)).astype("float32"))
    assert len(pickle.dumps(bn)) < 5000


@pytest.mark.parametrize(
    "bn",
    [
        fastbn.BatchNorm(3),
        fastbn.BatchNorm(3, 1e-3, None, False, False, axis=-1, dtype="float64"),
        fastbn.BatchNorm(7, momentum=0.01, activation="relu", unbiased=False, num_threads=2),
    ],
    ids=repr,
)
def test_repr_and_config_make_the_layer_again(bn):
    again = eval(repr(bn), {"fastbn": fastbn, "BatchNorm": fastbn.BatchNorm, "None": None})
    config = json.loads(json.dumps(bn.config()))
    assert config.keys() == inspect.signature(fastbn.BatchNorm).parameters.keys()
    assert repr(again) == repr(bn) == repr(fastbn.BatchNorm(**config))
    assert again.config() == bn.config()


def test_forward_and_call_are_the_same():
    bn, x, _ = used()
    assert (bn.forward(x) == bn(x)).all()


def test_out_equal_to_x_drops_the_batch_in_eval_too():
    bn, x, dy = used()
    bn.eval()
    for out in (x, x[...]):
        bn(x, out=out)
        with pytest.raises(RuntimeError):
            bn.backward(dy)


def test_backward_may_write_into_dy_and_never_into_the_saved_batch():
    bn, x, dy = used()
    expected, kept = bn.backward(dy), x.copy()
    for out in (x, x[...]):
        with pytest.raises(ValueError, match="out"):
            bn.backward(dy, out=out)
    assert (x == kept).all()
    assert bn.backward(dy, out=dy) is dy
    assert (dy == expected).all()
