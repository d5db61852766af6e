"""Averages of weights over a training, against the weights of every step and NumPy's own sums."""

import numpy as np
import pytest

from fastbn import BatchNorm, averaging, checkpoint, losses, nn, optim, schedules, training

LD = np.longdouble
STEPS, EPOCHS = 5, 4  # 42 examples in mini-batches of 9


def blobs(n=42, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    return (rng.normal(size=(n, 5)) + np.eye(3, 5)[y]).astype(dtype), y


def network(dtype="float32", p=0.25):
    return nn.Sequential(
        nn.Dense(5, 8, bias=False, dtype=dtype, seed=0),
        BatchNorm(8, dtype=dtype),
        nn.Sequential(nn.Tanh(), nn.Dropout(p, seed=9), nn.Dense(8, 6, dtype=dtype, seed=1)),
        BatchNorm(6, dtype=dtype, activation="relu", unbiased=False),
        nn.Dense(6, 3, dtype=dtype, seed=2),
    )


def fit(model, optimizer=None, **options):
    optimizer = optimizer or optim.Adam(model, 0.02)
    options = {
        "data": blobs(dtype=model[-1].params["weight"].dtype),
        "epochs": EPOCHS,
        "batch_size": 9,
        "seed": 3,
    } | options
    return training.fit(model, options.pop("data"), losses.softmax_cross_entropy, optimizer, **options)


def state(model):
    return {key: array.tobytes() for key, array in model.state_dict().items()}


def weights_of_every_step(dtype, **options):
    model, seen = network(dtype), []
    history = fit(
        model, on_step=lambda *_: seen.append({k: p.astype(LD) for k, p in model.params.items()}), **options
    )  # fmt: skip
    return seen, history


def expected_statistics(model, X):
    """Mean and variance of what comes to both BatchNorms in float64, each behind those before it."""
    weight = {key: p.astype(np.float64) for key, p in model.params.items()}
    z = X.astype(np.float64) @ weight["0.weight"].T
    y = (z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + 1e-5) * weight["1.weight"] + weight["1.bias"]
    z2 = np.tanh(y) @ weight["2.2.weight"].T + weight["2.2.bias"]
    return {1: (z.mean(axis=0), z.var(axis=0, ddof=1)), 3: (z2.mean(axis=0), z2.var(axis=0))}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("average", "stop"),
    [(0.5, None), (0.9, None), (0.999, None), (0.9, 1), (0.9, 13), ("swa 1", None), ("swa 3", None)],
)
def test_the_average_is_the_sum_written_out(dtype, average, stop):
    seen, plain = weights_of_every_step(dtype)
    model = network(dtype)
    options = (
        {"average": average} if isinstance(average, float) else {"average": "swa", "average_from": int(average[4:])}
    )
    history = fit(model, on_step=lambda step, _: step == stop, **options)
    assert history.loss == plain.loss[: len(history.loss)]  # training itself is the same
    if isinstance(average, float):
        steps = seen[: stop or len(seen)]
        factors = LD(average) ** np.arange(len(steps))[::-1]
    else:
        steps = seen[STEPS - 1 :: STEPS][options["average_from"] - 1 :]
        factors = np.ones(len(steps), LD)
    for key, p in model.params.items():
        expected = sum(f * step[key] for f, step in zip(factors, steps, strict=True)) / factors.sum()
        np.testing.assert_allclose(p.astype(LD), expected, rtol=2e-13 if dtype == "float64" else 1e-7, atol=1e-14)
    X = blobs(dtype=dtype)[0]
    for i, (mean, var) in expected_statistics(model, X).items():
        np.testing.assert_allclose(model[i].running_mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(model[i].running_var, var, rtol=1e-5)
    assert model.training
    assert all(layer.training for layer in model)


def test_running_averages_are_those_that_recalibrate_takes():
    model = network()
    fit(model, average=0.9)
    before = state(model)
    assert state(training.recalibrate(model, blobs()[0])) == before


@pytest.mark.parametrize("how", ["freeze", "eval"])
def test_statistics_that_do_not_move_stay(how):
    """They were constants of the training, for the layers behind them too."""
    model = network(p=0)
    getattr(model[1], how)()
    X = blobs()[0]
    mean = np.arange(8.0)
    model[1].running_mean = mean
    fit(model, average=0.9, on_step=lambda *_: None if how == "freeze" else model[1].eval() and None)
    if how == "freeze":
        np.testing.assert_array_equal(model[1].running_mean, mean)
        np.testing.assert_array_equal(model[1].running_var, np.ones(8))
    z = model[2](model[1].eval()(model[0](X)))
    np.testing.assert_allclose(model[3].running_mean, z.mean(axis=0, dtype=float), rtol=1e-5, atol=1e-6)


def test_a_network_without_batch_normalization():
    model = nn.Sequential(nn.Dense(5, 3, seed=0))
    seen = []
    fit(model, average="swa", average_from=2, on_epoch=lambda *_: seen.append(model.params["0.weight"].astype(LD)))
    np.testing.assert_allclose(model.params["0.weight"], np.mean(seen[1:], axis=0), rtol=1e-7)


def test_held_out_examples_are_no_part_of_the_statistics():
    X, y = blobs()
    rows = np.random.default_rng(0).permutation(42)
    model, other = network(), network()
    fit(model, average=0.9, data=(X[rows[:30]], y[rows[:30]]), validation=(X[rows[30:]], y[rows[30:]]))
    fit(other, average=0.9, data=(X[rows[:30]], y[rows[:30]]))
    assert state(model) == state(other)


AVERAGES = [{"average": 0.9}, {"average": "swa", "average_from": 2}]


@pytest.mark.parametrize("options", AVERAGES, ids=str)
def test_stopped_after_any_step_it_goes_on_with_the_same_bits(tmp_path, options):
    pytest.importorskip("safetensors")
    options = options | {"schedule": schedules.cosine(), "clip_norm": 1.0, "validation": 0.25, "batch_size": 8}
    whole = network()
    fit(whole, **options)
    trained = network()
    fit(trained, **{key: value for key, value in options.items() if not key.startswith("average")})
    for stop in range(1, EPOCHS * 4):
        path = tmp_path / f"{stop}"
        fit(network(), **options, checkpoint=path, on_step=lambda step, _, stop=stop: step == stop)
        for _ in range(2):  # going on, and reading what is finished
            model = network()
            fit(model, **options, checkpoint=path, resume=True)
            assert state(model) == state(whole)
        last = checkpoint.load(path)
        assert {key: array.tobytes() for key, array in last.params.items()} == {
            key: array.tobytes() for key, array in trained.params.items()
        }


def test_stopped_before_the_first_epoch_that_counts(tmp_path):
    model, other = network(), network()
    fit(model, average="swa", average_from=3, on_epoch=lambda epoch, _: epoch == 2)
    fit(other, epochs=2)
    assert state(model) == state(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": 0.0}, "a number between 0 and 1 or \"swa\", got 0.0"),
        ({"average": 1}, "got 1"),
        ({"average": -0.1}, "got -0.1"),
        ({"average": float("nan")}, "got nan"),
        ({"average": "ema"}, "got 'ema'"),
        ({"average": "swa"}, "needs average_from"),
        ({"average": "swa", "average_from": 0}, "an epoch from 1 to 4, got 0"),
        ({"average": "swa", "average_from": 5}, "an epoch from 1 to 4, got 5"),
        ({"average": 0.9, "average_from": 2}, "average_from needs average=\"swa\", got average=0.9"),
        ({"average_from": 2}, "average_from needs average=\"swa\", got average=None"),
        ({"average": 0.9, "patience": 2, "validation": 0.5}, "patience restores .* average gives"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(options, message):
    model = network()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        fit(model, **options)
    assert state(model) == before


def test_a_forward_of_ones_own_is_refused_before_the_first_step():
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    model = nn.Sequential(Residual(nn.Dense(5, 5, seed=0), BatchNorm(5)), nn.Dense(5, 3, seed=0))
    before = state(model)
    with pytest.raises(ValueError, match="forward of one's own, got one in Residual"):
        fit(model, average=0.9)
    assert state(model) == before


def test_an_error_at_the_end_leaves_the_trained_weights(monkeypatch):
    model, other = network(), network()
    fit(other)

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(training, "retake", fails)
    with pytest.raises(MemoryError):
        fit(model, average=0.9)
    assert state(model) == state(other)


def test_an_average_of_constants_is_that_constant():
    for decay in (None, 0.1, 0.9999):
        params = {"a": np.array([0.1, -1e30, 3.0], np.float32), "b": np.array(0.7)}
        before = {key: p.tobytes() for key, p in params.items()}
        average = averaging.Average(params, decay)
        for _ in range(50):
            average.update()
        average.give()
        assert {key: p.tobytes() for key, p in params.items()} == before
