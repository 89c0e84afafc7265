"""A method that joins others' training, but has none of its own for others to join."""

from paperworks.bench import Bound, Run, Settings, Task, claim
from paperworks.train import Intervention


class Nudge(Intervention):
    """Adds two to the score of ``tiny``."""


@claim("nudge", arms=["only"], expects=[Bound("score", "only", at_least=0)], seeds={"quick": 2})
def trial(run: Run, arm: str, settings: Settings) -> dict[str, float]:
    return {"score": 2.0}


@trial.intervention
def intervention(task: Task) -> Intervention:
    return Nudge()
