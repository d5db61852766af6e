"""Masks, ghost batches and renormalisation, alone and together: against the twin, batch by batch."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import twin
from twin import within

import fastbn

# The examples lie along the first axis that is not the feature axis.
PLACES = [
    ((11, 3), 1),
    ((3, 11), 0),
    ((9, 4, 7), 1),
    ((9, 7, 4), -1),
    ((4, 9, 7), 0),
    ((7, 3, 5, 4), 1),
    ((7, 5, 4, 3), 3),
]
INF = float("inf")


def arrays(shape, axis, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal((2, *shape)) * 2 + 3).astype(dtype)
    return x, dy - 3, rng.normal(1, 0.7, shape[axis]).astype(dtype), rng.normal(0, 1, shape[axis]).astype(dtype)


def layer(weight, bias, **options):
    bn = fastbn.BatchNorm(len(weight), dtype=weight.dtype, **options)
    bn.weight, bn.bias = weight, bias
    return bn


def some_mask(shape, axis, seed=1):
    """Some of the positions, the first two examples wholly, the last not at all."""
    mask = np.random.default_rng(seed).random(np.delete(shape, axis)) < 0.6
    mask[:2], mask[-1] = True, False
    return mask


def examples(n, size):
    """Slices of `size` examples; a remainder of 1 joins the one before."""
    starts = [a for a in range(0, n, size or n) if a == 0 or n - a > 1 or size == 1]
    return [slice(a, b) for a, b in itertools.zip_longest(starts, starts[1:], fillvalue=n)]


def oracle(bn, x, dy, y, mask, ghost_size, renorm):
    """What the twin makes of each batch's rows (m, C): results, and the measures of their errors, by name."""
    axis, activation = bn.axis, bn.config()["activation"]
    front, dfront, yfront = (np.moveaxis(a, axis, -1) for a in (x, dy, y))
    mask = np.ones(front.shape[:-1], bool) if mask is None else mask
    wide = np.longdouble
    w, b = bn.weight.astype(wide), bn.bias.astype(wide)
    mean, var = np.zeros(len(w), wide), np.ones(len(w), wide)
    found = {name: np.zeros(front.shape, wide) for name in ("y", "y size", "dx", "dx size")}
    found |= {name: np.zeros(len(w), wide) for name in ("weight", "weight size", "bias", "bias size")}
    count = 0
    for part in examples(len(front), ghost_size):
        valid = np.zeros(front.shape[:-1], bool)
        valid[part] = mask[part]
        if not valid.any():
            continue
        rows, stats = front[valid], twin.statistics(front[valid])
        r, d = np.ones(len(w), wide), np.zeros(len(w), wide)
        if renorm is not None:
            std = np.sqrt(var + wide(bn.eps))
            r = np.clip(np.sqrt(stats.var + wide(bn.eps)) / std, 1 / wide(renorm[0]), renorm[0])
            d = np.clip((stats.mean - mean) / std, -renorm[1], renorm[1])
        found["y"][valid], found["y size"][valid] = twin.forward(rows, stats, w * r, b + w * d, activation=activation)
        (dx, dw, db), (dx_size, dw_size, db_size) = twin.backward(
            dfront[valid], rows, stats, w * r, activation=activation, y=yfront[valid]
        )
        found["dx"][valid], found["dx size"][valid] = dx, dx_size
        found["weight"] += r * dw + d * db
        found["weight size"] += r * dw_size + abs(d) * db_size
        found["bias"] += db
        found["bias size"] += db_size
        mean = twin.averaged(mean, stats.mean, bn.momentum)
        var = twin.averaged(var, twin.unbiased(stats), bn.momentum)
        count += 1
    return found | {"mean": mean, "var": var, "count": count}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), PLACES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ghost_size", [None, 2, 5])
@pytest.mark.parametrize("renorm", [None, (1.3, 0.4), (INF, INF)])
def test_every_combination_is_the_twins_batch_by_batch(shape, axis, dtype, masked, ghost_size, renorm, unchanged):
    if masked and ghost_size == 2 and len(shape) == 2:
        ghost_size = 4  # of two examples of one position each, one alone may be valid
    activation = [None, "relu", "leaky_relu"][sum(shape) % 3]
    x, dy, weight, bias = arrays(shape, axis, dtype)
    mask = some_mask(shape, axis) if masked else None
    if masked and len(shape) == 2:
        mask[:] = [k % 4 < 3 for k in range(len(mask))]
    unchanged(x, dy, weight, bias, mask)
    bn = layer(weight, bias, axis=axis, activation=activation, ghost_size=ghost_size, renorm=renorm)
    y = bn(x, mask=mask)
    dx = bn.backward(dy)
    assert y.dtype == dx.dtype == x.dtype
    true = oracle(bn, x, dy, y, mask, ghost_size, renorm)
    u = twin.unit(dtype)
    # What renormalisation makes of weight and bias is rounded to float64, too.
    more = 2 if renorm and dtype == "float64" else 1
    within(np.moveaxis(y, axis, -1), true["y"], 5 * more * u * true["y size"])
    within(np.moveaxis(dx, axis, -1), true["dx"], 8 * more * u * true["dx size"])
    for name in ("weight", "bias"):
        within(bn.grads[name], true[name], 8 * more * u * true[f"{name} size"])
    within(bn.running_mean, true["mean"], 4e-7 if dtype == "float32" else 1e-15)
    within(bn.running_var, true["var"], 4e-7 * true["var"] if dtype == "float32" else 1e-14 * true["var"])
    assert bn.num_batches_tracked == true["count"]
    assert (bn.backward(dy) == dx).all()


def run(bn, x, dy, **options):
    """All that a training step gives, as bytes in the order of the axes."""
    results = [bn(x, **options), bn.backward(dy), *bn.grads.values(), bn.running_mean, bn.running_var]
    return [np.ascontiguousarray(a).tobytes() for a in results]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), [*PLACES, ((700, 40), 1)])
def test_what_is_a_whole_batch_has_the_bits_of_one(shape, axis, dtype):
    x, dy, weight, bias = arrays(shape, axis, dtype)
    n = shape[0 if axis else 1]
    expected = run(layer(weight, bias, axis=axis), x, dy)
    assert run(layer(weight, bias, axis=axis), x, dy, mask=np.ones(np.delete(shape, axis), bool)) == expected
    for size in (n - 1, n, n + 1, 10**6):
        assert run(layer(weight, bias, axis=axis, ghost_size=size), x, dy) == expected
    assert run(layer(weight, bias, axis=axis, renorm=(1, 0)), x, dy) == expected


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("shape", "axis"), PLACES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"momentum": None, "renorm": (2, 1)}], ids=str)
def test_a_ghost_batch_is_a_batch_of_its_own(shape, axis, size, order, options):
    x, dy, weight, bias = arrays(shape, axis, "float32")
    x, dy = np.asarray(x, order=order), np.asarray(dy, order=order)
    plain, ghost = layer(weight, bias, axis=axis, **options), layer(weight, bias, axis=axis, ghost_size=size, **options)
    if size == 1 and len(shape) == 2:
        with pytest.raises(ValueError, match=r"more than 1 value per channel when training, got input size"):
            ghost(x)
        return
    y, dx = ghost(x), ghost.backward(dy)
    total = np.zeros((2, len(weight)))
    for part in examples(shape[0 if axis else 1], size):
        where = part if axis else (slice(None), part)
        assert (plain(x[where]) == y[where]).all()
        plain.backward(dy[where])
        stats = fastbn.moments(x[where], axis)
        total += fastbn.batch_norm_backward(dy[where], x[where], stats, weight, bias, axis=axis)[1:]
        if not options:
            assert (plain.backward(dy[where]) == dx[where]).all()
    if not options:
        assert (ghost.grads["weight"] == total[0].astype("float32")).all()
    assert (ghost.grads["bias"] == total[1].astype("float32")).all()
    assert (ghost.running_mean == plain.running_mean).all()
    assert (ghost.running_var == plain.running_var).all()
    assert ghost.num_batches_tracked == plain.num_batches_tracked
    assert (ghost.eval()(x) == plain.eval()(x)).all()


@pytest.mark.parametrize("axis", [1, -1])
def test_a_ghost_batch_with_a_mask_is_a_masked_batch_of_its_own(axis):
    x, dy, weight, bias = arrays((16, 20, 20, 20), axis, "float64")
    mask = some_mask(x.shape, axis)
    mask[:4] = True
    plain, ghost = layer(weight, bias, axis=axis), layer(weight, bias, axis=axis, ghost_size=4)
    y, dx = ghost(x, mask=mask), ghost.backward(dy)
    for a in range(0, 16, 4):
        assert (plain(x[a : a + 4], mask=mask[a : a + 4]) == y[a : a + 4]).all()
        assert (plain.backward(dy[a : a + 4]) == dx[a : a + 4]).all()
    assert (ghost.running_var == plain.running_var).all()


def test_ghost_batches_are_for_training_alone():
    x, _, weight, bias = arrays((9, 3, 4), 1, "float32")
    for track in (True, False):
        ghost, plain = (layer(weight, bias, track_running_stats=track, ghost_size=size).eval() for size in (3, None))
        assert (ghost(x) == plain(x)).all()
        assert (ghost.train()(x) != plain.train()(x)).any()


@pytest.mark.parametrize("renorm", [None, (2, 1)])
def test_neither_threads_nor_memory_order_nor_what_is_masked_change_a_bit(renorm):
    shape = (90, 64, 70)
    x, dy, weight, bias = arrays(shape, 1, "float32")
    mask = some_mask(shape, 1)
    expected = {}
    for threads, order, size in itertools.product((1, 3), "CF", (None, 40)):
        noise = np.where(mask[:, None], x, np.float32(threads * 1e30 if order == "C" else np.nan))
        bn = layer(weight, bias, num_threads=threads, ghost_size=size, renorm=renorm)
        given = np.asarray(noise, order=order), np.asarray(dy, order=order)
        results = run(bn, *given, mask=mask)
        assert results == expected.setdefault(size, results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "axis"), PLACES)
@pytest.mark.parametrize("track", [True, False])
def test_masked_positions_give_nothing_and_get_nothing(shape, axis, training, track):
    x, dy, weight, bias = arrays(shape, axis, "float32")
    mask = some_mask(shape, axis)
    front, dfront = np.moveaxis(x, axis, -1), np.moveaxis(dy, axis, -1)
    front[~mask], dfront[~mask] = np.nan, np.inf
    bn, rows = layer(weight, bias, axis=axis, track_running_stats=track), layer(weight, bias, track_running_stats=track)
    for one in (bn, rows):
        one.train(training)
        if track:
            one.running_mean[...], one.running_var[...] = 3, 5
    y, dx = bn(x, mask=mask), bn.backward(dy)
    expected, expected_dx = rows(front[mask]), rows.backward(dfront[mask])
    for result, valid in ((y, expected), (dx, expected_dx)):
        result = np.moveaxis(result, axis, -1)
        assert (result[mask] == valid).all()
        assert result[~mask].tobytes() == np.zeros_like(result[~mask]).tobytes()
    assert all((bn.grads[k] == rows.grads[k]).all() for k in bn.grads)
    assert pickle.dumps(bn.state_dict()) == pickle.dumps(rows.state_dict())


@pytest.mark.parametrize("renorm", [None, (3, 5), (INF, INF)])
@pytest.mark.parametrize("mode", ["training", "frozen", "inference"])
def test_what_has_no_examples_touches_no_gradient(mode, renorm):
    x, dy, weight, bias = arrays((9, 3, 4), 1, "float32")

    def fresh(**options):
        bn = layer(weight, bias, renorm=renorm, **options).train(mode != "inference").freeze(mode == "frozen")
        bn.grads["weight"], bn.grads["bias"] = 7, 7
        return bn

    empty = np.zeros((0, 3, 4)), np.zeros((9, 3, 0), "f4")
    nothing = [(x * np.nan, np.zeros((9, 4), bool)), *((e, None) for e in empty), (empty[0], np.ones((0, 4), bool))]
    for (given, mask), size, momentum in itertools.product(nothing, (None, 3), (0.1, None)):
        bn = fresh(ghost_size=size, momentum=momentum)
        before = pickle.dumps(bn.state_dict())
        assert (bn(given, mask=mask) == 0).all()
        assert (bn.backward(np.full_like(given, np.nan)) == 0).all()
        assert all((g == 0).all() for g in bn.grads.values())
        assert pickle.dumps(bn.state_dict()) == before
    # A ghost batch without anything is none: all is as if its examples were not there.
    mask = np.repeat([[True], [False], [True]], 3, 0) & np.ones((1, 4), bool)
    rest = np.r_[0:3, 6:9]
    for momentum in (0.1, None):
        bn, other = fresh(ghost_size=3, momentum=momentum), fresh(ghost_size=3, momentum=momentum)
        y, expected = bn(x, mask=mask), other(x[rest])
        dx, expected_dx = bn.backward(dy), other.backward(dy[rest])
        assert (y[rest] == expected).all()
        assert (dx[rest] == expected_dx).all()
        assert not y[3:6].any()
        assert not dx[3:6].any()
        assert pickle.dumps((bn.grads, bn.state_dict())) == pickle.dumps((other.grads, other.state_dict()))


def test_an_example_alone_in_inference():
    x, _, weight, bias = arrays((5,), 0, "float32")
    bn = layer(weight, bias, axis=0, ghost_size=2).eval()
    assert (bn(x, mask=True) == bn(x)).all()
    assert (bn(x, mask=np.array(False)) == 0).all()
    assert (bn.backward(x) == 0).all()


@pytest.mark.parametrize("options", [{}, {"ghost_size": 3}, {"ghost_size": 3, "renorm": (2, 1)}], ids=str)
@pytest.mark.parametrize(("shape", "axis"), PLACES)
def test_out_and_places_that_are_taken(shape, axis, options):
    x, dy, weight, bias = arrays(shape, axis, "float32")
    mask = some_mask(shape, axis) if len(shape) > 2 else None
    bn, other = (layer(weight, bias, axis=axis, **options) for _ in range(2))
    y, dx = bn(x, mask=mask), bn.backward(dy)
    strided = np.full((*shape, 2), np.nan, "float32")[..., 0]
    assert other(x, out=strided, mask=mask) is strided
    assert (strided == y).all()
    assert other.backward(dy, out=strided) is strided
    assert (strided == dx).all()
    with pytest.raises(ValueError, match="share no memory with x"):
        other.backward(dy, out=x)
    taken = dy.copy()
    assert other.backward(taken, out=taken) is taken
    assert (taken == dx).all()
    # In place y takes x's place, and backward is not possible.
    other = layer(weight, bias, axis=axis, **options)
    taken = x.copy()
    assert other(taken, out=taken, mask=mask) is taken
    assert (taken == y).all()
    with pytest.raises(RuntimeError):
        other.backward(dy)
    # A list, a strided array and integers are as welcome as without a mask.
    other = layer(weight, bias, axis=axis, **options)
    assert (other(np.repeat(x, 2, -1)[..., ::2], mask=mask) == y).all()
    assert (other.backward(np.repeat(dy, 2, -1)[..., ::2]) == dx).all()
    whole = np.round(x)
    as_list = layer(weight, bias, axis=axis, **options)
    assert (as_list(whole.astype(int).tolist(), mask=None if mask is None else mask.tolist()).dtype) == np.float64


def test_what_is_not_finite_stays_in_its_feature_and_says_nothing():
    x, dy, weight, bias = arrays((9, 3, 4), 1, "float32")
    for options in ({"ghost_size": 4}, {"renorm": (3, 5)}, {"ghost_size": 4, "renorm": (3, 5)}):
        bn, clean = layer(weight, bias, **options), layer(weight, bias, **options)
        y, dx = clean(x), clean.backward(dy)
        bad = x.copy()
        bad[0, 1, 0], bad[8, 1, 0] = np.inf, -np.inf
        assert (bn(bad)[:, ::2] == y[:, ::2]).all()
        assert (bn.backward(dy)[:, ::2] == dx[:, ::2]).all()
        assert (bn.grads["weight"][::2] == clean.grads["weight"][::2]).all()
    # Sums that float32 cannot hold.
    bn = layer(weight, bias, ghost_size=4)
    bn(x)
    bn.backward(np.full_like(dy, 3e38))
    assert (bn.grads["bias"] == np.inf).all()


# --- derivatives, by differences of the loss sum(dy*y)


def slope(loss, a, h=1e-5):
    found = np.empty_like(a)
    for k in np.ndindex(a.shape):
        kept, a[k] = a[k], a[k] + h
        above = loss()
        a[k] = kept - h
        found[k] = (above - loss()) / (2 * h)
        a[k] = kept
    return found


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("options", [{}, {"ghost_size": 3}, {"frozen": True}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_loss(options, masked, activation):
    options = dict(options)
    frozen = options.pop("frozen", False)
    x, dy, weight, bias = arrays((7, 3, 2), 1, "float64")
    mask = some_mask((7, 3, 2), 1) if masked else None
    bn = layer(weight, bias, activation=activation, momentum=0.0, **options)
    bn.running_mean[...], bn.running_var[...] = 1, [2, 3, 4]
    bn.freeze(frozen)
    bn(x, mask=mask)
    dx = bn.backward(dy)
    grads = {name: g.copy() for name, g in bn.grads.items()}

    def loss():
        return float((dy * bn(x, mask=mask)).sum())

    np.testing.assert_allclose(dx, slope(loss, x), rtol=1e-6, atol=1e-7)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, slope(loss, bn.params[name]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("limits", [(1.2, 0.3), (INF, INF), (1, 0)])
@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_gradients_of_renormalisation_take_r_and_d_as_constants(limits, momentum):
    x, dy, weight, bias = arrays((8, 3), 1, "float64")
    bn = layer(weight, bias, renorm=limits, momentum=momentum)
    bn.running_mean[...], bn.running_var[...] = [2.5, 3, 9], [4, 0.5, 3]
    std = np.sqrt(bn.running_var + bn.eps)
    r = np.clip(np.sqrt(x.var(0) + bn.eps) / std, 1 / limits[0], limits[0])
    d = np.clip((x.mean(0) - bn.running_mean) / std, -limits[1], limits[1])

    def forward():
        return ((x - x.mean(0)) / np.sqrt(x.var(0) + bn.eps) * r + d) * weight + bias

    np.testing.assert_allclose(bn(x), forward(), rtol=1e-12, atol=1e-13)
    dx = bn.backward(dy)
    np.testing.assert_allclose(dx, slope(lambda: (dy * forward()).sum(), x), rtol=1e-6, atol=1e-7)
    for name, a in (("weight", weight), ("bias", bias)):
        np.testing.assert_allclose(bn.grads[name], slope(lambda: (dy * forward()).sum(), a), rtol=1e-6, atol=1e-7)
    # Without weight and bias, r and d are there all the same.
    plain = fastbn.BatchNorm(3, affine=False, renorm=limits)
    plain.running_mean[...], plain.running_var[...] = [2.5, 3, 9], [4, 0.5, 3]
    weight[...], bias[...] = 1, 0
    np.testing.assert_allclose(plain(x), forward(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(plain.backward(dy), slope(lambda: (dy * forward()).sum(), x), rtol=1e-6, atol=1e-7)


# --- renormalisation, frozen statistics


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), PLACES)
def test_without_limits_renormalised_training_gives_what_inference_gives(shape, axis, dtype):
    x, _, weight, bias = arrays(shape, axis, dtype)
    bn = layer(weight, bias, axis=axis, renorm=(INF, INF))
    bn.running_mean[...], bn.running_var[...] = 2, 3
    expected = copy.deepcopy(bn).eval()(x)
    np.testing.assert_allclose(bn(x), expected, rtol=0, atol=40 * twin.unit(dtype) * abs(expected).max())
    assert bn.num_batches_tracked == 1


def test_renorm_can_be_relaxed_during_training():
    x, dy, weight, bias = arrays((20, 3), 1, "float32")
    bn, plain = layer(weight, bias), layer(weight, bias)
    assert bn.renorm is None
    bn.renorm = (1, 0)
    assert run(bn, x, dy) == run(plain, x, dy)
    bn.renorm = [3, 5]
    assert bn.renorm == (3.0, 5.0)
    y = bn(x)
    assert (y != plain(x)).any()
    bn.renorm = None
    assert run(bn, x, dy) == run(plain, x, dy)
    assert "renorm" not in repr(bn)
    for limits in ((3, 5), (INF, 0.5), (INF, INF)):
        bn.renorm = limits
        assert eval(repr(bn), {"BatchNorm": fastbn.BatchNorm}).renorm == limits


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("options", [{}, {"ghost_size": 4, "renorm": (3, 5)}], ids=str)
def test_frozen_statistics_are_inferences_and_the_parameters_train(activation, options):
    x, dy, weight, bias = arrays((20, 3), 1, "float32")
    bn = layer(weight, bias, activation=activation, **options)
    bn(x)
    expected = copy.deepcopy(bn).eval()
    assert bn.freeze() is bn
    assert bn.frozen
    before = pickle.dumps(bn.state_dict())
    for change in (bn.train, bn.eval, bn.train):
        change()
        assert bn.frozen
        assert (bn(x) == expected(x)).all()
        assert (bn.backward(dy) == expected.backward(dy)).all()
        assert all((bn.grads[k] == expected.grads[k]).all() for k in bn.grads)
    assert pickle.dumps(bn.state_dict()) == before
    for copied in (copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        assert copied.frozen
        assert copied.training
        assert (copied(x) == expected(x)).all()
    fastbn.optim.SGD(bn, lr=0.1).step()
    assert (bn.weight != weight).all()
    # A single example is no trouble, and the layer thaws.
    assert bn(x[:1]).shape == (1, 3)
    assert bn.freeze(False) is bn
    assert not bn.frozen
    bn(x)
    assert pickle.dumps(bn.state_dict()) != before


@pytest.mark.parametrize("layers", [[], [fastbn.nn.Tanh()]])
def test_checkpoints_keep_all_of_it(tmp_path, layers):
    pytest.importorskip("safetensors")
    bn = fastbn.BatchNorm(3, ghost_size=4, renorm=(3, 5)).freeze()
    model = fastbn.nn.Sequential(fastbn.BatchNorm(3), *layers, bn)
    fastbn.checkpoint.save(tmp_path / "m", model)
    back = fastbn.checkpoint.load(tmp_path / "m")
    assert repr(back) == repr(model)
    assert [getattr(one, "frozen", False) for one in back] == [False, *[False for _ in layers], True]
    assert back[-1].renorm == (3.0, 5.0)


# --- errors


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ghost_size": 0}, "ghost_size to be at least 1 or None, got 0"),
        ({"renorm": (0.5, 1)}, r"renorm to be \(r_max, d_max\).*got \(0.5, 1\)"),
        ({"renorm": (2, -1)}, "renorm"),
        ({"renorm": (2, np.nan)}, "renorm"),
        ({"renorm": 3}, "renorm.*got 3"),
        ({"renorm": (1, 2, 3)}, "renorm"),
        ({"renorm": (None, 1)}, r"renorm to be .*got \(None, 1\)"),
        ({"renorm": ("3", "5")}, "renorm to be"),
        ({"renorm": (2, 1), "track_running_stats": False}, "expected running statistics for renorm"),
    ],
    ids=str,
)
def test_options_that_mean_nothing(options, match):
    with pytest.raises(ValueError, match=match):
        fastbn.BatchNorm(3, **options)
    if "renorm" in options and "track_running_stats" not in options:
        bn = fastbn.BatchNorm(3, renorm=(2, 1))
        with pytest.raises(ValueError, match=match):
            bn.renorm = options["renorm"]
        assert bn.renorm == (2.0, 1.0)


def test_nothing_to_freeze():
    bn = fastbn.BatchNorm(3, track_running_stats=False)
    with pytest.raises(ValueError, match="expected running statistics to freeze"):
        bn.freeze()
    assert not bn.frozen


MASK = some_mask((8, 3, 4), 1)
X = np.ones((8, 3, 4), "float32")
ONE = np.zeros((8, 4), bool)
ONE[6, 2] = True
SINGLE = MASK.copy()
SINGLE[4:], SINGLE[7, 1] = False, True


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"mask": MASK[:7]}, ValueError, r"mask of shape \(8, 4\), x's without the feature axis, got \(7, 4\)"),
        ({"mask": MASK[:, None]}, ValueError, r"got \(8, 1, 4\)"),
        ({"mask": MASK.astype(int)}, TypeError, "mask of dtype bool, got int64"),
        ({"mask": np.ma.array(MASK, mask=~MASK)}, TypeError, "plain array, got a masked array"),
        ({"mask": None, "out": X[:, :, :2]}, ValueError, r"out of shape \(8, 3, 4\)"),
        ({"mask": MASK, "out": X[:, :, :2]}, ValueError, r"out of shape \(8, 3, 4\)"),
        ({"mask": MASK, "out": X.astype("float64")}, TypeError, "out of dtype float32"),
        ({"mask": ONE}, ValueError, r"Expected more than 1 value per channel when training, got .* 1 valid position"),
        ({"mask": SINGLE}, ValueError, r"more than 1 value.*\(4, 3, 4\) with 1 valid position"),
        ({"mask": MASK, "x": X[:, :2]}, ValueError, "3 features"),
        ({"mask": MASK, "x": X.astype("float16")}, TypeError, "float16"),
        ({"mask": MASK, "x": np.ma.array(X)}, TypeError, "masked array"),
    ],
)
def test_errors_change_nothing(options, error, match):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 8, 3, 4)).astype("float32")
    bn = fastbn.BatchNorm(3, ghost_size=None if options["mask"] is ONE else 4)
    bn(x, mask=MASK)
    dx, before = bn.backward(dy), pickle.dumps((bn.state_dict(), bn.grads))
    out = np.full_like(x, 7)
    call = {"x": x, "out": out} | options
    given = call["out"].copy()
    with pytest.raises(error, match=match):
        bn(**call)
    assert (call["out"] == given).all()
    assert pickle.dumps((bn.state_dict(), bn.grads)) == before
    with pytest.raises(ValueError, match="partly overlapping"):
        bn(x[:4], out=x[1:5], mask=MASK[:4])
    # The batch before is still there.
    assert (bn.backward(dy) == dx).all()
    for bad in ({"dy": dy[:, :, :2]}, {"dy": dy, "out": x}, {"dy": dy, "out": x[:2]}):
        with pytest.raises(ValueError, match="expected"):
            bn.backward(**bad)
    bn.grads["bias"].flags.writeable = False
    with pytest.raises(ValueError, match="gradient of bias"):
        bn.backward(dy, out=out)
    assert (out == 7).all()
    bn.grads["bias"].flags.writeable = True
    bn.running_var.flags.writeable = False
    with pytest.raises(ValueError, match="running_var"):
        bn(x, out=out, mask=MASK)
    assert (out == 7).all()
    assert pickle.dumps((bn.state_dict(), bn.grads)) == before


def test_memory_that_runs_out_between_ghost_batches_changes_nothing(monkeypatch):
    x, dy, weight, bias = arrays((9, 3, 4), 1, "float32")
    bn = layer(weight, bias, ghost_size=3)
    bn(x)
    dx, before = bn.backward(dy), pickle.dumps(bn.state_dict())
    left = iter([fastbn.calls.forward, fastbn.calls.forward])

    def forward(*arguments):
        for one in left:
            return one(*arguments)
        raise MemoryError

    monkeypatch.setattr(fastbn.calls, "forward", forward)
    with pytest.raises(MemoryError):
        bn(2 * x)
    assert pickle.dumps(bn.state_dict()) == before
    assert (bn.backward(dy) == dx).all()


@pytest.mark.parametrize(
    "bn", [fastbn.BatchNorm(3, ghost_size=16, renorm=(3, 5)), fastbn.BatchNorm(3, renorm=(INF, 0.5))], ids=repr
)
def test_repr_makes_the_layer_again(bn):
    again = eval(repr(bn), {"BatchNorm": fastbn.BatchNorm, "inf": INF})
    assert again.config() == bn.config()
    assert pickle.loads(pickle.dumps(bn)).config() == bn.config()
