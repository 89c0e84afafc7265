"""Results as a page that stands alone, as JSON, as a table in a README."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from paperworks.bench.report import BEGIN, END, number, spread
from paperworks.catalog import catalog

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def checked(paperworks):
    done = paperworks("check", "tiny", "--executor", "serial", "--scale", "smoke", "--set", f"data={EVIL}")
    assert done.code == 0, done.err
    return done


def test_a_page_stands_alone_and_escapes_what_it_shows(checked, paperworks):
    assert paperworks("report", "--html", "all.html").code == 0
    (own,) = Path("results/tiny").glob("data=*/smoke.html")  # changed settings leave the claim's own result alone
    for path in (own, Path("all.html")):
        text = path.read_text()
        page = Page(text)
        tags = {tag for tag, _ in page.tags}
        assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
        assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
        for name in ("src", "href", "srcset", "data", "action", "background"):
            assert all(attrs[name].startswith("data:image/png;base64,") for _, attrs in page.tags if name in attrs)
        assert not re.search(r"url\(|@import", text)
        assert EVIL not in text
        shown = "".join(page.text)
        assert shown.count(EVIL) >= 2  # the setting's value and the expectation's name
        assert f"paperworks check tiny --scale smoke --seeds 1 --set 'data={EVIL}'" in shown
        assert "Tiny <method>" in shown
        assert "On <b>one</b>" in shown
        images = [attrs["src"].partition(",")[2] for tag, attrs in page.tags if tag == "img"]
        assert len(images) == 6  # expectations, metrics, curves, and what each arm drew
        assert all(base64.b64decode(image, validate=True).startswith(b"\x89PNG") for image in images)


def test_the_terminal_shows_names_as_they_are(checked):
    assert EVIL in checked.out


def test_report_as_json(checked, paperworks):
    done = paperworks("report", "--json")
    assert done.err == ""
    (found,) = json.loads(done.out)
    assert list(found) == ["slug", "scale", "seeds", "expectations", "changed"]
    assert found["changed"] == {"data": EVIL}
    assert (found["slug"], found["scale"], found["seeds"]) == ("tiny", "smoke", 1)
    assert [list(expectation) for expectation in found["expectations"]] == [
        ["name", "verdict", "estimate", "low", "high"]
    ] * 3
    first, ratio, _ = found["expectations"]
    assert first == {
        "name": "score: better − base",
        "verdict": "undecided",
        "estimate": pytest.approx(1, abs=1e-5),
        "low": None,
        "high": None,
    }
    assert ratio["name"] == EVIL


def test_report_as_a_table(checked, paperworks):
    done = paperworks("report")
    assert done.code == 0
    assert "score: better − base" in done.out
    assert paperworks("report", "--results", "results/combine").code == 2
    Path("empty").mkdir()
    assert paperworks("report", "--results", "empty").out == "No results in empty yet.\n"


def test_show_tells_the_last_result(checked, paperworks):
    assert "Measured" not in paperworks("show", "tiny").out
    paperworks("check", "tiny", "--executor", "serial", "--scale", "smoke")
    out = paperworks("show", "tiny").out
    assert "Measured at smoke with 1 seed: undecided" in out
    assert "score: better − base: 1 (−∞ … ∞): undecided" in out
    shown = json.loads(paperworks("show", "tiny", "--json").out)
    assert shown["result"]["verdict"] == "undecided"
    assert shown["claim"] == "One is added."


def test_the_table_of_methods_stands_between_its_marks(paperworks):
    paperworks("check", "tiny", "--executor", "serial")
    readme = Path("README.md")
    readme.write_text(f"# Title\n\n{BEGIN}\nbefore\n{END}\n\nThe end\n")
    assert paperworks("report", "--readme", readme).code == 0
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n| method |")
    assert text.endswith(f"{END}\n\nThe end\n")
    assert "before" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(catalog())
    assert [row.split("|")[4].strip() for row in rows if "`tiny`" in row] == ["holds (quick, 2 seeds)"]
    assert [row.split("|")[4].strip() for row in rows if "`nudge`" in row] == ["not measured yet"]
    readme.write_text("# Of another project\n")
    done = paperworks("report", "--readme", readme)
    assert done.code == 2
    assert "lacks the marks" in done.line
    assert readme.read_text() == "# Of another project\n"


def test_numbers_as_people_read_them():
    assert [number(v) for v in (0.123456, -2.0, float("inf"), float("-inf"))] == ["0.123", "−2", "∞", "−∞"]
    assert number(0.05, "difference") == "+0.05"
    assert number(-0.05, "difference") == "−0.05"
    assert spread([1.0, 2.0, 3.0]) == "2 ± 1"
    assert spread([0.5]) == "0.5 ± 0"
