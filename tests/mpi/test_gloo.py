"""Processes of torch.distributed: two, on the backend for CPUs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastbn
from fastbn.distributed import Gloo

pytest.importorskip("torch")

PROGRAM = """
import datetime, json, os, signal, sys, time
import numpy as np
import torch.distributed as dist
from fastbn import BatchNorm, losses, nn, optim, ranks, training
from fastbn.distributed import Gloo, SyncBatchNorm, convert

rank, size, store, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size,
                        timeout=datetime.timedelta(seconds=60))
X = np.random.default_rng(0).standard_normal((100, 4))
y = (X[:, 0] > 0).astype(int)
assert Gloo() == Gloo()


def trained(comm, loss=losses.softmax_cross_entropy):
    model = nn.Sequential(nn.Dense(4, 8, bias=False, seed=0, dtype="float64"), BatchNorm(8, dtype="float64"), nn.ReLU(),
                          nn.Dense(8, 2, seed=1, dtype="float64"))
    if comm is not None:
        convert(model, comm)
    training.fit(model, (X, y), loss, optim.SGD(model, 0.1), epochs=2, batch_size=16, progress=False, comm=comm)
    return {k: v.tolist() for k, v in model.state_dict().items()}


def fails():
    layer = SyncBatchNorm(4, comm=Gloo())
    for step in range(10**9):
        if step == 3 and rank == 1:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "broken off":
                real = layer.group.comm.allgather
                def broken_off(array):
                    real(array)
                    raise KeyboardInterrupt
                layer.group.comm.allgather = broken_off
            if what == "error":
                raise ZeroDivisionError("outside the layer")
        layer(X[rank::size])


started = time.perf_counter()
try:
    if what.startswith("fit"):
        if what == "fit sliced":  # which few numbers are not
            ranks.SLICED_FROM = 0
        result = trained(Gloo())
        if rank == 0:
            result = [result, trained(None)]
    elif what in ("loss", "kill in fit"):
        calls = []
        def loss(prediction, target):
            calls.append(None)
            if rank == 1 and len(calls) == 5:
                if what == "kill in fit":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ZeroDivisionError("in the loss")
            return losses.softmax_cross_entropy(prediction, target)
        result = trained(Gloo(), loss)
    else:
        result = fails()
except BaseException as error:
    result = f"{type(error).__name__}: {error}"
print(json.dumps([result, time.perf_counter() - started]))
"""


def processes(what, folder, size=2):
    """What each of the processes prints; None of one that was killed."""
    root = {"PYTHONPATH": str(Path(fastbn.__file__).parents[1]), "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-c", PROGRAM]
    running = [
        subprocess.Popen([*command, str(rank), str(size), str(folder / "store"), what], env=root, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(size)
    ]  # fmt: skip
    try:
        outs = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    print(outs)
    return [json.loads(out) if out else None for out, _ in outs]


@pytest.mark.parametrize("what", ["fit", "fit sliced"])
def test_two_processes_are_one(what, tmp_path):
    (together, alone), other = (result for result, _ in processes(what, tmp_path))
    assert other == together
    for name, values in alone.items():
        np.testing.assert_allclose(together[name], values, rtol=1e-9, atol=1e-12)


def test_an_error_on_one_process_ends_both(tmp_path):
    (here, _), (there, _) = processes("loss", tmp_path)
    assert here.startswith("RankError: rank 1 of 2 failed: ZeroDivisionError: ")
    assert there.startswith("ZeroDivisionError: ")


@pytest.mark.parametrize("what", ["kill", "kill in fit", "error", "broken off"])
def test_a_process_that_is_gone_ends_the_other(what, tmp_path):
    (here, took), there = processes(what, tmp_path)
    assert "RuntimeError" in here
    assert took < 10
    expected = {
        "kill": None,
        "kill in fit": None,
        "error": "ZeroDivisionError: outside the layer",
        "broken off": "KeyboardInterrupt: ",
    }
    assert (there and there[0]) == expected[what]


def test_a_group_must_have_been_made():
    with pytest.raises(RuntimeError, match=r"init_process_group\(\"gloo\"\) to be called before"):
        Gloo()
