"""The README works as printed."""

import re

import pytest

from paperworks.bench.report import BEGIN, END
from snippets import ROOT, check_commands, run_python

README = ROOT / "README.md"


def test_its_python_runs_when_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    run_python(README)
    accuracy = float(capsys.readouterr().out.rstrip("%\n"))
    assert accuracy > 80


def test_its_commands_exist() -> None:
    assert check_commands(README) >= 10


def test_it_opens_with_the_two_commands() -> None:
    first = README.read_text("utf-8").split("```")[1]
    assert re.findall(r"^make \w+", first, re.M) == ["make demo", "make test"]


def test_what_it_links_to_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_it_holds_the_generated_table() -> None:
    text = README.read_text("utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.split(BEGIN)[1].split(END)[0].count("\n| ") == 49 + 2
