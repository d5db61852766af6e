"""`fastbn train` and `predict` on other people's data: digits, labels, columns, regressions, images."""

import gzip
import itertools
import json
import math
import os
from decimal import Decimal

import numpy as np
import pytest
from test_cli import refused, run
from test_data import write_idx

from fastbn import checkpoint, nn, plots, training
from fastbn.__main__ import main
from fastbn.commands import train
from fastbn.labels import printable

for package in ("safetensors", "matplotlib", "sklearn"):
    pytest.importorskip(package)


@pytest.fixture(autouse=True)
def drawn(monkeypatch, tmp_path):
    """No pictures, which take longer than these trainings; gives what would have been drawn."""
    kept = []
    monkeypatch.setattr(plots, "learning_curves", lambda *arguments: kept.append(arguments))
    monkeypatch.setattr(plots, "confusion", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    return kept


SHORT = ("--hidden", "16", "--epochs", "4", "--lr", "0.03", "--batch-size", "16", "--out", "run")
MODEL = "run/model.safetensors"


def trained(capsys, *arguments):
    """What a training said on standard error, and its figures."""
    status, out, err = run(capsys, "train", *SHORT, *arguments)
    assert status == 0
    assert out.startswith("with batch normalization  ")
    assert err.splitlines()[-1].startswith("wrote run")
    with open("run/metrics.json") as file:
        return err, json.load(file)


def write(name, rows, header="a,b,t"):
    with open(name, "w") as file:
        file.write(header + "\n" * bool(header))
        file.writelines(",".join(map(str, row)) + "\n" for row in rows)


def two_kinds(n=400, seed=0):
    """Kinds, and a column that tells them apart by 3 of its standard deviations of 1."""
    rng = np.random.default_rng(seed)
    kinds = np.arange(n) % 2
    return kinds, rng.normal(size=n) + 4 * kinds - 2


@pytest.mark.parametrize("options", [(), ("--patience", "2"), ("--no-standardize",)])
def test_a_held_out_example_beyond_float32_is_an_error_that_leaves_nothing(capsys, tmp_path, options):
    kinds, a = two_kinds(100)
    np.savez("d.npz", x_train=np.c_[a, a], y_train=kinds, x_test=np.array([[0, 1], [1, -1e60]]), y_test=[0, 1])
    error = refused(capsys, "train", "--data", "d.npz", *SHORT, *options)
    assert error.endswith("a held-out example's column number 2 is too far from the training data for float32\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("values", [("1e149", "3e149"), ("1e-170", "3e-170")])
def test_targets_at_the_ends_of_float64_are_refused_or_learnt(capsys, values):
    write("d.csv", [(i % 2, i % 3, values[i % 2]) for i in range(40)])
    status, out, err = run(capsys, "train", "--data", "d.csv", "--target", "t", "--task", "regression", *SHORT)
    assert "nan" not in out
    assert status == 0 or "the squares of targets that differ by" in err


@pytest.mark.parametrize(
    ("centre", "scale", "form"),
    [
        (1700000030, 15, "{:.0f}"),  # seconds
        (20180130, 4, "{:.0f}"),  # days
        (123456.78, 0.05, "{:.4f}"),  # prices
        (101325, 500, "{:.1f}"),  # pressures
        (1.7e18, 1e6, "{:.0f}"),  # nanoseconds
        (-1e-9, 1e-14, "{:.20f}"),
    ],
)
def test_columns_keep_their_digits_until_they_are_standardized(capsys, monkeypatch, centre, scale, form):
    kinds, x = two_kinds()
    cells = [form.format(Decimal(centre) + Decimal(scale) * Decimal(value)) for value in x.tolist()]
    write("d.csv", [(cell, 7, kind) for cell, kind in zip(cells, kinds, strict=True)])
    dtypes = set()
    fit = training.fit
    monkeypatch.setattr(
        training, "fit", lambda model, pair, *a, **o: dtypes.add(pair[0].dtype) or fit(model, pair, *a, **o)
    )
    said, metrics = trained(capsys, "--data", "d.csv", "--target", "t")
    assert "inputs standardized, column by column, 1 of them constant" in said
    assert dtypes == {np.dtype("float32")}
    for row in metrics["held_out"].values():
        assert row["accuracy"] > 0.93
    # The saved model takes the columns as they are. The oracle: decimals.
    model = checkpoint.load(MODEL)
    assert isinstance(model[0], nn.Standardize)
    assert {layer.dtype for layer in model if isinstance(layer, nn.Dense)} == {np.dtype("float32")}
    exact = [Decimal(float(cell)) for cell in cells]
    mean = sum(exact) / len(exact)
    std = (sum((value - mean) ** 2 for value in exact) / len(exact)).sqrt()
    # The training part's statistics are those of a draw: any affine map of the exact values, to float32's rounding.
    inputs = model[0](np.array([[float(cell), 7] for cell in cells]))
    assert inputs.dtype == np.float32
    assert (inputs[:, 1] == 0).all()
    z = np.array([float((value - mean) / std) for value in exact])
    slope, shift = np.polyfit(z, inputs[:, 0], 1)
    assert 0.9 < slope < 1.1
    np.testing.assert_allclose(inputs[:, 0], slope * z + shift, atol=1e-6)
    out = run(capsys, "predict", MODEL, "d.csv", "--target", "t")[1]
    assert np.mean(np.array(out.split(), int) == kinds) > 0.93


def test_standardized_by_itself_is_standardized_by_hand(capsys):
    from sklearn.datasets import load_breast_cancer
    from sklearn.preprocessing import StandardScaler

    X, y = load_breast_cancer(return_X_y=True)
    X = np.hstack([X, np.full((len(X), 1), 1e6)])
    rows = np.arange(len(X)) % 5 > 0
    scaler = StandardScaler().fit(X[rows])
    losses = []
    for scaled, options in ((X, []), (scaler.transform(X), ["--no-standardize"])):
        np.savez("d.npz", x_train=scaled[rows], y_train=y[rows], x_test=scaled[~rows], y_test=y[~rows])
        said, metrics = trained(capsys, "--data", "d.npz", *options)
        assert ("inputs as they are" in said) == bool(options)
        assert isinstance(checkpoint.load(MODEL)[0], nn.Dense) == bool(options)
        losses.append([row["loss"] for row in metrics["held_out"].values()])
        assert all(row["accuracy"] > 0.94 for row in metrics["held_out"].values())
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_images_have_one_scale_and_rare_pixels_do_not_blow_up(capsys, tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(300, dtype=np.uint8) % 3
    images = rng.integers(0, 100, (300, 4, 4), dtype=np.uint8)
    images[np.arange(300), 1, labels] += 150
    images[:, 3, 3] = 0
    images[0, 3, 3] = 255  # one in 300: 17 standard deviations of its own
    (tmp_path / "pixels").mkdir()
    write_idx(tmp_path / "pixels" / "train-images-idx3-ubyte", images)
    write_idx(tmp_path / "pixels" / "train-labels-idx1-ubyte", labels)
    write_idx(tmp_path / "pixels" / "t10k-images-idx3-ubyte", images)
    write_idx(tmp_path / "pixels" / "t10k-labels-idx1-ubyte", labels)
    np.savez("d.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    for source in ("pixels", "d.npz"):
        said, metrics = trained(capsys, "--data", source)
        assert "the mean of each pixel and one scale for all" in said
        assert metrics["held_out"]["with batch normalization"]["accuracy"] > 0.95
        X = images.reshape(300, 16) / 255
        y = checkpoint.load(MODEL)[0](X)
        np.testing.assert_allclose(y, (X - X.mean(axis=0)) / math.sqrt(X.var(axis=0).mean()), atol=1e-5)
        assert abs(y).max() < 8


def test_what_float32_cannot_hold_needs_standardizing(capsys):
    kinds, x = two_kinds(60)
    np.savez("d.npz", X=(x * 1e60)[:, np.newaxis], y=kinds)
    assert trained(capsys, "--data", "d.npz")[1]["held_out"]["with batch normalization"]["accuracy"] > 0.8
    assert "beyond float32's range, leave out --no-standardize" in refused(
        capsys, "train", *SHORT, "--data", "d.npz", "--no-standardize"
    )
    np.savez("far.npz", X=[[0.0], [1e149]])
    np.savez("near.npz", X=[[0.0], [1e60]])
    assert "far.npz: example 2 is too far from the training data" in refused(capsys, "predict", MODEL, "far.npz")
    assert run(capsys, "predict", MODEL, "near.npz")[0] == 0


def test_labels_are_the_same_in_every_spelling_and_format(capsys):
    kinds, x = two_kinds(60)
    write("d.csv", zip(x, x, kinds, strict=True))
    trained(capsys, "--data", "d.csv", "--target", "t")
    expected = run(capsys, "predict", MODEL, "d.csv", "--target", "t")[2]
    assert expected.startswith("accuracy ")
    number = expected.split(" ", 1)[1].split(", examples")[0].strip()
    for spelt in (["0.0", "1.0"], ["+0", "1."], ["-0", "1e0"], ["False", "True"]):
        write("e.csv", zip(x, x, [spelt[kind] for kind in kinds], strict=True))
        assert run(capsys, "predict", MODEL, "e.csv", "--target", "t")[2] == f"accuracy {number}\n"
    for labels in (kinds.astype(float), kinds.astype("f4"), kinds == 1, kinds.astype(str), kinds.astype("S1")):
        np.savez("e.npz", X=np.stack([x, x], axis=1), y=labels)
        assert run(capsys, "predict", MODEL, "e.npz")[2] == f"accuracy {number}\n"
    write("e.csv", zip(x, x, kinds + 1, strict=True))
    unseen = refused(capsys, "predict", MODEL, "e.csv", "--target", "t")
    assert "label 2 was not seen in training, expected one of 0, 1" in unseen
    write("e.csv", zip(x, x, ["?", *kinds[1:]], strict=True))
    assert "e.csv: line 2, column 't': the label is missing" in refused(
        capsys, "predict", MODEL, "e.csv", "--target", "t"
    )


def test_labels_beyond_64_bits_are_printed_whole(capsys):
    kinds, x = two_kinds(60)
    labels = [str(2**64 + int(kind)) for kind in kinds]
    write("d.csv", zip(x, x, labels, strict=True))
    trained(capsys, "--data", "d.csv", "--target", "t")
    out = run(capsys, "predict", MODEL, "d.csv", "--target", "t")[1]
    assert np.mean(np.array(out.split()) == labels) > 0.9


def test_a_table_without_a_header_from_train_to_predict(capsys):
    _, x = two_kinds(60)
    write("d.data", zip(range(7, 67), x, ["no", "yes"] * 30, strict=True), header="")
    assert "(--no-header) reads it as an example" in refused(
        capsys, "train", *SHORT, "--data", "d.data", "--target", "3"
    )
    said, _ = trained(capsys, "--data", "d.data", "--no-header", "--target", "3", "--ignore", "1")
    assert "48 training examples, 12 held out, 1 features" in said
    write("e.data", [[value] for value in x], header="")
    assert "--no-header" in refused(capsys, "predict", MODEL, "e.data")
    out = run(capsys, "predict", MODEL, "e.data", "--no-header")[1]
    assert len(out.split()) == 60
    whole = run(capsys, "predict", MODEL, "d.data", "--no-header", "--target", "3", "--columns", "2")
    assert whole[1] == out


def test_predict_takes_the_columns_that_the_model_was_trained_on(capsys):
    kinds, x = two_kinds(60)
    rows = [*zip([f"2018-01-{i % 28 + 1:02}" for i in range(60)], x, x**2, kinds, strict=True)]
    write("d.csv", rows, header="day,u,v,t")
    assert "got '2018-01-01' (ignore=['day'] (--ignore day) leaves the column out" in refused(
        capsys, "train", *SHORT, "--data", "d.csv", "--target", "t"
    )
    trained(capsys, "--data", "d.csv", "--target", "t", "--ignore", "day")
    expected = run(capsys, "predict", MODEL, "d.csv")[1]
    write("e.csv", [(v, "?", u) for _, u, v, _ in rows], header="v,t,u")
    assert run(capsys, "predict", MODEL, "e.csv")[1] == expected
    with open("d.csv", "rb") as file:
        content = gzip.compress(file.read().replace(b",", b";"))
    with open("e.csv.gz", "wb") as file:
        file.write(content)
    assert run(capsys, "predict", MODEL, "e.csv.gz")[1] == expected
    np.savez("e.npz", X=np.stack([x, x**2], axis=1))
    assert run(capsys, "predict", MODEL, "e.npz")[1] == expected
    trained(capsys, "--data", "d.csv", "--target", "t", "--columns", "v,u")
    assert [*checkpoint.read_metadata(MODEL)["columns"]] == ["v", "u"]


@pytest.mark.parametrize("offset", [0, 1e9])
@pytest.mark.parametrize("options", [(), ("--patience", "20")])
def test_a_regression_is_scored_in_the_targets_unit(capsys, drawn, offset, options):
    from sklearn.metrics import mean_squared_error, r2_score

    rng = np.random.default_rng(0)
    X = rng.uniform(50, 300, (500, 3))
    y = X @ [1200.0, 300.0, -50.0] + offset + 0.25
    np.savez("d.npz", X_train=X[:400], y_train=y[:400], X_test=X[400:], y_test=y[400:])
    said, metrics = trained(capsys, "--data", "d.npz", *options)
    assert "--task auto: regression, since the target holds numbers with a fraction" in said
    _, predicted, err = run(capsys, "predict", MODEL, "d.npz")
    predicted = np.array(predicted.split(), float)
    rmse, r2 = math.sqrt(mean_squared_error(y[400:], predicted)), r2_score(y[400:], predicted)
    row = metrics["held_out"]["with batch normalization"]
    assert (row["RMSE"], row["R2"]) == pytest.approx((rmse, r2), rel=1e-3)
    assert err == f"read X_train, y_train, X_test, y_test\nRMSE {rmse:.5g}, R2 {r2:.4f}, 100 examples\n"
    assert r2 > 0.9
    [(curves, _, labels)] = drawn
    assert labels == ("RMSE", "R2")
    epochs = metrics["epochs"]["with batch normalization"]
    curve = curves["with batch normalization"]
    assert (curve.val_loss, curve.val_accuracy) == (epochs["val_rmse"], epochs["val_r2"])
    if not options:
        assert (epochs["val_rmse"][-1], epochs["val_r2"][-1]) == pytest.approx((rmse, r2), rel=1e-3)
    for rmses, r2s in ((epochs["rmse"], epochs["r2"]), (epochs["val_rmse"], epochs["val_r2"])):
        # 1 - R2 is the mean square over a variance that no epoch changes
        ratio = [value**2 / (1 - r2) for value, r2 in zip(rmses, r2s, strict=True)]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
        assert math.sqrt(ratio[0]) == pytest.approx(y.std(), rel=0.2)
    alone = metrics["one_at_a_time"]
    assert "other_predictions" not in alone


def test_auto_and_asked_for(capsys):
    kinds, x = two_kinds(90)
    write("d.csv", [(u, u, round(1e5 * u)) for u in x])
    said, _ = trained(capsys, "--data", "d.csv", "--target", "t")
    assert "regression, since the target holds 90 different whole numbers" in said
    asked = refused(capsys, "train", *SHORT, "--data", "d.csv", "--target", "t", "--task", "classification")
    assert "task regression takes labels as numbers" in asked
    write("d.csv", [(u, u, kind + 3) for u, kind in zip(x, kinds, strict=True)])
    said, _ = trained(capsys, "--data", "d.csv", "--target", "t")
    assert "--task auto: classification, since the target holds 2 different labels" in said
    said, _ = trained(capsys, "--data", "d.csv", "--target", "t", "--task", "regression", "--no-standardize")
    assert "targets from 3 to 4" in said
    assert "auto" not in said
    predicted = np.array(run(capsys, "predict", MODEL, "d.csv")[1].split(), float)
    assert abs(predicted - kinds - 3).mean() < 1.5
    write("d.csv", [(u, u, 5) for u in x])
    constant = refused(capsys, "train", *SHORT, "--data", "d.csv", "--target", "t", "--task", "regression")
    assert "expected targets that differ, got 5 alone" in constant


def test_agreement_is_judged_against_the_outputs_size(capsys):
    class Off:
        def __init__(self, size, off):
            self.size, self.off = size, off

        def __call__(self, X):
            return self.size * X * (1 + self.off * (len(X) == 1))

    X = np.linspace(1, 2, 8).reshape(4, 2)
    task = train.Classification(train.data.Dataset(X, None, np.array([0, 1]), "x"))
    detail = {"classes": [0], "precision": [1.0], "recall": [None], "examples": [0], "confusion": [[0]]}
    for size, (off, word) in itertools.product(
        [1e-20, 1, 1e20], [(1e-6, "agrees with"), (1e-2, "DIFFERS from"), (np.nan, "DIFFERS")]
    ):
        train._print_results({"x": {"diverged": ""}}, detail, train._one_at_a_time(Off(size, off), X, task), task)
        assert f"one example at a time {word}" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_read(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "load", None)
    for out in (*["/proc/x"] * os.path.exists("/proc"), "x" * 300, "d.csv", "d.csv/run"):
        write("d.csv", [(1, 2, 3)])
        assert "--out " in refused(capsys, "train", "--out", out)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert "no such file" in refused(capsys, "train", "--data", "none.csv", "--out", "a/b/c")
    assert not (tmp_path / "a").exists()


def test_nothing_in_a_file_does_anything_to_a_terminal(capsys):
    kinds, x = two_kinds(60)
    np.savez("d.npz", X=np.c_[x, x], y=np.array(["a\nb", "c\x1b[2J"])[kinds])
    trained(capsys, "--data", "d.npz")
    assert {*run(capsys, "predict", MODEL, "d.npz")[1].splitlines()} == {"a\\nb", "c\\x1b[2J"}
    write("d.csv", [("x", "y\r")], "a\x1b[2J,t")
    for name, fault in (
        ("d\x1b[2J.csv", "no such file"),
        ("\udcff.csv", "no such file"),
        ("d.csv", "expected a number"),
    ):
        error = refused(capsys, "train", *SHORT, "--data", name, "--target", "t")
        assert fault in error
        assert error.rstrip("\n").isprintable()
    with pytest.raises(SystemExit):
        main(["predict", "m", "d", "\x1b[2J"])
    assert "unrecognized arguments: \\x1b[2J" in capsys.readouterr().err
    harmless = "\u0645\u06cc\u200c\u062e \u3000 \xa0 \U0001f469\u200d\U0001f52c"  # Persian, a joined emoji
    assert printable(harmless) == harmless
    assert printable("\u202eabc\u2028\ud800") == "\\u202eabc\\u2028\\ud800"
