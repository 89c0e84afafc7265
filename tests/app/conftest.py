"""The claims of tests/bench/plugin, a project in an empty folder, and its page."""

import json
import time

import pytest


@pytest.fixture(autouse=True)
def plugin(tinyclaims):
    """Every test has the claims of the plug-in, and an empty folder."""


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
