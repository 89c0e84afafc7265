"""What every request must pass: who asks, from where, and how much; and what every answer says of itself."""

from __future__ import annotations

import base64
import ipaddress
import secrets
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import TypeVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
SMALL = 256 * 1024
T = TypeVar("T")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware.

    - The Host header must be an address, ``localhost`` or a name of this machine: a name from elsewhere that was made
      to point here (DNS rebinding) is refused.
    - What changes something must come from a page of this server: same Origin, or Sec-Fetch-Site.
    - With ``auth``, every request needs user and password.
    - Bodies are limited: ``SMALL``, or what ``large`` says for the paths that start so.
    - Every answer carries the security headers. Paths in ``foreign`` have a content policy of their own.

    Args:
        app: What answers.
        auth: ``user:password``.
        names: More names that Host may have.
        large: Bytes that a body may have, by the start of the path.
        foreign: Content policies, by the start of the path.
    """

    def __init__(
        self,
        app: ASGIApp,
        auth: str | None = None,
        names: Iterable[str] = (),
        large: dict[str, int] | None = None,
        foreign: dict[str, str] | None = None,
    ) -> None:
        self.app, self.large, self.foreign = app, large or {}, foreign or {}
        self.credentials = base64.b64encode(auth.encode()) if auth else None
        self.names = {"localhost", socket.gethostname().lower(), *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answer[name] = value
                answer["Content-Security-Policy"] = _of(path, self.foreign, POLICY)
                answer.setdefault("Cache-Control", "no-cache")
            await send(message)

        refused = self._refusal(scope, headers)
        if refused is None:
            limit = _of(path, self.large, SMALL)
            declared = headers.get("content-length", "0")
            if not declared.isdecimal() or int(declared) > limit:
                refused = PlainTextResponse(f"at most {limit // 1024} KiB are taken here", 413)
        if refused is not None:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await refused(scope, receive, named)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise HTTPException(413, f"at most {limit // 1024} KiB are taken here")
            return message

        with suppress(ClientDisconnect):  # nobody is left to answer
            await self.app(scope, counted, named)

    def _refusal(self, scope: Scope, headers: Headers) -> PlainTextResponse | None:
        host = headers.get("host", "")
        if not self._knows(host):
            return PlainTextResponse("this name is not of this server", 421)
        if self.credentials is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "basic" or not secrets.compare_digest(given.encode(), self.credentials):
                ask = {"WWW-Authenticate": 'Basic realm="paperworks", charset="UTF-8"'}
                return PlainTextResponse("user and password, please", 401, ask)
        if scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            origin, site = headers.get("origin"), headers.get("sec-fetch-site")
            same = urlsplit(origin).netloc == host if origin is not None else site == "same-origin"
            if not same:
                return PlainTextResponse("only a page of this server may do that", 403)
        return None

    def _knows(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
            if name in self.names:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _of(path: str, by_start: dict[str, T], default: T) -> T:
    return next((value for start, value in by_start.items() if path.startswith(start)), default)
