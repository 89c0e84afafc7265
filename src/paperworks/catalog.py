"""The cards of the methods. Reading them imports neither torch nor any method.

The library's own cards stand in ``catalog.toml``. Another package adds cards by an entry point of the group
``paperworks.catalog`` whose value is a package that holds a ``catalog.toml`` of the same form.
"""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paperworks.errors import UserError, unknown

SCALES = ("smoke", "quick", "full")
FAMILIES = {
    "robust": "noisy, few or biased labels",
    "efficient": "less work per step",
    "distributed": "many workers",
    "search": "finding and predicting nets",
    "vision": "backbones and image quality",
    "detection": "finding objects",
    "synthesis": "making scenes, videos, molecules, music",
    "agents": "acting and reasoning",
    "audit": "what is wrong with it",
    "graphs": "graphs and knowledge",
    "physics": "quantum and PDEs",
}


@dataclass(frozen=True)
class Paper:
    """Where a method was published; ``arxiv`` is empty where there is no preprint."""

    title: str
    authors: tuple[str, ...]
    year: int
    venue: str
    arxiv: str = ""

    @property
    def published(self) -> str:
        """Venue and year, which many venues have in their name."""
        return self.venue if str(self.year) in self.venue else f"{self.venue}, {self.year}"

    @property
    def url(self) -> str:
        """Address of the preprint, or empty."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""


@dataclass(frozen=True)
class Card:
    """What is known of a method without importing it.

    Attributes:
        slug: Its name on the command line.
        name: Its name in the literature.
        family: One of ``FAMILIES``, or a plug-in's own.
        summary: One line.
        problem: What problem it solves, for whom.
        paper: Where it was published.
        tags: The field's terms.
        api: Dotted names of its public objects; empty while it is planned.
        claim: Dotted name of the module that measures its claim.
        extra: The extra with its heavy dependencies.
        command: Dotted name of the ``click`` command of a method that is a tool: ``paperworks SLUG …``.
        reconstruction: Whether parts inside are reconstructed because no reference code could be read.
    """

    slug: str
    name: str
    family: str
    summary: str
    problem: str
    paper: Paper
    tags: tuple[str, ...] = ()
    api: tuple[str, ...] = ()
    claim: str = ""
    extra: str = ""
    command: str = ""
    reconstruction: bool = False

    @property
    def built(self) -> bool:
        """Whether the method is there, not only planned."""
        return bool(self.api)

    def imports(self, width: int) -> str:
        """One import statement a module, over several lines where it is longer than ``width``."""
        modules: dict[str, list[str]] = defaultdict(list)
        for name in self.api:
            module, _, attribute = name.rpartition(".")
            modules[module].append(attribute)
        lines = []
        for module, names in modules.items():
            line = f"from {module} import {', '.join(names)}"
            block = f"from {module} import (\n    " + ",\n    ".join(names) + ",\n)"
            lines.append(line if len(line) <= width else block)
        return "\n".join(lines)

    @property
    def claim_source(self) -> Path | None:
        """The file that measures the claim."""
        spec = find_spec(self.claim) if self.claim else None
        return Path(spec.origin) if spec and spec.origin else None

    @property
    def claim_text(self) -> str:
        """The claim's docstring, read without importing its module. Its first paragraph is the claim."""
        source = self.claim_source
        return (ast.get_docstring(ast.parse(source.read_text("utf-8"))) or "") if source else ""

    @property
    def claim_sentence(self) -> str:
        """The claim in one sentence."""
        return " ".join(self.claim_text.split("\n\n")[0].split())

    @property
    def claim_arms(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        """What the claim compares: scales, and their arms. Read without importing its module; empty if the arms are
        computed there and not written out.
        """
        source = self.claim_source
        try:
            return _arms(ast.parse(source.read_bytes())) if source else {}
        except ValueError:
            return {}


@cache
def catalog() -> dict[str, Card]:
    """All cards by slug, the library's own first, then those of installed plug-ins.

    Raises:
        UserError: If a plug-in's catalog is malformed or takes a slug that is there already.
    """
    cards = {card.slug: card for card in read("paperworks")}
    for point in sorted(entry_points(group="paperworks.catalog"), key=lambda point: point.name):
        try:
            added = read(point.value)
        except (OSError, ImportError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
            raise UserError(f"plug-in {point.name!r} has no valid catalog.toml in {point.value}: {error}") from error
        for card in added:
            if card.slug in cards:
                raise UserError(f"plug-in {point.name!r} takes the slug {card.slug!r}, which is there already")
            cards[card.slug] = card
    return cards


def read(package: str) -> list[Card]:
    """The cards in the ``catalog.toml`` of a package."""
    content = tomllib.loads(files(package).joinpath("catalog.toml").read_text("utf-8"))
    return [_card(**method) for method in content["method"]]


def find(slug: str) -> Card:
    """The card of a method.

    Raises:
        UserError: If there is none, with the nearest slug.
    """
    cards = catalog()
    if slug in cards:
        return cards[slug]
    for card in cards.values():
        if slug.casefold() in (card.slug, card.name.casefold()):
            raise UserError(f"unknown method {slug!r}. Did you mean {card.slug!r}?")
    raise unknown("method", slug, cards)


def _arms(tree: ast.Module) -> dict[tuple[str, ...], tuple[str, ...]]:
    """What the decorator ``claim`` is given as ``arms``, with scales of the same arms together."""
    there: dict[str, ast.expr] = {}
    for line in tree.body:
        match line:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                there[name] = value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                there[name] = value
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="claim"), keywords=words):
                arms = next((word.value for word in words if word.arg == "arms"), None)
                if not isinstance(arms, ast.Dict):
                    return {SCALES: _written(arms, there)}
                for scale, value in zip(_written(arms, there), arms.values, strict=True):
                    groups[_written(value, there)].append(scale)
    return {tuple(scales): arms for arms, scales in groups.items()}


def _written(node: ast.expr | None, there: Mapping[str, ast.expr]) -> tuple[str, ...]:
    """The texts of a list or the keys of a dictionary, as they stand in a source or are named there."""
    match node:
        case ast.Constant(value=str(text)):
            return (text,)
        case ast.Name(id=name) if name in there:
            return _written(there[name], there)
        case ast.Call(func=ast.Name(id="list" | "tuple"), args=[inside]):
            return _written(inside, there)
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return tuple(arm for part in parts for arm in _written(part, there))
        case ast.Subscript(value=inside, slice=ast.Slice(lower, upper, step)):
            ends = [ast.literal_eval(end) if end else None for end in (lower, upper, step)]
            return _written(inside, there)[slice(*ends)]
        case ast.Starred(value=inside):
            return _written(inside, there)
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return tuple(arm for key, value in pairs for arm in _written(key or value, there))
    raise ValueError("computed")


def _card(paper: dict[str, Any], **fields: Any) -> Card:
    paper["authors"] = tuple(paper["authors"])
    for name in ("tags", "api"):
        fields[name] = tuple(fields.get(name, ()))
    return Card(paper=Paper(**paper), **fields)
