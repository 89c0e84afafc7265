"""The cards are complete and true, and reading them costs nothing."""

import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import metadata
from statistics import median
from time import perf_counter

import pytest

from paperworks.bench import load_claim
from paperworks.catalog import FAMILIES, Card, catalog, find
from paperworks.errors import MissingExtra, UserError

METHODS = {
    "robust": "sent logitclip cmpl rmix ddg iern",
    "efficient": "gradfilter sparcl redundancy",
    "distributed": "dgc papaya dpsvrg alpa resharding",
    "search": "haq spvnas ovo aiop gennape netgraph",
    "vision": "emo convformer pmtiqa cmaae",
    "detection": "samdetr metadetr reft cmt dynrec",
    "synthesis": "discoscene stylesv objectsdf sem2nerf moldesign drums",
    "agents": "ace girl getup autotrig",
    "audit": "feat ddbackdoor robustar mrclens",
    "graphs": "reliant mgtab bertnet notmad",
    "physics": "quantumnas koopman",
}
CARDS = list(catalog().values())
BUILT = [card for card in CARDS if card.built]
PLANNED = [card for card in CARDS if not card.built]
API = [name for card in BUILT for name in card.api]
LIGHT = [
    ["list"],
    ["list", "--family", "robust"],
    ["list", "--json"],
    ["show", "logitclip"],
    ["show", "logitclip", "--json"],
    ["--help"],
    ["--version"],
    ["check", "--help"],
    ["combine", "--help"],
]


def slug(card: Card) -> str:
    return card.slug


def test_all_49_methods_have_a_card_in_their_family() -> None:
    found = {family: " ".join(card.slug for card in CARDS if card.family == family) for family in FAMILIES}
    assert found == METHODS
    assert len(CARDS) == 49


@pytest.mark.parametrize("card", CARDS, ids=slug)
def test_a_card_is_complete(card: Card) -> None:
    assert card.name
    assert re.fullmatch(r"[^\n]{20,110}[^\n.]", card.summary)
    assert len(card.problem.split()) > 15
    assert card.tags
    assert card.paper.title
    assert card.paper.authors
    assert 2015 <= card.paper.year <= 2025
    assert card.paper.venue
    assert re.fullmatch(r"(\d{4}\.\d{4,5})?", card.paper.arxiv)
    assert card.built == bool(card.claim)


@pytest.mark.parametrize("card", BUILT, ids=slug)
def test_the_extra_of_a_built_card_is_one_of_the_package(card: Card) -> None:
    assert card.extra in ("", *metadata("paperworks").get_all("Provides-Extra", []))


@pytest.mark.parametrize("name", API)
def test_every_name_on_a_built_card_resolves_and_is_documented(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert getattr(import_module(module), attribute).__doc__
    assert attribute in import_module(module).__all__


@pytest.mark.parametrize("card", BUILT, ids=slug)
def test_a_built_card_has_a_claim_in_one_sentence(card: Card) -> None:
    try:
        assert load_claim(card.slug).slug == card.slug
    except MissingExtra as error:
        pytest.skip(str(error))
    assert re.fullmatch(r"[A-Z].*\.", card.claim_sentence)


@pytest.mark.parametrize("card", PLANNED, ids=slug)
def test_a_planned_method_has_no_claim_to_check(card: Card) -> None:
    with pytest.raises(UserError, match=f"{card.slug} is planned"):
        load_claim(card.slug)


def test_an_unknown_slug_gets_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"unknown method 'logitclp'. Did you mean 'logitclip'\?"):
        find("logitclp")


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "paperworks", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.stdout
    assert "click" in imported  # the listing was read
    assert not imported & {"torch", "numpy", "pandas", "scipy", "sklearn", "matplotlib", "pydantic", "rich", "PIL"}


def test_listing_costs_little_beyond_starting_python() -> None:
    def seconds(*arguments: str) -> float:
        begun = perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        return perf_counter() - begun

    bare = ("-c", "import click, importlib.metadata, tomllib, ast, json")
    pairs = [(seconds("-m", "paperworks", "list"), seconds(*bare)) for _ in range(5)]
    assert median(ours / theirs for ours, theirs in pairs) < 3
