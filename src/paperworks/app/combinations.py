"""Which methods can meet in one training, starting such a factorial, and what was found."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response

from paperworks.catalog import Card, catalog, find
from paperworks.errors import UserError

from .charts import effects, interactions
from .checks import ordered, texts
from .site import Site


def router(site: Site) -> APIRouter:
    """The form, and one page a combination."""
    pages = APIRouter()

    def form(request: Request, given: dict[str, str] | None = None, error: str = "") -> Response:
        cards = [card for card in catalog().values() if card.built and card.claim]
        return site.page(
            request,
            "combinations.html",
            422 if error else 200,
            joining=[card for card in cards if "intervention" in offers(card)],
            hosts=[card for card in cards if "host" in offers(card)],
            found=site.project.combinations(),
            given=given or dict(request.query_params),
            error=error,
        )

    @pages.get("/combine")
    def choose(request: Request) -> Response:
        return form(request)

    @pages.post("/combine")
    async def start(request: Request) -> Response:
        given = await texts(request)
        slugs, on = given.get("method", "").split(), given.get("on", "")
        try:
            for slug in [*slugs, on]:
                find(slug)
            order = await run_in_threadpool(ordered, site, slugs, on, given)
        except UserError as mistake:
            return await run_in_threadpool(form, request, given, " ".join(str(mistake).split()))
        await run_in_threadpool(site.orders.start, order)
        return RedirectResponse(f"/runs/{order.run}", 303)

    @pages.get("/combine/{name}")
    def combination(request: Request, name: str) -> Response:
        found = site.project.combinations().get(name)
        if found is None:
            raise HTTPException(404, "there is no such combination")
        return site.page(
            request,
            "combination.html",
            combination=found,
            effects=effects(found),
            interactions=interactions(found),
        )

    return pages


def offers(card: Card) -> frozenset[str]:
    """Whether a claim hosts others (``host``) and joins others (``intervention``), read without importing it."""
    source = card.claim_source
    return _offers(source, source.stat().st_mtime_ns) if source else frozenset()


@cache
def _offers(source: Path, changed: int) -> frozenset[str]:
    functions = [node for node in ast.parse(source.read_bytes()).body if isinstance(node, ast.FunctionDef)]
    marks = [mark.attr for node in functions for mark in node.decorator_list if isinstance(mark, ast.Attribute)]
    return frozenset(marks) & {"host", "intervention"}
