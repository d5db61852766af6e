import gzip
import itertools
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from fastbn import data


def write_idx(path, array, magic=None):
    """An idx file by the format's description, independent of the reader."""
    magic = {3: 0x803, 1: 0x801}[array.ndim] if magic is None else magic
    content = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return content


def idx_folder(folder, *, parts=("train", "t10k"), suffix="", labels=True, n=12):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    made = {}
    for part in parts:
        images = rng.integers(0, 256, (n, 4, 3), dtype=np.uint8)
        y = (np.arange(n) % 3 * 2).astype(np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        if labels:
            write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", y)
        made[part] = images, y
    return made


def test_digits():
    pytest.importorskip("sklearn")
    digits = data.load()
    assert digits.X.shape == (1797, 64)
    assert digits.X.dtype == np.float32
    assert (digits.X.min(), digits.X.max()) == (0, 1)
    assert set((digits.X * 16).astype(int).ravel()) == set(range(17))
    assert digits.classes.tolist() == list(range(10))
    assert digits.name == "digits"
    assert digits.held_out is None
    assert digits.images


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.array([7, -2, 7, 30]), [-2, 7, 30]),
        (np.array([7.0, -2.0, 7.0, 30.0]), [-2, 7, 30]),
        (np.array([[7], [2], [7], [30]], np.uint8), [2, 7, 30]),
        (np.array([0.5, -1, 0.5, 2], np.float32), [-1.0, 0.5, 2.0]),
        (np.array(["b", "a", "b", "cc"]), ["a", "b", "cc"]),
        (np.array([b"b", b"a", b"b", b"cc"]), ["a", "b", "cc"]),
        (np.array([True, False, True, False]), [False, True]),
    ],
)
def test_npz(tmp_path, labels, classes):
    X = np.arange(24).reshape(4, 3, 2)
    np.savez(tmp_path / "d.npz", X=X, y=labels)
    read = data.load(tmp_path / "d.npz")
    np.testing.assert_array_equal(read.X, X.reshape(4, 6))
    assert read.X.dtype == np.float64
    assert read.classes.tolist() == classes
    assert read.classes[read.y].tolist() == [v.decode() if type(v) is bytes else v for v in labels.ravel().tolist()]
    assert read.y.dtype == np.int64


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("u1", "f4"), ("i2", "f4"), ("?", "f4"), ("f2", "f4"), (">f4", "f4"), ("i4", "f8"), ("u8", "f8"), (">f8", "f8")],
)
def test_npz_keeps_digits(tmp_path, dtype, kept):
    X = (np.arange(6).reshape(3, 2) * (2**27 + 1 if dtype in ("i4", "u8", ">f8") else 1)).astype(dtype)
    np.savez(tmp_path / "d.npz", X=X)
    read = data.load(tmp_path / "d.npz").X
    assert read.dtype == kept
    assert read.dtype.isnative
    assert (read == X).all()


IMAGES, LABELS = np.arange(60, dtype=np.uint8).reshape(10, 3, 2), np.arange(10) % 2
TEST_IMAGES, TEST_LABELS = IMAGES[:4] + np.uint8(100), np.array([1, 1, 0, 1])


@pytest.mark.parametrize(
    "names",
    [
        "x_train y_train x_test y_test",
        "X_train Y_train X_test Y_test",
        "train_images train_labels test_images test_labels",
        "trainX trainY testX testY",
        "xtrain ytrain xtest ytest",
        "train_data train_target test_data test_target",
        "images labels test_images test_labels",
        "images_train labels_train images_test labels_test",
    ],
)
def test_npz_of_parts(tmp_path, names):
    arrays = dict(zip(names.split(), (IMAGES, LABELS, TEST_IMAGES, TEST_LABELS), strict=True))
    np.savez(tmp_path / "d.npz", **arrays, val_images=IMAGES, val_labels=LABELS)
    dataset = data.load(tmp_path / "d.npz")
    assert dataset.X.tolist() == (IMAGES.reshape(10, 6) / np.float32(255)).tolist()
    assert dataset.y.tolist() == LABELS.tolist()
    assert dataset.held_out.X.tolist() == (TEST_IMAGES.reshape(4, 6) / np.float32(255)).tolist()
    assert dataset.held_out.y.tolist() == TEST_LABELS.tolist()
    assert dataset.images
    assert dataset.notes == (f"read {', '.join(names.split())}; not used: val_images, val_labels",)


@pytest.mark.parametrize(
    ("X", "images"),
    [
        (IMAGES, True),
        (IMAGES / 255, True),
        (IMAGES.reshape(10, 6), False),
        (IMAGES * 1.0, False),
        (IMAGES - 0.5, False),
    ],
)
def test_which_arrays_are_images(tmp_path, X, images):
    np.savez(tmp_path / "d.npz", X=X)
    assert data.load(tmp_path / "d.npz").images == images


@pytest.mark.parametrize("names", ["x y", "images labels", "data target", "features label", "arr_0 arr_1", "X Y"])
def test_npz_of_other_names(tmp_path, names):
    np.savez(tmp_path / "d.npz", **dict(zip(names.split(), (IMAGES, LABELS[:, np.newaxis]), strict=True)))
    dataset = data.load(tmp_path / "d.npz")
    assert dataset.X.tolist() == (IMAGES.reshape(10, 6) / np.float32(255)).tolist()
    assert dataset.y.tolist() == LABELS.tolist()
    assert dataset.held_out is None


def test_npz_without_labels(tmp_path):
    np.savez_compressed(tmp_path / "d.npz", X=np.ones((2, 3)))
    read = data.load(str(tmp_path / "d.npz"))
    assert read.y is None
    assert read.classes is None


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"foo": np.ones((2, 2)), "bar": np.ones(2)}, "no array called X: .* x_train, .*; got foo, bar"),
        ({"data": np.ones((2, 2)), "images": np.ones((2, 2))}, "expected one of data, images: .*; got data, images"),
        ({"x_train": np.ones((2, 2)), "x_test": np.ones((2, 3))}, "as many features in x_test as in x_train"),
        ({"X": np.ones((2, 2)), "y": np.array(["a", None], object)}, "Python objects, which are not unpickled"),
        ({"X": np.ones(3)}, r"X must be .* got float64 \(3,\)"),
        ({"X": np.ones((0, 3))}, "non-empty"),
        ({"X": np.ones((3, 2), complex)}, "complex"),
        ({"X": np.array([["a"]])}, "X must be"),
        ({"X": np.array([[{}]], dtype=object)}, "cannot be read"),
        ({"X": np.array([[1, 2], [3, np.nan]])}, r"X\[1, 1\] is nan"),
        ({"X": np.array([[1, 1e300]])}, r"X\[0, 1\] is 1e\+300, expected a finite number below 1e\+150"),
        ({"X": np.ones((3, 2)), "y": np.arange(2)}, r"expected y to be 3 labels, got int64 \(2,\)"),
        ({"X": np.ones((3, 2)), "y": np.eye(3)}, "expected y to be 3 labels.* as y.argmax"),
        ({"X": np.ones((1, 2)), "y": np.array(3)}, "expected y to be 1 labels"),
        ({"X": np.ones((2, 2)), "y": np.array([1, np.nan])}, r"y\[1\]: the label is missing"),
        ({"X": np.ones((2, 2)), "y": np.array([1, -np.inf])}, r"y\[1\]: expected a label that is finite"),
        ({"X": np.ones((2, 2)), "y": np.array([1j, 2])}, "expected y to be 2 labels"),
        ({"X": np.ones((2, 2)), "y": np.array([0x110000, 65], np.uint32).view("U1")}, "expected y to be text"),
    ],
)
def test_npz_faults(tmp_path, arrays, fault):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=rf"bad\.npz: .*{fault}"):
        data.load(tmp_path / "bad.npz")


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9])
def test_npz_damaged(tmp_path, keep):
    np.savez_compressed(tmp_path / "d.npz", X=np.random.default_rng(0).random((30, 30)))
    content = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "bad.npz").write_bytes(content[: keep if keep in (0, 10) else int(keep * len(content))])
    with pytest.raises(ValueError, match=r"bad\.npz: "):
        data.load(tmp_path / "bad.npz")
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:  # a header of Python 2 that never ends
        archive.writestr("X.npy", b"\x93NUMPY\x01\0\x04\0{(1L")
    with pytest.raises(ValueError, match=r"bad\.npz: cannot be read"):
        data.load(tmp_path / "bad.npz")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    (tmp_path / "bad.npz").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"bad\.npz: cannot be read"):
        data.load(tmp_path / "bad.npz")


def test_csv(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes(b'\xef\xbb\xbfwidth,kind, height\r\n1,b,2.5\r\n\r\n-3e-1, a ,"4"\r\n')
    read = data.load(path, target="kind")
    assert read.X.tolist() == [[1, 2.5], [-0.3, 4]]
    assert read.features == ("width", "height")
    assert read.classes.tolist() == ["a", "b"]
    assert read.y.tolist() == [1, 0]
    assert read.name == "d.csv"


@pytest.mark.parametrize(
    ("column", "classes"),
    [("10 9 10", [9, 10]), ("10 09 10", ["09", "10"]), ("1 x 1", ["1", "x"]), ("-1 2 2", [-1, 2])],
)
def test_csv_labels_keep_their_spelling(tmp_path, column, classes):
    path = tmp_path / "d.csv"
    path.write_text("a,t\n" + "".join(f"0,{label}\n" for label in column.split()))
    assert data.load(path, target="t").classes.tolist() == classes


def test_csv_without_target_is_all_features(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("a,b\n1,2\n")
    read = data.load(path)
    assert read.X.tolist() == [[1, 2]]
    assert read.y is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "empty, expected a header"),
        ("a,b,t\n", "no rows"),
        ("a,b\n1,2\n", "expected one column called 't', got the columns a, b"),
        ("t,t,a\n1,2,3\n", "expected one column called 't'"),
        ("t\n1\n", "no feature column"),
        ("a,b,t\n1,2,x\n1,oops,x\n", "line 3, column 'b': expected a number, got 'oops'"),
        ("a,t,b\n1,x,\n", "line 2, column 'b': expected a number, got ''"),
        ("a,t,b\n1,x,nan\n", "line 2, column 'b': expected a number, got 'nan'"),
        ("a,t,b\n\n-inf,x,1\n", "line 3, column 'a': expected a number, got '-inf'"),
        ("a,t,b\n1,,1\n", "line 2, column 't': the label is missing"),
        ("a,t,b\n1,x,1\n1,x\n", "line 3 has 2 cells parted by commas, expected 3"),
        ('a,t,b\n1,x,"1\n', "line 2: not a row of a table"),
        ("a,t,b\n1,\udcff,1\n", "not a text file in UTF-8"),
    ],
)
def test_csv_faults(tmp_path, text, fault):
    path = tmp_path / "bad.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"bad\.csv: .*{fault}"):
        data.load(path, target="t")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder(tmp_path, suffix):
    made = idx_folder(tmp_path / "pixels", suffix=suffix)
    read = data.load(tmp_path / "pixels")
    for dataset, part in ((read, "train"), (read.held_out, "t10k")):
        images, labels = made[part]
        np.testing.assert_allclose(dataset.X, images.reshape(12, 12) / 255.0, rtol=1e-7)
        assert dataset.X.dtype == np.float32
        assert dataset.classes.tolist() == [0, 2, 4]
        np.testing.assert_array_equal(dataset.classes[dataset.y], labels)
    assert read.name == "pixels"


@pytest.mark.parametrize(("parts", "labels"), [(("t10k",), True), (("train",), False), (("t10k",), False)])
def test_idx_folder_with_one_part(tmp_path, parts, labels):
    idx_folder(tmp_path, parts=parts, labels=labels)
    read = data.load(tmp_path)
    assert read.X.shape == (12, 12)
    assert (read.y is not None) == labels
    assert read.held_out is None


@pytest.mark.parametrize(
    "pattern",
    [
        "{}-images.idx3-ubyte {}-labels.idx1-ubyte",
        "emnist-letters-{}-images-idx3-ubyte emnist-letters-{}-labels-idx1-ubyte",
        "{}_images_idx3_ubyte.gz {}_labels_idx1_ubyte.gz",
        "{}-images-idx3-ubyte {}-labels.idx1-ubyte.gz",
    ],
)
@pytest.mark.parametrize("test", ["t10k", "test"])
def test_idx_names(tmp_path, pattern, test):
    made = idx_folder(tmp_path)
    for part, called in (("train", "train"), ("t10k", test)):
        for kind, name in zip(("images-idx3", "labels-idx1"), pattern.format(called, called).split(), strict=True):
            content = (tmp_path / f"{part}-{kind}-ubyte").read_bytes()
            (tmp_path / f"{part}-{kind}-ubyte").unlink()
            (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    read = data.load(tmp_path)
    for dataset, part in ((read, "train"), (read.held_out, "t10k")):
        assert (dataset.X * 255).round().tolist() == made[part][0].reshape(12, 12).tolist()
        assert dataset.classes[dataset.y].tolist() == made[part][1].tolist()


def damage(folder, name, how):
    file = folder / name
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[:-1])
    elif how == "longer":
        file.write_bytes(content + b"\0")
    elif how == "header":
        file.write_bytes(content[:7])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "type":
        file.write_bytes(b"\0\0\x0d\x03" + content[4:])
    elif how == "size":
        file.write_bytes(content[:4] + b"\xff\xff\xff\xff" + content[8:])
    elif how == "no images":
        file.write_bytes(content[:4] + b"\0\0\0\0" + b"\xff\xff\xff\xff" * 2)
    elif how == "not gzip":
        file.rename(file.with_name(name + ".gz"))
    elif how == "cut gzip":
        file.unlink()
        file.with_name(name + ".gz").write_bytes(gzip.compress(content)[:-9])


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ("cut", "asks for 144 bytes of data, got 143"),
        ("longer", "asks for 144 bytes of data, got more"),
        ("header", "truncated, expected a header of 16 bytes, got 7"),
        ("empty", "truncated"),
        ("type", "expected the magic number 0x00000803, got 0x00000d03"),
        ("size", "asks for 51539607540 bytes"),
        ("not gzip", "damaged or truncated"),
        ("cut gzip", "damaged or truncated"),
        ("no images", r"empty, got shape \(0, 4294967295, 4294967295\)"),
    ],
)
def test_idx_faults(tmp_path, how, fault):
    idx_folder(tmp_path)
    damage(tmp_path, "t10k-images-idx3-ubyte", how)
    with pytest.raises(ValueError, match=f"t10k-images-idx3-ubyte(.gz)?: .*{fault}"):
        data.load(tmp_path)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_header_cannot_ask_for_more_than_the_file_has(tmp_path, version):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 30000), }\n"
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("X.npy", b"\x93NUMPY" + bytes([version, 0]) + size + header + bytes(80))
    with pytest.raises(ValueError, match=r"d\.npz: cannot be read \(X asks for 240000000000 bytes of data"):
        data.load(tmp_path / "d.npz")


def test_the_same_images_are_the_same_numbers_in_any_file(tmp_path):
    """A model of idx files was right on half of an .npz with the same bytes."""
    made = idx_folder(tmp_path / "idx")
    names = {"train": ("x_train", "y_train"), "t10k": ("x_test", "y_test")}
    np.savez(tmp_path / "d.npz", **{n: a for part in names for n, a in zip(names[part], made[part], strict=True)})
    one, other = data.load(tmp_path / "idx"), data.load(tmp_path / "d.npz")
    for a, b in ((one, other), (one.held_out, other.held_out)):
        assert a.images
        assert b.images
        assert a.X.dtype == b.X.dtype == np.float32
        np.testing.assert_array_equal(a.X, b.X)
        np.testing.assert_array_equal(a.y, b.y)


def test_a_small_file_does_not_take_much_memory(tmp_path):
    """300 KB, whose header says one pixel, held 300 MB of zeros."""
    idx_folder(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    content = file.read_bytes()[:4] + b"\0\0\0\1" * 3
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb", compresslevel=1) as packed:
        packed.write(content)
        for _ in range(60):
            packed.write(bytes(5_000_000))
    file.unlink()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="asks for 1 bytes of data, got more"):
            data.load(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_idx_folders_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"neither train-images-idx3-ubyte nor t10k-images-idx3-ubyte .*, got nothing"):
        data.load(tmp_path)
    (tmp_path / "images.png").touch()
    with pytest.raises(ValueError, match=r"neither train-images-idx3-ubyte .*, got images\.png"):
        data.load(tmp_path)
    idx_folder(tmp_path)
    write_idx(tmp_path / "mnist-train-images-idx3-ubyte", np.zeros((12, 4, 3), np.uint8))
    with pytest.raises(
        ValueError, match="one file for each part, got mnist-train-images-idx3-ubyte, train-images-idx3"
    ):
        data.load(tmp_path)
    (tmp_path / "mnist-train-images-idx3-ubyte").unlink()
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(11, np.uint8))
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte: 11 labels for the 12 images"):
        data.load(tmp_path)
    idx_folder(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(12, dtype=np.uint8) % 3 * 3)
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte: label\[1\]: the test label 3 does not occur"):
        data.load(tmp_path)
    idx_folder(tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((12, 2, 2), np.uint8))
    with pytest.raises(ValueError, match="differ in size"):
        data.load(tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte: empty"):
        data.load(tmp_path)


def test_paths(tmp_path):
    for missing in ("a.npz", "a.csv", "a"):
        with pytest.raises(FileNotFoundError, match=f"no such file or folder: .*{missing}"):
            data.load(tmp_path / missing)
    with pytest.raises(ValueError, match="expected a path, got ''"):
        data.load("")
    (tmp_path / "a.xls").write_text("a\n1\n")
    with pytest.raises(ValueError, match=r"a\.xls: expected a folder of idx files, an \.npz file or a table: \.csv"):
        data.load(tmp_path / "a.xls")
    with pytest.raises(ValueError, match=r"a\.xls: expected a folder of idx files, an \.npz file or a table: \.csv"):
        data.load(tmp_path / "a.xls", target="a")
    for path in (None, tmp_path, tmp_path / "a.npz"):
        with pytest.raises(ValueError, match=r"a target column is for tables such as \.csv files"):
            data.load(path, target="t")


def test_split_is_stratified_seeded_and_whole(tmp_path):
    y = np.repeat([3, 5, 9], [50, 20, 2])
    np.savez(tmp_path / "d.npz", X=np.arange(72)[:, None], y=y)
    dataset = data.load(tmp_path / "d.npz")
    train, held = data.split(dataset, seed=1)
    assert np.bincount(train.y).tolist() == [40, 16, 1]
    assert np.bincount(held.y).tolist() == [10, 4, 1]
    assert sorted(train.X.ravel().tolist() + held.X.ravel().tolist()) == list(range(72))
    for part in (train, held):
        np.testing.assert_array_equal(y[part.X.ravel().astype(int)], dataset.classes[part.y])
    again = data.split(dataset, seed=1)[1]
    other = data.split(dataset, seed=2)[1]
    np.testing.assert_array_equal(held.X, again.X)
    assert not np.array_equal(held.X, other.X)
    assert len(data.split(dataset, fraction=0.5)[1].X) == 36


def test_split_keeps_the_sources_own_test_part(tmp_path):
    idx_folder(tmp_path)
    dataset = data.load(tmp_path)
    train, held = data.split(dataset, seed=5)
    assert train.X is dataset.X
    assert train.held_out is None
    assert held is dataset.held_out


def test_split_of_a_regression_draws_from_all(tmp_path):
    y = np.arange(20) / 2
    np.savez(tmp_path / "d.npz", X=y[:, np.newaxis] * 4, y=y)
    train, held = data.split(data.load(tmp_path / "d.npz", task="regression"), seed=1)
    assert (len(train.X), len(held.X)) == (16, 4)
    assert sorted([*train.y, *held.y]) == y.tolist()
    assert all((part.X[:, 0] == part.y * 4).all() for part in (train, held))


def test_a_test_part_without_labels_is_not_held_out(tmp_path):
    np.savez(tmp_path / "d.npz", x_train=np.eye(10), y_train=np.arange(10) % 2, x_test=np.eye(10))
    dataset = data.load(tmp_path / "d.npz")
    assert dataset.held_out.y is None
    train, held = data.split(dataset)
    assert (len(train.X), len(held.X)) == (8, 2)


def test_labels_of_the_test_part_alone(tmp_path):
    arrays = {"x_train": np.eye(4), "x_test": np.eye(4)}
    np.savez(tmp_path / "d.npz", **arrays, y_test=[10.5, 20.5, 7, 9])
    dataset = data.load(tmp_path / "d.npz", task="regression")
    assert (dataset.y, dataset.classes, dataset.held_out.y.tolist()) == (None, None, [10.5, 20.5, 7, 9])
    np.savez(tmp_path / "d.npz", **arrays, y_test=["b", "a", "b", "a"])
    dataset = data.load(tmp_path / "d.npz")
    assert (dataset.y, dataset.classes.tolist(), dataset.held_out.y.tolist()) == (None, ["a", "b"], [1, 0, 1, 0])


def test_columns_are_chosen_in_one_way(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("a,b\n1,2\n3,4\n")
    with pytest.raises(ValueError, match=r"expected columns or ignore, got both: \['a'\] and \['b'\]"):
        data.load(path, columns=["a"], ignore=["b"])
    for choice in ({"columns": "ab"}, {"ignore": "b"}):
        with pytest.raises(TypeError, match="expected columns and ignore to be sequences of names"):
            data.load(path, **choice)


def test_split_faults(tmp_path):
    def split(y, **options):
        arrays = {"X": np.ones((4, 1))} if y is None else {"X": np.ones((4, 1)), "y": np.array(y)}
        np.savez(tmp_path / "d.npz", **arrays)
        return data.split(data.load(tmp_path / "d.npz"), **options)

    with pytest.raises(ValueError, match="no labels"):
        split(None)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        split([1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"got 1 of class b$"):
        split(["a", "a", "b", "a"])
    with pytest.raises(ValueError, match=r"got 1 of class -21247 \(task regression takes labels as numbers\)"):
        split([1, 1, -21247.0, 1])
    with pytest.raises(ValueError, match="fraction"):
        split([1, 1, 0, 0], fraction=1)


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"), [(10, 5, [5, 5]), (8, 3, [3, 3, 2]), (7, 3, [3, 3]), (4, 9, [4])]
)
def test_minibatches(n, batch_size, sizes):
    def epochs(seed):
        rng = np.random.default_rng(seed)
        return [list(data.minibatches(n, batch_size, rng)) for _ in range(3)]

    for batches in epochs(0):
        assert [len(rows) for rows in batches] == sizes
        flat = np.concatenate(batches).tolist()
        assert len(set(flat)) == sum(sizes)
        assert set(flat) <= set(range(n))
    same = zip(itertools.chain(*epochs(0)), itertools.chain(*epochs(0)), strict=True)
    assert all(np.array_equal(a, b) for a, b in same)
    orders = {tuple(np.concatenate(batches)) for seed in (0, 1) for batches in epochs(seed)}
    assert len(orders) > 3
