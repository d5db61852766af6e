"""What bad input gets: the right exception, one sentence with expected and got, and nothing changed."""

import copy
import os
import pickle
import re

import numpy as np
import pytest

import fastbn

C = 3
AxisError = np.exceptions.AxisError


class World:
    """Everything that a failed call must leave as it was: a used layer, its batch, running statistics, out."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.x, self.dy = rng.standard_normal((2, 8, C)).astype("float32")
        self.weight, self.bias = rng.standard_normal((2, C)).astype("float32")
        self.bn = fastbn.BatchNorm(C)
        self.bn.weight[...], self.bn.bias[...] = self.weight, self.bias
        self.bn(self.x)
        self.bn.backward(self.dy)
        self.mean, self.var = np.linspace(0, 1, C), np.linspace(1, 2, C)
        self.running = fastbn.RunningStats(C)
        self.running.update(fastbn.moments(self.x))
        self.stats = fastbn.moments(self.x)

    def snapshot(self):
        bn, running = self.bn, self.running
        arrays = [self.x, self.dy, self.weight, self.bias, self.mean, self.var, running.mean, running.var]
        arrays += [*bn.params.values(), *bn.grads.values()]
        state = [running.count, running.num_batches, bn.training, pickle.dumps(bn.state_dict())]
        return [a.tobytes() for a in arrays] + state

    # Every way to a forward, as a function of the array, axis and out.
    def batch_norm_training(self, x, **options):
        return fastbn.batch_norm(x, self.mean, self.var, self.weight, self.bias, True, **options)

    def batch_norm_inference(self, x, **options):
        return fastbn.batch_norm(x, self.mean, self.var, self.weight, self.bias, **options)

    def batch_norm_forward(self, x, **options):
        return fastbn.batch_norm_forward(x, self.weight, self.bias, running=self.running, **options)

    def batch_norm_backward(self, dy, **options):
        return fastbn.batch_norm_backward(dy, self.x, self.stats, self.weight, self.bias, **options)

    def moments(self, x, axis=1):
        return fastbn.moments(x, axis)

    def layer_training(self, x, out=None):
        return self.bn(x, out=out)

    def layer_inference(self, x, out=None):
        self.bn.eval()
        try:
            return self.bn(x, out=out)
        finally:
            self.bn.train()

    def layer_backward(self, dy, out=None):
        return self.bn.backward(dy, out=out)


TRAINING = ["batch_norm_training", "batch_norm_forward", "layer_training"]
FORWARD = [*TRAINING, "batch_norm_inference", "layer_inference"]
BACKWARD = ["batch_norm_backward", "layer_backward"]
EVERY = [*FORWARD, *BACKWARD, "moments"]


@pytest.fixture
def world():
    """Its state is compared before and after, and the layer's next steps with those of a layer that saw no error."""
    world = World()
    before = world.snapshot()
    spare = copy.deepcopy(world.bn)
    yield world
    assert world.snapshot() == before
    spare.running_mean[...], spare.running_var[...] = 0, 1
    spare(world.x)
    assert (world.bn.backward(world.dy) == spare.backward(world.dy)).all(), "the saved batch is still the one before"


def refuses(world, name, exception, match, x, **options):
    with pytest.raises(exception, match=match) as error:
        getattr(world, name)(x, **options)
    assert type(error.value) is exception
    text = str(error.value)
    assert text
    assert "\n" not in text


def f4(*shape):
    return np.ones(shape, "float32")


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("shape", [(8, 4), (8, 2), (8, 0), (2, 4, 5), (0, 4), (8, 1)])
def test_wrong_feature_count(world, name, shape):
    refuses(world, name, ValueError, rf"(?s){C}.*{shape[1]}|{shape[1]}.*{C}", f4(*shape))


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("shape", [(8, 4), (9, C), (8, C, 1), (C,), (0, C)])
def test_wrong_shape_of_dy(world, name, shape):
    refuses(world, name, ValueError, r"\(8, 3\)", f4(*shape))


BAD_DTYPES = [
    np.ones((8, C), np.float16),
    np.ones((8, C), np.longdouble),
    np.ones((8, C), np.complex64),
    np.ones((8, C), np.complex128),
    np.full((8, C), 1.0, object),
    np.full((8, C), "1"),
    np.zeros((8, C), "datetime64[s]"),
]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("x", BAD_DTYPES, ids=lambda x: x.dtype.name)
def test_wrong_dtype(world, name, x):
    refuses(world, name, TypeError, "float32|float64", x)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("mask", [False, True])
def test_masked_arrays(world, name, mask):
    x = np.ma.array(np.ones((8, C), "float32"), mask=np.full((8, C), mask))
    refuses(world, name, TypeError, "mask", x)


def test_masked_out_and_parameters(world):
    with pytest.raises(TypeError):
        world.batch_norm_forward(world.x, out=np.ma.ones((8, C), "float32"))
    with pytest.raises(TypeError):
        fastbn.batch_norm_forward(world.x, np.ma.ones(C))


@pytest.mark.parametrize("name", ["batch_norm_training", "batch_norm_inference", "batch_norm_forward", "moments"])
@pytest.mark.parametrize("axis", [2, -3, 5, 10**6])
def test_bad_axis(world, name, axis):
    refuses(world, name, AxisError, "axis", world.x, axis=axis)


@pytest.mark.parametrize("name", ["batch_norm_training", "batch_norm_inference", "batch_norm_forward", "moments"])
@pytest.mark.parametrize("axis", [1.0, "1", None, (1,)])
def test_axis_is_an_integer(world, name, axis):
    with pytest.raises(TypeError):
        getattr(world, name)(world.x, axis=axis)


@pytest.mark.parametrize("name", [*FORWARD, "moments"])
@pytest.mark.parametrize("x", [f4(C), f4(0), np.float32(1)], ids=["1d", "empty", "0d"])
def test_too_few_dimensions(world, name, x):
    refuses(world, name, AxisError, "axis", x)


@pytest.mark.parametrize("name", FORWARD + BACKWARD)
@pytest.mark.parametrize("shape", [(8, 4), (7, C), (8, C, 1), (C, 8), (8,), (0, C)])
def test_wrong_shape_of_out(world, name, shape):
    out = f4(*shape)
    refuses(world, name, ValueError, r"out.*\(8, 3\)", world.x, out=out)
    assert (out == 1).all()


@pytest.mark.parametrize("name", FORWARD + BACKWARD)
@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "object"])
def test_wrong_dtype_of_out(world, name, dtype):
    out = np.ones((8, C), dtype)
    refuses(world, name, TypeError, "out.*float32", world.x, out=out)
    assert (out == 1).all()


@pytest.mark.parametrize("name", FORWARD + BACKWARD)
def test_out_that_cannot_be_written(world, name):
    out = f4(8, C)
    out.flags.writeable = False
    refuses(world, name, ValueError, "out.*(read-only|writ)", world.x, out=out)
    refuses(world, name, TypeError, "out", world.x, out=[[0.0] * C] * 8)


@pytest.mark.parametrize("name", FORWARD + BACKWARD)
@pytest.mark.parametrize("kind", ["later", "earlier", "strided", "transposed", "reversed"])
def test_partly_overlapping_out(world, name, kind):
    n = 8 * C
    buffer = np.arange(4.0 * n, dtype="float32")
    x, out = {
        "later": (buffer[:n].reshape(8, C), buffer[1 : n + 1].reshape(8, C)),
        "earlier": (buffer[C : n + C].reshape(8, C), buffer[:n].reshape(8, C)),
        "strided": (buffer[:n].reshape(8, C), buffer[: 2 * n].reshape(8, 2 * C)[:, ::2]),
        "transposed": (buffer[:n].reshape(8, C), buffer[:n].reshape(C, 8).T),
        "reversed": (buffer[:n].reshape(8, C), buffer[:n].reshape(8, C)[::-1]),
    }[kind]
    kept = buffer.copy()
    refuses(world, name, ValueError, "overlap", x, out=out)
    assert (buffer == kept).all()


def test_out_may_lie_between_the_values_of_x(world):
    """Interleaved, as columns of one table: the memory bounds overlap, the elements do not."""
    table = np.repeat(world.x, 2, axis=1)
    y, _ = fastbn.batch_norm_forward(table[:, ::2], out=table[:, 1::2])
    assert (table[:, ::2] == world.x).all()
    assert (y == fastbn.batch_norm_forward(world.x)[0]).all()


@pytest.mark.parametrize("name", TRAINING)
def test_a_single_value_per_feature(world, name):
    for shape in ((1, C), (1, C, 1), (1, C, 1, 1)):
        sentence = f"Expected more than 1 value per channel when training, got input size {shape}"
        refuses(world, name, ValueError, f"^{re.escape(sentence)}$", f4(*shape))


def test_the_sentence_for_a_single_value():
    sentence = "Expected more than 1 value per channel when training, got input size (1, 64)"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        fastbn.BatchNorm(64)(f4(1, 64))


@pytest.mark.parametrize("name", FORWARD)
def test_an_empty_batch_changes_nothing(name):
    world = World()
    before = world.snapshot()
    y = getattr(world, name)(f4(0, C))
    assert (y[0] if isinstance(y, tuple) else y).shape == (0, C)
    assert world.snapshot() == before


@pytest.mark.parametrize("wrong", [f4(4), f4(2), f4(1), f4(C, 1), f4(0), f4()], ids=lambda a: str(a.shape))
def test_wrong_shape_of_parameters_and_statistics(world, wrong):
    ok, mean, var = f4(C), world.mean, world.var
    running_before = mean.copy(), var.copy()
    calls = {
        "weight": [
            lambda: fastbn.batch_norm(world.x, mean, var, wrong, ok, True),
            lambda: fastbn.batch_norm(world.x, mean, var, wrong, ok),
            lambda: fastbn.batch_norm_forward(world.x, wrong, ok, running=world.running),
            lambda: fastbn.batch_norm_backward(world.dy, world.x, world.stats, wrong, ok),
        ],
        "bias": [
            lambda: fastbn.batch_norm(world.x, mean, var, ok, wrong, True),
            lambda: fastbn.batch_norm(world.x, mean, var, ok, wrong),
            lambda: fastbn.batch_norm_forward(world.x, ok, wrong, running=world.running),
            lambda: fastbn.batch_norm_backward(world.dy, world.x, world.stats, ok, wrong),
        ],
        "running_mean": [
            lambda: fastbn.batch_norm(world.x, wrong.astype(float), var, ok, ok, True),
            lambda: fastbn.batch_norm(world.x, wrong.astype(float), var, ok, ok),
        ],
        "running_var": [
            lambda: fastbn.batch_norm(world.x, mean, wrong.astype(float), ok, ok, True),
            lambda: fastbn.batch_norm(world.x, mean, wrong.astype(float), ok, ok),
        ],
    }
    for name, some in calls.items():
        for call in some:
            with pytest.raises(ValueError, match=rf"{name}.*\(?{C}"):
                call()
    assert (mean == running_before[0]).all()
    assert (var == running_before[1]).all()


@pytest.mark.parametrize("dtype", ["float16", "longdouble", "complex64", "object"])
def test_wrong_dtype_of_parameters_and_statistics(world, dtype):
    wrong, ok = np.ones(C, dtype), f4(C)
    for call in (
        lambda: fastbn.batch_norm_forward(world.x, wrong, ok, running=world.running),
        lambda: fastbn.batch_norm_forward(world.x, ok, wrong, running=world.running),
        lambda: fastbn.batch_norm(world.x, wrong, world.var, ok, ok, True),
        lambda: fastbn.batch_norm(world.x, world.mean, wrong, ok, ok, True),
        lambda: fastbn.batch_norm_backward(world.dy, world.x, world.stats, wrong, ok),
    ):
        with pytest.raises(TypeError):
            call()


def test_running_statistics_that_cannot_be_updated(world):
    frozen = world.mean.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"running_mean.*(read-only|writ)"):
        fastbn.batch_norm(world.x, frozen, world.var, training=True)
    with pytest.raises(ValueError, match=r"running_var.*(read-only|writ)"):
        fastbn.batch_norm(world.x, world.mean, frozen, training=True)
    assert (fastbn.batch_norm(world.x, frozen, frozen + 1) == fastbn.batch_norm(world.x, world.mean, frozen + 1)).all()


def test_inference_needs_running_statistics(world):
    for mean, var in ((None, None), (world.mean, None), (None, world.var)):
        with pytest.raises(ValueError, match="running"):
            fastbn.batch_norm(world.x, mean, var)
        if mean is not var:
            with pytest.raises(ValueError, match="running"):
                fastbn.batch_norm(world.x, mean, var, training=True)


def test_stats_of_other_features(world):
    with pytest.raises(ValueError, match=r"3.*4|4.*3"):
        fastbn.batch_norm_backward(world.dy, world.x, fastbn.moments(f4(5, 4)), world.weight, world.bias)
    with pytest.raises(TypeError):
        fastbn.batch_norm_backward(world.dy, world.x, None, world.weight, world.bias)


@pytest.mark.parametrize("eps", [0, 0.0, -1e-5, np.nan, -np.inf])
def test_eps_is_positive(world, eps):
    for call in (
        lambda: fastbn.BatchNorm(C, eps),
        lambda: fastbn.batch_norm(world.x, world.mean, world.var, eps=eps),
        lambda: fastbn.batch_norm(world.x, world.mean, world.var, training=True, eps=eps),
        lambda: fastbn.batch_norm_forward(world.x, eps=eps, running=world.running),
        lambda: fastbn.batch_norm_backward(world.dy, world.x, world.stats, eps=eps),
    ):
        with pytest.raises(ValueError, match="eps"):
            call()


@pytest.mark.parametrize("momentum", [np.nan, np.inf, -np.inf])
def test_momentum_is_finite(world, momentum):
    for call in (
        lambda: fastbn.BatchNorm(C, momentum=momentum),
        lambda: fastbn.batch_norm(world.x, world.mean, world.var, training=True, momentum=momentum),
    ):
        with pytest.raises(ValueError, match="momentum"):
            call()


@pytest.mark.parametrize("activation", ["gelu", "RELU", "", b"relu", 3])
def test_unknown_activation(world, activation):
    for call in (
        lambda: fastbn.BatchNorm(C, activation=activation),
        lambda: world.batch_norm_training(world.x, activation=activation),
        lambda: world.batch_norm_inference(world.x, activation=activation),
        lambda: world.batch_norm_forward(world.x, activation=activation),
        lambda: world.batch_norm_backward(world.dy, activation=activation),
    ):
        with pytest.raises(ValueError, match="relu"):
            call()


@pytest.mark.parametrize("n", [0, -1, 4 * (os.cpu_count() or 1) + 64, 65536, 2**70])
def test_thread_counts_are_what_a_machine_can_bear(world, n):
    threads = fastbn.get_num_threads()
    for call in (
        lambda: fastbn.set_num_threads(n),
        lambda: fastbn.threads(n).__enter__(),
        lambda: fastbn.BatchNorm(C, num_threads=n),
        lambda: world.batch_norm_training(world.x, num_threads=n),
        lambda: world.batch_norm_inference(world.x, num_threads=n),
        lambda: world.batch_norm_forward(world.x, num_threads=n),
        lambda: world.batch_norm_backward(world.dy, num_threads=n),
    ):
        with pytest.raises(ValueError, match="thread"):
            call()
    assert fastbn.get_num_threads() == threads


@pytest.mark.parametrize("n", [1.5, "2"])
def test_thread_counts_are_integers(world, n):
    for call in (lambda: fastbn.set_num_threads(n), lambda: world.batch_norm_forward(world.x, num_threads=n)):
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize("c", [2**63 // 8 // 5 + 1, 2**60, 2**64 // 24 + 1, 2**64 // 40 + 1, 2**62])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sizes_that_are_none(c, dtype):
    """An empty array may have any number of features, for each of which something is kept."""
    try:
        x = np.empty((0, c), dtype)
    except ValueError:
        pytest.skip("NumPy refuses such an array")
    bn = fastbn.BatchNorm(1)
    for call in (
        lambda: fastbn.moments(x),
        lambda: fastbn.batch_norm_forward(x),
        lambda: fastbn.batch_norm(x, training=True),
        lambda: fastbn.batch_norm_backward(x, x, fastbn.moments(np.eye(2))),
        lambda: fastbn.BatchNorm(c),
        lambda: fastbn.RunningStats(c),
        lambda: bn(x),
        lambda: bn.eval()(x),
    ):
        with pytest.raises((MemoryError, ValueError)):
            call()


def test_backward_before_forward():
    bn = fastbn.BatchNorm(C)
    with pytest.raises(RuntimeError, match="forward"):
        bn.backward(f4(8, C))
    assert all((g == 0).all() for g in bn.grads.values())


def test_backward_after_a_forward_over_its_own_input(world):
    bn, x = fastbn.BatchNorm(C), world.x.copy()
    bn(world.x)
    bn(x, out=x)
    with pytest.raises(RuntimeError, match="forward"):
        bn.backward(world.dy)
    assert all((g == 0).all() for g in bn.grads.values())


def test_layers_that_cannot_be():
    for n in (-1, 0):
        with pytest.raises(ValueError, match="num_features"):
            fastbn.BatchNorm(n)
        with pytest.raises(ValueError, match="num_features"):
            fastbn.RunningStats(n)
    for n in (2.5, "3", None):
        with pytest.raises(TypeError):
            fastbn.BatchNorm(n)
    for dtype in ("float16", "int64", "complex64", np.longdouble):
        with pytest.raises(TypeError, match="float32"):
            fastbn.BatchNorm(C, dtype=dtype)


def test_assignments_that_do_not_fit(world):
    for wrong in (f4(4), f4(2, 3)):
        with pytest.raises(ValueError, match="shape"):
            world.bn.weight = wrong
        with pytest.raises(ValueError, match="shape"):
            world.bn.bias = wrong


@pytest.mark.parametrize("key", ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"])
def test_state_dicts_that_do_not_fit(world, key):
    state = {k: v + 1 for k, v in world.bn.state_dict().items()}
    for wrong in (
        state | {key: f4(4)},
        state | {key: f4(2, 3)},
        state | {key + "_": f4(C)},
    ):
        with pytest.raises(ValueError, match=key):
            world.bn.load_state_dict(wrong)
    if key != "num_batches_tracked":
        with pytest.raises(ValueError, match=f"missing key '{key}'"):
            world.bn.load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match="weight"):
        fastbn.BatchNorm(C, affine=False).load_state_dict(state)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(64, 3), (33, 16), (64, 100), (300, 1000), (4, 3, 7), (2, 16, 49), (2, 3, 3136)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_nan_and_inf_stay_in_their_feature(value, dtype, shape, activation):
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    bad_x, bad_dy = x.copy(), dy.copy()
    k = shape[1] // 2
    bad_x[(shape[0] // 2, k) + (0,) * (len(shape) - 2)] = value
    bad_dy[(-1, k) + (-1,) * (len(shape) - 2)] = value
    others = [i for i in range(shape[1]) if i != k]

    def run(x, dy):
        bn = fastbn.BatchNorm(shape[1], dtype=dtype, activation=activation)
        bn.weight[...], bn.bias[...] = np.random.default_rng(2).standard_normal((2, shape[1]))
        with np.errstate(all="raise"):  # no stray warning either
            y = bn(x)
            dx = bn.backward(dy)
        evaluated = fastbn.batch_norm(x, np.zeros(shape[1]), np.ones(shape[1]), activation=activation)
        return {
            "y": np.moveaxis(y, 1, 0),
            "dx": np.moveaxis(dx, 1, 0),
            "running_mean": bn.running_mean,
            "running_var": bn.running_var,
            "evaluated": np.moveaxis(evaluated, 1, 0),
            **bn.grads,
        }

    clean, dirty, dirty_dy = run(x, dy), run(bad_x, dy), run(x, bad_dy)
    for name, expected in clean.items():
        assert dirty[name][others].tobytes() == expected[others].tobytes(), name
        assert dirty_dy[name][others].tobytes() == expected[others].tobytes(), name
    for name in ("running_mean", "running_var"):
        assert not np.isfinite(dirty[name][k])
    if activation is None:
        assert not np.isfinite(dirty["weight"][k])
    if np.isnan(value):
        assert np.isnan(dirty["y"][k]).all(), "no activation hides a NaN"
    # Inference looks at one value at a time.
    differs = (dirty["evaluated"] != clean["evaluated"]).sum()
    assert differs <= 1
