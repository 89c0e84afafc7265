from pathlib import Path

import pytest

from paperworks.data import DatasetNotFound, data_root, locate


def test_the_argument_comes_before_the_environment_before_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("PAPERWORKS_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_root() == tmp_path / "cache" / "paperworks"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_root() == Path.home() / ".cache" / "paperworks"
    monkeypatch.setenv("PAPERWORKS_DATA", str(tmp_path / "env"))
    assert data_root() == tmp_path / "env"
    assert data_root(tmp_path / "argument") == tmp_path / "argument"
    assert data_root("~/sets") == Path.home() / "sets"


def test_a_path_is_found_as_given_or_in_the_root(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root" / "sets").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    assert locate("sets", root=tmp_path / "root") == tmp_path / "root" / "sets"
    assert locate("here", root=tmp_path / "root") == Path("here")
    monkeypatch.setenv("PAPERWORKS_DATA", str(tmp_path / "root"))
    assert locate("sets") == tmp_path / "root" / "sets"
    assert locate(tmp_path / "here") == tmp_path / "here"


def test_a_root_that_is_asked_for_comes_before_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ("sets", "root/sets"):
        (tmp_path / folder).mkdir(parents=True)
    assert locate("sets", root="root") == Path("root/sets")
    monkeypatch.setenv("PAPERWORKS_DATA", "root")
    assert locate("sets") == Path("sets")


def test_what_is_missing_says_where_it_was_looked_for_and_how_to_get_it(tmp_path):
    with pytest.raises(DatasetNotFound, match="PAPERWORKS_DATA") as caught:
        locate("groove", root=tmp_path)
    assert str(tmp_path / "groove") in str(caught.value)
    with pytest.raises(DatasetNotFound, match=r"Get it from example\.org"):
        locate("groove", root=tmp_path, how="Get it from example.org.")
