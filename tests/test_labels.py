"""What a label means, the same whatever reader it comes from."""

import gzip
import itertools

import numpy as np
import pytest
from test_data import write_idx

from fastbn import data

WRITTEN = ["csv", "npz text", "npz bytes", "gz"]


def read(folder, labels, how="csv", **options):
    """A data set with these labels, given as texts, or as an array for .npz."""
    X = np.arange(len(labels), dtype=float)[:, np.newaxis] / 2
    path = folder / ("d.npz" if how.startswith("npz") else "d.csv" if how == "csv" else "d.csv.gz")
    if how.startswith("npz"):
        array = np.array(labels)
        np.savez(path, X=X, y=np.char.encode(array, "utf-8") if how == "npz bytes" else array)
        return data.load(path, **options)
    text = "a,t\n" + "".join(f'{x},"{label}"\n' for [x], label in zip(X, labels, strict=True))
    path.write_bytes(text.encode() if how == "csv" else gzip.compress(text.encode()))
    return data.load(path, "t", **options)


def same(dataset, i, j):
    return dataset.y[i] == dataset.y[j]


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize(
    "group",
    [["5", "5.0", "+5", "5.", "05e0"[1:]], ["-1", "-1.00"], ["0", "-0", "0.0", "+0."], ["0.1", ".1", "1e-1", "0.10"]],
)
def test_spellings_of_a_number_are_one_label(tmp_path, group, how):
    labels = [*group, "7"]
    read_labels = read(tmp_path, labels, how)
    assert read_labels.y[:-1].tolist() == [read_labels.y[0]] * len(group)
    assert read_labels.classes.tolist() == sorted([float(group[0]), 7])
    mixed = read(tmp_path, [*labels, "x"], how)  # among texts they are one label too, spelt as it was met first
    assert mixed.y[: len(group)].tolist() == [mixed.y[0]] * len(group)
    assert mixed.classes[mixed.y[0]] == group[0]


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize(
    ("one", "other"),
    [("7", "007"), ("10", "1_0"), ("3", "\u0663"), ("16", "0x10"), ("5", "5,0"), ("a", "A"), ("Na", "na"), ("1", "1%")],
)
def test_what_nobody_writes_for_a_number_is_text(tmp_path, one, other, how):
    assert not same(read(tmp_path, [one, other], how), 0, 1)


@pytest.mark.parametrize("how", WRITTEN)
def test_whole_numbers_keep_all_their_digits(tmp_path, how):
    for numbers, dtype in (
        ([2**53, 2**53 + 1, -(2**63)], "int64"),
        ([2**64 - 1, 2**64 - 2, 0], "uint64"),
        ([-1, 2**63, 2**63 - 1], "<U19"),  # in numpy's own array they are float64, and two of them one
        ([2**64, 2**64 + 1, 9, 10**30], "<U31"),
    ):
        dataset = read(tmp_path, list(map(str, numbers)), how)
        assert dataset.classes.dtype == dtype
        assert [int(label) for label in dataset.classes] == sorted(numbers)
        assert [int(label) for label in dataset.classes[dataset.y]] == numbers


@pytest.mark.parametrize("dtype", ["u8", ">u8", "i8", "f2", "f4", "f8", "longdouble", "u1"])
def test_numbers_of_any_dtype_are_what_they_say(tmp_path, dtype):
    labels = np.array([3, 1, 3, 0], dtype)
    if dtype.endswith("u8"):
        labels[1] = 2**64 - 1
    dataset = read(tmp_path, labels, "npz")
    assert dataset.classes.dtype.kind in "iu"
    assert dataset.classes[dataset.y].tolist() == [int(label) for label in labels]


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_a_fraction_is_the_one_that_was_written(tmp_path, dtype):
    labels = np.array([0.1, 2.5, 0.1], dtype)
    assert read(tmp_path, labels, "npz").classes.tolist() == [0.1, 2.5]


MISSING = [
    "",
    "nan",
    "NaN",
    "-nan",
    "NA",
    "N/A",
    "n/a",
    "<NA>",
    "null",
    "NULL",
    "None",
    "NaT",
    "?",
    "#N/A",
    "\\N",
    "#REF!",
]


@pytest.mark.parametrize("task", ["classification", "regression", "auto"])
@pytest.mark.parametrize("how", WRITTEN)
def test_a_missing_label_is_an_error_with_its_row(tmp_path, how, task):
    for missing in MISSING:
        where = r"y\[2\]" if how.startswith("npz") else r"line 4, column 't'"
        with pytest.raises(ValueError, match=rf"d\.\S+: {where}: the label is missing"):
            read(tmp_path, ["1", "2", missing, "2"], how, task=task)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "longdouble"])
def test_a_missing_number_is_an_error_with_its_row(tmp_path, dtype):
    for task in ("classification", "regression", "auto"):
        with pytest.raises(ValueError, match=r"d\.npz: y\[1\]: the label is missing"):
            read(tmp_path, np.array([1, np.nan, np.nan], dtype), "npz", task=task)


def test_what_is_missing_elsewhere_is_a_class_here(tmp_path):
    for label in ("none", "-", ".", "Na", "unknown", "missing", "nil", "nano"):
        assert read(tmp_path, [label, "x"]).y.tolist() in ([0, 1], [1, 0])


@pytest.mark.parametrize("how", WRITTEN)
def test_infinity_is_no_number_and_may_be_a_text(tmp_path, how):
    for infinite in ("inf", "-Infinity", "1e400", "9" * 5000):
        with pytest.raises(ValueError, match=r"(y\[1\]|line 3, column 't'): expected a label that is finite"):
            read(tmp_path, ["1", infinite], how)
    assert read(tmp_path, ["flu", "inf"], how).classes.tolist() == ["flu", "inf"]


def test_bytes_that_are_no_text_are_not_one_class(tmp_path):
    with pytest.raises(ValueError, match=r"y\[1\]: expected a label in UTF-8, got b'\\xff'"):
        read(tmp_path, np.array([b"a", b"\xff", b"\xfe"]), "npz")


def test_booleans_are_one_label_in_any_spelling(tmp_path):
    for how in WRITTEN:
        dataset = read(tmp_path, ["TRUE", "false", "True", "false"], how)
        assert dataset.y.tolist() == [0, 1, 0, 1]
        assert dataset.classes.tolist() == ["TRUE", "false"]
    assert read(tmp_path, np.array([True, False]), "npz").classes.tolist() == [False, True]


@pytest.mark.parametrize(
    ("labels", "regression"),
    [
        (["1.5", "2", "3"], True),
        (["1.0", "2.00", "3"], False),
        (["a", "1.5", "2.5"], False),
        ([str(i) for i in range(40)], True),  # 40 different numbers, one example each
        ([str(i % 21) for i in range(209)], True),
        ([str(i % 21) for i in range(210)], False),
        ([str(i % 20) for i in range(30)], False),
        ([f"c{i}" for i in range(40)], False),
    ],
)
def test_auto_decides_by_the_targets_kind(tmp_path, labels, regression):
    for how in WRITTEN:
        dataset = read(tmp_path, labels, how, task="auto")
        assert (dataset.classes is None) == regression
        if regression:
            assert dataset.y.dtype == np.float64
            assert dataset.y.tolist() == [float(label) for label in labels]


def test_auto_refuses_a_slip_among_many_numbers(tmp_path):
    """Each value twice, so that a split by classes would work."""
    slip = [f"{i}.5" for i in range(30)] + ["3.5x"]
    for how in WRITTEN:
        with pytest.raises(ValueError, match=r"expected a number, as most targets are, got '3.5x': task=\"class"):
            read(tmp_path, 2 * slip, how, task="auto")
        assert len(read(tmp_path, 2 * slip, how, task="classification").classes) == 31
        codes = [*map(str, range(30)), *["text", "more"] * 20]  # a few codes that look like numbers
        assert len(read(tmp_path, codes, how, task="auto").classes) == 32


def test_targets_of_a_regression_are_finite_numbers(tmp_path):
    assert read(tmp_path, ["1e3", "-.5", "True"], task="regression").y.tolist() == [1000, -0.5, 1]
    for wrong in ("inf", "1e400", "1e200", "x", "1_0", "\u0663", "0x1"):
        with pytest.raises(ValueError, match=r"line 3, column 't': expected a number below 1e\+150 as the target"):
            read(tmp_path, ["1", wrong], task="regression")
    with pytest.raises(ValueError, match=r"y\[1\]: expected a number below 1e\+150 as the target"):
        read(tmp_path, np.array([1, -np.inf]), "npz", task="regression")
    with pytest.raises(ValueError, match="expected task to be auto"):
        read(tmp_path, ["1", "2"], task="ranking")


@pytest.mark.parametrize(
    ("train", "test"),
    [*itertools.product([np.array([0, 1, 0, 1]), np.array([0.0, 1.0, 0.0, 1.0]), np.array(list("0101"))], repeat=2)],
)
def test_the_test_part_has_the_training_parts_labels(tmp_path, train, test):
    np.savez(tmp_path / "d.npz", x_train=np.eye(4), y_train=train, x_test=np.eye(4), y_test=test[::-1])
    dataset = data.load(tmp_path / "d.npz")
    assert dataset.y.tolist() == [0, 1, 0, 1]
    assert dataset.held_out.y.tolist() == [1, 0, 1, 0]
    assert dataset.held_out.classes is dataset.classes


def test_labels_of_idx_files(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((4, 1, 2), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([200, 3, 200, 0], np.uint8))
    assert data.load(tmp_path).classes.tolist() == [0, 3, 200]


@pytest.mark.parametrize("missing", [None, float("nan"), np.float64("nan")])
def test_a_missing_label_of_objects_is_an_error_of_the_estimators_too(missing):
    pytest.importorskip("sklearn")
    from fastbn.estimators import BatchNormClassifier, BatchNormRegressor

    X = np.eye(4)
    for estimator, y in (
        (BatchNormClassifier((2,), max_iter=1), ["a", "b", missing, "b"]),
        (BatchNormRegressor((2,), max_iter=1), [1.0, 2.0, missing, 3.0]),
    ):
        with pytest.raises(ValueError, match=r"without missing values, got .* in y\[2\]"):
            estimator.fit(X, np.array(y, dtype=object))
