"""Runs started from the page: one at a time, each a process of the command line that can be stopped and resumed."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from paperworks.errors import UserError
from paperworks.files import write_whole

Status = Literal["waiting", "running", "stopping", "done", "stopped", "failed"]
ACTIVE = ("waiting", "running", "stopping")
INTERRUPTED = 130  # how the command line ends after Ctrl-C


@dataclass(frozen=True)
class Order:
    """A run that was asked for.

    Attributes:
        run: Id of the run.
        arguments: Of the command line.
        common: What its trials have in common.
        arms: Its arms.
        seeds: How many seeds each.
        status: Where it stands.
        message: The last line of what the command said, if it failed.
        pid: Of the process, which leads a group of its own.
        changed: When the status last changed, in seconds since 1970.
    """

    run: str
    arguments: tuple[str, ...]
    common: dict[str, Any]
    arms: tuple[str, ...]
    seeds: int
    status: Status = "waiting"
    message: str = ""
    pid: int = 0
    changed: float = 0.0

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.status in ACTIVE


class Orders:
    """The queue, kept in a folder: a server that starts again knows what was asked for, and finds what still runs.

    Args:
        folder: Of the orders and of what their commands printed.
        patience: Seconds until a process that does not stop is killed.
    """

    def __init__(self, folder: Path, patience: float = 20.0) -> None:
        self.folder, self.patience = folder, patience
        self._lock = threading.RLock()
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._orders: dict[str, Order] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.json")):
            with suppress(ValueError, TypeError, KeyError):
                content = json.loads(path.read_text("utf-8"))
                order = Order(**content | {name: tuple(content[name]) for name in ("arguments", "arms")})
                self._orders[order.run] = order
        for order in list(self._orders.values()):
            if order.status == "waiting" or (order.active and not self._still_runs(order.run)):
                self._set(order.run, status="stopped")
            elif order.active:
                self._queue.put(order.run)
        self._worker = threading.Thread(target=self._work, name="orders", daemon=True)
        self._worker.start()

    def get(self, run: str) -> Order | None:
        """The order of a run, if it was asked for here."""
        return self._orders.get(run)

    def all(self) -> list[Order]:
        """Every order, the one that changed last first."""
        with self._lock:
            return sorted(self._orders.values(), key=lambda order: -order.changed)

    def start(self, order: Order) -> Order:
        """Put a run into the queue; one that is there already stays as it is."""
        with self._lock:
            there = self._orders.get(order.run)
            if there is not None and there.active:
                return there
            self._orders[order.run] = order
            self._set(order.run, status="waiting", message="")
            self._queue.put(order.run)
            return self._orders[order.run]

    def resume(self, run: str) -> None:
        """Go on with a run that was stopped or failed; what is stored is not measured again."""
        order = self._orders.get(run)
        if order is None:
            raise UserError("this run was not started here")
        self.start(replace(order, arguments=tuple(a for a in order.arguments if a != "--fresh")))

    def cancel(self, run: str) -> None:
        """Stop a run as Ctrl-C does: what was measured stays."""
        with self._lock:
            order = self._orders.get(run)
            if order is None or not order.active:
                return
            if order.status == "waiting":
                self._set(run, status="stopped")
                return
            self._set(run, status="stopping")
            _signal(order.pid, signal.SIGINT)
            self._insist(run, order.pid)

    def close(self) -> None:
        """Stop what runs; it can be resumed."""
        for order in self.all():
            self.cancel(order.run)
        self._queue.put(None)
        self._worker.join(self.patience + 5)

    def output(self, run: str) -> str:
        """What the command printed last."""
        with suppress(OSError), open(self._path(run, "log"), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
            return file.read().decode("utf-8", "replace")
        return ""

    def _work(self) -> None:
        while (run := self._queue.get()) is not None:
            with self._lock:
                order = self._orders[run]
            if order.status in ("running", "stopping"):  # of a server before this one
                self._await(run)
            elif order.status == "waiting":
                self._run(order)

    def _run(self, order: Order) -> None:
        """Start the command and wait for its end. The lock is open in the process itself, so it lasts as long."""
        run = order.run
        with open(self._path(run, "log"), "wb") as log, open(self._path(run, "lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with self._lock:
                if self._orders[run].status != "waiting":
                    return
                command = [sys.executable, "-m", "paperworks", *order.arguments]
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=[lock.fileno()],
                )
                self._set(run, status="running", pid=process.pid)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its group's number is not another's yet
        _signal(process.pid, signal.SIGKILL)  # what it may have left behind
        self._ended(run, process.wait())

    def _still_runs(self, run: str) -> bool:
        with open(self._path(run, "lock"), "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _await(self, run: str) -> None:
        """Wait until a process that is no child of ours is gone."""
        with open(self._path(run, "lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
        self._set(run, status="stopped")

    def _ended(self, run: str, code: int) -> None:
        lines = [line for line in self.output(run).splitlines() if line.strip()]
        with self._lock:
            if code == 0:
                self._set(run, status="done")
            elif code == INTERRUPTED or self._orders[run].status == "stopping":
                self._set(run, status="stopped")
            else:
                ended = f"the process was killed by signal {-code}" if code < 0 else f"the command ended with {code}"
                self._set(run, status="failed", message=lines[-1] if lines else ended)

    def _insist(self, run: str, pid: int) -> None:
        def kill() -> None:
            with self._lock:
                order = self._orders[run]
                if order.status == "stopping" and order.pid == pid:
                    _signal(pid, signal.SIGKILL)

        timer = threading.Timer(self.patience, kill)
        timer.daemon = True
        timer.start()

    def _set(self, run: str, **changes: object) -> None:
        with self._lock:
            order = replace(self._orders[run], changed=time.time(), **changes)  # type: ignore[arg-type]
            self._orders[run] = order
            write_whole(self._path(run, "json"), json.dumps(asdict(order), indent=1).encode(), durable=False)

    def _path(self, run: str, suffix: str) -> Path:
        return self.folder / f"{run.replace('/', '--')}.{suffix}"


def _signal(pid: int, number: signal.Signals) -> None:
    if pid > 1:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, number)
