"""Learning-rate schedules and clipped gradients, beside what they say, written out."""

import math

import numpy as np
import pytest

from fastbn import losses, nn, optim, schedules, training

FACTORS = {
    "constant": (schedules.constant(), lambda t, epochs: 1),
    "step": (schedules.step(2, 0.1), lambda t, epochs: 0.1 ** math.floor(t / 2)),
    "half epochs": (schedules.step(0.5, 0.9), lambda t, epochs: 0.9 ** math.floor(2 * t)),
    "cosine": (schedules.cosine(), lambda t, epochs: math.cos(math.pi / 2 * t / epochs) ** 2),
    "inverse_time": (schedules.inverse_time(0.5), lambda t, epochs: 2 / (2 + t)),
    "own": (lambda t, epochs: t / epochs, lambda t, epochs: t / epochs),
}


def problem(n=40, dtype=np.float64):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 3)).astype(dtype)
    return X, X @ np.array([[1.0], [-2.0], [3.0]], dtype)


@pytest.mark.parametrize("name", FACTORS)
def test_every_step_has_its_rate(name):
    schedule, factor = FACTORS[name]
    X, y = problem()
    model, reference = (nn.Dense(3, 1, dtype="float64", seed=0) for _ in range(2))
    optimizer = optim.SGD(model, 0.2)
    rates = []
    history = training.fit(
        model, (X, y), losses.mse, optimizer, epochs=5, batch_size=9, schedule=schedule,
        on_step=lambda *_: rates.append(optimizer.lr),
    )  # fmt: skip
    expected = [0.2 * factor(k + s / 5, 5) for k in range(5) for s in range(5)]
    np.testing.assert_allclose(rates, expected, rtol=1e-14, atol=1e-18)
    assert history.lr == rates[4::5]
    assert optimizer.lr == 0.2
    for step, rate in enumerate(expected):
        rows = np.random.default_rng([0, 1 + step // 5]).permutation(40)[9 * (step % 5) :][:9]
        error = X[rows] @ reference.params["weight"].T + reference.params["bias"] - y[rows]
        reference.params["weight"] -= rate * 2 * error.T @ X[rows] / len(rows)
        reference.params["bias"] -= rate * 2 * error.mean(axis=0)
    np.testing.assert_allclose(model.params["weight"], reference.params["weight"], rtol=1e-12)
    np.testing.assert_allclose(model.params["bias"], reference.params["bias"], rtol=1e-12)


def test_the_rate_is_put_back_after_an_error():
    optimizer = optim.SGD(model := nn.Dense(3, 1, seed=0), 0.2)
    for schedule, error in ((lambda t, epochs: 0.5 if t < 1 else math.nan, ValueError), (lambda t: 1.0, TypeError)):
        with pytest.raises(error):
            training.fit(model, problem(), losses.mse, optimizer, epochs=5, batch_size=9, schedule=schedule)
        assert optimizer.lr == 0.2


def test_a_rate_that_callbacks_set_is_noted_and_stays():
    optimizer = optim.SGD(model := nn.Dense(3, 1, seed=0), 0.2)
    history = training.fit(
        model, problem(), losses.mse, optimizer, epochs=3, batch_size=9,
        on_epoch=lambda epoch, history: setattr(optimizer, "lr", 0.2 / (1 + epoch)),
    )  # fmt: skip
    assert history.lr == [0.2, 0.1, 0.2 / 3]
    assert optimizer.lr == 0.05


@pytest.mark.parametrize("lr", [math.nan, -1.0, math.inf])
def test_a_rate_that_is_none_is_refused_and_the_old_one_stays(lr):
    optimizer = optim.Adam(nn.Dense(3, 1, seed=0), 0.2)
    with pytest.raises(ValueError, match="finite lr of at least 0"):
        optimizer.lr = lr
    assert optimizer.lr == 0.2


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedules.step(0, 0.5),
        lambda: schedules.step(math.nan, 0.5),
        lambda: schedules.step(1, -1),
        lambda: schedules.step(1, math.inf),
        lambda: schedules.inverse_time(-1),
        lambda: schedules.inverse_time(math.nan),
    ],
)
def test_arguments_out_of_range(make):
    with pytest.raises(ValueError, match="expected a finite"):
        make()


class Steepest:
    """Notes the gradients that come to it."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def step(self):
        self.seen.append({key: g.copy() for key, g in self.model.grads.items()})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e22])  # of the targets: in float32 the sum of the squares is none
def test_clipping_scales_all_gradients_alike(dtype, scale):
    X, y = problem(dtype=dtype)
    y *= scale
    seen = []
    for clip_norm in (None, 0.5):
        model = nn.Sequential(nn.Dense(3, 4, dtype=dtype, seed=0), nn.Tanh(), nn.Dense(4, 1, dtype=dtype, seed=1))
        optimizer = Steepest(model)
        history = training.fit(model, (X, y), losses.mse, optimizer, epochs=1, batch_size=9, clip_norm=clip_norm)
        assert history.lr == []
        seen.append(optimizer.seen)
    for plain, clipped in zip(*seen, strict=True):
        joint = np.concatenate([g.ravel() for g in plain.values()]).astype(np.longdouble)
        norm = float(np.sqrt((joint**2).sum()))
        factor = min(1.0, 0.5 / (norm + 1e-6))
        for key, g in plain.items():
            np.testing.assert_allclose(clipped[key], g * factor, rtol=1e-6 if dtype == "float32" else 1e-14)
            if norm < 0.5:
                assert clipped[key].tobytes() == g.tobytes()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_stops_and_says_where(bad):
    model = nn.Dense(3, 1, dtype="float64", seed=0)
    calls = []

    def loss(prediction, target):
        value, gradient = losses.mse(prediction, target)
        calls.append(1)
        return value, gradient * (bad if len(calls) == 1 + 5 + 2 else 1)  # one call looks at the arguments

    states = []
    with pytest.raises(FloatingPointError, match=r"the gradients' norm is (inf|nan) at epoch 2, step 2"):
        training.fit(
            model, problem(), loss, optim.SGD(model, 0.1), epochs=5, batch_size=9, clip_norm=1.0,
            on_step=lambda *_: states.append(model.params["weight"].copy()),
        )  # fmt: skip
    np.testing.assert_array_equal(model.params["weight"], states[-1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip_norm": 0}, ValueError, "clip_norm must be above 0, got 0"),
        ({"clip_norm": math.nan}, ValueError, "clip_norm must be above 0, got nan"),
        ({"schedule": schedules.cosine()}, TypeError, "an optimizer with lr, got Steepest"),
    ],
)
def test_refused_before_the_first_step(options, error, message):
    model = nn.Dense(3, 1, seed=0)
    optimizer = Steepest(model)
    with pytest.raises(error, match=message):
        training.fit(model, problem(), losses.mse, optimizer, epochs=1, batch_size=9, **options)
    assert optimizer.seen == []
