"""Shows how far training is."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .intervention import Intervention, State


class ProgressBar(Intervention):
    """A bar in the terminal, or calls of ``show(fraction done, text)``."""

    def __init__(self, show: bool | Callable[[float, str], None] = True) -> None:
        self._show = show if callable(show) else None
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def setup(self, state: State) -> None:
        if self._show is None:
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._task = self._bar.add_task("training", total=state.total_steps)
            self._bar.start()

    def on_step_end(self, state: State) -> None:
        text = f"epoch {state.epoch + 1}/{state.epochs}"
        if self._bar is not None:
            self._bar.update(self._task, completed=state.step, description=text)
        elif self._show is not None:
            self._show(state.step / state.total_steps, text)

    def teardown(self, state: State) -> None:
        if self._bar is not None:
            self._bar.stop()
