"""Damaged files: each mutant is read, or refused by a ValueError that names the file, and nothing is half-changed.

FASTBN_MUTANTS is the number for each kind of file: 40 by default, more on demand (`.ci/run` takes 2,000).
"""

import gzip
import io
import os
import struct
import zipfile

import numpy as np
import pytest

from fastbn import BatchNorm, checkpoint, data, losses, nn, optim, training

MUTANTS = int(os.environ.get("FASTBN_MUTANTS", "40"))
TELLING = b'\0\xff\x7f\x80 0919-+.eE{}[]",:\n\r;|\tnulltruefalseNaNInfinity'


def mutant(rng, content):
    """One to three changes: of bytes, of digits, of whole pieces."""
    a = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, n = int(rng.integers(len(a) + 1)), int(rng.integers(1, 1 + max(1, min(40, len(a)))))
        piece = a[at : at + n]
        match int(rng.integers(9)):
            case 0:
                a[at : at + 1] = bytes([rng.integers(256)])
            case 1:
                a[at : at + 1] = bytes([TELLING[rng.integers(len(TELLING))]])
            case 2:
                del a[at : at + n]
            case 3:
                a[at:at] = piece
            case 4:
                a[at:at] = rng.bytes(n)
            case 5:
                del a[at:]
            case 6:
                if at < len(a):
                    a[at] ^= 1 << int(rng.integers(8))
            case 7:  # a number, longer or another
                digits = [i for i, byte in enumerate(a[:4000]) if 48 <= byte < 58]
                if digits:
                    i = digits[rng.integers(len(digits))]
                    a[i : i + 1] = [b"0", b"9", b"99999999999", b"-1", b"1e9", b"1.5"][rng.integers(6)]
            case 8:
                to = int(rng.integers(len(a) + 1))
                a[to : to + len(piece)] = piece
    return bytes(a)


def each(content, seed):
    """Mutants, and the content itself first."""
    rng = np.random.default_rng(seed)
    yield content
    for _ in range(MUTANTS):
        yield mutant(rng, content)


def tried(path, contents, read):
    """How many were read; all others were refused as they should be."""
    readable = 0
    for content in contents:
        path.write_bytes(content)
        refused = None
        try:
            read(path)
            readable += 1
        except ValueError as error:
            refused = error
        if refused is not None:
            assert str(path.name) in str(refused) or str(path.parent) in str(refused), refused
            assert len(str(refused)) < 2000 + len(str(path))
            assert not isinstance(refused, UnicodeError)
    return readable


def network():
    layers = [nn.Standardize(3).fit(np.eye(3)), nn.Dense(3, 4, bias=False, seed=0), BatchNorm(4, activation="relu")]
    return nn.Sequential(*layers, nn.Dropout(0.1, seed=0), nn.Dense(4, 2, seed=1))


def test_models(tmp_path):
    pytest.importorskip("safetensors")
    x = np.eye(3)

    def read(path):
        model = checkpoint.load(path).eval()
        metadata = checkpoint.read_metadata(path)
        assert isinstance(metadata, dict)
        model.state_dict()
        said = "expected"
        try:
            with np.errstate(all="ignore"):  # of numbers that are none
                model(x)
        except (ValueError, TypeError) as error:  # layers that do not fit together: said when they are called
            said = str(error)
        assert "expected" in said or "out of bounds" in said

    for model, seed in ((network(), 0), (network().eval().folded(), 1)):
        checkpoint.save(tmp_path / "m", model, metadata={"classes": ["a", 2], "inputs": 3})
        assert tried(tmp_path / "m", each((tmp_path / "m").read_bytes(), seed), read) > 0


def test_files_of_interrupted_trainings(tmp_path):
    pytest.importorskip("safetensors")
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((40, 3)).astype("float32"), np.arange(40) % 2

    def fit(path, resume):
        model = network()
        optimizer = optim.Adam(model)
        before = model.state_dict(), optimizer.state_dict()
        try:
            training.fit(
                model, (X, y), losses.softmax_cross_entropy, optimizer, epochs=2, batch_size=20, validation=0.2,
                patience=2, checkpoint=path, resume=resume, progress=False,
            )  # fmt: skip
        except FloatingPointError:  # weights may be any numbers
            return
        except ValueError:
            for was, now in zip(before, (model.state_dict(), optimizer.state_dict()), strict=True):
                assert all((was[key] == now[key]).all() for key in was)
            raise

    fit(tmp_path / "run", False)
    assert tried(tmp_path / "run", each((tmp_path / "run").read_bytes(), 2), lambda path: fit(path, True)) > 0


def looked_at(dataset):
    assert np.isfinite(dataset.X).all()
    assert dataset.X.dtype in (np.float32, np.float64)
    assert dataset.y is None or len(dataset.y) == len(dataset.X)


TABLES = {
    "commas": ("t.csv", b"a,b,t\n1,2.5,x\n-3,4e2,y\n5,.5,x\n", "t"),
    "semicolons": ("t.csv", b'"a";"b";"t"\n1;2;"x"\n3;4;"y z"\n', "t"),
    "tabs, numbers": ("t.tsv", b"a\tb\tt\n1\t2\t3.5\n4\t5\t6.5\n", "t"),
    "row names": ("t.txt", b'"a" "t"\n"1" 5 "u"\n"2" 7 "v"\n', "t"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables(tmp_path, kind):
    name, content, target = TABLES[kind]

    def read(path):
        looked_at(data.load(path, target, task="auto"))

    assert tried(tmp_path / name, each(content, 3), read) > 1
    packed = each(gzip.compress(content), 4)
    assert tried(tmp_path / f"{name}.gz", packed, read) > 0


def test_arrays(tmp_path):
    """Mutants of the archive, and archives of mutants: the archive's checksums would refuse nearly all of the first."""
    arrays = {"X": np.arange(12.0).reshape(4, 3), "y": np.array(["a", "b", "a", "c"])}
    whole = io.BytesIO()
    np.savez_compressed(whole, **arrays)
    members = {}
    for name, array in arrays.items():
        file = io.BytesIO()
        np.save(file, array)
        members[f"{name}.npy"] = file.getvalue()

    def archives(seed):
        rng = np.random.default_rng(seed)
        for _ in range(MUTANTS):
            spoilt = list(members)[rng.integers(2)]
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, mutant(rng, content) if name == spoilt else content)
            yield file.getvalue()

    def read(path):
        looked_at(data.load(path))

    assert tried(tmp_path / "d.npz", each(whole.getvalue(), 5), read) > 0
    assert tried(tmp_path / "d.npz", archives(6), read) > 0


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix):
    images = struct.pack(">4I", 0x803, 5, 2, 3) + bytes(range(30))
    labels = struct.pack(">2I", 0x801, 5) + bytes([0, 1, 2, 1, 0])
    pack = gzip.compress if suffix else bytes
    (tmp_path / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(labels))
    file = tmp_path / f"train-images-idx3-ubyte{suffix}"
    assert tried(file, each(pack(images), 7), lambda path: looked_at(data.load(tmp_path))) > 0
    file.write_bytes(pack(images))
    file = tmp_path / f"train-labels-idx1-ubyte{suffix}"
    assert tried(file, each(pack(labels), 8), lambda path: looked_at(data.load(tmp_path))) > 0
