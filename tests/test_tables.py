"""Tables as other people's programs write them: .csv and its kin."""

import gzip
import itertools
import shlex
from decimal import Decimal

import numpy as np
import pytest

from fastbn import data


def read(folder, text, target=None, name="d.csv", **options):
    content = text.encode() if isinstance(text, str) else text
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return data.load(folder / name, target, **options)


ROWS = [["width", "kind", "height"], ["7.5", "b", "-2"], ["30", "a", "0.25"]]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", " ", ", ", "; ", "   "])
def test_the_delimiter_is_found(tmp_path, delimiter):
    names = ["d.csv", "d.tsv", "d.txt", "d.data", "d.CSV", "d.csv.gz", "d.tsv.gz"]
    quotes = ["", '"'] if delimiter.strip(" ") else [""]
    for name, quote, end in itertools.product(names, quotes, ["\n", "\r\n", "\r"]):
        text = "".join(delimiter.join(f"{quote}{cell}{quote}" for cell in row) + end for row in ROWS)
        dataset = read(tmp_path, text, "kind", name)
        assert dataset.features == ("width", "height")
        assert dataset.X.tolist() == [[7.5, -2], [30, 0.25]]
        assert dataset.classes[dataset.y].tolist() == ["b", "a"]


def test_a_name_with_a_space_above_single_cells(tmp_path):
    (tmp_path / "d.csv").write_text("sepal length\n5.1\n4.9\n")
    dataset = data.load(tmp_path / "d.csv")
    assert (dataset.features, dataset.X.tolist()) == (("sepal length",), [[5.1], [4.9]])


def test_delimiters_within_names_and_excels_own_line(tmp_path):
    assert read(tmp_path, "weight (kg, dry);height\n1;2\n").features == ("weight (kg, dry)", "height")
    assert read(tmp_path, '"a;b",c\n1,2\n').features == ("a;b", "c")
    assert read(tmp_path, "a;b,t\n1,x;y\n2,z\n", "t").features == ("a;b",)
    dataset = read(tmp_path, 'sep=;\n"a,b";c\n1;2\n1;x\n', ignore=["c"])
    assert dataset.features == ("a,b",)
    with pytest.raises(ValueError, match="line 4, column 'c': expected a number, got 'x'"):
        read(tmp_path, "sep=;\na;c\n1;2\n1;x\n")
    with pytest.raises(ValueError, match=r"got the columns a, b;c \(parted by commas\)"):
        read(tmp_path, "a, b;c\n1, 2;3\n", "c")
    with pytest.raises(
        ValueError, match=r"got '7,4' \(cells are parted by semicolons; decimals are written with a point"
    ):
        read(tmp_path, "a;b\n7,4;5\n")


def test_what_numpy_writes_is_read(tmp_path):
    X = np.random.default_rng(0).normal(size=(5, 3)) * 10.0 ** np.array([-8, 0, 12])
    for delimiter in (" ", ",", "\t", ";"):
        np.savetxt(tmp_path / "d.txt", X, delimiter=delimiter, header=delimiter.join("abc"))
        assert data.load(tmp_path / "d.txt").X.tobytes() == X.tobytes()
        np.savetxt(tmp_path / "d.txt", X, delimiter=delimiter)
        assert data.load(tmp_path / "d.txt", header=False).X.tobytes() == X.tobytes()


@pytest.mark.parametrize(
    "text", ["1,2,0\n3,4,1\n", "5.1,3.5,setosa\n4,3,other\n", "a,1990,1991\nx,1,2\n", "x1,True,x\nx2,False,y\n"]
)
def test_a_first_row_that_may_be_an_example_is_not_eaten(tmp_path, text):
    with pytest.raises(
        ValueError, match=r"d\.csv: the first row holds \S+, so it may be an example .*header=False \(--no-header\)"
    ):
        read(tmp_path, text)
    rows = [line.split(",") for line in text.splitlines()]
    last = len(rows[0])
    whole = read(tmp_path, text, str(last), ignore=["1"], header=False)
    assert len(whole.X) == 2
    assert [str(label) for label in whole.classes[whole.y]] == [row[-1] for row in rows]
    assert whole.features is None
    assert len(read(tmp_path, text, rows[0][-1], ignore=[rows[0][0]], header=True).X) == 1


def test_positions_are_the_names_without_a_header(tmp_path):
    text = "7,1.5,x,2\n8,2.5,y,3\n"
    dataset = read(tmp_path, text, "3", header=False, ignore=["1"])
    assert dataset.X.tolist() == [[1.5, 2], [2.5, 3]]
    assert read(tmp_path, text, "3", header=False, columns=["4", "2"]).X.tolist() == [[2, 1.5], [3, 2.5]]
    with pytest.raises(ValueError, match=r"expected one column called '5', got the columns 1, 2, 3, 4"):
        read(tmp_path, text, "5", header=False)


@pytest.mark.parametrize(
    "cell", ["1700000001", "20180130.25", "123456.78000000001", "1e5", "+.5", "-7.", "1E-3", " 4 ", "0"]
)
def test_numbers_keep_their_digits(tmp_path, cell):
    X = read(tmp_path, f"a,b\n{cell},1\n").X
    assert X.dtype == np.float64
    assert abs(Decimal(X[0, 0].item()) - Decimal(cell.strip())) <= abs(Decimal(cell.strip())) / 2**53


@pytest.mark.parametrize(
    "cell", ["1_000", "\u0663", "\uff13", "0x1F", "1 000", "12%", "$5", "1d5", "\u22125", "--5", "1.2.3"]
)
@pytest.mark.parametrize("beside", ["1", "True"])  # the row's other cell: numbers alone are read at once
def test_what_nobody_writes_for_a_number_is_refused(tmp_path, cell, beside):
    with pytest.raises(
        ValueError,
        match=r"line 2, column 'a': expected a number, got .*ignore=\['a'\] \(--ignore a\) leaves the column out",
    ):
        read(tmp_path, f"a,b,t\n{cell},{beside},x\n", "t")


@pytest.mark.parametrize("missing", ["", "NA", "nan", "?", "#N/A"])
def test_a_missing_number_is_refused_with_the_way_on(tmp_path, missing):
    with pytest.raises(
        ValueError,
        match=r"line 3, column 'a b': .* \(fill in what is missing, or ignore=\['a b'\] \(--ignore 'a b'\) leaves",
    ):
        read(tmp_path, f"a b,t\n1,x\n{missing},x\n", "t")


@pytest.mark.parametrize("cell", ["inf", "-inf", "Infinity", "1e999"])
def test_an_infinity_is_refused_as_a_number(tmp_path, cell):
    with pytest.raises(ValueError, match=r"line 2, column 'a': expected .*, got ") as refusal:
        read(tmp_path, f"a,t\n{cell},x\n", "t")
    assert "OneHotEncoder" not in str(refusal.value)


def test_booleans_are_numbers(tmp_path):
    assert read(tmp_path, "a,b\nTrue,false\nFALSE,TRUE\n").X.tolist() == [[1, 0], [0, 1]]


def test_columns_and_ignore(tmp_path):
    text = "id,a,b,t\nx7,1,2,u\nx8,3,4,v\n"
    for options, features in (({"ignore": ["id"]}, ("a", "b")), ({"columns": ["b", "a"]}, ("b", "a"))):
        dataset = read(tmp_path, text, "t", **options)
        assert dataset.features == features
        assert dataset.X.tolist() == [[{"a": 1, "b": 2}[k] for k in features], [{"a": 3, "b": 4}[k] for k in features]]
    for options, fault in (
        ({"ignore": ["c"]}, "expected one column called 'c', got the columns id, a, b, t"),
        ({"columns": ["a", "t"]}, "expected 't' as the target or as a feature, not as both"),
        ({"ignore": ["id", "a", "b"]}, "no feature column beside 't'"),
    ):
        with pytest.raises(ValueError, match=fault):
            read(tmp_path, text, "t", **options)
    np.savez(tmp_path / "d.npz", X=np.ones((2, 2)))
    for options in ({"columns": ["a"]}, {"ignore": ["a"]}, {"header": False}):
        with pytest.raises(ValueError, match="is for tables"):
            data.load(tmp_path / "d.npz", **options)


@pytest.mark.parametrize("first", ["", '""', "Unnamed: 0"])
@pytest.mark.parametrize(
    ("cells", "left_out"), [("0 1 2", True), ("17 3 99", True), ("x y z", True), ("1 1 2", False), ("0.5 1 2", False)]
)
def test_row_names_are_no_feature(tmp_path, first, cells, left_out):
    text = f"{first},a,t\n" + "".join(f"{cell},{i * i},x\n" for i, cell in enumerate(cells.split()))
    dataset = read(tmp_path, text, "t")
    assert dataset.features == (("a",) if left_out else (first.strip('"'), "a"))
    assert dataset.X[:, -1].tolist() == [0, 1, 4]
    assert dataset.notes == (
        ("left out the first column, which has no name and another cell in every row",)
        if left_out
        else (f"the first column has no name, and is a feature: ignore=[{dataset.features[0]!r}] "
              f"(--ignore {shlex.quote(dataset.features[0])}) leaves it out",)
    )  # fmt: skip


def test_a_header_without_a_cell_above_the_row_names(tmp_path):
    """As R's write.table writes it: quoted or not, parted by spaces or by what `sep` says."""
    rows = [("1", "5.1", "3.5", "se tosa"), ("2", "4.9", "3.0", "virginica")]
    for delimiter in " \t,;":
        for quote in ('"', "") if delimiter != " " else ('"',):
            head = delimiter.join(f"{quote}{name}{quote}" for name in ("Sepal.Length", "Sepal.Width", "Species"))
            body = [delimiter.join((f"{quote}{a}{quote}", b, c, f"{quote}{d}{quote}")) for a, b, c, d in rows]
            dataset = read(tmp_path, "\n".join([head, *body, ""]), "Species")
            assert dataset.features == ("Sepal.Length", "Sepal.Width")
            assert dataset.X.tolist() == [[5.1, 3.5], [4.9, 3.0]]
            assert dataset.classes.tolist() == ["se tosa", "virginica"]
            assert dataset.notes == ("left out the first column, which has no name and another cell in every row",)
    with pytest.raises(ValueError, match="no name for the first column, expected row names, got cells that are there"):
        read(tmp_path, "a,t\n1,2,u\n1,3,v\n", "t")
    with pytest.raises(ValueError, match="line 3 has 3 cells parted by commas, expected 2"):
        read(tmp_path, "a,t\n1,u\n1,3,v\n", "t")
    # A decimal comma; a delimiter at the end of the rows alone.
    for text in ("x\n1,5\n2,7\n", "x,y\n1,5,\n2,7,\n", "x\ty\r\n1\t5\t\r\n2\t7\t\r\n"):
        with pytest.raises(ValueError, match=r"line 2 has . cells parted by .*, expected"):
            read(tmp_path, text, columns=["x"])


def test_a_column_asked_for_by_its_empty_name_is_one(tmp_path):
    text = ",a\n4,1\n5,2\n"
    assert read(tmp_path, text, columns=["", "a"]).X.tolist() == [[4, 1], [5, 2]]
    assert read(tmp_path, text, ignore=[""]).X.tolist() == [[1], [2]]
    assert read(tmp_path, "NA,?,x\n4,1,2\n", "x").features == ("NA", "?")  # sodium may be a header


def test_a_column_that_counts_the_rows_is_named(tmp_path):
    dataset = read(tmp_path, "Id,a,t\n" + "".join(f"{i},{i % 2},x\n" for i in range(5, 9)), "t")
    assert dataset.notes == ("column Id counts the rows: ignore=['Id'] (--ignore Id) leaves it out",)
    assert read(tmp_path, "x,t\n1,u\n2,v\n3,u\n", "t").notes == ()  # the only feature there is


def test_columns_of_one_name_are_said_to_be_features(tmp_path):
    dataset = read(tmp_path, "a,a,b,label\n1,2,3,x\n4,5,7,y\n2,2,2,x\n", "label")
    assert dataset.X.shape == (3, 3)
    assert dataset.notes == ("2 columns are called a, and all are features",)


def test_what_is_no_table(tmp_path):
    for content, fault in (
        ("a,t\n1,\u00e9\n".encode("latin-1"), r"not a text file in UTF-8 .*: save it as UTF-8"),
        ("a,t\n1,2\n".encode("utf-16"), "UTF-8"),
        ("a,t\n1,2\n".encode("utf-16-le"), "UTF-8"),
        (b'a,t\n1,2\n3,"4\n', "line 3: not a row of a table"),
        (b"a,t\n1e151,2\n", "line 2, column 'a': expected less than 1e\\+150"),
        (b"a,t\n" + b"7" * 100_000 + b",2\n", "line 2, column 'a': expected less than"),
    ):
        with pytest.raises(ValueError, match=rf"d\.csv: .*{fault}"):
            read(tmp_path, content, "t")
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(b"a\n1\n")[:-5])
    with pytest.raises(ValueError, match=r"d\.csv\.gz: damaged or truncated"):
        data.load(tmp_path / "d.csv.gz")
    with pytest.raises(ValueError, match="expected a number") as caught:
        read(tmp_path, f"{'n' * 5000},t\n{'x' * 5000},2\n", "t")
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
