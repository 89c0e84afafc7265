import gzip

import pandas as pd
import pytest

from paperworks.data import DatasetNotFound, load, read_table
from paperworks.errors import UserError

TABLE = "height,width,species\n1.5,2,cat\n3,4.25,dog\n5,6,cat\n7,8,ant\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="pets.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_the_last_column_holds_the_labels_by_default(write):
    data = load(write(TABLE))
    assert data.inputs.tolist() == [[1.5, 2], [3, 4.25], [5, 6], [7, 8]]
    assert data.classes == ("ant", "cat", "dog")
    assert data.targets.tolist() == [1, 2, 1, 0]
    assert data.name == "pets.csv"


@pytest.mark.parametrize("name", ["label", "target", "class"])
def test_a_column_called_as_labels_are_holds_them(write, name):
    data = load(write(f"{name},x\n10,1\n9,2\n10,3\n"))
    assert data.classes == ("9", "10")
    assert data.targets.tolist() == [1, 0, 1]


def test_the_target_can_be_named_and_the_rest_are_inputs(write):
    data = load(write("a,kind,label\n1,3.0,5\n2,1.0,6\n"), target="kind")
    assert data.inputs.tolist() == [[1, 5], [2, 6]]
    assert data.classes == ("1", "3")


def test_tsv_gzip_and_parquet_hold_the_same_table(write, tmp_path):
    expected = load(write(TABLE))
    (tmp_path / "pets.csv.gz").write_bytes(gzip.compress(TABLE.encode()))
    pd.read_csv(tmp_path / "pets.csv").to_parquet(tmp_path / "pets.parquet")
    for path in (
        write(TABLE.replace(",", "\t"), "pets.tsv"),
        tmp_path / "pets.csv.gz",
        tmp_path / "pets.parquet",
    ):
        data = load(path)
        assert data.inputs.equal(expected.inputs)
        assert data.targets.equal(expected.targets)


def test_limit_draws_a_stratified_part(write):
    rows = "".join(f"{i},{'ab'[i % 2]}\n" for i in range(40))
    data = load(write("x,kind\n" + rows), limit=10, seed=3)
    assert data.targets.bincount().tolist() == [5, 5]
    assert load(write("x,kind\n" + rows), limit=10, seed=3).inputs.equal(data.inputs)
    assert len(load(write("x,kind\n" + rows), limit=100)) == 40


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TABLE, {"target": "specie"}, "has no column 'specie'. Did you mean 'species'"),
        (TABLE, {"target": "height"}, r"'height' holds 1.5 in data row 1.*whole numbers or words"),
        (TABLE, {"target": "width"}, "'width' holds 4.25 in data row 2"),
        (TABLE.replace("4.25", "wide"), {}, "column 'width' is not numeric: data row 2 holds 'wide'"),
        (TABLE.replace("4.25", ""), {}, "column 'width' is empty or NaN in data row 2"),
        (TABLE.replace("4.25", "nan"), {}, "column 'width' is empty or NaN in data row 2"),
        (TABLE.replace("4.25", "inf"), {}, "column 'width' holds inf in data row 2"),
        (TABLE.replace("4.25", "1e300"), {}, r"column 'width' holds 1e\+300 in data row 2"),
        (TABLE.replace("dog", ""), {}, "label column 'species' is empty in data row 2"),
        ("species\ncat\n", {}, "no column beside 'species'"),
        ("height,species\n", {}, "has no rows"),
        ("", {}, "cannot be read as a table"),
        ("a,b\n1,2,3\n", {}, "cannot be read as a table"),
        ("a,b\n1,2\n1,2,3,4\n", {}, "cannot be read as a table.*line 3"),
        (TABLE, {"split": "train"}, "no split 'train'"),
        (TABLE, {"grayscale": True}, "is a table"),
        (TABLE, {"image_size": 8}, "is a table"),
        (TABLE, {"limit": 0}, "limit must be at least 1"),
        (TABLE, {"limit": 2}, "cannot hold all 3 classes"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(write, text, options, message):
    with pytest.raises(UserError, match=message) as caught:
        load(write(text), **options)
    assert "\n" not in str(caught.value)


def test_read_table_keeps_texts_and_takes_names(write, tmp_path):
    write('3,"Title, one",Text\n1,Two,"He said ""no"""\n', "news.csv")
    table = read_table("news.csv", names=["class", "title", "text"], root=tmp_path)
    assert table["title"].tolist() == ["Title, one", "Two"]
    assert table["class"].tolist() == [3, 1]
    assert table["text"][1] == 'He said "no"'


def test_read_table_refuses_what_is_no_table(write, tmp_path):
    with pytest.raises(UserError, match=r"not a table: expected .csv"):
        read_table(write("a", "notes.txt"))
    with pytest.raises(UserError, match="cannot be read as a table"):
        read_table(write("not parquet", "x.parquet"))
    (tmp_path / "latin.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(UserError, match="cannot be read as a table"):
        read_table(tmp_path / "latin.csv")
    with pytest.raises(DatasetNotFound):
        read_table(tmp_path / "absent.csv")
