"""A bar over trials: how many are done, which run now and how far they are, the time left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .check import Records


@contextmanager
def progress_bar(records: Records, console: Console) -> Iterator[Progress]:
    """Show the bar while trials run; their own progress comes from the store, wherever they run."""
    columns = (
        BarColumn(30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    total, pending = len(records.pending), {trial.key for trial in records.pending}
    text = TextColumn("{task.fields[text]}", markup=False)
    with Progress(*columns, text, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("trials", total=total, text="starting")
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.5):
                running = [live for live in records.store.live() if live.get("key") in pending]
                share = sum(float(live.get("fraction", 0)) for live in running)
                text = ", ".join(f"{live['key'].rsplit('-', 1)[0]} ({live.get('text', '')})" for live in running)
                bar.update(task, completed=min(records.done + share, total), text=text[:100])

        watcher = threading.Thread(target=watch, daemon=True)
        if console.is_terminal:
            watcher.start()
        try:
            yield bar
        finally:
            ended.set()
            if watcher.ident is not None:
                watcher.join()
