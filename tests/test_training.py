import csv
import io
import math
import sys
import types

import numpy as np
import pytest

from fastbn import BatchNorm, data, losses, nn, optim, pairs, training


def blobs(n=90, seed=0, classes=3, dtype=np.float32):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return (rng.normal(size=(n, 5)) + 2 * np.eye(classes, 5)[y]).astype(dtype), y


def network(seed=0, dtype="float32"):
    return nn.Sequential(
        nn.Dense(5, 8, bias=False, dtype=dtype, seed=seed),
        BatchNorm(8, dtype=dtype, activation="relu"),
        nn.Dense(8, 3, dtype=dtype, seed=seed + 1),
    )


def state(model):
    return {key: array.tobytes() for key, array in model.state_dict().items()}


def softmax_regression(X, y, W, b, lr, batch_size, epochs, seed):
    """The loop that fit promises, written out in float64 for one affine layer."""
    history, right_history = [], []
    for epoch in range(1, epochs + 1):
        order = np.random.default_rng([seed, epoch]).permutation(len(X))
        total, seen, right = 0.0, 0, 0
        for start in range(0, len(X), batch_size):
            rows = order[start : start + batch_size]
            if len(rows) == 1:
                continue
            z = X[rows] @ W.T + b
            p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
            total -= np.log(p[np.arange(len(rows)), y[rows]]).sum()
            right += (z.argmax(axis=1) == y[rows]).sum()
            seen += len(rows)
            p[np.arange(len(rows)), y[rows]] -= 1
            W = W - lr * p.T @ X[rows] / len(rows)
            b = b - lr * p.sum(axis=0) / len(rows)
        history.append(total / seen)
        right_history.append(right / seen)
    return W, b, history, right_history


# mini-batches: equal, a short one, one example left over, a single one
@pytest.mark.parametrize(("n", "batch_size"), [(90, 30), (90, 16), (81, 16), (20, 64)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_fit_is_the_loop_written_out(n, batch_size, order):
    X, y = blobs(n, dtype=np.float64)
    model = nn.Sequential(nn.Dense(5, 3, dtype="float64", seed=3))
    W, b, loss, accuracy = softmax_regression(
        X, y, model.params["0.weight"].copy(), model.params["0.bias"].copy(), 0.3, batch_size, 4, seed=7
    )
    history = training.fit(
        model, (np.array(X, order=order), y), losses.softmax_cross_entropy, optim.SGD(model, 0.3),
        epochs=4, batch_size=batch_size, seed=7,
    )  # fmt: skip
    np.testing.assert_allclose(model.params["0.weight"], W, rtol=1e-12)
    np.testing.assert_allclose(model.params["0.bias"], b, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(history.loss, loss, rtol=1e-12)
    assert history.accuracy == accuracy
    assert history.val_loss == history.val_accuracy == []
    assert len(history.seconds) == 4
    assert min(history.seconds) > 0


def test_same_seed_same_bits_and_inputs_unchanged():
    X, y = blobs(91)
    before = X.copy(), y.copy()
    states = []
    for seed in (0, 0, 1):
        model = network()
        training.fit(
            model, (X, y), losses.softmax_cross_entropy, optim.Adam(model, 1e-2), epochs=3, batch_size=10, seed=seed
        )
        states.append(state(model))
    assert states[0] == states[1]
    assert states[0] != states[2]
    np.testing.assert_array_equal(X, before[0])
    np.testing.assert_array_equal(y, before[1])


def test_validation_is_evaluate_after_each_epoch():
    X, y = blobs()
    Xv, yv = blobs(31, seed=1)
    model = network()
    history = training.fit(
        model, (X, y), losses.softmax_cross_entropy, optim.SGD(model, 0.1), epochs=2, batch_size=16, validation=(Xv, yv)
    )
    loss, accuracy = training.evaluate(model, (Xv, yv), losses.softmax_cross_entropy)
    assert len(history.val_loss) == len(history.val_accuracy) == 2
    assert history.val_loss[-1] == loss
    assert history.val_accuracy[-1] == accuracy
    assert model.training
    assert all(layer.training for layer in model)


def test_fit_trains_in_training_mode_whatever_the_mode_was():
    models = network(), network().eval()
    for model in models:
        training.fit(
            model, blobs(), losses.softmax_cross_entropy, optim.SGD(model, 0.1), epochs=2, batch_size=16,
            validation=blobs(),
        )  # fmt: skip
    assert state(models[0]) == state(models[1])
    assert models[1][1].num_batches_tracked == 2 * 6


@pytest.mark.parametrize("batch_size", [1, 7, 1024])
def test_evaluate_takes_running_averages_and_the_exact_mean(batch_size):
    X, y = blobs(100, dtype=np.float64)
    model = nn.Sequential(BatchNorm(5, dtype="float64"), nn.Dense(5, 3, dtype="float64", seed=0))
    rng = np.random.default_rng(5)
    mean, var = rng.normal(size=5), rng.uniform(0.5, 2, 5)
    model[0].running_mean[...], model[0].running_var[...] = mean, var
    z = (X - mean) / np.sqrt(var + 1e-5) @ model.params["1.weight"].T + model.params["1.bias"]
    expected = np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(100), y])
    before = state(model)
    loss, accuracy = training.evaluate(model, (X, y), losses.softmax_cross_entropy, batch_size=batch_size)
    assert loss == pytest.approx(expected, rel=1e-13)
    assert accuracy == np.mean(z.argmax(axis=1) == y)
    assert state(model) == before


@pytest.mark.parametrize("shape", [(60,), (60, 1), (60, 4)])
def test_accuracy_of_yes_and_no(shape):
    rng = np.random.default_rng(0)
    X = rng.normal(size=shape)
    target = rng.integers(0, 2, shape)
    loss, accuracy = training.evaluate(nn.LeakyReLU(), (X, target), losses.sigmoid_cross_entropy, batch_size=13)
    assert accuracy == np.mean((X > 0) == target)
    z = np.where(X > 0, X, 0.01 * X)
    assert loss == pytest.approx(np.mean(np.log1p(np.exp(z)) - z * target), rel=1e-12)


def test_regression_has_no_accuracy():
    X = np.random.default_rng(0).normal(size=(50, 3))
    y = X @ [[1.0], [2.0], [3.0]]
    model = nn.Dense(3, 1, dtype="float64", seed=0)
    history = training.fit(
        model, (X, y), losses.mse, optim.SGD(model, 0.1), epochs=50, batch_size=10, validation=(X, y), progress=False
    )
    assert history.accuracy == history.val_accuracy == []
    assert history.val_loss[-1] < 1e-6
    assert training.evaluate(model, (X, y), losses.mse) == (history.val_loss[-1], None)


def test_modes_are_restored_even_after_an_error():
    X, y = blobs()
    inner = nn.Sequential(BatchNorm(5), nn.Tanh())
    model = nn.Sequential(inner, nn.Dense(5, 3, seed=0))
    modes = (True, True, False, True, False)  # a frozen layer within a model in training
    layers = (model, inner, inner[0], inner[1], model[1])
    for layer, mode in zip(layers, modes, strict=True):
        layer.train(mode)
    training.evaluate(model, (X, y), losses.softmax_cross_entropy)
    assert tuple(layer.training for layer in layers) == modes
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        training.evaluate(model, (X, y + 1), losses.softmax_cross_entropy)
    assert tuple(layer.training for layer in layers) == modes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2"),
        ({"batch_size": 2.5}, TypeError, "float"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"data": (blobs()[0], blobs()[1][:-1])}, ValueError, r"data: .* equally long, .* \(90, 5\) and \(89,\)"),
        ({"data": blobs()[0]}, TypeError, r"data must be a pair \(X, y\)"),
        ({"data": (blobs()[0][:1], blobs()[1][:1])}, ValueError, "at least 2 examples, got 1"),
        ({"data": (blobs()[0][:0], blobs()[1][:0])}, ValueError, "data: no examples"),
        ({"data": (blobs()[0][:, 1:], blobs()[1])}, ValueError, "data does not fit"),
        ({"data": (blobs()[0], blobs()[1] - 1)}, ValueError, "labels from 0 to 2.*got -1"),
        ({"data": (blobs()[0], blobs(classes=4)[1])}, ValueError, "labels from 0 to 2.*got 3"),
        ({"data": (blobs()[0], blobs()[1] * 1.0)}, TypeError, "data does not fit.*integer"),
        ({"data": (blobs()[0], blobs()[1].astype(str))}, TypeError, "y must hold numbers"),
        ({"data": (blobs()[0].astype(complex), blobs()[1])}, TypeError, "complex"),
        ({"validation": (blobs()[0][:4], blobs()[1])}, ValueError, "validation: X and y"),
        ({"validation": (blobs()[0][:, 1:], blobs()[1])}, ValueError, "validation does not fit"),
        ({"validation": 1.0}, ValueError, "validation must be .* fraction between 0 and 1, got 1.0"),
        ({"validation": 0.5, "data": (blobs()[0][:3], [0, 1, 2])}, ValueError, "holds out no example"),
        ({"patience": 2}, ValueError, "patience needs validation"),
        ({"patience": 0, "validation": 0.5}, ValueError, "patience must be at least 1"),
        ({"seed": -1}, ValueError, "non-negative"),
        ({"optimizer": optim.Adam(network())}, ValueError, "optimizer that was made for this model"),
        ({"optimizer": optim.Adam}, TypeError, r"made for this model, as Adam\(model, \.\.\.\), got the class"),
        ({"optimizer": "adam"}, TypeError, "expected an object with a step method as optimizer, got 'adam'"),
        ({"loss": "mse"}, TypeError, "expected loss to be a function, as those of fastbn.losses, got 'mse'"),
        ({"schedule": "cosine"}, TypeError, "schedule to be a function, as those of fastbn.schedules, got 'cosine'"),
        ({"on_step": 3}, TypeError, "expected on_step to be a function, got 3"),
        ({"on_epoch": []}, TypeError, r"expected on_epoch to be a function, got \[\]"),
        ({"epochs": 2.0}, TypeError, "expected epochs as an integer, got float"),
        ({"batch_size": "8"}, TypeError, "expected batch_size as an integer, got str"),
        ({"seed": None}, TypeError, "expected seed as an integer, got NoneType"),
        ({"patience": 1.5, "validation": 0.5}, TypeError, "expected patience as an integer, got float"),
    ],
)
def test_bad_arguments_change_nothing(change, error, message):
    model = network()
    model[1].eval()
    optimizer = optim.Adam(model, 1e-2)
    before = state(model), state(optimizer)
    arguments = {"data": blobs(), "loss": losses.softmax_cross_entropy, "optimizer": optimizer}
    with pytest.raises(error, match=message):
        training.fit(model, **(arguments | {"epochs": 1, "batch_size": 8} | change))
    assert (state(model), state(optimizer)) == before
    assert [layer.training for layer in (model, *model)] == [True, True, False, True]


@pytest.mark.parametrize(("data_", "batch_size"), [(blobs(), 0), ((blobs()[0], [1, 2]), 4), ((blobs()[0][:0], []), 4)])
def test_evaluate_refuses(data_, batch_size):
    with pytest.raises(ValueError, match=r"batch_size|equally long|no examples"):
        training.evaluate(network(), data_, losses.softmax_cross_entropy, batch_size=batch_size)


def test_loss_that_is_not_finite_stops_and_says_where():
    X, y = blobs(40)
    calls = []

    def loss(prediction, target):
        value, gradient = losses.softmax_cross_entropy(prediction, target)
        calls.append(1)
        return (math.nan if len(calls) == 1 + 5 + 3 else value), gradient  # one call looks at the arguments

    model = network()
    with pytest.raises(FloatingPointError, match="the loss is nan at epoch 2, step 3"):
        training.fit(model, (X, y), loss, optim.SGD(model, 0.1), epochs=3, batch_size=8)


def poisoned(name, array, value, at, n=40):
    """(X, y) and a validation pair for mse, float64, one of them with that value somewhere; and what a message says."""
    rng = np.random.default_rng(0)
    pairs = {key: [rng.normal(size=(n, 5)), rng.normal(size=(n, 3))] for key in ("data", "validation")}
    pairs[name]["Xy".index(array)][at] = value
    return *map(tuple, pairs.values()), f"^{name}: {array}\\[{at[0]}, {at[1]}\\] is {value}: expected finite numbers$"


@pytest.mark.parametrize(("value", "at"), [(np.nan, (0, 0)), (np.inf, (17, 2)), (-np.inf, (39, 1))])
@pytest.mark.parametrize(("name", "array"), [(name, array) for name in ("data", "validation") for array in "Xy"])
@pytest.mark.parametrize("layout", [np.copy, np.asfortranarray, lambda a: a[::-1][::-1]], ids=["C", "F", "strided"])
def test_what_is_not_finite_is_an_error_before_the_first_step(name, array, value, at, layout):
    data_, validation, message = poisoned(name, array, value, at)
    model, loss = network(dtype="float64"), losses.mse
    before = state(model)
    for pair in (validation, *([0.25] if name == "data" else [])):
        with pytest.raises(ValueError, match=message):
            training.fit(
                model, tuple(map(layout, data_)), loss, optim.SGD(model, 0.1), epochs=1, batch_size=8, patience=3,
                validation=pair,
            )  # fmt: skip
    assert state(model) == before


def test_only_the_first_fault_is_named_and_large_finite_numbers_are_none():
    X = np.full((3_000, 500), 3e38, np.float32)  # their sum is not finite
    pairs.check_finite(X, "X")
    X[2_999, 499] = np.nan
    with pytest.raises(ValueError, match=r"X\[2999, 499\] is nan"):
        pairs.check_finite(X, "X")
    X[[1_700, 1_800], [3, 2]] = np.inf, -np.inf
    with pytest.raises(ValueError, match=r"X\[1700, 3\] is inf"):
        pairs.check_finite(X, "X")
    with pytest.raises(ValueError, match=r"y\[1\] is nan"):
        pairs.check_finite(np.array([65000, np.nan], np.float16), "y")


def test_masked_targets_are_refused():
    X, y = blobs()
    model = network()
    with pytest.raises(TypeError, match="expected data: y without a mask"):
        training.fit(
            model, (X, np.ma.masked_equal(y, 2)), losses.softmax_cross_entropy, optim.SGD(model, 0.1), epochs=1,
            batch_size=8,
        )  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_validation_loss_that_becomes_nan_is_an_error_of_its_epoch(bad):
    def loss(prediction, target):
        value, gradient = losses.softmax_cross_entropy(prediction, target)
        judged.append(1) if len(prediction) == 31 else None
        return (bad if len(judged) == 2 else value), gradient

    model, judged = network(), []
    with pytest.raises(FloatingPointError, match=f"the loss of the validation data is {bad} after epoch 2"):
        training.fit(
            model, blobs(), loss, optim.SGD(model, 0.1), epochs=3, batch_size=16, validation=blobs(31), patience=3
        )


def test_a_last_step_that_overflows_is_an_error():
    """No later loss tells of it."""
    model = network()
    X, y = blobs(32)
    with pytest.raises(FloatingPointError, match=r"after epoch 1, the model's '0.weight'\[0, 0\] is -?(inf|nan)"):
        training.fit(model, (X, y), losses.softmax_cross_entropy, optim.SGD(model, 1e300), epochs=1, batch_size=32)


def test_on_step_and_on_epoch_see_everything_and_change_nothing():
    X, y = blobs(81)
    seen, epochs = [], []
    models = network(), network()
    histories = [
        training.fit(
            model, (X, y), losses.softmax_cross_entropy, optim.SGD(model, 0.1), epochs=3, batch_size=16, **callbacks
        )
        for model, callbacks in zip(
            models,
            (
                {},
                {
                    "on_step": lambda step, loss: seen.append((step, loss)),
                    "on_epoch": lambda epoch, history: epochs.append((epoch, list(history.loss))),
                },
            ),
            strict=True,
        )
    ]
    assert state(models[0]) == state(models[1])
    assert [step for step, _ in seen] == list(range(1, 3 * 5 + 1))  # the example left over makes no step
    for epoch in (1, 2, 3):
        means = [loss for _, loss in seen[5 * (epoch - 1) : 5 * epoch]]
        assert histories[1].loss[epoch - 1] == pytest.approx(np.mean(means), rel=1e-12)
        assert epochs[epoch - 1] == (epoch, histories[0].loss[:epoch])


@pytest.mark.parametrize(("step", "whole"), [(1, 0), (5, 0), (7, 1), (10, 1)])
def test_a_true_on_step_ends_training_there(step, whole):
    X, y = blobs(80)
    model, reference = network(), network()
    losses_seen = []
    history = training.fit(
        model, (X, y), losses.softmax_cross_entropy, optim.SGD(model, 0.1), epochs=3, batch_size=16, seed=5,
        on_step=lambda at, loss: losses_seen.append(loss) or at == step,
    )  # fmt: skip
    optimizer = optim.SGD(reference, 0.1)
    for at in range(step):
        rows = np.random.default_rng([5, 1 + at // 5]).permutation(80)[16 * (at % 5) : 16 * (at % 5 + 1)]
        value, gradient = losses.softmax_cross_entropy(reference(X[rows]), y[rows])
        reference.backward(gradient)
        optimizer.step()
        assert losses_seen[at] == value
    assert len(losses_seen) == step
    assert state(model) == state(reference)
    assert len(history.loss) == len(history.seconds) == whole


def test_a_true_on_epoch_ends_training_there():
    models = network(), network()
    for model, options in zip(
        models, ({"epochs": 2}, {"epochs": 9, "on_epoch": lambda epoch, _: epoch == 2}), strict=True
    ):
        history = training.fit(
            model, blobs(), losses.softmax_cross_entropy, optim.SGD(model, 0.1), batch_size=16, **options
        )
        assert len(history.loss) == 2
    assert state(models[0]) == state(models[1])


class Truthy:
    def __bool__(self):
        return True


@pytest.mark.parametrize(
    "answer",
    [0, 1, 13, -1.0, "text", [0], {"loss": 1}, np.int64(1), np.float64(2), np.ones(()), Truthy(), object, None],
)
@pytest.mark.parametrize("callback", ["on_step", "on_epoch"])
def test_only_true_ends_training(callback, answer):
    log = io.StringIO()
    model = network()
    history = training.fit(
        model, blobs(), losses.softmax_cross_entropy, optim.SGD(model, 0.1), epochs=3, batch_size=16,
        **{callback: lambda at, _: [log.write(f"{at} "), answer][1]},
    )  # fmt: skip
    assert len(history.loss) == 3
    assert log.getvalue().split()[-1] == ("18" if callback == "on_step" else "3")


@pytest.mark.parametrize("callback", ["on_step", "on_epoch"])
@pytest.mark.parametrize(("yes", "no"), [(True, False), (np.True_, np.False_), (np.float64(1) < 2, np.float64(3) < 2)])
def test_true_ends_training_also_numpys(callback, yes, no):
    seen = []
    model = network()
    training.fit(
        model, blobs(), losses.softmax_cross_entropy, optim.SGD(model, 0.1), epochs=3, batch_size=16,
        **{callback: lambda at, _: seen.append(at) or (yes if at == 2 else no)},
    )  # fmt: skip
    assert seen == [1, 2]


def test_writers_of_tables_are_callbacks(tmp_path):
    model = network()
    with open(tmp_path / "log.csv", "w", newline="") as file:
        rows = csv.writer(file)
        training.fit(
            model, blobs(), losses.softmax_cross_entropy, optim.SGD(model, 0.1), epochs=3, batch_size=16,
            on_step=lambda step, loss: rows.writerow([step, loss]),
        )  # fmt: skip
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3 * 6


class Witness(nn.ReLU):
    """Notes the first column of what goes through, training and inference apart."""

    def __init__(self):
        super().__init__()
        self.seen = {True: [], False: []}

    def forward(self, x):
        self.seen[self.training] += x[:, 0].tolist()
        return super().forward(x)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.9])
@pytest.mark.parametrize("classes", [True, False])
def test_a_fraction_is_held_out_of_every_class(fraction, classes):
    y = np.repeat([0, 1, 2], [30, 60, 1]) if classes else np.random.default_rng(0).normal(size=(91, 1))
    X = np.random.default_rng(1).normal(size=(91, 5))
    X[:, 0] = 1 + np.arange(91)
    held = []
    for seed in (3, 3, 4):
        witness = Witness()
        model = nn.Sequential(witness, BatchNorm(5), nn.Dense(5, 3 if classes else 1, seed=0))
        history = training.fit(
            model, (X, y), losses.softmax_cross_entropy if classes else losses.mse, optim.SGD(model, 0.01),
            epochs=1, batch_size=7, seed=seed, validation=fraction,
        )  # fmt: skip
        assert len(history.val_loss) == 1
        trained, judged = (set(witness.seen[mode]) - {0.0} for mode in (True, False))
        assert not trained & judged
        assert len(trained | judged) >= 90  # one may be left over
        held.append(judged)
        rows = np.array(sorted(judged), int) - 1
        if classes:
            assert np.bincount(y[rows], minlength=3).tolist() == [round(30 * fraction), round(60 * fraction), 0]
        else:
            assert len(rows) == round(91 * fraction)
    assert held[0] == held[1]
    assert held[0] != held[2]


@pytest.mark.parametrize("patience", [1, 2, 4, 100])
def test_patience_ends_at_the_best_epoch(patience):
    X, y = blobs(60)
    X *= 0.3  # the blobs overlap: the validation loss goes up and down
    model = network()
    states = []
    history = training.fit(
        model, (X, y), losses.softmax_cross_entropy, optim.SGD(model, 0.5), epochs=40, batch_size=16,
        validation=blobs(seed=1), on_epoch=lambda *_: states.append(state(model)),
    )  # fmt: skip
    best = 0
    for epoch, value in enumerate(history.val_loss):
        best = epoch if value < history.val_loss[best] else best
        if epoch - best >= patience:
            break
    assert 0 < best < 39
    model = network()
    stopped = training.fit(
        model, (X, y), losses.softmax_cross_entropy, optim.SGD(model, 0.5), epochs=40, batch_size=16,
        validation=blobs(seed=1), patience=patience,
    )  # fmt: skip
    assert stopped.val_loss == history.val_loss[: epoch + 1]
    assert stopped.best_epoch == best + 1
    assert state(model) == states[best]


def test_best_epoch_of_none_and_of_nan():
    assert training.History().best_epoch is None
    assert training.History(val_loss=[math.nan, 3.0, 2.0, 2.0, math.inf]).best_epoch == 3
    assert training.History(val_loss=[math.nan, math.inf]).best_epoch == 1


def test_a_fraction_may_be_any_number():
    trained = []
    for fraction in (0.5, np.float32(0.5), np.float16(0.5)):
        model = network()
        training.fit(
            model, blobs(), losses.softmax_cross_entropy, optim.Adam(model), epochs=1, batch_size=16,
            validation=fraction,
        )  # fmt: skip
        trained.append(state(model))
    assert trained[0] == trained[1] == trained[2]
    with pytest.raises(TypeError, match=r"validation must be a pair \(X, y\), got bool"):
        training.fit(
            model, blobs(), losses.softmax_cross_entropy, optim.Adam(model), epochs=1, batch_size=16, validation=True
        )


def test_the_history_draws_itself(tmp_path):
    pytest.importorskip("matplotlib")
    model = network()
    history = training.fit(
        model, blobs(), losses.softmax_cross_entropy, optim.Adam(model), epochs=3, batch_size=16, validation=0.5
    )
    history.plot(tmp_path / "curves")
    assert (tmp_path / "curves").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no epochs to draw"):
        training.History().plot(tmp_path / "none")


def test_without_a_path_the_figure_is_returned():
    pytest.importorskip("matplotlib")
    figure = training.History(loss=[3.0, 2.0, 1.0], accuracy=[0.1, 0.2, 0.3]).plot()
    assert [[line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes] == [
        [[3, 2, 1]],
        [[0.1, 0.2, 0.3]],
    ]
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook asks for
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_loss_below_zero_is_drawn_too(tmp_path):
    """A logarithmic axis would show nothing of either."""
    pytest.importorskip("matplotlib")
    for name, loss in (("falling", [-1.0, -2.0, -3.0]), ("rising", [-3.0, -2.0, -1.0])):
        training.History(loss=loss).plot(tmp_path / name)
    assert (tmp_path / "falling").read_bytes() != (tmp_path / "rising").read_bytes()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def fit_with_bar(monkeypatch, stream, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    model = network()
    X, y = blobs(49)
    training.fit(model, (X, y), losses.softmax_cross_entropy, optim.SGD(model, 0.1), epochs=2, batch_size=8, **options)
    return stream.getvalue()


def test_progress_bar_on_a_terminal_alone(monkeypatch):
    pytest.importorskip("tqdm")
    shown = fit_with_bar(monkeypatch, Terminal())
    assert "epoch 2/2" in shown
    assert "loss " in shown
    assert "accuracy " in shown
    assert "examples/s" in shown
    assert "96.0/96.0" in shown  # the example left over is not counted
    assert fit_with_bar(monkeypatch, io.StringIO()) == ""
    assert fit_with_bar(monkeypatch, Terminal(), progress=False) == ""


def test_no_tqdm_no_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert fit_with_bar(monkeypatch, Terminal()) == ""


def test_notebooks_have_their_own_bar(monkeypatch):
    """tqdm.auto's, which shows itself wherever it is made: a notebook's standard error is no terminal."""
    tqdm = pytest.importorskip("tqdm")
    made = []

    class Widget(tqdm.tqdm):
        def __init__(self, *args, disable, **options):
            assert disable is None
            super().__init__(*args, file=io.StringIO(), mininterval=0, **options)
            made.append(self)

    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=Widget))
    fit_with_bar(monkeypatch, io.StringIO(), verbose=True)
    (bar,) = made
    assert bar.n == bar.total == 2 * 48
    assert "epoch 2/2" in bar.fp.getvalue()


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("validation", [None, blobs(20)])
def test_verbose_is_a_line_an_epoch_where_no_bar_is_shown(monkeypatch, capsys, progress, validation):
    model, lines = network(), []
    out = lambda *_: lines.append(capsys.readouterr().out)  # noqa: E731
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    history = training.fit(
        model, blobs(49), losses.softmax_cross_entropy, optim.SGD(model, 0.1), epochs=2, batch_size=8,
        validation=validation, verbose=True, progress=progress, on_epoch=out,
    )  # fmt: skip
    for i, line in enumerate(lines):
        expected = f"epoch {i + 1}/2: loss {history.loss[i]:.4g}, accuracy {history.accuracy[i]:.4f}"
        if validation:
            expected += (
                f", validation loss {history.val_loss[i]:.4g}, validation accuracy {history.val_accuracy[i]:.4f}"
            )
        assert line == f"{expected}, seconds {history.seconds[i]:.1f}\n"
    assert sys.stderr.getvalue() == ""


def test_no_line_beside_a_bar(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    assert "epoch 2/2" in fit_with_bar(monkeypatch, Terminal(), verbose=True)
    assert capsys.readouterr().out == ""


def test_optimizer_and_loss_of_ones_own():
    X, y = blobs()
    model = network()
    steps = []
    training.fit(
        model, (X.tolist(), y.tolist()), lambda p, t: losses.softmax_cross_entropy(p, t),
        types.SimpleNamespace(step=lambda: steps.append(1)), epochs=2, batch_size=32,
    )  # fmt: skip
    assert len(steps) == 2 * 3


def test_digits_reach_97_percent():
    pytest.importorskip("sklearn")
    train, held_out = data.split(data.load(), seed=3)
    model = nn.Sequential(nn.Dense(64, 64, bias=False, seed=0), BatchNorm(64), nn.Sigmoid(), nn.Dense(64, 10, seed=1))
    optimizer = optim.SGD(model, 0.2, momentum=0.9)
    training.fit(model, (train.X, train.y), losses.softmax_cross_entropy, optimizer, epochs=15, batch_size=32)
    accuracy = training.evaluate(model, (held_out.X, held_out.y), losses.softmax_cross_entropy)[1]
    assert accuracy >= 0.97
