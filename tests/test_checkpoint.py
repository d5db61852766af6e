import errno
import json
import os
import random
import re
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fastbn
from fastbn import BatchNorm, checkpoint, losses, nn, optim, training

safetensors_numpy = pytest.importorskip("safetensors.numpy")

LAYERS = [
    BatchNorm(4),
    BatchNorm(3, eps=1e-3, momentum=None, axis=-1, dtype="float64", activation="leaky_relu", unbiased=False),
    BatchNorm(2, affine=False, track_running_stats=False),
    nn.Dense(3, 5, seed=1),
    nn.Dense(3, 2, bias=False, dtype="float64"),
    nn.Dense(3, 2, activation="leaky_relu"),
    nn.Standardize(3, axis=-1),
    nn.ReLU(),
    nn.LeakyReLU(0.2),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Softmax(axis=1),
    nn.Flatten(),
    nn.Identity(),
    nn.Dropout(0.3, seed=4),
    nn.Sequential(),
    nn.Sequential(nn.Dense(2, 3), nn.Sequential(BatchNorm(3), nn.Tanh()), nn.Dense(3, 2)),
]


def network(seed=0):
    return nn.Sequential(
        nn.Dense(5, 8, bias=False, seed=seed), BatchNorm(8, activation="relu"), nn.Dropout(0.1, seed=9),
        nn.Dense(8, 3, seed=seed + 1),
    )  # fmt: skip


def trained(kind=optim.Adam, epochs=2):
    rng = np.random.default_rng(0)
    data = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 3, 40)
    model = network()
    optimizer = kind(model, 1e-2, momentum=0.9) if kind is optim.SGD else kind(model, 1e-2)
    training.fit(model, data, losses.softmax_cross_entropy, optimizer, epochs=epochs, batch_size=8)
    return model, optimizer, data


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_every_layer_comes_back(tmp_path, layer):
    rng = np.random.default_rng(0)
    layer.load_state_dict(
        {k: a if a.dtype.kind == "i" else rng.uniform(1, 2, a.shape) for k, a in layer.state_dict().items()}
    )
    checkpoint.save(tmp_path / "m.safetensors", layer)
    back = checkpoint.load(tmp_path / "m.safetensors")
    assert type(back) is type(layer)
    assert repr(back) == repr(layer)
    assert same(back.state_dict(), layer.state_dict())
    assert checkpoint.read_metadata(tmp_path / "m.safetensors") == {}


def test_modes_come_back(tmp_path):
    model = network()
    model[1].eval()
    checkpoint.save(tmp_path / "m", model)
    assert [layer.training for layer in checkpoint.load(tmp_path / "m")] == [True, False, True, True]
    checkpoint.save(tmp_path / "m", model.eval())
    back = checkpoint.load(tmp_path / "m")
    assert not back.training
    x = np.ones((1, 5), np.float32)
    np.testing.assert_array_equal(back(x), model(x))


def test_the_file_is_what_pytorchs_users_expect(tmp_path):
    model, optimizer, _ = trained()
    checkpoint.save(tmp_path / "m.safetensors", model, optimizer, metadata={"classes": ["é", 1, None]})
    tensors = safetensors_numpy.load_file(tmp_path / "m.safetensors")
    own = {key: array for key, array in tensors.items() if not key.startswith("optimizer.")}
    assert sorted(own) == [
        "0.weight", "1.bias", "1.num_batches_tracked", "1.running_mean", "1.running_var", "1.weight",
        "3.bias", "3.weight",
    ]  # fmt: skip
    assert same(own, model.state_dict())
    assert own["1.num_batches_tracked"].shape == ()
    state = {key.removeprefix("optimizer."): array for key, array in tensors.items() if key not in own}
    assert same(state, optimizer.state_dict())
    assert checkpoint.read_metadata(str(tmp_path / "m.safetensors")) == {"classes": ["é", 1, None]}


@pytest.mark.parametrize("kind", [optim.SGD, optim.RMSprop, optim.Adam])
def test_training_goes_on_where_it_stopped(tmp_path, kind):
    model, optimizer, data = trained(kind)
    checkpoint.save(tmp_path / "m", model, optimizer)
    other, other_optimizer, _ = trained(kind, epochs=1)
    arrays = [*other.params.values()]
    checkpoint.restore(tmp_path / "m", other, other_optimizer)
    assert all(a is b for a, b in zip(arrays, other.params.values(), strict=True))
    model[2].eval(), other[2].eval()  # dropout's random stream is not state
    for m, o in ((model, optimizer), (other, other_optimizer)):
        _, gradient = losses.softmax_cross_entropy(m(data[0]), data[1])
        m.backward(gradient)
        o.step()
    assert same(model.state_dict(), other.state_dict())
    assert same(optimizer.state_dict(), other_optimizer.state_dict())


def test_restore_without_optimizer_takes_any_safetensors_file(tmp_path):
    model = trained()[0]
    safetensors_numpy.save_file(model.state_dict(), tmp_path / "foreign.safetensors")
    other = network(seed=5)
    checkpoint.restore(tmp_path / "foreign.safetensors", other)
    assert same(model.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match=r"foreign\.safetensors: not a fastbn checkpoint"):
        checkpoint.load(tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"foreign\.safetensors: not a fastbn checkpoint"):
        checkpoint.read_metadata(tmp_path / "foreign.safetensors")


def test_restore_changes_all_or_nothing(tmp_path):
    model, optimizer, _ = trained()
    checkpoint.save(tmp_path / "adam", model, optimizer)
    checkpoint.save(tmp_path / "bare", model)
    state = model.state_dict()
    late = state | {"3.bias": np.zeros(4)}
    kind = state | {"1.num_batches_tracked": np.array(1.5)}
    safetensors_numpy.save_file(late, tmp_path / "late")
    safetensors_numpy.save_file(kind, tmp_path / "kind")
    other = network(seed=5)
    sgd, adam = optim.SGD(other, 0.1, momentum=0.9), optim.Adam(other, 0.1)
    before = other.state_dict(), sgd.state_dict(), adam.state_dict()
    for name, given, fault in (
        ("adam", sgd, "adam: .*key"),
        ("bare", adam, "bare: .*no optimizer's state"),
        ("late", None, r"late: .*3\.bias.*\(3,\), got .*\(4,\)"),
        ("kind", None, "kind: .*num_batches_tracked"),
    ):
        with pytest.raises(ValueError, match=fault):
            checkpoint.restore(tmp_path / name, other, given)
        assert same(other.state_dict(), before[0])
        assert same(sgd.state_dict(), before[1])
        assert same(adam.state_dict(), before[2])


def test_missing_files_and_folders(tmp_path):
    for read in (checkpoint.load, checkpoint.read_metadata, lambda path: checkpoint.restore(path, network())):
        with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.safetensors"):
            read(tmp_path / "none.safetensors")
        with pytest.raises(IsADirectoryError, match=r"expected a file, such as model\.safetensors, got a folder: "):
            read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        checkpoint.save(tmp_path / "nowhere" / "m", network())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for call in (checkpoint.load, checkpoint.read_metadata, lambda path: checkpoint.restore(path, network())):
        with pytest.raises(ValueError, match=r"pipe: expected a regular file"):
            call(tmp_path / "pipe")


def test_every_truncation_is_refused(tmp_path):
    checkpoint.save(tmp_path / "m", nn.Sequential(nn.Dense(2, 2), BatchNorm(2)))
    content = (tmp_path / "m").read_bytes()
    for length in [*range(0, 120), *range(120, len(content), 17), len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut: not a safetensors file"):
            checkpoint.load(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(content + b"x")
    with pytest.raises(ValueError, match="cut: not a safetensors file"):
        checkpoint.load(tmp_path / "cut")


def test_flipped_header_bytes_give_a_model_or_a_value_error(tmp_path):
    checkpoint.save(tmp_path / "m", nn.Sequential(nn.Dense(2, 2), BatchNorm(2)))
    content = (tmp_path / "m").read_bytes()
    refused = 0
    for at in range(0, 8 + struct.unpack("<Q", content[:8])[0], 3):
        flipped = bytearray(content)
        flipped[at] ^= 0x10
        (tmp_path / "bad").write_bytes(flipped)
        try:
            checkpoint.load(tmp_path / "bad")
        except ValueError as error:
            assert "bad: " in str(error)  # noqa: PT017
            refused += 1
    assert refused > 100


def rewrite(path, change):
    """The file with its architecture and tensors changed, by safetensors itself."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        texts = file.metadata()
    tensors = safetensors_numpy.load_file(path)
    model = json.loads(texts["fastbn.model"])
    model = change(model, tensors, texts) or model
    if "fastbn.model" in texts and texts["fastbn.model"] != "{":
        texts["fastbn.model"] = json.dumps(model)
    safetensors_numpy.save_file(tensors, path, texts)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda model, arrays, texts: arrays.pop("1.weight"), "1.weight"),
        (lambda model, arrays, texts: arrays.update(more=np.ones(1)), "more"),
        (lambda model, arrays, texts: arrays.update({"0.weight": np.ones((2, 3), np.float32)}), r"0.weight.*\(2, 3\)"),
        (lambda model, arrays, texts: arrays.update({"1.num_batches_tracked": np.array(1.5)}), "num_batches_tracked"),
        (lambda model, arrays, texts: {"class": "system", "training": True, "config": {}}, "known class, got .*system"),
        (lambda model, arrays, texts: {"class": "Sequential", "training": True, "layers": {}}, "known class"),
        (lambda model, arrays, texts: ["Sequential"], "known class"),
        (lambda model, arrays, texts: model["layers"][0]["config"].update(n_out=-1), "n_out"),
        (lambda model, arrays, texts: model["layers"][0]["config"].update(n_out="2"), "cannot be loaded"),
        (lambda model, arrays, texts: model["layers"][0]["config"].update(colour="red"), "colour"),
        (lambda model, arrays, texts: model["layers"][0]["config"].pop("n_in"), "n_in"),
        (lambda model, arrays, texts: model["layers"][1].update(training="yes"), "known class"),
        (lambda model, arrays, texts: texts.pop("fastbn.model") and None, "not a fastbn checkpoint"),
        (lambda model, arrays, texts: texts.update({"fastbn.model": "{"}), "not JSON"),
    ],
)
def test_wrong_content_is_named(tmp_path, change, fault):
    path = tmp_path / "wrong"
    checkpoint.save(path, nn.Sequential(nn.Dense(2, 2), BatchNorm(2)))
    rewrite(path, lambda *parts: result if isinstance(result := change(*parts), dict | list) else None)
    with pytest.raises(ValueError, match=f"wrong: .*{fault}"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.Dense(2, 3), {"n_in": 10**6, "n_out": 10**6}),
        (nn.Dense(2, 3, bias=False), {"n_in": 3, "n_out": 2}),
        (nn.Sequential(nn.Sequential(nn.ReLU(), nn.Dense(2, 3))), {"n_out": 10**12}),
        (BatchNorm(4), {"num_features": 10**12}),
        (nn.Standardize(4), {"num_features": 10**12}),
        (BatchNorm(4, affine=False), {"num_features": 10**12}),
        (BatchNorm(4, track_running_stats=False), {"num_features": 10**12}),
        (BatchNorm(4, affine=False, track_running_stats=False), {"num_features": 10**12, "affine": True}),
        (BatchNorm(4, affine=False, track_running_stats=False), {"num_features": 10**12, "track_running_stats": 1}),
    ],
    ids=repr,
)
def test_a_small_file_that_asks_for_much_memory(tmp_path, monkeypatch, layer, sizes):
    """Refused by its shapes, before anything is allocated."""

    def resize(model, tensors, texts):
        inner = model
        while "layers" in inner:
            inner = inner["layers"][-1]
        inner["config"].update(sizes)

    checkpoint.save(tmp_path / "huge", layer)
    rewrite(tmp_path / "huge", resize)
    for module in (np.random, np):
        for name in ("default_rng", "zeros"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, None)
    with pytest.raises(ValueError, match=r"huge: .*(expected (n_out|num_features)|missing key)"):
        checkpoint.load(tmp_path / "huge")


def saved(path, *content, **metadata):
    checkpoint.save(path, *content, metadata=metadata or None)
    return path.read_bytes()


def test_the_same_content_makes_the_same_bytes(tmp_path):
    """safetensors writes the metadata in the order of a table whose hash differs from one save to the next."""
    model, optimizer, _ = trained()
    contents = {saved(tmp_path / f"{i}", model, optimizer, a=1, é="\u2028", b={"y": None, "x": [1]}) for i in range(12)}
    contents |= {saved(tmp_path / "m", model, optimizer, b={"x": [1], "y": None}, é="\u2028", a=1)}
    twin, twins = trained()[:2]
    contents |= {saved(tmp_path / "m", twin, twins, a=1, b={"x": (1,), "y": None}, é="\u2028")}
    back = checkpoint.load(tmp_path / "m")
    contents |= {saved(tmp_path / "again", back, optimizer, **checkpoint.read_metadata(tmp_path / "m"))}
    assert len(contents) == 1
    (content,) = contents
    size = struct.unpack("<Q", content[:8])[0]
    assert size % 8 == 0
    assert [*json.loads(content[8 : 8 + size])["__metadata__"]] == ["fastbn.metadata", "fastbn.model", "format"]


def test_other_content_makes_other_bytes(tmp_path):
    model = network()
    contents = [saved(tmp_path / "m", model), saved(tmp_path / "m", model, a=1), saved(tmp_path / "m", model.eval())]
    model[1].freeze()
    contents.append(saved(tmp_path / "m", model))
    assert len(set(contents)) == 4


def test_metadata_with_keys_that_are_no_texts(tmp_path):
    checkpoint.save(tmp_path / "m", nn.ReLU(), metadata={2: "two", "a": 1, None: 0.5})
    assert checkpoint.read_metadata(tmp_path / "m") == {"2": "two", "a": 1, "null": 0.5}


SAVING = """
import itertools, sys
import numpy as np
from fastbn import BatchNorm, checkpoint
bn = BatchNorm(20_000)
for n in itertools.count(1):
    for array in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
        array[...] = n
    bn.num_batches_tracked = n
    checkpoint.save(sys.argv[1], bn, metadata={"n": n})
    if n == 3:
        print("ready", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    path, rng = tmp_path / "m", random.Random(1)
    environment = os.environ | {"PYTHONPATH": str(Path(fastbn.__file__).parents[1])}
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", SAVING, path], stdout=subprocess.PIPE, env=environment) as process:
            try:
                assert process.stdout.readline().strip() == b"ready"
                for _ in range(20):
                    time.sleep(0.01 * rng.random())
                    n = checkpoint.read_metadata(path)["n"]  # a reader meets whole files too
                    assert n <= checkpoint.load(path).num_batches_tracked
            finally:
                process.kill()
        n = checkpoint.read_metadata(path)["n"]
        bn = checkpoint.load(path)
        assert n == bn.num_batches_tracked >= 3
        assert all((array == n).all() for array in (bn.weight, bn.bias, bn.running_mean, bn.running_var))


@pytest.mark.skipif(not hasattr(os, "O_DIRECTORY"), reason="folders cannot be flushed here")
def test_file_and_folder_are_flushed(tmp_path, monkeypatch):
    flushed = []

    def fsync(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        flushed.append((kind, os.path.exists(tmp_path / "m")))

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.save(tmp_path / "m", nn.ReLU())
    assert flushed == [("file", False), ("folder", True)]


def test_only_known_layers_are_saved_and_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m"
    checkpoint.save(path, network(), metadata={"which": "old"})
    old = path.read_bytes()

    class ReLU(nn.ReLU):
        pass

    with pytest.raises(TypeError, match="cannot save a ReLU"):
        checkpoint.save(path, nn.Sequential(ReLU()))
    with pytest.raises(TypeError, match=r"metadata: .*ndarray is not JSON serializable .*tolist\(\)"):
        checkpoint.save(path, network(), metadata={"array": np.ones(1)})
    with pytest.raises(TypeError, match="expected metadata to be a dict, got list"):
        checkpoint.save(path, network(), metadata=[])

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=f"{re.escape(os.strerror(errno.ENOSPC))}.*{re.escape(repr(str(path)))}$"):
            checkpoint.save(path, network(), metadata={"which": "new"})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["m"]
    checkpoint.save(path, network(), metadata={"which": "new"})
    assert checkpoint.read_metadata(path) == {"which": "new"}
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_permissions_are_those_of_any_new_file(tmp_path):
    checkpoint.save(tmp_path / "m", nn.ReLU())
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_safetensors_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (lambda: checkpoint.save(tmp_path / "m", nn.ReLU()), lambda: checkpoint.load(tmp_path / "m")):
        with pytest.raises(ImportError, match=r'checkpoints need safetensors: pip install "fastbn\[train\]"'):
            call()
