"""When to stop: the distribution over steps, what an episode earns, and losses that teach the policy."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from paperworks.errors import UserError, unknown

Reinforce = Literal["exact", "self_critical", "value"]
REINFORCE: tuple[Reinforce, ...] = ("exact", "self_critical", "value")


def log_halting(stop_logits: Float[Tensor, "batch steps"]) -> Float[Tensor, "batch steps"]:
    r"""$\log P(\tau)$; see ``halting_distribution``."""
    go_on = F.logsigmoid(-stop_logits[:, :-1]).cumsum(1)
    so_far = torch.cat([torch.zeros_like(stop_logits[:, :1]), go_on], 1)
    return so_far + torch.cat([F.logsigmoid(stop_logits[:, :-1]), torch.zeros_like(stop_logits[:, :1])], 1)


def halting_distribution(stop_logits: Float[Tensor, "batch steps"]) -> Float[Tensor, "batch steps"]:
    r"""How likely it is to stop at each step.

    $$P(\tau) = p_\tau \prod_{u < \tau} (1 - p_u), \qquad P(T) = \prod_{u < T} (1 - p_u), \qquad p = \sigma(\ell)$$

    Args:
        stop_logits: $\ell$; the last step's is not looked at, for there the stop is forced.

    Example:
        >>> halting_distribution(torch.zeros(1, 3))
        tensor([[0.5000, 0.2500, 0.2500]])
    """
    return log_halting(stop_logits).exp()


def sample_steps(stop_logits: Float[Tensor, "batch steps"], generator: torch.Generator) -> Int64[Tensor, " batch"]:
    """Draw the step at which each episode stops, from 1. The generator may live on another device."""
    edges = halting_distribution(stop_logits.detach()).cumsum(1)[:, :-1].contiguous()
    drawn = torch.rand(len(edges), 1, generator=generator, device=generator.device).to(edges)
    return torch.searchsorted(edges, drawn, right=True)[:, 0] + 1


def greedy_steps(stop_logits: Float[Tensor, "batch steps"]) -> Int64[Tensor, " batch"]:
    """The first step with a probability of more than one half, from 1, or the last one.

    At exactly one half it goes on, so that a policy which has learned nothing takes every step.
    """
    stops = stop_logits > 0
    stops[:, -1] = True
    return stops.int().argmax(1) + 1


def episode_reward(
    ious: Float[Tensor, "batch steps"],
    lam: float = 0.05,
    immediate: float = 0.5,
    *,
    sign: bool = False,
    gamma: float = 1.0,
    threshold: float = 0.5,
) -> Float[Tensor, "batch steps"]:
    r"""What an episode earns that stops at each step; a constant, without gradient.

    $$R(\tau) = \gamma^{\tau - 1} R_F(\tau) + \sum_{t < \tau} \gamma^{t - 1}
    \big( w (\text{IoU}_{t+1} - \text{IoU}_t) - \lambda \big)$$

    with $R_F = 1$ if the box hits ($\text{IoU} \geq$ ``threshold``), else −1. Values are reconstructed: the paper's
    are not known here.

    Args:
        ious: Of each step's box with the true one.
        lam: $\lambda$, the price of each step after the first.
        immediate: w, what a step earns that brings the box nearer.
        sign: Count only whether the box came nearer.
        gamma: Discount.
        threshold: Of a hit.
    """
    if not 0 < gamma <= 1:
        raise UserError(f"gamma must be in (0, 1], got {gamma}")
    if lam < 0 or immediate < 0:
        raise UserError(f"lam and immediate must not be negative, got {lam} and {immediate}")
    ious = ious.detach()
    final = torch.where(ious >= threshold, 1.0, -1.0).to(ious)
    gain = ious[:, 1:] - ious[:, :-1]
    on_the_way = immediate * (gain.sign() if sign else gain) - lam
    discount = gamma ** torch.arange(ious.shape[1], device=ious.device, dtype=ious.dtype)
    sums = (on_the_way * discount[:-1]).cumsum(1)
    return final * discount + torch.cat([torch.zeros_like(final[:, :1]), sums], 1)


def reinforce_loss(
    stop_logits: Float[Tensor, "batch steps"],
    rewards: Float[Tensor, "batch steps"],
    baseline: Reinforce = "self_critical",
    generator: torch.Generator | None = None,
    values: Float[Tensor, "batch steps"] | None = None,
) -> Float[Tensor, ""]:
    r"""Minus the expected reward, by its exact gradient or an estimate of it.

    $$L = -\frac{1}{B} \sum_b \sum_{t \leq \tau,\, t < T} \log \pi(a_t) \, (R(\tau) - v_t)$$

    for one draw $\tau$ an example. Since every step has been computed in training, the exact expectation
    $-\sum_\tau P(\tau) R(\tau)$ costs nothing more and has no variance.

    Args:
        stop_logits: Of the policy; the last is not looked at.
        rewards: $R(\tau)$ of stopping at each step; no gradient goes through them.
        baseline: ``self_critical``: v is the reward of the greedy stop; ``value``: of a value head, whose squared
            error joins the loss; ``exact``: the expectation instead of a draw.
        generator: Draws $\tau$; not needed for ``exact``.
        values: The value head's $v_t$, for ``value``.

    Raises:
        UserError: For an unknown baseline, or if one's argument is missing.
    """
    if baseline not in REINFORCE:
        raise unknown("baseline", baseline, REINFORCE)
    rewards = rewards.detach()
    if baseline == "exact":
        return -(halting_distribution(stop_logits) * rewards).sum(1).mean()
    if generator is None:
        raise UserError(f"baseline={baseline!r} draws where to stop and needs a generator")
    steps = sample_steps(stop_logits, generator)
    earned = rewards.gather(1, steps[:, None] - 1)
    if baseline == "self_critical":
        greedy = rewards.gather(1, greedy_steps(stop_logits)[:, None] - 1)
        return -(log_halting(stop_logits).gather(1, steps[:, None] - 1) * (earned - greedy)).mean()
    if values is None:
        raise UserError("baseline='value' needs values, of a value head")
    place = torch.arange(1, stop_logits.shape[1], device=steps.device)
    taken, stopped = place <= steps[:, None], place == steps[:, None]
    logits, guess = stop_logits[:, :-1], values[:, :-1]
    log_action = torch.where(stopped, F.logsigmoid(logits), F.logsigmoid(-logits))
    terms = -log_action * (earned - guess.detach()) + (guess - earned).square()
    return (terms * taken).sum(1).mean()


def ponder_loss(
    stop_logits: Float[Tensor, "batch steps"],
    losses: Float[Tensor, "batch steps"],
    *,
    prior: float = 0.3,
    beta: float = 0.01,
) -> Float[Tensor, ""]:
    r"""PonderNet's (Banino et al. 2021) alternative without rewards: $\sum_\tau P(\tau) L_\tau + \beta \,
    \text{KL}(P \,\|\, G)$, with G geometric, cut off at the last step.

    Args:
        stop_logits: Of the policy; the last is not looked at.
        losses: Of each step; gradients go through them.
        prior: Chance of the geometric distribution to stop; its mean is 1 / ``prior`` steps.
        beta: Weight of the prior.
    """
    if not 0 < prior < 1:
        raise UserError(f"prior must be between 0 and 1, got {prior}")
    log_p = log_halting(stop_logits)
    log_prior = log_halting(torch.full_like(stop_logits[:1], math.log(prior / (1 - prior))))
    p = log_p.exp()
    return (p * losses).sum(1).mean() + beta * (p * (log_p - log_prior)).sum(1).mean()
