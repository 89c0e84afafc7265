"""The documentation's snippets run, and its hooks make of TeX, cards and results what they should."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from paperworks.bench import Settings, scaled
from paperworks.bench.results import Found, Summary
from paperworks.catalog import catalog
from snippets import ROOT, check_commands, run_python

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mathml, pages = hook("mathml"), hook("pages")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_s_python_runs_and_its_commands_exist(page: Path) -> None:
    run_python(page)
    check_commands(page)


def test_formulas_become_mathml() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    content = 'a <span class="arithmatex">\\(x &lt; \\tau\\)</span> b'
    found = mathml.on_page_content(content, page)
    assert found.startswith("a <math")
    assert "τ" in found or "003C4" in found
    assert found.endswith("</math> b")
    assert 'display="block"' in mathml.on_page_content('<div class="arithmatex">\\[x\\]</div>', page)


def test_an_unknown_command_of_tex_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\\foo is not known"):
        mathml.mathml(r"x + \foo", block=False)


class ExampleSettings(Settings):
    """Settings of an example."""

    epochs: int = scaled(smoke=1, quick=20, full=300, description="passes | over the data")
    rates: tuple[float, ...] = (0.5, 1.0)


def example(low: float, high: float) -> Summary:
    found = Found(
        name="accuracy: <b>",
        verdict="holds",
        estimate=0.25,
        low=low,
        high=high,
        bar=0.02,
        direction="at least",
        unit="difference",
    )
    return Summary(
        slug="logitclip", scale="quick", seeds=3, verdict="holds", expectations=[found],
        arms={"ce": {"accuracy": [0.5, 0.5]}, "logitclip": {"accuracy": [0.75, 0.75]}}, settings={"epochs": 20},
        device="cpu", versions={"torch": "2"}, machine={"processor": "x", "cores": 2, "gpu": None}, cpu_seconds=10,
        measured="2026-01-01", digest="0",
    )  # fmt: skip


def test_a_method_s_page_shows_card_claim_result_settings_and_api() -> None:
    card = catalog()["logitclip"]
    page = pages.method_page(card, ExampleSettings, example(0.125, math.inf), [("forest.png", "A | figure")])
    assert page.startswith("# LogitClip\n")
    assert card.paper.title in page
    assert all(f"::: {name}" in page for name in card.api)
    assert "| accuracy: &lt;b&gt; | at least +0.02 | +0.25 | +0.125 … ∞ | holds |" in page
    assert "| logitclip | 0.75 ± 0 |" in page
    assert "| epochs | passes &#124; over the data | 1 | 20 | 300 |" in page
    assert "| rates |  | 0.5, 1 | 0.5, 1 | 0.5, 1 |" in page
    assert "![A &#124; figure](forest.png)" in page


def test_a_method_that_was_not_measured_says_so() -> None:
    page = pages.method_page(catalog()["logitclip"], ExampleSettings, None, [])
    assert "Not measured yet." in page


def test_every_built_method_has_a_page_and_every_public_module_a_place() -> None:
    made = dict(pages.generated([]))
    assert {f"methods/{card.slug}.md" for card in catalog().values() if card.built} <= set(made)
    assert "::: paperworks.train.trainer\n" in made["reference/train.md"]
    assert "::: paperworks.robust.mixing\n" in made["reference/robust.md"]
    assert "paperworks.robust.logitclip" not in made["reference/robust.md"]
