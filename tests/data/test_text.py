import pandas as pd
import pytest

from paperworks.data.root import DatasetNotFound
from paperworks.data.text import has_ag_news, load_text
from paperworks.errors import UserError

TABLE = "text,label\nrain today,weather\n2 : 1,sport\nsun,weather\n"
AG_NEWS = '"3","Oil rises","A barrel costs more."\n"4","Chips","They shrink."\n"1","Vote","A count."\n'


@pytest.fixture
def write(tmp_path):
    def write(text, name="news.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_texts_and_labels_are_found_by_their_usual_names(write):
    texts, targets, classes = load_text(write(TABLE))
    assert texts == ["rain today", "2 : 1", "sun"]
    assert classes == ("sport", "weather")
    assert targets.tolist() == [1, 0, 1]


def test_columns_of_text_are_joined_and_may_be_empty_if_not_all_are(write):
    table = "kind,head,body\na,one,two\nb,,three\na,four,\n"
    found = load_text(write(table), text=["head", "body"], target="kind")
    assert found.texts == ["one two", "three", "four"]


def test_numbers_are_texts_too(write):
    assert load_text(write("text,label\n12,a\n13,b\n")).texts == ["12", "13"]


def test_words_that_look_like_missing_values_are_words(write):
    found = load_text(write("text,label\nNA,a\nnull,NA\n"))
    assert (found.texts, found.classes) == (["NA", "null"], ("NA", "a"))
    with pytest.raises(UserError, match="label column 'label' is empty in row 1"):
        load_text(write("text,label\nx,\ny,a\n"))


def test_the_label_is_not_a_column_of_text(write):
    table = "class,sentence\n0,x\n1,y\n"
    found = load_text(write(table))
    assert found.texts == ["x", "y"]
    assert found.classes == ("0", "1")


def test_a_file_without_a_header_needs_names(write):
    path = write("x,one\ny,two\n")
    with pytest.raises(UserError, match=r"no column called text.*names="):
        load_text(path)
    assert load_text(path, names=("label", "text")).texts == ["one", "two"]


def test_tsv_and_parquet(write, tmp_path):
    assert load_text(write(TABLE.replace(",", "\t"), "news.tsv")).texts[1] == "2 : 1"
    pd.DataFrame({"text": ["a", "b"], "label": [5, 7]}).to_parquet(tmp_path / "news.parquet")
    assert load_text("news.parquet", root=tmp_path).classes == ("5", "7")


@pytest.mark.parametrize("place", ["ag_news_csv/test.csv", "text/ag_news_test.csv"])
def test_ag_news_in_its_official_form(write, tmp_path, place):
    assert not has_ag_news(tmp_path)
    write(AG_NEWS, place)
    assert has_ag_news(tmp_path)
    texts, targets, classes = load_text("ag_news", root=tmp_path)
    assert texts[0] == "Oil rises A barrel costs more."
    assert [classes[k] for k in targets] == ["Business", "Sci/Tech", "World"]


def test_ag_news_train_split(write, tmp_path):
    write(AG_NEWS, "ag_news_csv/train.csv")
    assert len(load_text("ag_news", split="train", root=tmp_path).texts) == 3
    with pytest.raises(DatasetNotFound, match=r"test\.csv.*Get ag_news_csv"):
        load_text("ag_news", root=tmp_path)


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (TABLE, {"text": "txt"}, "news.csv has no column 'txt'. Did you mean 'text'"),
        (TABLE, {"target": "labels"}, "news.csv has no column 'labels'. Did you mean 'label'"),
        (TABLE, {"text": []}, "text must name at least one column"),
        (TABLE, {"split": "train"}, "has no split 'train'"),
        ("text,label\na,x\n,y\n", {}, "column text is empty in row 2"),
        ("text,label\na,x\nb,\n", {}, "label column 'label' is empty in row 2"),
        ("text,label\na,x\nb,x\n", {}, "holds 'x' only, expected at least 2 classes"),
    ],
)
def test_bad_tables_get_a_line_that_names_the_trouble(write, table, options, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        load_text(write(table), **options)


def test_bad_ag_news(write, tmp_path):
    write(AG_NEWS + '"7","a","b"\n', "ag_news_csv/test.csv")
    with pytest.raises(UserError, match=r"class is 7 in row 4, expected 1 to 4"):
        load_text("ag_news", root=tmp_path)
    with pytest.raises(UserError, match=r"unknown split of ag_news 'tset'\. Did you mean 'test'"):
        load_text("ag_news", split="tset", root=tmp_path)
