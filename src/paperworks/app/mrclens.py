"""The page of MRCLens."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, RedirectResponse, Response
from starlette.datastructures import UploadFile

from paperworks.errors import UserError

from .audits import DOWNLOADS, LARGEST, Audit, Audits
from .charts import advantages
from .site import Site
from .watch import watch

TYPES = {"json": "application/json", "md": "text/markdown", "csv": "text/csv", "html": "text/html"}


def router(site: Site, audits: Audits) -> APIRouter:
    """Upload, progress, findings, downloads."""
    pages = APIRouter(prefix="/mrclens")

    def start_page(request: Request, error: str = "") -> Response:
        return site.page(
            request, "mrclens.html", 422 if error else 200, audits=audits.all(), error=error, largest=LARGEST
        )

    def known(id: str) -> Audit:
        audit = audits.get(id)
        if audit is None:
            raise HTTPException(404, "there is no such audit")
        return audit

    @pages.get("")
    def start(request: Request) -> Response:
        return start_page(request)

    @pages.post("")
    async def upload(request: Request) -> Response:
        async with request.form(max_files=1, max_fields=5) as form:
            file = form.get("file")
            try:
                if not isinstance(file, UploadFile) or not file.filename:
                    raise UserError("choose a SQuAD file first")
                audit = await run_in_threadpool(audits.start, file.filename, file.file)
            except UserError as mistake:
                return await run_in_threadpool(start_page, request, str(mistake))
        return RedirectResponse(f"/mrclens/{audit.id}", 303)

    @pages.get("/{id}")
    def audit(request: Request, id: str) -> Response:
        found = known(id)
        page: dict[str, Any] = {}
        if found.status == "done":
            page = json.loads((audits.folder / id / "page.json").read_text("utf-8"))
        return site.page(
            request,
            "audit.html",
            audit=found,
            page=page,
            rows=advantages(page["findings"], page["bar"]) if page else [],
            downloads=[name for name in DOWNLOADS if audits.file(id, name)],
        )

    @pages.get("/{id}/events")
    def events(request: Request, id: str) -> Response:
        known(id)

        def look() -> tuple[bool, str]:
            found = known(id)
            return found.active, site.part("audit_live.html", audit=found)

        return watch(site, request, look)

    @pages.get("/{id}/files/{name:path}")
    def file(id: str, name: str) -> Response:
        path = audits.file(id, name)
        if path is None:
            raise HTTPException(404, "there is no such file")
        return FileResponse(path, filename=f"mrclens-{path.name}", media_type=TYPES[path.suffix[1:]])

    @pages.post("/{id}/{action}")
    def act(id: str, action: str) -> Response:
        known(id)
        if action == "cancel":
            audits.cancel(id)
            return RedirectResponse(f"/mrclens/{id}", 303)
        if action == "delete":
            audits.remove(id)
            return RedirectResponse("/mrclens", 303)
        raise HTTPException(404)

    return pages
