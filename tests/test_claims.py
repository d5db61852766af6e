"""The experiments shift, noise and testtime: end to end, and what they measure beside hand-made cases."""

import copy

import numpy as np
import pytest
from test_experiments import blobs, check_files, run

from fastbn import BatchNorm, RunningStats, losses, nn, optim, training
from fastbn.experiments import noise, shift, testtime


def end_to_end(name, folder, capsys):
    status, out, err = run(capsys, name, "--quick", "--seeds", 2, "--out", folder)
    assert status == 0
    found = check_files(folder, name, out, err)
    assert (found["settings"]["seeds"], found["settings"]["data"]) == (2, "digits")
    return found


# --- shift


@pytest.mark.long
def test_shift_end_to_end(tmp_path, capsys):
    found = end_to_end("shift", tmp_path, capsys)
    rows = {name: cells for name, *cells in found["rows"]}
    assert {len(cells) for cells in rows.values()} == {4}
    # the images as they are: nothing is shifted, and the last checkpoint is what is tested
    assert rows["as trained, frozen"] == rows["accuracy after 40 steps"]
    assert rows["inverted, re-estimated"][0] is None
    # faint ink is undone by statistics of the faint images, exactly: batch normalization takes any scale out
    assert rows["faint, re-estimated"][2] == rows["as trained, re-estimated"][2]
    assert max(rows["moved in steps 1 to 20"][2]) < min(rows["moved in steps 1 to 20"][0])


def test_what_has_not_moved_and_what_has_moved_by_one_deviation():
    z = np.random.default_rng(0).normal([3, -1], [0.1, 7], (500, 2))
    assert shift.moved(z, z[::-1]) == 0
    assert shift.moved(z, z + z.std(axis=0)) == pytest.approx(1)
    assert shift.moved(z, z + 2 * z.std(axis=0).mean()) == pytest.approx(2)
    spread = np.abs(np.sort(z - z.mean(axis=0), axis=0)).mean()
    assert shift.moved(z, z.mean(axis=0) + 2 * (z - z.mean(axis=0))) == pytest.approx(spread / z.std(axis=0).mean())


def test_images_are_recoloured_as_it_says():
    X = np.float32([[0, 0.5, 1], [1, 0, 0]])
    assert shift.recolour(X, 0, 1, 0).tolist() == X.tolist()
    assert shift.recolour(X, 1, 0, 0).tolist() == (1 - X).tolist()
    assert shift.recolour(X, 0.5, 1, 0).tolist() == [[0.5, 0.75, 1], [1, 0.5, 0.5]]
    each = shift.recolour(np.tile(np.float32([0, 1]), (400, 1)), (0, 0.5), (0.5, 1), 3)
    for column, low, high in ((each[:, 0], 0, 0.5), (each[:, 1], 0.5, 1)):
        assert low <= column.min() < low + 0.02
        assert high - 0.02 < column.max() <= high
    assert each.dtype == np.float32


def test_the_jitter_is_gone_at_test_time_and_its_gradient_is_right():
    rng = np.random.default_rng(1)
    x, dy = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    layer = shift.Jittered(3, seed=2)
    y = layer(x)
    plain = BatchNorm(3)(x)
    slope = np.ptp(y, axis=0) / np.ptp(plain, axis=0)
    assert np.abs(np.log(slope)).max() > 0.05
    np.testing.assert_allclose(y - y.mean(axis=0), slope * plain, atol=1e-12)
    assert np.abs(y.mean(axis=0)).max() > 0.05
    dx = layer.backward(dy)
    for i in np.ndindex(x.shape):
        h = np.zeros_like(x)
        h[i] = 1e-6
        up, down = (np.sum(dy * shift.Jittered(3, seed=2)(x + s * h)) for s in (1, -1))
        assert dx[i] == pytest.approx((up - down) / 2e-6, abs=1e-7)
    twin = BatchNorm(3).eval()
    twin.load_state_dict(layer.state_dict())
    assert np.array_equal(layer.eval()(x), twin(x))


# --- noise


@pytest.mark.long
def test_noise_end_to_end(tmp_path, capsys):
    found = end_to_end("noise", tmp_path, capsys)
    assert len(found["rows"]) == len(noise.NETWORKS) * len(noise.SIZES) + len(noise.SIZES) - 1
    rows = {(network, size): cells for network, size, *cells in found["rows"]}
    for network, size in rows:
        noise_seen, right, held_out_right, loss, gap = rows[network, size]
        assert all(0 <= share <= 1 for share in right + held_out_right)
        assert all(b > g for b, g in zip(loss, gap, strict=True))  # the training loss is the difference
        assert (max(noise_seen) < 1e-6) == (network == "neither")  # the BLAS rounds by mini-batch size
    assert min(rows["batch normalization", 16][4]) > 0  # worse on what it has not seen
    # noise falls as mini-batches or ghost batches grow, and that of dropout does not
    for network, factor in (("batch normalization", 3), (noise.GHOSTS, 3), ("dropout", 0)):
        assert min(rows[network, 4][0]) > factor * max(rows[network, 64][0])
    assert min(rows["dropout", 64][0]) > max(rows["batch normalization", 4][0])


def test_only_the_normalisation_is_cut_into_ghost_batches():
    dataset = blobs(64)
    pair = dataset.X, dataset.y
    model = noise.build("both", 5, 3, 16, 0)
    assert [type(layer).__name__ for layer in model] == ["Dense", "BatchNorm", "Dropout"] * 2 + ["Dense"]
    assert [layer.config()["ghost_size"] for layer in model if isinstance(layer, BatchNorm)] == [16, 16]
    norm = model[1]
    z = model[0](dataset.X)
    y = norm(z).reshape(4, 16, -1)
    alone = [BatchNorm(100, activation="relu")(part) for part in z.reshape(4, 16, -1)]
    assert np.array_equal(y, np.stack(alone))
    # as large as the mini-batch of 64, they are the mini-batch itself
    whole, same, smaller = (
        noise.learn(pair, pair, network, size, 0, 6)
        for network, size in (("batch normalization", 256), (noise.GHOSTS, 64), (noise.GHOSTS, 16))
    )
    assert whole == same
    assert smaller["held-out loss"] != whole["held-out loss"]
    assert whole["gap"] == 0  # of a pair beside itself


def test_noise_beside_what_it_must_be():
    X = np.random.default_rng(0).normal(size=(4096, 100)).astype(np.float32)
    # dropout at 1/2: an output is 0 or 2x, of deviation |x| about x, and mean x^2 is the variance among examples;
    # to which the mean of 10 passes adds a tenth of the noise
    assert noise.noise_to_signal([nn.Dropout(0.5, seed=0)], X, 512, 0) == pytest.approx(1.1**-0.5, abs=0.01)
    # a normal x among m others: the mean's noise is 1/m, the deviation's x^2/(2m)
    for size in (32, 128):
        assert noise.noise_to_signal([BatchNorm(100)], X, size, 0) == pytest.approx(np.sqrt(1.5 / size), rel=0.05)
    assert noise.noise_to_signal([BatchNorm(100)], X, 4096, 0) < 1e-6
    assert noise.noise_to_signal([nn.ReLU()], X[:513], 512, 0) == 0  # an example is left over in every pass


# --- test time


@pytest.mark.long
def test_testtime_end_to_end(tmp_path, capsys):
    found = end_to_end("testtime", tmp_path, capsys)
    rows = {name: cells for name, *cells in found["rows"]}
    assert rows["exact statistics, recalibrated"][:2] == [[0, 0], [0, 0]]
    # of few steps, a small momentum remembers nothing but the start, unless that is divided out
    (slow, debiased) = (rows[f"momentum 0.001, {kind}"][0] for kind in ("from 0 and 1", "debiased"))
    assert min(slow) > 2 * max(debiased)
    assert "0 of 718 predictions differ" in found["remarks"][0]


def test_the_averages_are_those_that_the_layer_keeps_itself():
    """Beside networks trained under one momentum each."""
    dataset = blobs(70)
    pair = dataset.X, dataset.y
    found = testtime.learn(pair, pair, 4, [3, 7])
    for momentum in (0.5, 0.1, 0.001, None):
        model = testtime.build(5, 3, 4)
        layers = [
            BatchNorm(layer.num_features, momentum=momentum, activation="relu")
            if isinstance(layer, BatchNorm)
            else layer
            for layer in model
        ]
        model = nn.Sequential(*layers)
        training.fit(
            model, pair, losses.softmax_cross_entropy, optim.SGD(model, testtime.RATE), epochs=7,
            batch_size=testtime.BATCH_SIZE, seed=4, on_step=lambda step, loss: step == 7, progress=False,
        )  # fmt: skip
        exact = training.recalibrate(copy.deepcopy(model), dataset.X)
        # the mean square over values with the exact mean and deviation: mu - sigma and mu + sigma, half of each
        off = []
        for norm, true in ((model[i], exact[i]) for i in (1, 3)):
            for z in (-1, 1):
                x = true.running_mean + z * np.sqrt(true.running_var + 1e-5)
                off.append((x - norm.running_mean) / np.sqrt(norm.running_var + 1e-5) - z)
        accuracy, distance = found[(momentum, False), 7]
        assert distance == pytest.approx(np.sqrt(np.mean(np.square(off))))
        assert accuracy == training.evaluate(model, pair, losses.softmax_cross_entropy)[1]


def test_the_distance_is_in_deviations():
    norm = BatchNorm(2, eps=1e-12)
    norm.running_mean, norm.running_var = [5, -3], [4, 0.25]
    stats = RunningStats(2, 1.0, unbiased=False)
    for mean, var, expected in (
        ([5, -3], [4, 0.25], 0),
        ([7, -3.5], [4, 0.25], 1),  # one deviation
        ([5, -3], [1, 1 / 16], 1),  # half the deviation: every normalised value is twice what it should be
        ([5, -3], [16, 0.25], np.sqrt((0.5**2 + 0) / 2)),
    ):
        stats.mean[...], stats.var[...] = mean, var
        assert testtime.distance([stats], nn.Sequential(norm)) == pytest.approx(expected, abs=1e-9)
