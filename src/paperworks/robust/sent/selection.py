"""Selections that need no detector: the neighbours that SENT is compared with. True means "keep"."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperworks.data.labels import check_labels
from paperworks.errors import UserError


def small_loss(loss: Float[Tensor, " n"], keep: float) -> Bool[Tensor, " n"]:
    """Keep the ``round(keep * n)`` examples of the smallest loss (Arpit et al., 2017; co-teaching, 2018).

    Models learn right labels first. How many to keep has to be known: 1 - noise rate.

    Args:
        loss: Loss of each example, best averaged over the epochs.
        keep: Share of the examples, above 0 to 1.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep must be above 0 and at most 1, got {keep}")
    kept = torch.zeros_like(loss, dtype=torch.bool)
    kept[loss.argsort(stable=True)[: round(keep * len(loss))]] = True
    return kept


def confident(probs: Float[Tensor, "n classes"], threshold: float = 0.9) -> Bool[Tensor, " n"]:
    """Keep pseudo-labels of which their teacher was sure: largest probability at least ``threshold``."""
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold must be from 0 to 1, got {threshold}")
    return probs.amax(1) >= threshold


def confident_learning(probs: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    r"""Drop the off-diagonal of the confident joint (Northcutt et al., 2021, "Confident Learning", eq. 1).

    With $t_k$ the mean of $p_k$ over the examples labelled k, an example is counted as of class
    $\mathrm{argmax}_{k: p_k \ge t_k} p_k$ (of none, if no class reaches its threshold) and dropped if that is not
    its label.

    Args:
        probs: Out-of-sample predictions: of models that were not trained on that example.
        labels: The labels that are doubted.
    """
    num_classes = probs.shape[1]
    check_labels(labels, num_classes, "labels")
    members = torch.nn.functional.one_hot(labels.long(), num_classes).to(probs)
    threshold = (probs * members).sum(0) / members.sum(0).clamp(min=1)
    reached = probs >= threshold.where(members.sum(0) > 0, torch.inf)
    counted = probs.masked_fill(~reached, -1.0).argmax(1)
    return ~reached.any(1) | (counted == labels)
