"""An end in the middle of a training, where a kill would leave no more than the last checkpoint."""

from paperworks.train import Intervention, State


class Stop(Exception):
    """The training ends here."""


class StopAt(Intervention):
    """Stops a training in the batch after so many steps; without a number it only takes part, as checkpoints ask."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step

    def on_batch(self, state: State) -> None:
        if state.step == self.step:
            raise Stop
