"""The protocol by which a method changes training, and the state it acts on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

Criterion = Callable[[Any, Any], Tensor]


@dataclass
class State:
    """All that a training step works on. Interventions read it and write it.

    Attributes:
        fabric: Device, precision and process group (``fabric.device``, ``fabric.global_rank`` …).
        module: The model as it was given; for extra passes outside the training step.
        model: The same model as the training step calls it, wrapped for precision and DDP.
        optimizer: The optimizer; ``add_param_group`` in ``setup`` trains further modules along.
        criterion: The loss ``(outputs, targets) -> scalar`` that was given to ``fit``.
        epochs, total_steps: Length of the run, in epochs and optimizer steps.
        epoch, step: Current epoch, and optimizer steps done; both count from 0.
        inputs, targets: The current batch on the device; ``extra`` holds what else the dataset yields.
        outputs: The model's outputs for ``inputs``.
        logs: Figures to record with this epoch; interventions may add their own.
    """

    fabric: Fabric
    module: nn.Module
    model: nn.Module
    optimizer: Optimizer
    criterion: Criterion
    epochs: int
    total_steps: int
    epoch: int = 0
    step: int = 0
    inputs: Any = None
    targets: Any = None
    extra: tuple[Any, ...] = ()
    outputs: Any = None
    logs: dict[str, float] = field(default_factory=dict)


class Intervention:
    """A change to training. Override the moments that matter; the rest do nothing.

    Interventions run in the order of the trainer's list. Around the loss, the first of the list is outermost.
    What must survive a killed run belongs in ``state_dict``.
    """

    def setup(self, state: State) -> None:
        """Before the model is wrapped for precision and DDP: swap layers, add parameter groups."""

    def on_epoch_start(self, state: State) -> None:
        """Before the first batch of an epoch."""

    def on_batch(self, state: State) -> None:
        """Before the forward pass: may replace ``state.inputs`` and ``state.targets``."""

    def compute_loss(self, state: State, next: Callable[[State], Tensor]) -> Tensor:
        """After the forward pass: return the loss, from ``next(state)`` or without it.

        ``next`` ends in ``criterion(state.outputs, state.targets)``; replacing ``state.outputs`` first
        changes what it sees.
        """
        return next(state)

    def on_gradients(self, state: State) -> None:
        """After the backward pass and before clipping and the optimizer's step: may change ``p.grad``."""

    def on_step_end(self, state: State) -> None:
        """After the optimizer's step; gradients are still there."""

    def on_epoch_end(self, state: State) -> None:
        """After the last batch of an epoch, before evaluation."""

    def teardown(self, state: State) -> None:
        """When training ends, also by an error: undo what ``setup`` did to the model."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them; loaded without executing code."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned. Called after ``setup``."""


class RandomIntervention(Intervention):
    """An intervention with a generator of its own, which a resumed run goes on with.

    Args:
        seed: Of all draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)

    def seed_process(self, state: State) -> None:
        """Begin anew, each process of a group with draws of its own; for ``setup``."""
        self.generator.manual_seed(self.seed + 1_000_003 * state.fabric.global_rank)

    def state_dict(self) -> dict[str, Any]:
        """The generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on drawing where ``state_dict`` was taken."""
        self.generator.set_state(state_dict["generator"])


def compose_loss(interventions: list[Intervention]) -> Callable[[State], Tensor]:
    """Nest every ``compute_loss`` around the criterion, the first intervention outermost."""

    def innermost(state: State) -> Tensor:
        return state.criterion(state.outputs, state.targets)

    loss: Callable[[State], Tensor] = innermost
    for intervention in reversed(interventions):
        if type(intervention).compute_loss is not Intervention.compute_loss:
            loss = _around(intervention, loss)
    return loss


def _around(intervention: Intervention, next: Callable[[State], Tensor]) -> Callable[[State], Tensor]:
    return lambda state: intervention.compute_loss(state, next)
