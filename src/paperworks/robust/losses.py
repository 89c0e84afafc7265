"""Robust classification losses: the baselines of learning with noisy labels, each a short function.

All take logits and integer targets and average over the batch. Probabilities are clamped at ``1e-7`` where a
logarithm or a negative power of them is taken, as the reference implementations do.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.errors import UserError

TINY = 1e-7

Logits = Float[Tensor, "batch classes"]
Targets = Int[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def _probability(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def generalized_cross_entropy(logits: Logits, targets: Targets, q: float = 0.7) -> Scalar:
    r"""GCE (Zhang & Sabuncu 2018, eq. 6): $(1 - p_y^q) / q$; cross entropy for $q \to 0$, MAE for $q = 1$."""
    if not 0 < q <= 1:
        raise UserError(f"q must be in (0, 1], got {q}")
    return ((1 - _probability(logits, targets).clamp(min=TINY) ** q) / q).mean()


def mean_absolute_error(logits: Logits, targets: Targets) -> Scalar:
    r"""MAE (Ghosh et al. 2017): $\lVert e_y - p \rVert_1 = 2 (1 - p_y)$."""
    return 2 * (1 - _probability(logits, targets)).mean()


def partially_huberised_cross_entropy(logits: Logits, targets: Targets, tau: float = 10.0) -> Scalar:
    r"""PHuber-CE (Menon et al. 2020): $-\log p_y$, made linear, $-\tau p_y + \log\tau + 1$, where $p_y \le 1/\tau$.

    ``tau`` must exceed 1; 10 is the paper's for CIFAR-100, 2 for CIFAR-10.
    """
    if not tau > 1:
        raise UserError(f"tau must exceed 1, got {tau}")
    p = _probability(logits, targets)
    linear = -tau * p + math.log(tau) + 1
    return torch.where(p <= 1 / tau, linear, -p.clamp(min=1 / tau).log()).mean()


def focal_loss(logits: Logits, targets: Targets, gamma: float = 2.0) -> Scalar:
    r"""Focal loss (Lin et al. 2017, eq. 4): $-(1 - p_y)^\gamma \log p_y$; $\gamma = 2$ is the paper's."""
    if not gamma >= 0:
        raise UserError(f"gamma must not be negative, got {gamma}")
    log_p = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return (-((1 - log_p.exp()) ** gamma) * log_p).mean()


def normalized_cross_entropy(logits: Logits, targets: Targets) -> Scalar:
    r"""NCE (Ma et al. 2020, eq. 9): $\log p_y / \sum_k \log p_k$."""
    log_p = logits.log_softmax(-1)
    return (log_p.gather(-1, targets[:, None]).squeeze(-1) / log_p.sum(-1)).mean()


def reverse_cross_entropy(logits: Logits, targets: Targets, log_zero: float = -4.0) -> Scalar:
    r"""RCE (Wang et al. 2019, eq. 6) with $\log 0 := A$: $-A (1 - p_y)$; $A = \log 10^{-4}$ in Ma et al.'s code,
    $-4$ in the paper and here.
    """
    if not log_zero < 0:
        raise UserError(f"log_zero must be negative, got {log_zero}")
    return -log_zero * (1 - _probability(logits, targets)).mean()


def nce_and_rce(logits: Logits, targets: Targets, alpha: float = 1.0, beta: float = 1.0) -> Scalar:
    r"""Active-passive loss (Ma et al. 2020): $\alpha\,\mathrm{NCE} + \beta\,\mathrm{RCE}$; (1, 1) for CIFAR-10."""
    return alpha * normalized_cross_entropy(logits, targets) + beta * reverse_cross_entropy(logits, targets)


def asymmetric_gce(logits: Logits, targets: Targets, a: float = 0.6, q: float = 0.6) -> Scalar:
    r"""AGCE (Zhou et al. 2021, table 1): $((a + 1)^q - (a + p_y)^q) / q$; $a = q = 0.6$ is the paper's for CIFAR-10."""
    if not (a > 0 and q > 0):
        raise UserError(f"a and q must be positive, got a={a}, q={q}")
    return (((a + 1) ** q - (a + _probability(logits, targets)) ** q) / q).mean()
