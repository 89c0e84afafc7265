"""A method that joins others' training, but has none of its own for others to join."""

from paperworks.bench import Bound, Gain, Run, Settings, Task, claim
from paperworks.train import Intervention


class Nudge(Intervention):
    """Adds two to the score of ``tiny``."""


@claim(
    "nudge",
    arms={"smoke": ["only"], "quick": ["only", "twice"], "full": ["none", "only", "twice", "idle"]},
    expects=[
        Bound("score", "only", at_least=0),
        Gain("score", "only", over="none", at_least=1),
        Gain("score", "twice", over="only", at_least=9, name="two and two"),
    ],
    seeds={"quick": 2},
)
def trial(run: Run, arm: str, settings: Settings) -> dict[str, float]:
    return {"score": {"none": 0.0, "only": 2.0, "twice": 4.0, "idle": 0.0}[arm]}


@trial.intervention
def intervention(task: Task) -> Intervention:
    return Nudge()
