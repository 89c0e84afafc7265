"""A package from elsewhere adds a method: the one that docs/plugins.md prints, installed as printed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from paperworks.catalog import catalog
from snippets import ROOT, blocks

Paperworks = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plug-in installed in it."""
    source, target = tmp_path_factory.mktemp("smoothing"), tmp_path_factory.mktemp("site")
    for block in blocks(ROOT / "docs" / "plugins.md"):
        if block.title:
            path = source / block.title
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target]
    subprocess.run([*pip, source], check=True, capture_output=True, text=True)
    return target


@pytest.fixture
def paperworks(site: Path, tmp_path: Path) -> Paperworks:
    """The command line, beside the plug-in."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(site)}
        command = [sys.executable, "-m", "paperworks", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_list_names_it_after_the_library_s_own(paperworks: Paperworks) -> None:
    slugs = [card["slug"] for card in json.loads(paperworks("list", "--json").stdout)]
    assert slugs == [*catalog(), "smoothing"]


def test_show_reads_its_card_and_its_claim(paperworks: Paperworks) -> None:
    shown = paperworks("show", "smoothing").stdout
    assert "from smoothing.loss import LabelSmoothing" in shown
    assert "Claim: With half of the training labels wrong" in shown


def test_check_measures_its_claim(paperworks: Paperworks, tmp_path: Path) -> None:
    done = paperworks("check", "smoothing", "--scale", "smoke", "--executor", "serial")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results" / "smoothing" / "smoke.json").read_text())
    assert result["expectations"][0]["name"] == "accuracy: smoothing − plain"
    assert f"smoothing (smoke, 1 seed): {result['verdict']}" in done.stdout


def test_a_fault_in_the_plug_in_is_one_line(site: Path, paperworks: Paperworks) -> None:
    card = site / "smoothing" / "catalog.toml"
    text = card.read_text()
    try:
        card.write_text(text.replace('slug = "smoothing"', 'slug = "logitclip"'))
        taken = paperworks("list")
        card.write_text(text.replace("[method.paper]", "[method.article]"))
        malformed = paperworks("list")
    finally:
        card.write_text(text)
    assert (taken.returncode, malformed.returncode) == (2, 2)
    assert "plug-in 'smoothing' takes the slug 'logitclip'" in taken.stderr
    assert "plug-in 'smoothing' has no valid catalog.toml" in malformed.stderr
    assert taken.stderr.count("\n") == malformed.stderr.count("\n") == 1
