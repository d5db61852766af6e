"""What `fastbn` prints: tables, matrices and probabilities beside scikit-learn's, and where they go."""

import csv
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_cli import refused, run

from fastbn import checkpoint, plots
from fastbn.__main__ import main

for package in ("safetensors", "matplotlib", "sklearn"):
    pytest.importorskip(package)

MODEL = "run/model.safetensors"
COMMAND = ("train", "--out", "run", "--hidden", "6,5", "--epochs", "4", "--lr", "0.05", "--batch-size", "16")


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch, tmp_path):
    """None are drawn, which takes longer than these trainings; gives what was asked for."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "learning_curves", lambda *_: None)
    if request.node.name == "test_the_picture_of_a_matrix":
        return asked
    monkeypatch.setattr(
        plots, "confusion", lambda counts, labels, path: asked.append((counts, labels)) or path.write_bytes(b"\x89PNG")
    )
    return asked


def mixed(labels, n=40, test=range(40)):
    """d.npz: classes that overlap, so that every kind of mistake is made; a test part of the classes in `test`."""
    rng = np.random.default_rng(1)
    labels = np.array(list(labels))
    y = np.arange(n * len(labels)) % len(labels)
    X = rng.normal(size=(len(y), 3)) + np.c_[y % 2, y % 3, y / len(labels)]
    held = (np.arange(len(y)) // len(labels) % 4 == 3) & np.isin(y, test)
    np.savez("d.npz", x_train=X[~held], y_train=labels[y[~held]], x_test=X[held], y_test=labels[y[held]])
    np.savez("test.npz", X=X[held])
    return labels[y[held]]


def table(out, head):
    """The cells of a printed table by its first line, up to an empty one: names, and lists of the rest."""
    lines = out[out.index(head) :].split("\n\n")[0].splitlines()[1:]
    return [re.split("  +", line.strip()) for line in lines]


@pytest.mark.parametrize("options", [(), ("--no-batchnorm",), ("--activation", "tanh", "--no-standardize")])
def test_the_model_is_a_table(capsys, options):
    mixed("abc")
    out = run(capsys, *COMMAND, "--data", "d.npz", *options)[1]
    widths = [3, 6, 5, 3]
    weights = sum(a * b for a, b in itertools.pairwise(widths))
    assert out.count("total ") == 1 + ("--no-batchnorm" not in options)
    for name, beside in (("with batch normalization", 2 * (6 + 5) + 3), ("without batch normalization", 6 + 5 + 3)):
        if name.startswith("without") or "--no-batchnorm" not in options:
            *rows, (total, parameters) = table(out, f"{name}  ")
            assert (total, int(parameters)) == ("total", weights + beside)
            assert sum(int(row[2]) for row in rows) == weights + beside
            assert [row[1] for row in rows if row[0].startswith("Dense")] == ["(N, 6)", "(N, 5)", "(N, 3)"]
    rows = table(out, "with")[:-1]
    model = checkpoint.load(MODEL)
    assert [row[0].split()[0] for row in rows] == [type(layer).__name__ for layer in model]
    assert [int(row[2]) for row in rows] == [sum(p.size for p in layer.params.values()) for layer in model]
    x = np.ones((1, 3), np.float32)
    for layer, row in zip(model.eval(), rows, strict=True):
        x = layer(x)
        assert row[1] == f"(N, {x.shape[1]})"


def test_precision_recall_and_confusion_are_scikit_learns(capsys, pictures):
    from sklearn.metrics import confusion_matrix, precision_score, recall_score

    labels = ["a long label", "b", "c", "unseen"]
    right = mixed(labels, test=range(3))
    out = run(capsys, *COMMAND, "--data", "d.npz", "--no-batchnorm")[1]
    predicted = run(capsys, "predict", MODEL, "test.npz")[1].splitlines()
    expected = {"labels": labels, "average": None, "zero_division": np.nan}
    precision, recall = (score(right, predicted, **expected) for score in (precision_score, recall_score))
    rows = table(out, "without batch normalization, class by class")
    assert [row[0] for row in rows] == labels
    for k, text in ((1, precision), (2, recall)):
        assert [row[k] for row in rows] == ["-" if np.isnan(value) else f"{value:.2%}" for value in text]
    assert [int(row[3]) for row in rows] == [np.sum(right == label) for label in labels]
    assert rows[3][2:] == ["-", "0"]
    assert 0 < recall[0] < 1
    counts = confusion_matrix(right, predicted, labels=labels)
    rows = table(out, "confusion matrix: ")
    assert rows[0] == labels
    assert [row[0] for row in rows[1:]] == labels
    assert np.array_equal([[*map(int, row[1:])] for row in rows[1:]], counts)
    with open("run/metrics.json") as file:
        metrics = json.load(file)
    assert metrics["classes"] == labels
    assert np.array_equal(metrics["confusion"], counts)
    np.testing.assert_array_equal(np.array(metrics["precision"], float), precision)
    np.testing.assert_array_equal(np.array(metrics["recall"], float), recall)
    assert pictures == [(counts.tolist(), labels)]


@pytest.mark.parametrize("classes", [20, 21, 201])
def test_many_classes(capsys, tmp_path, classes):
    mixed([f"{k:03}: a label of {'x' * 30}" for k in range(classes)], n=4, test=range(classes))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "confusion.png").write_text("of an earlier training")
    _, out, err = run(capsys, *COMMAND, "--data", "d.npz")
    assert ("confusion matrix: a row" in out) == (classes == 20)
    assert ("the confusion matrix of 21 classes is in confusion.png and metrics.json" in out) == (classes == 21)
    assert ("no confusion matrix, which is for 200 classes at most" in out) == (classes == 201)
    assert (tmp_path / "run" / "confusion.png").exists() == (classes <= 200) == err.endswith("confusion.png\n")
    assert len(table(out, "with batch normalization, class by class")) == classes
    if classes == 20:
        assert all(len(line) <= 100 for line in out[out.index("confusion matrix") :].split("\n\n")[0].splitlines())


def test_a_regression_has_no_classes(capsys, tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 2))
    np.savez("d.npz", X=x, y=x[:, 0])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "confusion.png").write_text("of an earlier training")
    status, out, _ = run(capsys, *COMMAND, "--data", "d.npz")
    assert status == 0
    assert "RMSE" in out
    assert "class" not in out
    assert not (tmp_path / "run" / "confusion.png").exists()
    before = run(capsys, "predict", MODEL, "d.npz")[1]
    expected = "run/model.safetensors: --proba is for classes, and this model predicts numbers\n"
    assert refused(capsys, "predict", MODEL, "d.npz", "--proba").endswith(expected)
    assert len(before.split()) == 60


def test_probabilities(capsys):
    from scipy.special import softmax

    labels = ["a,b", 'c"d', "e\x1b[2J", "f"]
    mixed(labels)
    assert run(capsys, *COMMAND, "--data", "d.npz")[0] == 0
    status, out, err = run(capsys, "predict", MODEL, "d.npz", "--proba")
    head, *rows = csv.reader(io.StringIO(out))
    assert (status, head) == (0, ["a,b", 'c"d', "e\\x1b[2J", "f"])
    probabilities = np.array(rows, float)
    X = np.load("test.npz")["X"]
    np.testing.assert_allclose(probabilities, softmax(np.float64(checkpoint.load(MODEL).eval()(X)), axis=1), rtol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-8)
    plain = run(capsys, "predict", MODEL, "d.npz")
    assert [head[k] for k in probabilities.argmax(axis=1)] == plain[1].splitlines()
    assert len(set(probabilities.argmax(axis=1))) == 4
    assert err == plain[2]
    assert err.startswith("read x_train, y_train, x_test, y_test\naccuracy ")


def test_probabilities_of_huge_outputs_are_numbers(capsys):
    mixed("ab")
    assert run(capsys, *COMMAND, "--data", "d.npz", "--no-standardize")[0] == 0
    np.savez("far.npz", X=np.array([[1e30, 0, 0], [-1e30, 0, 0]]))
    out = run(capsys, "predict", MODEL, "far.npz", "--proba")[1].splitlines()
    assert {tuple(map(float, line.split(","))) for line in out[1:]} <= {(0.0, 1.0), (1.0, 0.0)}


def test_notes_of_the_reader_are_no_predictions(capsys):
    right = mixed("ab")
    assert run(capsys, *COMMAND, "--data", "d.npz")[0] == 0
    X = np.load("test.npz")["X"]
    np.savez("other.npz", data=X, more=X)
    status, out, err = run(capsys, "predict", MODEL, "other.npz")
    assert (status, err) == (0, "read data; not used: more\n")
    assert len(out.splitlines()) == len(right)


def test_labels_that_standard_output_cannot_encode_are_escaped(monkeypatch):
    mixed(["\xe9t\xe9", "\u51ac"])
    for arguments, expected in (
        ([*COMMAND, "--data", "d.npz"], "\n\\u51ac "),
        (["predict", MODEL, "test.npz"], "\n\\u51ac\n"),
        (["predict", MODEL, "test.npz", "--proba"], "\\xe9t\\xe9,\\u51ac\n"),
    ):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", newline="\n"))
        assert main(arguments) == 0
        assert expected in written.getvalue().decode("ascii")


@pytest.mark.long
def test_a_reader_that_leaves_early_stops_no_training(python):
    """As `fastbn train | head -n 1` does: the training ends with its files, and leaves none of an unfinished one."""
    mixed("abc")
    first_line = """
import subprocess, sys
with subprocess.Popen([sys.executable, "-m", "fastbn", *sys.argv[1:]], stdout=subprocess.PIPE, text=True) as process:
    print(process.stdout.readline(), end="")
    process.stdout.close()
sys.exit(process.returncode)
"""
    ran = python("-c", first_line, *COMMAND, "--data", "d.npz", "--epochs", "40")
    assert ran.returncode == 141
    assert re.fullmatch("with batch normalization +output +parameters\n", ran.stdout)
    assert sorted(os.listdir("run")) == ["confusion.png", "learning-curves.png", "metrics.json", "model.safetensors"]


@pytest.mark.parametrize(("y", "number"), [(np.arange(40) / 8, "0.0"), (np.r_[np.arange(39) % 2, 7], "7")])
def test_experiments_do_not_advise_what_they_have_not(capsys, y, number):
    for package in ("joblib", "tqdm"):
        pytest.importorskip(package)
    np.savez("d.npz", X=np.random.default_rng(0).random((40, 3)), y=y)
    error = refused(capsys, "experiment", "noise", "--data", "d.npz")
    expected = f"d.npz: experiments learn classes, of 2 examples or more each, got the number {number} once\n"
    assert error.endswith(expected)


def test_the_picture_of_a_matrix(tmp_path, monkeypatch):
    from matplotlib import image

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for counts, left in (([[5, 0], [1, 1]], True), ([[0, 5], [1, 1]], False)):
        plots.confusion(counts, ["no", "yes"], "c.png")
        picture = image.imread("c.png")
        height, width = picture.shape[:2]
        dark = picture[:, : int(width * 0.8), 0] < 0.1  # one cell; without the scale of colours
        assert dark.sum() > 10_000
        row, column = np.median(np.argwhere(dark), axis=0)
        assert row < height * 0.45
        assert (column < width * 0.45) == left
    # Neither formulas nor letters that the font lacks end a training.
    plots.confusion(np.eye(3, dtype=int), ["$\\frac$", "\u51ac" * 50, ""], "c.png")
    plots.confusion(np.zeros((45, 45), int), [str(k) for k in range(45)], "c.png")
    assert (tmp_path / "c.png").stat().st_size < 100_000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pictures need matplotlib"):
        plots.confusion([[1]], ["a"], "c.png")


@pytest.mark.skipif(os.name == "nt", reason="the bash that Windows finds may be that of a Linux beside it")
def test_completion_in_bash(capsys, tmp_path, monkeypatch):
    pytest.importorskip("shtab")
    if not (bash := shutil.which("bash")):
        pytest.skip("no bash")
    with pytest.raises(SystemExit) as stopped:
        main(["--print-completion", "bash"])
    assert stopped.value.code == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "flowers.csv").write_text("")
    (tmp_path / "flowers").mkdir()
    for typed, expected in (
        ("fastbn ", ["experiment", "info", "predict", "train"]),
        ("fastbn predict --pro", ["--proba"]),
        ("fastbn train --optimizer ", ["adam", "rmsprop", "sgd"]),
        ("fastbn train --data flow", ["flowers", "flowers.csv"]),
        ("fastbn train --out flow", ["flowers"]),
    ):
        words = typed.split(" ")
        code = f"""source ./script
COMP_WORDS=({" ".join(repr(word) for word in words)}) COMP_CWORD={len(words) - 1}
COMPREPLY=()
_shtab_fastbn
printf '%s\\n' "${{COMPREPLY[@]}}" """
        ran = subprocess.run([bash, "-c", code], capture_output=True, text=True, check=True)
        assert sorted(word.rstrip("/ ") for word in ran.stdout.split("\n") if word) == expected, typed
    assert "expected bash, zsh, tcsh" in refused(capsys, "--print-completion", "no\x1b[2J")


def test_completion_without_its_library(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    expected = 'fastbn: error: --print-completion needs shtab: pip install "fastbn[completion]"\n'
    assert refused(capsys, "--print-completion", "zsh") == expected
