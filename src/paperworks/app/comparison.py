"""Runs side by side: what differs in their settings, their verdicts, their metrics, their curves."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response

from paperworks.bench.results import Found, Summary
from paperworks.catalog import catalog

from .charts import SEPARATOR, Interval, forest, panels, strips
from .checks import find
from .runs import Points
from .site import Site

MOST = 6


@dataclass(frozen=True)
class Compared:
    """One of them: its letter, what was found, and its curves if the store has them."""

    letter: str
    address: str
    summary: Summary
    curves: dict[str, dict[str, list[Points]]]


def router(site: Site) -> APIRouter:
    """The page of a comparison."""
    pages = APIRouter()

    @pages.get("/compare")
    def compare(request: Request, run: list[str] = Query(default=[])) -> Response:  # noqa: B008
        asked = list(dict.fromkeys(run))
        if len(asked) > MOST:
            raise HTTPException(422, f"at most {MOST} runs can be compared, got {len(asked)}")
        found = [_compared(site, letter, name) for letter, name in zip(string.ascii_uppercase, asked, strict=False)]
        together: dict[str, list[Compared]] = {}
        for item in found:
            together.setdefault(item.summary.slug, []).append(item)
        groups = [_group(slug, items) for slug, items in together.items()]
        return site.page(request, "compare.html", groups=groups, count=len(found))

    return pages


def _compared(site: Site, letter: str, name: str) -> Compared:
    """A run by its id, or a published result by ``result:slug/scale``."""
    if name.startswith("result:") and name.count("/") == 1:
        slug, scale = name.removeprefix("result:").split("/")
        summary = site.project.summary(slug, scale) if slug in catalog() else None
        if summary is None:
            raise HTTPException(404, f"there is no result {name!r}")
        return Compared(letter, f"/methods/{slug}?scale={scale}", summary, {})
    if name.count("/") != 2:
        raise HTTPException(404, f"there is no run {name!r}")
    run = find(site, name)
    if run.summary is None:
        raise HTTPException(422, f"the run {name} has no verdict yet: only checks with every arm measured compare")
    return Compared(letter, f"/runs/{name}", run.summary, run.curves())


def _group(slug: str, items: Sequence[Compared]) -> dict[str, Any]:
    """The runs of one claim."""
    names = list(dict.fromkeys(name for item in items for name in item.summary.settings))
    settings = [(name, [item.summary.settings.get(name, "–") for item in items]) for name in names]
    arms = {f"{arm}{SEPARATOR}{item.letter}": metrics for item in items for arm, metrics in item.summary.arms.items()}
    by_arm = list(dict.fromkeys(arm for item in items for arm in item.summary.arms))
    labels = [f"{arm}{SEPARATOR}{item.letter}" for arm in by_arm for item in items if arm in item.summary.arms]
    curves: dict[str, dict[str, list[Points]]] = {}
    for item in items:
        for title, by_label in item.curves.items():
            for arm, runs in by_label.items():
                curves.setdefault(title, {})[f"{arm}{SEPARATOR}{item.letter}"] = runs
    drawn = strips(arms)
    expectations: dict[str, list[Found | None]] = {}
    for index, item in enumerate(items):
        for found in item.summary.expectations:
            expectations.setdefault(found.name, [None] * len(items))[index] = found
    return {
        "card": catalog()[slug],
        "items": items,
        "differ": [(name, values) for name, values in settings if any(value != values[0] for value in values)],
        "same": [(name, values[0]) for name, values in settings if all(value == values[0] for value in values)],
        "expectations": [(name, _row(found)) for name, found in expectations.items()],
        "strips": {label: drawn[label] for label in labels},
        "arms": arms,
        "curves": panels(curves, by_arm),
        "order": by_arm,
    }


def _row(found: list[Found | None]) -> list[Interval | None]:
    """One expectation in every run, on one axis."""
    drawn = iter(forest([one for one in found if one], shared=True))
    return [next(drawn) if one else None for one in found]
