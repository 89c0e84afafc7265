"""The pages put together: what they share, what answers errors, and who guards them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles

from paperworks import __version__
from paperworks.bench.report import bar, interval, number, spread
from paperworks.errors import UserError

from .audits import LARGEST, Audits
from .charts import colour, metric_names
from .guard import SMALL, Guard
from .orders import Orders
from .project import Project
from .runs import Runs

if TYPE_CHECKING:
    from paperworks.audit.robustar import RobustarProject

MASKS = 65 * 2**20  # bytes of an archive of masks
GRADIO = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
STATIC = Path(str(files("paperworks.app").joinpath("static")))


@dataclass
class Site:
    """What every page needs.

    Attributes:
        project: Where it reads and writes.
        runs: The runs of the store.
        orders: What was started here.
        tools: The tools that have a page: title by path.
        closing: Set when the server ends, for answers that go on.
    """

    project: Project
    runs: Runs
    orders: Orders
    tools: dict[str, str] = field(default_factory=dict)
    closing: bool = False

    def page(self, request: Request, template: str, status: int = 200, **context: Any) -> HTMLResponse:
        """A page as the browser gets it."""
        return HTMLResponse(self.part(template, path=request.url.path, tools=self.tools, **context), status)

    def part(self, template: str, **context: Any) -> str:
        """A piece of a page."""
        return environment().get_template(template).render(**context)


def create_app(
    project: Project, *, robustar: RobustarProject | None = None, auth: str | None = None, names: Iterable[str] = ()
) -> FastAPI:
    """The page of a project.

    Args:
        project: Where it reads and writes.
        robustar: The Robustar project whose page is at ``/robustar``.
        auth: ``user:password`` that every request needs.
        names: Names under which the server is reached, beside addresses and those of this machine.
    """
    from . import checks, combinations, comparison, gallery, mrclens  # which need Site

    site = Site(project, Runs(project.store), Orders(project.state / "orders"), tools={"/mrclens": "MRCLens"})
    audits = Audits(project.state / "mrclens")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        site.closing = True
        audits.close()
        site.orders.close()

    large = {"/mrclens": LARGEST + SMALL, "/robustar": MASKS}
    guard = Middleware(Guard, auth=auth, names=names, large=large, foreign={"/robustar": GRADIO})
    app = FastAPI(
        title="paperworks",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
        middleware=[guard, Middleware(GZipMiddleware, minimum_size=2000)],
    )
    app.state.site = site
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_api_route("/favicon.ico", lambda: FileResponse(STATIC / "icon.svg"))  # which Gradio's page asks for
    for pages in (gallery, checks, comparison, combinations):
        app.include_router(pages.router(site))
    app.include_router(mrclens.router(site, audits))

    if robustar is not None:
        from .robustar import mount  # which imports Gradio

        mount(app, robustar, "/robustar")
        site.tools["/robustar/"] = "Robustar"

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        title = HTTPStatus(error.status_code).phrase
        detail = "" if error.detail == title else error.detail
        return site.page(request, "error.html", error.status_code, title=title, detail=detail)

    @app.exception_handler(UserError)
    async def mistaken(request: Request, error: UserError) -> Response:
        return site.page(request, "error.html", 422, title="That does not work", detail=" ".join(str(error).split()))

    @app.exception_handler(Exception)
    async def faulty(request: Request, error: Exception) -> Response:  # which the server logs
        title = "That is a fault of ours"
        return site.page(request, "error.html", 500, title=title, detail="The terminal of the server says more.")

    return app


@cache
def environment() -> Environment:
    """The templates: everything that people named is shown as text."""
    found = Environment(
        loader=PackageLoader("paperworks.app"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"number": number, "spread": spread, "shown": shown, "ago": ago, "bytes": bytes_text}
    found.globals |= {
        "version": __version__,
        "asset": asset,
        "bar": bar,
        "colour": colour,
        "interval": interval,
        "metric_names": metric_names,
        "plural": plural,
    }
    return found


@cache
def asset(name: str) -> str:
    """Address of a static file, another for other content."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:10]
    return f"/static/{name}?{digest}"


def shown(value: object) -> str:
    """A setting as one gives it on the command line."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def ago(seconds: float) -> str:
    """How long ago a moment was, given in seconds since 1970."""
    if not seconds:
        return ""
    passed = max(0, int(datetime.now(UTC).timestamp() - seconds))
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if passed >= size:
            return f"{plural(passed // size, name)} ago"
    return "just now"


def bytes_text(size: int) -> str:
    """``3.4 MB``."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def plural(count: int, noun: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
