"""What test_mpi.py runs on every rank: `mpiexec -n K python -m mpi4py programs.py NAME ARGUMENTS`.

`python -m mpi4py` ends all ranks when an error leaves one of them. What a program returns on rank 0 is printed as JSON.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parents[1]))
import twin

from fastbn import BatchNorm, losses, nn, optim, ranks, training
from fastbn.distributed import SyncBatchNorm, convert

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()


def parts(n, uneven):
    """Where this rank's part of n examples is; uneven ones may be empty."""
    if uneven:
        ends = np.sort(np.random.default_rng(SIZE).integers(0, n + 1, SIZE - 1)).tolist()
        return [slice(a, b) for a, b in zip([0, *ends], [*ends, n], strict=True)]
    return [slice(n * r // SIZE, n * (r + 1) // SIZE) for r in range(SIZE)]


def digest(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


# --- the layer


SHAPES = [(40, 5), (33, 64), (14, 3, 6, 5), (9, 16, 10, 10), (1003, 8)]


def agreement(uneven, *sliced):
    """The largest errors against wider arithmetic, in units of what the contract allows, and the bits of all."""
    if sliced:  # which few numbers are not
        ranks.SLICED_FROM = 0
    uneven, worst, bits = uneven == "uneven", {"y": 0.0, "dx": 0.0, "averages": 0.0}, []
    for shape in SHAPES:
        for dtype, gradient in (("float32", 8), ("float64", 16)):
            rng = np.random.default_rng(shape[0])
            x, dy = (rng.standard_normal((2, *shape)) * 3 + 1e4).astype(dtype)
            weight, bias = rng.uniform(-2, 2, (2, shape[1])).astype(dtype)
            layer = SyncBatchNorm(shape[1], dtype=dtype, comm=COMM)
            layer.weight, layer.bias = weight, bias
            rows = parts(shape[0], uneven)[RANK]
            y = layer(x[rows])
            dx = layer.backward(dy[rows])
            shared = [layer.running_mean, layer.running_var, *layer.grads.values()]
            all_bits = COMM.allgather(digest(*shared))
            assert len(set(all_bits)) == 1, "ranks differ in running averages or gradients"
            ys, dxs = COMM.gather(y), COMM.gather(dx)
            bits += [digest(y, dx), all_bits[0]]
            if RANK:
                continue
            u = twin.unit(dtype)
            stats = twin.statistics(x)
            true, scale = twin.forward(x, stats, weight, bias)
            worst["y"] = max(worst["y"], float((abs(np.concatenate(ys) - true) / (5 * u * scale)).max()))
            trues, scales = twin.backward(dy, x, stats, weight)
            for got, true, scale in zip([np.concatenate(dxs), *shared[2:]], trues, scales, strict=True):
                worst["dx"] = max(worst["dx"], float((abs(got - true) / (gradient * u * scale)).max()))
            alone = BatchNorm(shape[1], dtype=dtype)
            alone(x)
            for name in ("running_mean", "running_var"):
                one, other = getattr(layer, name), getattr(alone, name)
                worst["averages"] = max(worst["averages"], float((abs(one - other) / abs(other)).max()))
    return worst | {"bits": digest(*(np.frombuffer("".join(b).encode(), np.uint8) for b in COMM.allgather(bits)))}


def failing(what):
    """A batch that the layer refuses, or takes; what happened on each rank, and whether the layer goes on."""
    rng = np.random.default_rng(RANK)
    features = 3 + (what == "channels" and RANK == 0)
    x = rng.standard_normal((4, features))
    if what in ("empty rank", "all empty", "one each", "one in all"):
        n = {"empty rank": 4 * (RANK > 0), "all empty": 0, "one each": 1, "one in all": int(RANK == 0)}[what]
        x = x[:n]
    elif what == "dimensions" and RANK == 0:
        x = rng.standard_normal((4, 3, 5))
    elif what == "dtypes" and RANK == 0:
        x = x.astype(np.float32)
    elif what == "wrong x" and RANK == 1:
        x = x[:, :2]
    elif what == "nan" and RANK == 1:
        x[0, 1] = np.nan
    layer = SyncBatchNorm(features, comm=COMM, dtype="float64")
    started = time.perf_counter()
    try:
        y = layer(x)
        dx = layer.backward(np.ones_like(y))
        said = "well"
        finite = np.isfinite(y).all(axis=0).tolist(), np.isfinite(dx).all(axis=0).tolist()
        y = [list(y.shape), finite, layer.num_batches_tracked, layer.running_var.tolist()]
    except Exception as error:
        said, y = f"{type(error).__name__}: {error}", None
    took = time.perf_counter() - started
    again = SyncBatchNorm(3, comm=COMM)  # the ranks still understand each other
    assert np.isfinite(again.backward(again(rng.standard_normal((4, 3))))).all()
    return COMM.gather((said, y, took))


def steps_until(what):
    """Steps without an end, in which something happens to one rank."""
    print(f"pid {os.getpid()}", file=sys.stderr, flush=True)
    layer = SyncBatchNorm(3, comm=COMM)
    x = np.random.default_rng(RANK).standard_normal((4, 3))
    for step in range(10**9):
        layer.backward(layer(x))
        if step == 5 and RANK == SIZE - 1:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("outside the layer")
        if step == 5 and what == "error while others receive":
            COMM.recv(source=SIZE - 1)


def refused(what):
    """What each rank raises for such a communicator, in the layer and in fit."""
    part = COMM.Split(RANK % 2, RANK)
    comm = MPI.COMM_NULL if what == "null" else COMM.Dup()
    if what == "inter":
        comm = part.Create_intercomm(0, COMM, 1 - RANK % 2)
    said = []
    try:
        layer = SyncBatchNorm(3, comm=comm)
        if what == "freed":
            comm.Free()
        layer(np.eye(3))
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    try:
        trained(comm, network())
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    return COMM.gather(said)


def broken_off():
    """An exchange that fails on rank 1 when the others have made it."""
    layer = SyncBatchNorm(3, comm=COMM)
    if RANK == 1:
        layer.group.comm.allgather = lambda array: 1 / 0
    layer(np.eye(3))


# --- fit


X = np.random.default_rng(0).standard_normal((203, 6))
LABELS = (X.sum(axis=1) > 0).astype(int) + (X[:, 0] > 1)


def network(dtype="float64", dropout=0.0):
    return nn.Sequential(
        nn.Dense(6, 12, bias=False, seed=0, dtype=dtype), BatchNorm(12, dtype=dtype, activation="relu"),
        nn.Dense(12, 8, bias=False, seed=1, dtype=dtype), BatchNorm(8, dtype=dtype), nn.ReLU(),
        nn.Dropout(dropout, seed=3), nn.Dense(8, 3, seed=2, dtype=dtype),
    )  # fmt: skip


def trained(comm, model, loss=losses.softmax_cross_entropy, **options):
    if comm is not None:
        convert(model, comm)
    X_ = X.astype(model[0].dtype)
    optimizer = optim.SGD(model, 0.1, momentum=0.9)
    options = {"epochs": 2, "batch_size": 32, "validation": 0.2, "progress": False} | options
    return training.fit(model, (X_, LABELS), loss, optimizer, comm=comm, **options)


def fit(dtype, *one_step):
    """The largest relative difference to one process, of parameters and averages."""
    options = {"on_step": lambda step, loss: True} if one_step else {}
    together, alone = network(dtype), network(dtype)
    trained(COMM, together, **options)
    trained(None, alone, **options)
    state = together.state_dict()
    bits = COMM.allgather(digest(*state.values()))
    assert len(set(bits)) == 1, "ranks differ"
    differences = [abs(state[k] - a).max() / abs(a).max() for k, a in alone.state_dict().items() if a.any()]
    return {"difference": float(max(differences)), "bits": bits[0]}


def fit_until(what, folder):
    """A long training in which something happens to the last rank; what each rank raised."""
    print(f"pid {os.getpid()}", file=sys.stderr, flush=True)
    last = RANK == SIZE - 1
    calls, steps = [], []

    def loss(prediction, target):
        calls.append(None)
        if last and len(calls) == 12:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "ctrl-c":
                os.kill(os.getpid(), signal.SIGINT)
            if what == "error":
                raise ZeroDivisionError("in the loss")
        value, gradient = losses.softmax_cross_entropy(prediction, target)
        return (np.nan if what == "nan" and last and len(calls) == 12 else value), gradient

    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = network(dropout=0.2)
    started = time.perf_counter()
    try:
        trained(COMM, model, loss, epochs=10**6, checkpoint=Path(folder) / "run.safetensors",
                on_step=lambda step, loss: steps.append(step))  # fmt: skip
    except BaseException as error:
        return COMM.gather((f"{type(error).__name__}: {error}", steps[-1], time.perf_counter() - started))


def goes_on(folder, dropout):
    """Epochs until three are done, and the bits of the model."""
    model = network(dropout=float(dropout))
    history = trained(COMM, model, epochs=3, checkpoint=Path(folder) / "run.safetensors", resume=True)
    return {"loss": history.loss, "bits": digest(*model.state_dict().values())}


def stops(folder, dropout, step):
    """Rank 0 ends it after a step."""
    trained(COMM, network(dropout=float(dropout)), epochs=3, checkpoint=Path(folder) / "run.safetensors",
            on_step=lambda n, loss: n == int(step) and RANK == 0)  # fmt: skip


# --- the command line


def interrupted_command(*arguments):
    """`fastbn train --mpi`, where rank 1 gets a Ctrl-C in its fifth step."""
    from fastbn.__main__ import main

    steps, step = [], optim.Adam.step

    def counting(self):
        steps.append(None)
        if RANK == 1 and len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        step(self)

    optim.Adam.step = counting
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(["train", "--mpi", *arguments]))


def interrupted_at_the_end(*arguments):
    """`fastbn train --mpi`, where all get a Ctrl-C while rank 0 writes and the others wait for it."""
    from fastbn.__main__ import main
    from fastbn.commands.tasks import Classification

    pids = COMM.allgather(os.getpid())

    def draw(self, *arguments):
        for pid in pids[1:]:
            os.kill(pid, signal.SIGINT)
        time.sleep(0.5)
        os.kill(pids[0], signal.SIGINT)
        time.sleep(10)

    Classification.draw = draw
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return COMM.gather(main(["train", "--mpi", *arguments]))


if __name__ == "__main__":
    result = globals()[sys.argv[1]](*sys.argv[2:])
    if RANK == 0:
        print(json.dumps(result), flush=True)
