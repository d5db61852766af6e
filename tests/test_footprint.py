"""Inference needs NumPy and safetensors alone, and imports nothing that it does not need."""

import json

import numpy as np
import pytest

from fastbn import BatchNorm, checkpoint, nn

# Runs fastbn where nothing but the standard library, NumPy, safetensors and fastbn itself can be imported.
ALONE = """
import json, sys
import numpy
class Alone:
    def find_spec(self, name, *_):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "numpy", "safetensors", "fastbn"}:
            raise ModuleNotFoundError(f"{name} is not to be imported")
sys.meta_path.insert(0, Alone())
before = {*sys.modules}
"""
# Modules of the standard library and of NumPy (the newest, which imports its parts when they are asked for).
NOT_FOR_INFERENCE = {
    "asyncio", "csv", "email", "gzip", "importlib.metadata", "multiprocessing", "platform", "secrets", "sqlite3",
    "subprocess", "tempfile", "unittest", "urllib.request", "zipfile", "numpy.ma", "numpy.random", "numpy.testing",
}  # fmt: skip
# fastbn's own modules above the layers and their files.
FOR_TRAINING = {"averaging", "data", "labels", "losses", "optim", "plots", "runstate", "steps", "tables", "training"}


@pytest.fixture
def alone(python):
    """Runs a program there; gives what it printed, and the modules that it imported beside NumPy."""

    def run(program, *arguments):
        done = python("-c", f"{ALONE}{program}\nprint(json.dumps(sorted({{*sys.modules}} - before)))", *arguments)
        assert done.returncode == 0, done.stderr
        *lines, modules = done.stdout.splitlines()
        return lines, {*json.loads(modules)}

    return run


def network():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 6), dtype=np.float32)
    model = nn.Sequential(
        nn.Standardize(6).fit(X), nn.Dense(6, 8, bias=False, seed=0), BatchNorm(8), nn.ReLU(), nn.Dropout(0.2),
        nn.Sequential(nn.Dense(8, 7, seed=1), BatchNorm(7, axis=-1, activation="relu")), nn.Dense(7, 3, seed=2),
    )  # fmt: skip
    model(X)
    return model.eval(), X


def test_importing_fastbn_imports_little(alone):
    _, modules = alone("import fastbn")
    assert not modules & {*NOT_FOR_INFERENCE, *(f"fastbn.{name}" for name in FOR_TRAINING)}
    assert {name.partition(".")[0] for name in modules} & {"safetensors", "tqdm", "matplotlib", "sklearn"} == set()


@pytest.mark.parametrize("folded", [False, True])
def test_a_file_is_loaded_and_run_with_numpy_and_safetensors_alone(folded, alone, tmp_path):
    pytest.importorskip("safetensors")
    model, X = network()
    model = model.folded() if folded else model
    checkpoint.save(tmp_path / "model.safetensors", model, metadata={"classes": ["a", "b", "c"]})
    np.save(tmp_path / "X.npy", X)
    program = """
import fastbn
folder = sys.argv[1]
X = numpy.load(f"{folder}/X.npy")
model = fastbn.checkpoint.load(f"{folder}/model.safetensors")
classes = fastbn.checkpoint.read_metadata(f"{folder}/model.safetensors")["classes"]
numpy.save(f"{folder}/y.npy", model(X))
print("".join(classes[i] for i in model(X).argmax(axis=1)))
"""
    lines, modules = alone(program, str(tmp_path))
    y = model(X)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), y, rtol=1e-5, atol=1e-6)
    assert lines == ["".join("abc"[i] for i in y.argmax(axis=1))]
    assert not modules & {*NOT_FOR_INFERENCE, *(f"fastbn.{name}" for name in FOR_TRAINING)}


def test_what_is_left_for_later_is_there_when_it_is_asked_for(python):
    program = """
import fastbn, sys
later = ["losses", "optim", "training"]
assert not any(f"fastbn.{name}" in sys.modules for name in later)
assert {*later, "__version__"} <= {*dir(fastbn)}
for name in later:
    assert getattr(fastbn, name) is sys.modules[f"fastbn.{name}"]
assert fastbn.__version__[0].isdigit()
try:
    fastbn.nothing
except AttributeError as error:
    print(error)
"""
    done = python("-c", program)
    assert (done.returncode, done.stdout) == (0, "module 'fastbn' has no attribute 'nothing'\n"), done.stderr
