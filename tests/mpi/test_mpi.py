"""Processes under mpiexec: what programs.py does with each number of ranks, and every fault, within a time."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mpi4py")

ROOT = Path(__file__).parents[2]
BESIDE_PYTHON = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
MPIEXEC = shutil.which("mpiexec", path=BESIDE_PYTHON)
RANKS = [1, 2, 3, 4, 7]
# More ranks than processors, by root, one thread each.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}  # fmt: skip
LIMIT = 120  # seconds for any program; a rank that waits in vain is an error here

pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec")


def mpiexec(size, *command, limit=LIMIT):
    """Output and standard error of these ranks, the exit status, and the time that it took."""
    started = time.monotonic()
    process = subprocess.Popen(
        [MPIEXEC, "-n", str(size), sys.executable, *map(str, command)], env=os.environ | ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"hangs after {limit} s:\n{out}\n{err}")
    return out, err, process.returncode, time.monotonic() - started


def program(size, *command, limit=LIMIT):
    """What a program of programs.py returns on rank 0."""
    out, err, status, _ = mpiexec(size, "-m", "mpi4py", Path(__file__).with_name("programs.py"), *command, limit=limit)
    assert status == 0, f"{out}\n{err}"
    return json.loads(out)


# --- the layer


@pytest.mark.parametrize("cut", ["even", "uneven"])
@pytest.mark.parametrize("size", RANKS)
def test_the_parts_are_the_whole_within_the_contract(size, cut):
    found = program(size, "agreement", cut)
    print(size, cut, found)
    assert found["y"] <= 1
    assert found["dx"] <= 1
    assert found["averages"] <= 1e-13


@pytest.mark.parametrize("size", [3, 4])
def test_the_same_number_of_ranks_has_the_same_bits(size):
    bits = program(size, "agreement", "uneven")["bits"]
    assert program(size, "agreement", "uneven")["bits"] == bits
    assert program(size, "agreement", "uneven", "sliced")["bits"] == bits


REFUSED = {
    "one in all": "ValueError: Expected more than 1 value per channel when training, got 1 on {size} ranks together",
    "channels": "ValueError: expected the same num_features on all ranks, got [4, 3",
    "dimensions": "ValueError: expected the same dimensions of x on all ranks, got [3, 2",
    "dtypes": "ValueError: expected the same bytes of an element on all ranks, got [4, 8",
    "wrong x": "RankError: rank 1 of {size} failed: ValueError: expected x with 3 features",
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("size", [2, 4])
def test_what_is_refused_is_refused_on_every_rank(size, what):
    results = program(size, "failing", what)
    print(size, what, max(took for *_, took in results))
    for rank, (said, _, took) in enumerate(results):
        own = what == "wrong x" and rank == 1
        assert said.startswith("ValueError: expected x with" if own else REFUSED[what].format(size=size))
        assert took < 5


@pytest.mark.parametrize("what", ["empty rank", "all empty", "one each", "nan"])
@pytest.mark.parametrize("size", [2, 4])
def test_what_is_taken_is_taken_on_every_rank(size, what):
    for rank, (said, (shape, finite, tracked, var), _) in enumerate(program(size, "failing", what)):
        assert said == "well"
        assert shape == [{"empty rank": 4 * (rank > 0), "all empty": 0, "one each": 1, "nan": 4}[what], 3]
        assert finite == [[True, what != "nan", True]] * 2
        assert tracked == (what != "all empty")
        assert all(math.isfinite(v) for v in var) == (what != "nan")


@pytest.mark.parametrize(
    ("what", "words"),
    [("null", "got MPI.COMM_NULL"), ("inter", "got an intercommunicator"), ("freed", "after its Free()")],
)
def test_communicators_that_cannot_do_are_refused_on_every_rank(what, words):
    in_fit = "got MPI.COMM_NULL" if what == "freed" else words
    for layer, fit in program(3, "refused", what):
        assert layer.startswith("ValueError: expected a communicator ")
        assert layer.endswith(words)
        assert fit.startswith("ValueError: expected a communicator ")
        assert fit.endswith(in_fit)


def test_an_exchange_that_is_broken_off_ends_all_ranks_and_says_why():
    _, err, status, took = mpiexec(3, "-m", "mpi4py", Path(__file__).with_name("programs.py"), "broken_off")
    assert status != 0
    assert "ZeroDivisionError: division by zero" in err
    assert took < 30


def alive(err):
    """Those of the ranks, which have said their numbers, that still run 5 seconds later."""
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", err)]
    assert pids
    ends = time.monotonic() + 5
    while pids and time.monotonic() < ends:
        states = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
        pids = [pid for pid, stat in states.items() if stat.exists() and ") Z " not in stat.read_text()]
        time.sleep(0.1)
    return pids


@pytest.mark.parametrize("what", ["kill", "error", "error while others receive"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_is_killed_or_fails_outside_the_layer_ends_all(size, what):
    _, err, status, took = mpiexec(size, "-m", "mpi4py", Path(__file__).with_name("programs.py"), "steps_until", what)
    print(size, what, took)
    assert status != 0
    assert alive(err) == []
    assert what == "kill" or "ZeroDivisionError: outside the layer" in err
    assert took < 30


# --- fit


@pytest.mark.parametrize("size", RANKS)
def test_fit_is_the_training_of_one_process(size):
    found = program(size, "fit", "float64")
    print(size, found)
    assert found["difference"] < 1e-9
    assert size != 3 or found["bits"] == program(size, "fit", "float64")["bits"]


@pytest.mark.parametrize("size", [2, 4])
def test_the_first_step_of_float32(size):
    found = program(size, "fit", "float32", "one step")
    print(size, found)
    assert found["difference"] < 2e-6


@pytest.mark.parametrize("what", ["error", "ctrl-c", "nan"])
@pytest.mark.parametrize("size", [2, 4])
def test_what_ends_fit_on_one_rank_ends_it_on_all(size, what, tmp_path):
    pytest.importorskip("safetensors")
    results = program(size, "fit_until", what, tmp_path)
    print(size, what, max(took for *_, took in results))
    words = {
        "error": f"RankError: rank {size - 1} of {size} failed: ZeroDivisionError: in the loss",
        "ctrl-c": "KeyboardInterrupt: ",
        "nan": "FloatingPointError: the loss is nan at epoch ",
    }[what]
    for rank, (said, steps, took) in enumerate(results):
        assert said.startswith("ZeroDivisionError: in the loss" if (what, rank) == ("error", size - 1) else words)
        assert took < 10
        assert steps == results[0][1]


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_of_fit_that_is_killed_ends_all(size, tmp_path):
    pytest.importorskip("safetensors")
    where = Path(__file__).with_name("programs.py")
    _, err, status, took = mpiexec(size, where, "fit_until", "kill", tmp_path)
    print(size, "kill", took)
    assert status != 0
    assert alive(err) == []
    assert took < 30


def test_the_program_of_the_documentation(tmp_path):
    for package in ("sklearn", "safetensors"):
        pytest.importorskip(package)
    page = (ROOT / "docs" / "how-to" / "several-processes.md").read_text(encoding="utf-8")
    path = tmp_path / "program.py"
    path.write_text(re.search(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1], encoding="utf-8")
    out, err, status, _ = mpiexec(2, "-m", "mpi4py", path)
    assert status == 0, err
    assert re.fullmatch(r"0\.9\d\d of the held-out digits are right\n", out)


def command(size, *arguments):
    return mpiexec(size, "-m", "fastbn", "train", "--mpi", "--epochs", 2, "--no-batchnorm", *arguments)


def test_the_command_line_prints_and_writes_on_rank_0_alone(tmp_path):
    for package in ("sklearn", "safetensors", "matplotlib"):
        pytest.importorskip(package)
    found = {}
    for size in (1, 2):
        out, err, status, _ = command(size, "--out", tmp_path / str(size))
        assert status == 0, err
        assert out.count("held-out data, running averages") == 1
        assert err.count("wrote ") == 1
        names = {path.name for path in (tmp_path / str(size)).iterdir()}
        assert names == {"model.safetensors", "metrics.json", "learning-curves.png", "confusion.png"}
        metrics = json.loads((tmp_path / str(size) / "metrics.json").read_text())
        found[size] = metrics["held_out"]["without batch normalization"]["loss"]
    np.testing.assert_allclose(found[1], found[2], rtol=1e-4)


def test_the_command_line_goes_on_with_another_number_of_ranks(tmp_path):
    """After Ctrl-C on rank 1, in the fifth step of a training that would take hours."""
    for package in ("sklearn", "safetensors", "matplotlib"):
        pytest.importorskip(package)
    where, arguments = Path(__file__).with_name("programs.py"), ("--no-batchnorm", "--out", tmp_path / "out")
    out, err, status, _ = mpiexec(2, where, "interrupted_command", "--epochs", 10**6, *arguments)
    assert status == 130
    assert out.count("held-out data") == 0
    assert err.count("fastbn: interrupted: the same command with --resume goes on where it stopped") == 1
    out, err, status, _ = command(3, *arguments, "--resume")
    assert status == 0, err
    assert out.count("held-out data") == 1
    assert not list((tmp_path / "out").glob("unfinished*"))


def test_ctrl_c_while_rank_0_writes_is_ctrl_c_on_all(tmp_path):
    for package in ("sklearn", "safetensors", "matplotlib"):
        pytest.importorskip(package)
    where = Path(__file__).with_name("programs.py")
    arguments = "interrupted_at_the_end", "--no-batchnorm", "--epochs", 1, "--out", tmp_path / "out"
    out, err, status, _ = mpiexec(3, where, *arguments)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1]) == [130, 130, 130]
    assert err.count("fastbn: interrupted: the same command with --resume goes on where it stopped") == 1


@pytest.mark.parametrize("wrong", [["--epochs", 0], ["--quiet"], ["--help"]], ids=str)
def test_what_argparse_says_is_said_once(wrong):
    out, err, status, _ = command(3, *wrong)
    assert status == (0 if wrong == ["--help"] else 2)
    assert (out + err).count("usage: fastbn") == 1


def test_mpi4py_without_mpi():
    run = subprocess.run(
        [sys.executable, "-m", "fastbn", "train", "--mpi"], capture_output=True, text=True,
        env=os.environ | ENVIRONMENT | {"MPI4PY_LIBMPI": os.devnull},
    )  # fmt: skip
    assert run.returncode == 2
    assert re.fullmatch(r"fastbn: error: --mpi needs MPI: pip install mpich \(.*\)\n", run.stderr)


@pytest.mark.parametrize("wrong", [["--data", "nowhere.csv"], ["--out", os.devnull]], ids=" ".join)
def test_an_error_of_the_command_line_is_printed_once(wrong, tmp_path):
    pytest.importorskip("safetensors")
    pytest.importorskip("matplotlib")
    out, err, status, took = command(3, "--out", tmp_path / "out", *wrong)
    assert status == 2
    assert out == ""
    assert err.count("fastbn: error: ") == 1
    assert "Traceback" not in err
    assert took < 60
    assert not (tmp_path / "out").exists()


def test_a_training_goes_on_with_the_same_and_with_another_number_of_ranks(tmp_path):
    pytest.importorskip("safetensors")
    for folder, size, dropout in (("whole", 3, 0.3), ("whole too", 2, 0), ("cut", 3, 0.3), ("other", 3, 0)):
        (tmp_path / folder).mkdir()
        if folder in ("cut", "other"):
            mpiexec(size, where := Path(__file__).with_name("programs.py"), "stops", tmp_path / folder, dropout, 8)
            assert where.exists()
    whole = program(3, "goes_on", tmp_path / "whole", 0.3)
    assert program(3, "goes_on", tmp_path / "cut", 0.3) == whole
    other = program(2, "goes_on", tmp_path / "whole too", 0)
    np.testing.assert_allclose(program(2, "goes_on", tmp_path / "other", 0)["loss"], other["loss"], rtol=1e-9)
