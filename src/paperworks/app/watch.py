"""Answers that go on: a piece of a page again whenever it changed, as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from fastapi import HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

if TYPE_CHECKING:
    from .site import Site

PERIOD = 0.7  # seconds between two looks


def watch(site: Site, request: Request, look: Callable[[], tuple[bool, str]]) -> StreamingResponse:
    """Send what ``look`` gives: whether it goes on, and the piece as HTML. ``page.js`` puts it into its place."""

    async def stream() -> AsyncIterator[str]:
        last = ""
        while not site.closing and not await request.is_disconnected():
            try:
                goes_on, part = await run_in_threadpool(look)
            except HTTPException:  # what was looked at is gone
                goes_on, part = False, last
            if part != last:
                last = part
                yield f"event: live\ndata: {json.dumps(part)}\n\n"
            if not goes_on:
                yield "event: end\ndata: \n\n"
                return
            await asyncio.sleep(PERIOD)

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
