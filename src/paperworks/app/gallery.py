"""The gallery of methods, and the page of one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse, Response

from paperworks.bench import Claim, load_claim
from paperworks.bench.results import Summary
from paperworks.catalog import FAMILIES, SCALES, Card, catalog
from paperworks.errors import UserError

from .charts import forest, strips
from .site import Site

VERDICTS = ("holds", "undecided", "fails", "not measured", "planned")


def router(site: Site) -> APIRouter:
    """Gallery, method and figure."""
    pages = APIRouter()

    @pages.get("/")
    def gallery(request: Request, q: str = "", family: str = "", verdict: str = "") -> Response:
        entries = []
        for card in catalog().values():
            summary = latest(site.project.summaries(card.slug))
            entry: dict[str, Any] = {
                "card": card,
                "verdict": summary.verdict if summary else VERDICTS[3] if card.built else VERDICTS[4],
                "summary": summary,
                "rows": forest(summary.expectations) if summary else [],
                "text": _text(card),
            }
            entry["shown"] = matches(entry, q, family, verdict)
            entries.append(entry)
        families = [
            (name, FAMILIES.get(name, ""), sum(e["card"].family == name for e in entries))
            for name in dict.fromkeys([*FAMILIES, *(e["card"].family for e in entries)])
        ]
        counts = [(name, sum(e["verdict"] == name for e in entries)) for name in VERDICTS]
        return site.page(
            request,
            "gallery.html",
            entries=entries,
            families=[item for item in families if item[2]],
            counts=[item for item in counts if item[1]],
            q=q,
            family=family,
            verdict=verdict,
        )

    @pages.get("/methods/{slug}")
    def method(request: Request, slug: str, scale: str = "") -> Response:
        return method_page(site, request, slug, scale)

    @pages.get("/figures/{slug}/{name}")
    def figure(slug: str, name: str) -> Response:
        path = site.project.file(slug, name) if name.endswith(".png") else None
        if path is None:
            raise HTTPException(404, "there is no such figure")
        return FileResponse(path, media_type="image/png")

    return pages


def method_page(
    site: Site, request: Request, slug: str, scale: str = "", error: str = "", given: Mapping[str, str] | None = None
) -> Response:
    """A method; after a mistake in its form, with the error and what was given."""
    card = catalog().get(slug)
    if card is None:
        raise HTTPException(404, f"there is no method {slug!r}")
    summaries = site.project.summaries(slug)
    summary = summaries.get(scale) or latest(summaries) or summaries.get("smoke")
    claim: Claim | None = None
    missing = ""
    if card.claim:
        try:
            claim = load_claim(slug)
        except UserError as mistake:
            missing = str(mistake)
    sentence, *protocol = [" ".join(part.split()) for part in card.claim_text.split("\n\n")]
    return site.page(
        request,
        "method.html",
        422 if error else 200,
        card=card,
        snippet=card.imports(60),
        sentence=sentence,
        protocol=protocol,
        summary=summary,
        scales=[name for name in SCALES if name in summaries],
        rows=forest(summary.expectations) if summary else [],
        strips=strips(summary.arms) if summary else {},
        pictures=pictures(site, summary) if summary else [],
        claim=claim,
        fields=fields(claim) if claim else [],
        seeds=dict(claim.seeds) if claim else {},
        missing=missing,
        runs=[run for run in site.runs.of(slug) if not run.is_combination] if claim else [],
        error=error,
        given=given or {},
        command=shlex.join(["paperworks", "check", slug]),
    )


def latest(summaries: Mapping[str, Summary]) -> Summary | None:
    """The largest scale; smoke runs only show that the code works."""
    return summaries.get("full") or summaries.get("quick")


def matches(entry: Mapping[str, Any], q: str, family: str, verdict: str) -> bool:
    """Whether a method is asked for: every word somewhere, its family, its verdict. ``page.js`` does the same."""
    words = q.lower().split()
    return (
        all(word in entry["text"] for word in words)
        and family in ("", entry["card"].family)
        and verdict in ("", entry["verdict"])
    )


def fields(claim: Claim) -> list[dict[str, Any]]:
    """The settings as a form shows them: name, description, default a scale, and choices if there are few."""
    found = []
    defaults = {scale: claim.settings.at(scale).model_dump(mode="json") for scale in SCALES}
    for name, field in claim.settings.model_fields.items():
        kind = field.annotation
        options = get_args(kind) if get_origin(kind) is Literal else ("true", "false") if kind is bool else ()
        values = {scale: defaults[scale][name] for scale in SCALES}
        found.append({"name": name, "about": field.description or "", "defaults": values, "options": list(options)})
    return found


def _text(card: Card) -> str:
    parts = [card.slug, card.name, card.family, card.summary, card.problem, *card.tags, card.paper.title]
    return " ".join(" ".join([*parts, *card.paper.authors, str(card.paper.year)]).split()).lower()


def pictures(site: Site, summary: Summary) -> list[tuple[str, str]]:
    """The figures of a result by file and caption, without those that the page draws itself."""
    found = []
    for name in site.project.pictures(summary.slug, summary.scale):
        stem = name.removesuffix(".png").removeprefix(f"{summary.scale}-")
        if stem not in ("expectations", "metrics"):
            found.append((name, stem.replace("-", " ")))
    return found
