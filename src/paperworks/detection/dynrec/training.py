"""Losses of boxes at every step, and the intervention that teaches the policy by reinforcement."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.detection.dynrec.boxes import box_loss, paired_iou
from paperworks.detection.dynrec.halting import (
    REINFORCE,
    Reinforce,
    episode_reward,
    greedy_steps,
    ponder_loss,
    reinforce_loss,
    sample_steps,
)
from paperworks.detection.dynrec.model import Reasoning, VisualTokens
from paperworks.errors import UserError, unknown
from paperworks.train import RandomIntervention, State


def right_place(places: VisualTokens, gt: Float[Tensor, "batch 4"]) -> Int64[Tensor, " batch"]:
    """The place whose point is nearest to the middle of the true box."""
    away = (places.points - gt[:, None, :2]).square().sum(-1)
    return away.masked_fill(places.pad, torch.inf).argmin(1)


def step_losses(
    reasoning: Reasoning, gt: Float[Tensor, "batch 4"], l1: float = 5.0, giou: float = 2.0
) -> Float[Tensor, "batch steps"]:
    """TransVG's box loss of each step's box; with a pointer, cross-entropy of each step's scores, and the box loss of
    the right place."""
    if reasoning.scores is None:
        return box_loss(reasoning.boxes, gt[:, None].expand_as(reasoning.boxes), l1, giou)
    place = right_place(reasoning.places, gt)
    steps = reasoning.scores.shape[1]
    missed = F.cross_entropy(reasoning.scores.transpose(1, 2), place[:, None].expand(-1, steps), reduction="none")
    found = reasoning.places.boxes[torch.arange(len(gt), device=gt.device), place]
    return missed + box_loss(found, gt, l1, giou)[:, None]


class GroundingLoss(nn.Module):
    """The mean of ``step_losses``: over all steps (deep supervision), or of the last alone.

    Args:
        supervise: ``all`` or ``last``.
        l1, giou: Weights of the box loss; TransVG's.
    """

    def __init__(self, supervise: Literal["all", "last"] = "all", l1: float = 5.0, giou: float = 2.0) -> None:
        super().__init__()
        if supervise not in ("all", "last"):
            raise unknown("supervise", supervise, ("all", "last"))
        self.supervise, self.l1, self.giou = supervise, l1, giou

    def forward(self, reasoning: Reasoning, gt: Float[Tensor, "batch 4"]) -> Float[Tensor, ""]:
        losses = step_losses(reasoning, gt, self.l1, self.giou)
        return (losses if self.supervise == "all" else losses[:, -1]).mean()


class PonderLoss(nn.Module):
    """Halting without reinforcement, for comparison: ``ponder_loss`` of the step losses.

    The policy learns by this alone, so the reasoner may as well have ``detach_state=False``.

    Args:
        prior: Chance of the geometric prior to stop.
        beta: Its weight.
        l1, giou: Weights of the box loss.
    """

    def __init__(self, prior: float = 0.3, beta: float = 0.01, l1: float = 5.0, giou: float = 2.0) -> None:
        super().__init__()
        self.prior, self.beta, self.l1, self.giou = prior, beta, l1, giou

    def forward(self, reasoning: Reasoning, gt: Float[Tensor, "batch 4"]) -> Float[Tensor, ""]:
        losses = step_losses(reasoning, gt, self.l1, self.giou)
        return ponder_loss(reasoning.stop_logits, losses, prior=self.prior, beta=self.beta)


class ReinforcedHalting(RandomIntervention):
    r"""Adds $\eta$ times the policy's loss, once a share ``start`` of training is over.

    A policy that learns before later steps are better than the first collapses to stopping at once, hence the wait.

    Args:
        eta: Weight of the policy's loss.
        lam, immediate, sign, gamma, threshold: Of ``episode_reward``.
        baseline: Of ``reinforce_loss``.
        start: Share of training without policy.
        supervise: ``all``: boxes learn as the criterion says; ``sampled``: those alone at which a draw stops, as the
            paper may be read; early steps then learn little while the policy goes on.
        seed: Of the draws.

    Example:
        >>> trainer = Trainer(10, interventions=[ReinforcedHalting()])
        >>> trainer.fit(reasoner, data.loader(64), loss=GroundingLoss(), optimizer=partial(AdamW, lr=1e-3))
    """

    def __init__(
        self,
        eta: float = 1.0,
        *,
        lam: float = 0.05,
        immediate: float = 0.5,
        sign: bool = False,
        gamma: float = 1.0,
        threshold: float = 0.5,
        baseline: Reinforce = "self_critical",
        start: float = 0.5,
        supervise: Literal["all", "sampled"] = "all",
        seed: int = 0,
    ) -> None:
        if eta <= 0:
            raise UserError(f"eta must be positive, got {eta}")
        if baseline not in REINFORCE:
            raise unknown("baseline", baseline, REINFORCE)
        if not 0 <= start < 1:
            raise UserError(f"start must be in [0, 1), got {start}")
        if supervise not in ("all", "sampled"):
            raise unknown("supervise", supervise, ("all", "sampled"))
        super().__init__(seed)
        self.eta, self.baseline, self.start, self.supervise = eta, baseline, start, supervise
        self.reward: dict[str, Any] = {
            "lam": lam,
            "immediate": immediate,
            "sign": sign,
            "gamma": gamma,
            "threshold": threshold,
        }
        episode_reward(torch.zeros(1, 1), **self.reward)  # refuses what is out of range

    def compute_loss(self, state: State, next: Callable[[State], Tensor]) -> Tensor:
        """The boxes' loss and, when it is time, the policy's."""
        reasoning: Reasoning = state.outputs
        logits = reasoning.stop_logits
        if self.supervise == "all":
            loss = next(state)
        else:
            chosen = sample_steps(logits, self.generator)[:, None] - 1
            loss = step_losses(reasoning, state.targets).gather(1, chosen).mean()
        if state.step < self.start * state.total_steps:  # all the same in the graph, for DDP's sake
            return loss + 0 * (logits.sum() + reasoning.values.sum())
        rewards = episode_reward(
            paired_iou(reasoning.boxes, state.targets[:, None].expand_as(reasoning.boxes)), **self.reward
        )
        policy = reinforce_loss(logits, rewards, self.baseline, self.generator, reasoning.values)
        steps = greedy_steps(logits.detach())
        state.logs["policy/steps"] = steps.float().mean().item()
        state.logs["policy/reward"] = rewards.gather(1, steps[:, None] - 1).mean().item()
        return loss + self.eta * policy
