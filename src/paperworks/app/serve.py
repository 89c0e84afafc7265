"""The server: binds, says where it is, ends cleanly."""

from __future__ import annotations

import errno
import socket
import webbrowser
from collections.abc import Callable
from contextlib import nullcontext
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from paperworks.errors import UserError

from .guard import is_loopback
from .project import Project
from .site import Site, create_app

if TYPE_CHECKING:
    from paperworks.audit.robustar import RobustarProject


def serve(
    project: Project,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: str | None = None,
    robustar: RobustarProject | None = None,
    open_browser: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Serve a project's page until Ctrl-C.

    Args:
        project: What the page is of.
        host: Address or name to bind; anything but a loopback address opens the page to the network and needs ``auth``.
        port: Port; 0 takes a free one.
        auth: ``user:password`` that every request needs.
        robustar: The Robustar project that has a page as well.
        open_browser: Open the page in the browser.
        say: Gets the lines meant for the terminal.

    Raises:
        UserError: If the port is taken, the store is served already, or there is no password where it takes one.
    """
    if auth is not None and not (0 < auth.find(":") < len(auth) - 1):
        raise UserError("--auth takes user:password")
    if not is_loopback(host):
        if auth is None:
            raise UserError(f"--host {host} opens the page to the network: give --auth user:password as well")
        say(
            f"warning: {host} can be reached from the network, and who has the password can start programs here. "
            "The password travels unencrypted: use a tunnel or a proxy with https"
        )
    with _bound(host, port) as listening:
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        with project.alone(address), robustar.locked() if robustar else nullcontext():
            app = create_app(project, robustar=robustar, auth=auth, names=[host])
            server = _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3, server_header=False))
            server.ready = lambda: _say_ready(address, open_browser, say)
            server.site = app.state.site
            server.run([listening])


def _say_ready(address: str, open_browser: bool, say: Callable[[str], None]) -> None:
    say(f"paperworks is at {address} (Ctrl-C ends it)")
    if open_browser:
        webbrowser.open(address)


class _Server(uvicorn.Server):
    ready: Callable[[], None]
    site: Site

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.site.closing = True  # answers that go on end now
        super().handle_exit(sig, frame)


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, number, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, number)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
    except (OSError, OverflowError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        advice = "the port is taken; --port 0 takes a free one" if taken else str(error)
        raise UserError(f"cannot serve at {host}, port {port}: {advice}") from error
    return listening
