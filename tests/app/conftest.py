"""The claims of tests/bench/plugin, a project in an empty folder, and its page."""

import json
import time
from pathlib import Path

import pytest

from paperworks.catalog import catalog

PLUGIN = Path(__file__).parents[1] / "bench" / "plugin"
HOST = "http://localhost"


@pytest.fixture(autouse=True)
def plugin(monkeypatch, tmp_path):
    """The claims of the plug-in, for this process and those it starts, which work in ``tmp_path``."""
    monkeypatch.syspath_prepend(PLUGIN)
    monkeypatch.setenv("PYTHONPATH", str(PLUGIN))
    monkeypatch.chdir(tmp_path)
    for variable in ("PAPERWORKS_STORE", "PAPERWORKS_AUTH", "TINY_FAULT", "TINY_TRIALS"):
        monkeypatch.delenv(variable, raising=False)
    catalog.cache_clear()
    yield
    catalog.cache_clear()


@pytest.fixture
def until():
    """Waits until something holds, and returns it."""

    def wait(holds, seconds=200.0):
        end = time.monotonic() + seconds
        while not (found := holds()):
            assert time.monotonic() < end, "it took too long"
            time.sleep(0.1)
        return found

    return wait


@pytest.fixture
def trials(monkeypatch, tmp_path_factory):
    """The trials that were begun, in whatever process."""
    path = tmp_path_factory.mktemp("trials") / "begun"
    monkeypatch.setenv("TINY_TRIALS", str(path))
    return lambda: path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def squad(tmp_path):
    """A SQuAD file in which the answer always stands in the first sentence; its words are marked up."""
    names = ["Anna", "Bert", "Cora", "Dora", "Emil", "Fred", "Gila", "Hans"]
    paragraphs = []
    for k in range(240):
        name, other = names[k % 8], names[(k * 3 + 1) % 8]
        first = f"In spring the house of {name} was painted <b>blue{k}</b> by friends."
        context = f"{first} Nobody saw the garden of {other} that year. Rain fell on roof {k}. The dog slept long."
        answer = {"text": f"<b>blue{k}</b>", "answer_start": context.index("<b>")}
        asked = f"What colour was the house of {name} painted in spring?"
        paragraphs.append({"context": context, "qas": [{"id": f"q{k}", "question": asked, "answers": [answer]}]})
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "houses", "paragraphs": paragraphs}]}))
    return path
