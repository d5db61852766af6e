import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from test_data import write_idx

import fastbn
from fastbn import checkpoint, nn, optim, plots, training
from fastbn.__main__ import main
from fastbn.kernels import machine

for package in ("safetensors", "matplotlib", "sklearn"):
    pytest.importorskip(package)

FILES = ["confusion.png", "learning-curves.png", "metrics.json", "model.safetensors"]


def run(capsys, *arguments):
    status = main(list(map(str, arguments)))
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def refused(capsys, *arguments):
    """The one sentence that a command which fails ends with, after what it said before, or the usage of argparse."""
    try:
        status, _, err = run(capsys, *arguments)
        *said, err = err.splitlines(keepends=True)
        assert not any(line.startswith(("fastbn: ", "Traceback")) for line in said)
    except SystemExit as stop:
        status, err = stop.code, capsys.readouterr().err
        assert err.startswith("usage: fastbn ")
        err = "fastbn: " + err.splitlines(keepends=True)[-1].split(": ", 1)[1]
    assert status == 2
    assert err.startswith("fastbn: error: ")
    assert err.endswith("\n")
    return err


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """Pictures that are not drawn, except where they are looked at: they take longer than these trainings."""
    if request.node.name not in (
        "test_default_training_on_the_digits",
        "test_learning_curves_of_a_regression_and_of_nothing",
    ):
        monkeypatch.setattr(plots, "learning_curves", lambda histories, path, *_: path.write_bytes(b"\x89PNG"))
        monkeypatch.setattr(plots, "confusion", lambda counts, labels, path: path.write_bytes(b"\x89PNG"))


KINDS = np.array(["rose", "lily", "aster"])[np.arange(90) % 3]


def plant(folder):
    """A .csv of three kinds, and the same without its labels."""
    X = np.random.default_rng(0).normal(size=(90, 4)) + 4 * np.eye(3, 4)[np.arange(90) % 3]
    labelled = [f"{a:.4f},{b:.4f},{kind},{c:.4f},{d:.4f}\n" for (a, b, c, d), kind in zip(X, KINDS, strict=True)]
    (folder / "flowers.csv").write_text("a,b,kind,c,d\n" + "".join(labelled))
    (folder / "plain.csv").write_text("a,b,c,d\n" + "".join(f"{a:.4f},{b:.4f},{c:.4f},{d:.4f}\n" for a, b, c, d in X))


@pytest.fixture
def flowers(tmp_path):
    plant(tmp_path)
    return tmp_path, KINDS


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flowers")
    plant(folder)
    assert main(["train", "--data", str(folder / "flowers.csv"), "--target", "kind", "--out", str(folder / "run"),
                 "--hidden", "8", "--epochs", "5", "--lr", "0.05", "--batch-size", "16"]) == 0  # fmt: skip
    return folder / "run" / "model.safetensors"


@pytest.fixture
def model(flowers, trained, capsys):
    """A model of these flowers, trained once."""
    capsys.readouterr()
    (flowers[0] / "run").mkdir()
    return shutil.copy(trained, flowers[0] / "run")


def test_default_training_on_the_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "train")
    assert status == 0
    assert err.splitlines() == [
        "digits: 1438 training examples, 359 held out, 64 features, 10 classes",
        "--task auto: classification, since the target holds 10 different labels",
        "inputs standardized, by the mean of each pixel and one scale for all",
        "training with batch normalization",
        "training without batch normalization",
        "wrote " + ", ".join(f"fastbn-run{os.sep}{name}" for name in (*FILES[:0:-1], FILES[0])),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fastbn-run"]
    assert sorted(path.name for path in (tmp_path / "fastbn-run").iterdir()) == FILES
    metrics = json.loads((tmp_path / "fastbn-run" / "metrics.json").read_text())
    rows = metrics["held_out"]
    assert rows["with batch normalization"]["accuracy"] >= 0.97
    for name, row in rows.items():
        assert any(line.startswith(name) and f"{row['accuracy']:.2%}" in line for line in out.splitlines())
        assert len(metrics["epochs"][name]["val_accuracy"]) == 20
        assert metrics["epochs"][name]["val_accuracy"][-1] == row["accuracy"]
    alone = metrics["one_at_a_time"]
    assert alone["examples"] == metrics["held_out_examples"] == 359
    assert alone["other_predictions"] == 0
    assert alone["largest_difference"] < 1e-4
    assert "one example at a time agrees with the batch: 359 examples" in out
    assert "same predictions" in out
    for name in FILES[:2]:
        picture = (tmp_path / "fastbn-run" / name).read_bytes()
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        assert min(struct.unpack(">II", picture[16:24])) > 400

    status, out, err = run(capsys, "predict", tmp_path / "fastbn-run" / "model.safetensors", "digits")
    from sklearn.datasets import load_digits

    right = np.sum(np.array(out.split(), int) == load_digits().target)
    assert err == f"accuracy {right / 1797:.2%}, {right} of 1797, examples it was trained on among them\n"
    assert status == 0
    assert right > 1750


def test_the_twins_differ_in_batch_normalization_alone(tmp_path, capsys):
    kinds = {}
    for activation in ("relu", "leaky_relu", "sigmoid", "tanh"):
        options = ("--activation", activation, "--hidden", "6,5", "--epochs", "1", "--seed", "4")
        for more in ((), ("--no-batchnorm",)):
            assert run(capsys, "train", "--out", tmp_path / "run", *options, *more)[0] == 0
            inputs, *layers = checkpoint.load(tmp_path / "run" / "model.safetensors")
            assert isinstance(inputs, nn.Standardize)
            kinds[activation, bool(more)] = [type(layer).__name__ for layer in layers]
            dense = [layer for layer in layers if isinstance(layer, nn.Dense)]
            biased = bool(more)
            assert [(d.n_in, d.n_out, d.bias) for d in dense] == [(64, 6, biased), (6, 5, biased), (5, 10, True)]
            assert {layer.config()["activation"] for layer in layers if isinstance(layer, fastbn.BatchNorm)} <= {
                activation if activation.endswith("relu") else None
            }
    for fused in ("relu", "leaky_relu"):
        assert kinds[fused, False] == ["Dense", "BatchNorm", "Dense", "BatchNorm", "Dense"]
    assert kinds["tanh", False] == ["Dense", "BatchNorm", "Tanh"] * 2 + ["Dense"]
    assert kinds["leaky_relu", True] == ["Dense", "LeakyReLU"] * 2 + ["Dense"]
    assert kinds["sigmoid", True] == ["Dense", "Sigmoid"] * 2 + ["Dense"]


def test_twins_start_alike_and_see_the_same_batches(flowers, capsys, monkeypatch):
    folder, _ = flowers
    seen = []

    def fit(model, data, loss, optimizer, **options):
        weights = {key: array for key, array in model.state_dict().items() if array.ndim == 2}
        seen.append((list(weights.values()), data, options, optimizer))
        return training_fit(model, data, loss, optimizer, **options)

    training_fit = training.fit
    monkeypatch.setattr(training, "fit", fit)
    assert run(capsys, "train", "--data", folder / "flowers.csv", "--target", "kind", "--out", folder / "run",
               "--optimizer", "sgd", "--lr", "0.25", "--momentum", "0.5", "--batch-size", "7", "--epochs", "2",
               "--bn-momentum", "0.3", "--seed", "11")[0] == 0  # fmt: skip
    (first, data, options, optimizer), (second, *_, other) = seen
    assert seen[1][1][0] is data[0]
    assert [str(chosen.pop("checkpoint").name) for chosen in (options, seen[1][2])] == [
        "unfinished-with.safetensors", "unfinished-without.safetensors",
    ]  # fmt: skip
    assert seen[1][2] == options
    assert (options["seed"], options["batch_size"], options["epochs"]) == (11, 7, 2)
    assert len(first) == len(second) == 3
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert (optimizer.lr, optimizer.momentum) == (other.lr, other.momentum) == (0.25, 0.5)
    assert checkpoint.load(folder / "run" / "model.safetensors")[2].momentum == 0.3


def test_predict_prints_the_original_labels(flowers, model, capsys):
    folder, kinds = flowers
    status, out, err = run(capsys, "predict", model, folder / "plain.csv")
    assert (status, err) == (0, "")
    right = np.sum(np.array(out.splitlines()) == kinds)
    assert right > 80
    status, labelled, err = run(capsys, "predict", model, folder / "flowers.csv", "--target", "kind")
    assert labelled == out
    assert err.startswith(f"accuracy {right / 90:.2%}, {right} of 90")


def test_labels_that_are_numbers_in_one_file_and_texts_in_another(tmp_path, capsys):
    rows = [f"{k + i / 100},{kind}\n" for i in range(30) for k, kind in enumerate(["10", "x"])]
    (tmp_path / "both.csv").write_text("a,kind\n" + "".join(rows))
    (tmp_path / "one.csv").write_text("a,kind\n" + "".join(rows[::2]))
    target = ("--target", "kind")
    assert run(capsys, "train", "--data", tmp_path / "both.csv", *target, "--out", tmp_path / "run", "--hidden", "8",
               "--epochs", "15", "--lr", "0.02")[0] == 0  # fmt: skip
    status, out, err = run(capsys, "predict", tmp_path / "run" / "model.safetensors", tmp_path / "one.csv", *target)
    assert (status, out) == (0, "10\n" * 30)
    assert err.startswith("accuracy 100.00%, 30 of 30")


def test_predict_refuses(flowers, model, capsys, tmp_path):
    folder, _ = flowers
    (folder / "narrow.csv").write_text("a,b,c\n1,2,3\n")
    np.savez(folder / "wide.npz", X=np.ones((2, 5)))
    checkpoint.save(folder / "bare", nn.ReLU())
    for name, fault in (
        ("narrow.csv", "narrow.csv: expected one column called 'd', got the columns a, b, c"),
        ("wide.npz", "wide.npz: expected 4 features, as in flowers.csv, got 5\n"),
        ("none.csv", "no such file or folder: "),
    ):
        assert fault in refused(capsys, "predict", model, folder / name)
    (folder / "other.csv").write_text("a,b,kind,c,d\n1,2,rose,3,4\n1,2,tulip,3,4\n")
    unseen = refused(capsys, "predict", model, folder / "other.csv", "--target", "kind")
    assert "other.csv: label 'tulip' was not seen in training, expected one of aster, lily, rose\n" in unseen
    for name, fault in (
        ("none", "no such file: "),
        ("plain.csv", "plain.csv: not a safetensors file"),
        ("bare", "a model that fastbn train wrote"),
    ):
        assert fault in refused(capsys, "predict", folder / name, folder / "plain.csv")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--data", "none.npz"], "no such file or folder: none.npz"),
        (
            ["--data", "flowers.csv"],
            "got 'rose' (target='kind' (--target kind) takes the column as labels, ignore=['kind'] (--ignore kind) le",
        ),
        (["--data", "plain.csv"], "no labels to learn: name their column with --target, one of a, b, c, d"),
        (["--data", "flowers.csv", "--target", "x"], "expected one column called 'x'"),
        (["--data", "unlabelled.npz"], "unlabelled.npz: no labels to learn"),
        (["--data", "bare.csv", "--no-header"], "no labels to learn: name their column with --target, one of 1 to 2"),
        (["--target", "kind"], "a target column is for tables such as .csv files, got the digits"),
        (["--batch-size", "1"], "argument --batch-size: expected a whole number of at least 2, got '1'"),
        (["--epochs", "0"], "argument --epochs: expected a whole number of at least 1, got '0'"),
        (["--epochs", "1_0"], "argument --epochs: expected a whole number of at least 1, got '1_0'"),
        (["--lr", "-1"], "argument --lr: expected a number above 0, got '-1'"),
        (["--lr", "nan"], "argument --lr: expected a number above 0, got 'nan'"),
        (["--lr", "\u0663"], "argument --lr: expected a number above 0, got '\u0663'"),
        (["--seed", "-1"], "argument --seed: expected a whole number of at least 0, got '-1'"),
        (["--patience", "0"], "argument --patience: expected a whole number of at least 1"),
        (["--clip-norm", "0"], "argument --clip-norm: expected a number above 0"),
        (["--bn-momentum", "inf"], "argument --bn-momentum: expected a number from 0 to 1, got 'inf'"),
        (["--bn-momentum", "1.5"], "argument --bn-momentum: expected a number from 0 to 1, got '1.5'"),
        (["--optimizer", "sgd", "--momentum", "1.5"], "argument --momentum: expected a number from 0 to below 1"),
        (["--hidden", "1000000000000"], "not enough memory"),
        (["--momentum", "0.5"], "argument --momentum: for --optimizer sgd alone, got adam"),
        (["--optimizer", "sgd", "--lr", "1e30"], "with batch normalization, the loss is"),
        (["--out", "flowers.csv"], "flowers.csv is not a folder"),
        (["--out", "flowers.csv/run"], "flowers.csv is not a folder"),
    ],
)
def test_a_failed_training_writes_nothing(flowers, monkeypatch, capsys, arguments, fault):
    folder, _ = flowers
    monkeypatch.chdir(folder)
    np.savez("unlabelled.npz", X=np.ones((4, 4)))
    (folder / "bare.csv").write_text("1,2\n3,4\n")
    (folder / "fastbn-run").mkdir()
    (folder / "fastbn-run" / "model.safetensors").write_text("precious")
    before = sorted(folder.rglob("*"))
    assert fault in refused(capsys, "train", *arguments)
    assert sorted(folder.rglob("*")) == before
    assert (folder / "fastbn-run" / "model.safetensors").read_text() == "precious"


def test_a_twin_that_diverges_is_reported(flowers, capsys, monkeypatch):
    folder, _ = flowers
    fit = training.fit

    def diverge(model, *arguments, **options):
        if not any(isinstance(layer, fastbn.BatchNorm) for layer in model):
            raise FloatingPointError("the loss is nan at epoch 1, step 2")
        return fit(model, *arguments, **options)

    monkeypatch.setattr(training, "fit", diverge)
    command = ("train", "--data", folder / "flowers.csv", "--target", "kind", "--out", folder / "run", "--epochs", "2")
    status, out, _ = run(capsys, *command)
    assert status == 0
    assert "without batch normalization     diverged: the loss is nan at epoch 1, step 2" in out
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["held_out"]["without batch normalization"] == {"diverged": "the loss is nan at epoch 1, step 2"}
    assert "without batch normalization, the loss is nan" in refused(capsys, *command, "--no-batchnorm")


def deterministic(folder):
    """What a training wrote, but for the times."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for row in (*metrics["held_out"].values(), *metrics["epochs"].values()):
        row.pop("seconds")
    model = checkpoint.load(folder / "model.safetensors")
    return metrics, repr(model), {key: array.tobytes() for key, array in model.state_dict().items()}


MORE = ("--schedule", "cosine", "--clip-norm", "0.5", "--epochs", "4", "--hidden", "8")


@pytest.mark.parametrize(
    ("at", "left"),
    [
        (2, ["unfinished-with.safetensors", "unfinished.json"]),
        (14, ["unfinished-with.safetensors", "unfinished-without.safetensors", "unfinished.json"]),
    ],
)
def test_an_interrupted_training_is_resumed(flowers, capsys, monkeypatch, at, left):
    folder, _ = flowers
    command = ("train", "--data", folder / "flowers.csv", "--target", "kind", *MORE)
    assert run(capsys, *command, "--out", folder / "whole")[0] == 0
    step, done = optim.Adam.step, []

    def pressing(optimizer):
        done.append(1)
        if len(done) == at:
            signal.raise_signal(signal.SIGINT)
        step(optimizer)

    monkeypatch.setattr(optim.Adam, "step", pressing)
    status, _, err = run(capsys, *command, "--out", folder / "run")
    assert status == 130
    assert err.splitlines()[-1] == "fastbn: interrupted: the same command with --resume goes on where it stopped"
    assert sorted(path.name for path in (folder / "run").iterdir()) == left
    if "unfinished-without.safetensors" in left:
        assert checkpoint.load(folder / "run" / left[0])[1].num_batches_tracked == 4 * 3
    again = refused(capsys, *command, "--out", folder / "run")
    for name in left[:-1]:
        assert name in again
    it = "them" if left[2:] else "it"
    assert f"the same command with --resume goes on with it; to begin anew, delete {it} or give another --out" in again
    for option, was, now in (
        ("seed", "0", "3"), ("hidden", "8", "8,4"), ("activation", "relu", "tanh"), ("lr", "not given", "0.5"),
        ("clip-norm", "0.5", "0.25"), ("patience", "not given", "3"), ("no-batchnorm", "not given", "given"),
    ):  # fmt: skip
        given = [f"--{option}"] if now == "given" else [f"--{option}", now]
        different = refused(capsys, *command, "--out", folder / "run", "--resume", *given)
        expected = f"--resume needs the options of the interrupted training, --{option} was {was}, is {now}\n"
        assert different.endswith(f"unfinished.json: {expected}")
    (folder / "run" / "unfinished.json").unlink()
    different = refused(capsys, *command, "--out", folder / "run", "--resume", "--seed", "3")
    assert "unfinished-with.safetensors: cannot be loaded: it is of another run, seed was 0, is 3" in different
    left = left[:-1]
    assert sorted(path.name for path in (folder / "run").iterdir()) == left
    assert run(capsys, *command, "--out", folder / "run", "--resume")[0] == 0
    assert sorted(path.name for path in (folder / "run").iterdir()) == FILES
    assert deterministic(folder / "run") == deterministic(folder / "whole")


def test_nothing_is_left_of_a_training_that_never_began(flowers, capsys):
    folder, _ = flowers
    command = ("train", "--data", folder / "flowers.csv", "--target", "kind", "--out", folder / "run")
    assert "argument --epochs: expected" in refused(capsys, *command, "--epochs", "0")
    assert "the loss is" in refused(capsys, *command, "--optimizer", "sgd", "--lr", "1e30", "--clip-norm", "1e30")
    assert not (folder / "run").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a single process")
def test_ctrl_c_from_outside(flowers):
    folder, _ = flowers
    command = [sys.executable, "-m", "fastbn", "train", "--data", folder / "flowers.csv", "--target", "kind",
               "--out", folder / "run", "--epochs", "100000"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "run" / "unfinished-with.safetensors").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        try:
            err = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "fastbn: interrupted: the same command with --resume goes on where it stopped"


def test_patience_leaves_the_held_out_data_alone(flowers, capsys, monkeypatch):
    folder, _ = flowers
    command = ("train", "--data", folder / "flowers.csv", "--target", "kind", "--out", folder / "run", "--lr", "0.05")
    seen = []
    fit = training.fit
    monkeypatch.setattr(
        training, "fit", lambda *a, **options: seen.append((a[1], options["validation"])) or fit(*a, **options)
    )
    assert run(capsys, *command, "--patience", "2", "--epochs", "200")[0] == 0
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    for history in metrics["epochs"].values():
        best = int(np.argmin(history["val_loss"])) + 1
        assert len(history["loss"]) == best + 2 < 200
    for (X, _), (held_X, held_y) in seen:
        assert len(X) + len(held_X) == metrics["training_examples"]
        assert len(held_X) == len(held_y) == 3 * round(metrics["training_examples"] / 3 / 10)  # of every class


def test_idx_folder_is_judged_by_its_own_test_part(tmp_path, capsys):
    folder = tmp_path / "pixels"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, n in (("train", 60), ("t10k", 21)):
        y = (np.arange(n) % 3 + 5).astype(np.uint8)
        images = rng.integers(0, 60, (n, 3, 3), dtype=np.uint8)
        images[np.arange(n), 0, y - 5] += 180
        for name, array in (("images-idx3", images), ("labels-idx1", y)):
            write_idx(folder / f"{part}-{name}-ubyte.gz", array)
    command = (
        "train",
        "--data",
        folder,
        "--out",
        tmp_path / "run",
        "--epochs",
        "10",
        "--lr",
        "0.01",
        "--batch-size",
        "16",
    )
    status, _, err = run(capsys, *command)
    assert status == 0
    assert "pixels: 60 training examples, 21 held out, 9 features, 3 classes\n" in err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    accuracy = metrics["held_out"]["with batch normalization"]["accuracy"]
    assert accuracy > 0.9
    status, out, err = run(capsys, "predict", tmp_path / "run" / "model.safetensors", folder)
    assert len(out.split()) == 21
    assert set(out.split()) == {"5", "6", "7"}
    assert err == f"accuracy {accuracy:.2%}, {round(21 * accuracy)} of 21\n"


def test_missing_extras_are_said_before_the_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "fit", None)
    for package in ("matplotlib", "safetensors", "sklearn"):
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda name, missing=package: None if name == missing else name)
            err = refused(capsys, "train", "--out", tmp_path / "run")
        assert f" {package}: pip install" in err
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sklearn.datasets", None)
        assert "the digits data need scikit-learn: pip install" in refused(capsys, "train", "--out", tmp_path / "run")


@pytest.mark.parametrize("text", ["", "10,", "a", "10,0", "-5"])
def test_widths_that_are_none(capsys, text):
    with pytest.raises(SystemExit) as stop:
        main(["train", f"--hidden={text}"])
    assert stop.value.code == 2
    assert "expected widths such as 100,100" in capsys.readouterr().err


def test_info_version_and_module(capsys):
    assert run(capsys, "info")[0] == 0
    fastbn.show_config()
    config = capsys.readouterr().out
    ran = subprocess.run([sys.executable, "-m", "fastbn", "info"], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[0] == config.splitlines()[0]
    # Every setting in force has a line of its own, a size its unit, and all values begin in one column.
    assert len({re.match(r"  \w+ +", line).end() for line in config.splitlines() if line.startswith("  ")}) == 1
    for name, number in machine.get_settings().items():
        assert re.search(rf"^  {name} +\S", config, re.MULTILINE), name
        if number % 2**10 == 0 < number < 2**20 and name.endswith("_bytes"):
            assert re.search(rf"^  {name} +{number >> 10} KB$", config, re.MULTILINE), name
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastbn {fastbn.__version__}\n"
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


def test_a_full_disk_is_one_sentence_that_names_the_place(flowers, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder, _ = flowers
    options = ["--data", folder / "flowers.csv", "--target", "kind", "--out", folder / "run", "--epochs", 1]
    with monkeypatch.context() as patch:
        patch.setattr(plots, "learning_curves", full)
        assert refused(capsys, "train", *options).endswith(f"{os.strerror(errno.ENOSPC)}: {str(folder / 'run')!r}\n")
    assert run(capsys, "train", *options, "--resume")[0] == 0


def test_an_empty_out_is_no_folder(flowers, capsys, monkeypatch):
    folder, _ = flowers
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data", "flowers.csv", "--target", "kind", "--out", ""])
    assert stopped.value.code == 2
    assert "expected a folder, got ''" in capsys.readouterr().err


def test_learning_curves_of_a_regression_and_of_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its state is the program's, not ours
    history = training.History(loss=[3.0, 1.0], val_loss=[2.0, 1.5], seconds=[0.1, 0.1])
    plots.learning_curves({"one": history, "two": training.History(loss=[1.0])}, tmp_path / "curves")
    assert (tmp_path / "curves").read_bytes().startswith(b"\x89PNG")
    for histories in ({}, {"none": training.History()}):
        with pytest.raises(ValueError, match="no epochs to draw"):
            plots.learning_curves(histories, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"classes": ["a"]}, {"classes": 5}, {"classes": ["a", {}]}, {"classes": ["a", None]}, {"columns": 7},
        *({"inputs": inputs} for inputs in (4.0, "4", None, [4], True, -4, 600_000_000, 10**30)),
    ],
)  # fmt: skip
def test_a_model_whose_metadata_do_not_fit(flowers, monkeypatch, capsys, wrong):
    monkeypatch.chdir(flowers[0] if isinstance(flowers, tuple) else flowers)
    metadata = {"classes": ["a", "b"], "inputs": 4, "columns": None, "data": "x"} | wrong
    checkpoint.save("wrong.safetensors", nn.Sequential(nn.Dense(4, 2)), metadata=metadata)
    assert main(["predict", "wrong.safetensors", "unlabelled.npz"]) == 2
    assert "wrong.safetensors: expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layers", "wrong", "fault"),
    [
        ([nn.Standardize(4), nn.Dense(4, 2)], {}, "cannot be used: Standardize needs the statistics"),
        ([nn.Dense(4, 3), nn.Dense(2, 2)], {}, "cannot be used: Dense expected x"),
        ([nn.Dense(4, 1)], {"classes": None, "target": {"mean": 0.0, "mean_low": 0.0, "std": 1e308}},
         "expected labels, or"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_used(tmp_path, monkeypatch, capsys, layers, wrong, fault):
    monkeypatch.chdir(tmp_path)
    np.savez("d.npz", X=np.ones((1, 4)))
    metadata = {"classes": ["a", "b"], "inputs": 4, "columns": None, "data": "x"} | wrong
    checkpoint.save("wrong.safetensors", nn.Sequential(*layers), metadata=metadata)
    assert main(["predict", "wrong.safetensors", "d.npz"]) == 2
    assert f"wrong.safetensors: {fault}" in capsys.readouterr().err
