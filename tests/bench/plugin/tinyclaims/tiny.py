"""One is added.

The arms train the same network with dropout on the same figures; the better one adds ``shift`` to what comes of it.
"""

import math
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import TensorDataset

from paperworks.bench import Close, Gain, Ratio, Run, Settings, Task, claim, scaled
from paperworks.errors import UserError
from paperworks.train import Intervention, State

from .nudge import Nudge


class TinySettings(Settings):
    """What can be set."""

    epochs: int = scaled(smoke=1, quick=3, full=4, ge=1, le=100, description="passes over the data")
    shift: float = Field(1.0, description="what the better arm adds")
    data: str = Field("noise", description="says nothing")
    rates: tuple[float, ...] = Field((0.1, 0.2), min_length=1, description="say nothing either")


class Tiny(Intervention):
    """Adds one to the score of ``tiny``."""


class Fault(Intervention):
    """What ``TINY_FAULT=kind@arm-seed`` asks for happens in that trial, in its second epoch or its last."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_epoch_end(self, state: State) -> None:
        if state.epoch == min(1, state.epochs - 1):
            match self.kind:
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "sleep":
                    time.sleep(120)
                case "user":
                    raise UserError("the moon is full")
                case "bug":
                    raise ZeroDivisionError("a slip\nof the pen")
                case "interrupt":
                    raise KeyboardInterrupt
                case "diverge":
                    nn.init.constant_(next(iter(state.module.parameters())), math.nan)


def fault(run: Run, arm: str) -> str:
    kind, _, where = os.environ.get("TINY_FAULT", "").partition("@")
    return kind if where in ("", f"{arm}-{run.seed}") else ""


@claim(
    "tiny",
    arms=["base", "base.2", "better"],
    expects=[
        Gain("score", "better", over="base", at_least=0.5),
        Ratio("size", "better", over="base", name="<script>alert(1)</script>"),
        Close("score", "base.2", to="base", within=0.1),
    ],
    seeds={"smoke": 1, "quick": 2, "full": 3},
)
def trial(run: Run, arm: str, settings: TinySettings) -> dict[str, float]:
    if path := os.environ.get("TINY_TRIALS"):
        with Path(path).open("a") as file:
            print(arm, run.seed, file=file)
    kind = fault(run, arm)
    figures = torch.randn(24, 3, generator=run.generator("figures"))
    torch.manual_seed(run.seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    history = run.trainer(settings.epochs, batch_size=8, interventions=[Fault(kind)]).fit(
        model, TensorDataset(figures, figures.sum(1, keepdim=True)), loss=F.mse_loss, optimizer=partial(SGD, lr=0.05)
    )
    for epoch, row in enumerate(history):
        run.log(epoch, **{"train/loss": row["train/loss"]})
    if run.seed == 0:
        drawing = Figure(figsize=(1, 1))
        drawing.subplots().plot([0, 1])
        run.figure("a picture", drawing)
        run.save("weights", model.state_dict())
    score = float(nn.utils.parameters_to_vector(model.parameters()).detach().sum())
    if arm == "better":
        score += settings.shift
    size: float | str = {"nan": math.nan, "text": "large"}.get(kind, 1.0 + run.seed)
    return {"score": score, "size": size}


@trial.host
def train(run: Run, settings: TinySettings, interventions: Callable[[Task], list[Intervention]]) -> dict[str, float]:
    kinds = [type(i) for i in interventions(Task(2, (3,), 24, settings.epochs, run.seed))]
    tiny, nudge = (kind in kinds for kind in (Tiny, Nudge))
    return {"score": run.seed + 1.0 * tiny + 2.0 * nudge + 0.5 * (tiny and nudge), "size/small": 1.0}


@trial.intervention
def intervention(task: Task) -> Intervention:
    return Tiny()
