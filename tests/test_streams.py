"""Standard output and error that are closed, full, or a pipe whose reader has gone."""

import errno
import os
import sys

import numpy as np
import pytest

from fastbn import checkpoint, nn, plots
from fastbn.__main__ import main

pytest.importorskip("safetensors")
METADATA = {"classes": ["no", "yes"], "inputs": 2, "columns": None, "data": "d.npz"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "learning_curves", lambda *_: None)
    monkeypatch.setattr(plots, "confusion", lambda *_: None)
    rng = np.random.default_rng(0)
    np.savez("d.npz", X=rng.normal(size=(40, 2)), y=np.array(["no", "yes"] * 20))
    checkpoint.save("model.safetensors", nn.Sequential(nn.Dense(2, 2, seed=0)), metadata=METADATA)
    return tmp_path


PREDICT = ["predict", "model.safetensors", "d.npz"]
TRAIN = ["train", "--data", "d.npz", "--epochs", "1", "--hidden", "4", "--out", "run"]
WRITTEN = ["metrics.json", "model.safetensors"]
SAID = {
    "train": """d.npz: 32 training examples, 8 held out, 2 features, 2 classes
--task auto: classification, since the target holds 2 different labels
inputs standardized, column by column
"""
}


class Unwritable:
    """A text stream of which every flush fails, as /dev/full's."""

    def __init__(self, code, descriptor, buffered=True):
        self.code, self.descriptor, self.buffered, self.lines = code, descriptor, buffered, []

    def write(self, text):
        self.lines.append(text)
        if not self.buffered:
            self.flush()

    def flush(self):
        if self.lines:
            raise OSError(self.code, os.strerror(self.code))

    def fileno(self):
        return self.descriptor


@pytest.fixture
def spare():
    """A file descriptor of which it does not matter where it leads."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("arguments", [PREDICT, TRAIN, ["info"], ["--help"], ["train", "--help"], ["--version"]])
def test_a_reader_that_has_gone(folder, monkeypatch, capfd, spare, arguments):
    monkeypatch.setattr(sys, "stdout", Unwritable(errno.EPIPE, spare))
    assert main(arguments) == 141  # as a shell sees a program that SIGPIPE ends
    assert capfd.readouterr().err == SAID.get(arguments[0] * (len(arguments) > 2), "")
    assert not (folder / "run").exists()


@pytest.mark.parametrize("arguments", [PREDICT, TRAIN, ["info"], ["--help"]])
def test_a_full_standard_output_is_named(folder, monkeypatch, capfd, spare, arguments):
    monkeypatch.setattr(sys, "stdout", Unwritable(errno.ENOSPC, spare))
    assert main(arguments) == 2
    error = f"fastbn: error: [Errno {errno.ENOSPC}] No space left on device: 'standard output'\n"
    assert capfd.readouterr().err == SAID.get(arguments[0], "") + error
    assert not (folder / "run").exists()


def test_a_reader_that_goes_before_the_results_leaves_whole_files(folder, monkeypatch, spare):
    stream = Unwritable(errno.EPIPE, spare)
    write = stream.write
    stream.write = lambda text: write(text) if "held-out data" in text else None
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(TRAIN) == 141
    assert sorted(path.name for path in (folder / "run").iterdir()) == WRITTEN


@pytest.mark.parametrize("arguments", [PREDICT, ["predict", "model.safetensors", "none.npz"], ["train", "--lr", "x"]])
def test_a_standard_error_that_nobody_reads(folder, monkeypatch, capfd, spare, arguments):
    monkeypatch.setattr(sys, "stderr", Unwritable(errno.EPIPE, spare, buffered=False))
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == (141 if arguments is PREDICT else 2)
    assert len(capfd.readouterr().out.split()) == (40 if arguments is PREDICT else 0)


@pytest.mark.parametrize(("arguments", "status"), [(PREDICT, 2), (TRAIN, 0), (["info"], 2)])
def test_a_closed_standard_output(folder, monkeypatch, capfd, arguments, status):
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `>&-`
    assert main(arguments) == status
    if status == 2:
        assert capfd.readouterr().err == "fastbn: error: standard output is closed\n"
    if arguments is TRAIN:
        assert sorted(path.name for path in (folder / "run").iterdir()) == WRITTEN


def test_a_closed_standard_error_does_not_print_among_the_labels(folder, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(PREDICT) == 0
    assert set(capfd.readouterr().out.split()) <= {"no", "yes"}
    assert main(["predict", "model.safetensors", "none.npz"]) == 2
    assert capfd.readouterr().out == ""


def test_all_of_it_closed_by_a_shell(folder, python):
    """In a process of its own: files of ours would get the numbers 0 to 2."""
    code = "import os, sys; os.closerange(0, 3); os.execv(sys.executable, sys.argv[1:])"
    noisy = """
import os, sys
from fastbn import plots
from fastbn.__main__ import main

def draw(histories, path):
    with open(path, "wb") as file:
        for descriptor in (0, 1, 2):
            os.write(descriptor, b"what a library prints")
        file.write(b"drawn")

plots.learning_curves = draw
plots.confusion = lambda *_: None
sys.exit(main(sys.argv[1:]))
"""
    ran = python("-c", code, sys.executable, "-c", noisy, *TRAIN)
    assert ran.returncode == 0
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["learning-curves.png", *WRITTEN]
    assert (folder / "run" / "learning-curves.png").read_bytes() == b"drawn"
    checkpoint.load(folder / "run" / "model.safetensors")


def test_a_pipe_without_a_reader_and_pythons_own_exit(folder, python):
    """Python flushes once more at exit, and would end with a status of its own."""
    code = "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.execv(sys.executable, sys.argv[1:])"
    ran = python("-c", code, sys.executable, "-m", "fastbn", *PREDICT, PYTHONUNBUFFERED="")
    assert (ran.returncode, ran.stderr) == (141, "")
