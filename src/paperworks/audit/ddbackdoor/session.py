"""What both distillers share: checks, fresh networks, and checkpoints of a distillation under way."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paperworks.audit.ddbackdoor.hooks import DistillationHook
from paperworks.errors import UserError
from paperworks.train import NonFiniteLoss
from paperworks.train.checkpoint import load, save, seeded

OnIteration = Callable[[int, float], None]


class Session:
    """A distillation under way. Its checkpoint is written whole or not at all, and stays when all is done.

    Args:
        identity: What a checkpoint must agree on to be this distillation's.
        variables: What is learnt; on resuming, filled in place.
        optimizer: Learns it.
        generator: Source of all draws.
        hook: The attack, if there is one; its state is kept too.
        path: The checkpoint, or nothing to keep none.
        every: Iterations between checkpoints.
        report: Called with an iteration and its loss.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        variables: dict[str, Tensor],
        optimizer: Optimizer,
        generator: torch.Generator,
        hook: DistillationHook | None,
        path: Path | None,
        every: int,
        report: OnIteration | None,
    ) -> None:
        if every < 1:
            raise UserError(f"checkpoint_every must be at least 1, got {every}")
        self.identity, self.variables, self.optimizer = identity, variables, optimizer
        self.generator, self.hook, self.path, self.every, self.report = generator, hook, path, every, report

    def resume(self) -> int:
        """Restore the checkpoint, if there is one; returns how many iterations are done."""
        if self.path is None or not self.path.exists():
            return 0
        state = load(self.path)
        for name, value in self.identity.items():
            if (found := state.get("identity", {}).get(name)) != value:
                raise UserError(f"checkpoint {self.path} is of {name}={found}, not {value}; delete it to start anew")
        with torch.no_grad():
            for name, variable in self.variables.items():
                variable.copy_(state["variables"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        if self.hook:
            self.hook.load_state_dict(state["hook"])
        return int(state["iteration"])

    def iterated(self, iteration: int, last: bool, loss: Tensor) -> None:
        """After an iteration, counted from 0: look at the loss, report it, keep a checkpoint if one is due."""
        value = float(loss)
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the distance is {value} in iteration {iteration}; lower the learning rates")
        if self.report:
            self.report(iteration, value)
        if self.path and (last or (iteration + 1) % self.every == 0):
            state = {
                "identity": self.identity,
                "variables": self.variables,
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "hook": self.hook.state_dict() if self.hook else {},
                "iteration": iteration + 1,
            }
            save(self.path, state)


def fresh(net_fn: Callable[[], nn.Module], generator: torch.Generator, device: torch.device) -> nn.Module:
    """A network with weights drawn from the generator."""
    with seeded(int(torch.randint(2**31, (), generator=generator))):
        return net_fn().to(device).train()


def count_classes(images: Tensor, labels: Tensor) -> int:
    """Check a training set; returns its number of classes."""
    if len(images) != len(labels) or not len(labels):
        raise UserError(f"images and labels must be as many, got {len(images)} and {len(labels)}")
    if not images.isfinite().all():
        raise UserError("images must be finite")
    if labels.min() < 0:
        raise UserError(f"labels must be classes from 0, got {int(labels.min())}")
    counts = labels.bincount()
    if not counts.all():
        raise UserError(f"class {int((counts == 0).nonzero()[0])} has no image; every class from 0 needs one")
    return len(counts)
