"""Long work in the background, one at a time, with progress, cancelling and errors."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from paperworks.errors import UserError


class Busy(UserError):
    """Another task holds the model."""


class Cancelled(Exception):
    """Raised inside a task that was asked to stop."""


@dataclass
class Task:
    """One piece of work, as it goes.

    Attributes:
        name: What is being done, for people.
        state: ``running`` until it is one of the others.
        fraction, text: How far it is.
        result: What the work returned, once ``done``.
        error: Why it ``failed``, in one line.
    """

    name: str
    state: Literal["running", "done", "failed", "cancelled"] = "running"
    fraction: float = 0.0
    text: str = ""
    result: Any = None
    error: str = ""
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)
    _ended: threading.Event = field(default_factory=threading.Event, repr=False)

    def progress(self, fraction: float, text: str = "") -> None:
        """Called by the work now and then.

        Raises:
            Cancelled: If it is to stop.
        """
        if self._stop.is_set():
            raise Cancelled
        self.fraction, self.text = fraction, text

    def cancel(self) -> None:
        """Ask the work to stop at its next ``progress``."""
        self._stop.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, which is returned."""
        return self._ended.wait(timeout)

    def __str__(self) -> str:
        ending = {"running": f"{self.fraction:.0%} {self.text}".strip(), "failed": self.error}
        return f"{self.name}: {self.state}" + (f" ({ending[self.state]})" if self.state in ending else "")


class TaskManager:
    """Runs one task at a time in a thread of its own, and remembers the last."""

    def __init__(self) -> None:
        self.last: Task | None = None
        self._lock = threading.Lock()

    def start(self, name: str, work: Callable[[Task], Any]) -> Task:
        """Start ``work(task)`` in the background.

        Raises:
            Busy: If a task is running.
        """
        with self._lock:
            if self.last is not None and self.last.state == "running":
                raise Busy(f"{self.last}: wait for it or cancel it first")
            task = self.last = Task(name)
        threading.Thread(target=_run, args=(task, work), name=name, daemon=True).start()
        return task

    def cancel(self) -> None:
        """Ask the running task, if there is one, to stop."""
        if self.last is not None:
            self.last.cancel()


def _run(task: Task, work: Callable[[Task], Any]) -> None:
    try:
        task.result = work(task)
        task.fraction, task.state = 1.0, "done"
    except Cancelled:
        task.state = "cancelled"
    except Exception as error:  # whatever it was, the person who waits is told
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        task.error = " ".join(text.split())
        task.state = "failed"
    finally:
        task._ended.set()
