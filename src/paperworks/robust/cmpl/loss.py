"""The loss by which networks learn from each other's pseudo-labels."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from paperworks.errors import UserError


class PseudoLabelStats(NamedTuple):
    """What the pseudo-labels of a batch were like; all without gradient.

    Attributes:
        mask_rate: Share of the clips on which each network, as a teacher, was confident enough.
        confidence: Each network's mean largest probability.
        agreement: Share of the clips on which all networks predict the same class.
        precision: Share of correct pseudo-labels among those used, by teacher (NaN where none was); None where no
            truth was given.
    """

    mask_rate: Float[Tensor, " models"]
    confidence: Float[Tensor, " models"]
    agreement: Float[Tensor, ""]
    precision: Float[Tensor, " models"] | None


def cross_pseudo_label_loss(
    logits_weak: Sequence[Float[Tensor, "_batch _classes"]],
    logits_strong: Sequence[Float[Tensor, "_batch _classes"]],
    threshold: float = 0.8,
    teacher: Literal["next", "self"] = "next",
    *,
    truth: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, " models"], PseudoLabelStats]:
    r"""Cross entropy of each network on strong views against another network's confident labels of the weak views.

    With $q^t = \mathrm{softmax}(z^t_{weak})$ of the teacher t of network n, without gradient,

    $$\mathcal{L}_u^n = \frac{1}{B} \sum_i \mathbb{1}[\max q^t_i \ge \delta] \;
    \mathrm{CE}(z^n_{strong,i}, \arg\max q^t_i)$$

    The mean is over all clips, not over those that pass. Two networks teach each other (CMPL); a single one
    teaches itself, which is FixMatch (Sohn et al. 2020, eq. 4), and plain pseudo-labelling (Lee 2013) where the
    strong view is the weak one.

    Args:
        logits_weak: Each network's logits of the weakly augmented clips.
        logits_strong: Each network's logits of the strong views of the same clips.
        threshold: Smallest confidence δ that makes a label; above 1 there is none. 0.8 is CMPL's, FixMatch's for
            images is 0.95.
        teacher: ``"next"``: network n learns from network n + 1, the last from the first. ``"self"``: each from itself.
        truth: Labels of the clips, for ``precision`` alone; the loss never sees them.

    Returns:
        The loss of each network, and statistics of the labels.

    Raises:
        UserError: If numbers of networks or shapes do not fit, or a logit is not finite.
    """
    weak, strong = _stack(logits_weak, "logits_weak"), _stack(logits_strong, "logits_strong")
    if weak.shape != strong.shape:
        raise UserError(
            f"logits_weak and logits_strong must be of the same networks, clips and classes, "
            f"got {list(weak.shape)} and {list(strong.shape)}"
        )
    if not threshold >= 0:
        raise UserError(f"threshold must be at least 0, got {threshold}")
    if teacher not in ("next", "self"):
        raise UserError(f"teacher must be 'next' or 'self', got {teacher!r}")
    confidence, labels = weak.detach().softmax(-1).max(-1)  # [models, batch]
    passes = confidence >= threshold
    stats = PseudoLabelStats(
        mask_rate=passes.float().mean(1),
        confidence=confidence.mean(1),
        agreement=(labels == labels[0]).all(0).float().mean(),
        precision=None if truth is None else (passes & (labels == truth)).sum(1) / passes.sum(1),
    )
    if teacher == "next":
        passes, labels = passes.roll(-1, 0), labels.roll(-1, 0)
    errors = F.cross_entropy(strong.flatten(0, 1), labels.flatten(), reduction="none").view_as(passes)
    return torch.where(passes, errors, 0.0).mean(1), stats


def _stack(logits: Sequence[Tensor], name: str) -> Tensor:
    """All networks' logits as ``[models, batch, classes]``, in float32 at least."""
    if not logits:
        raise UserError(f"{name} is empty: expected the logits of at least one network")
    for model, each in enumerate(logits):
        if each.ndim != 2 or each.shape != logits[0].shape:
            raise UserError(
                f"{name}[{model}] has shape {list(each.shape)}, expected [batch, classes]"
                + (f" = {list(logits[0].shape)} as of network 0" if model else "")
            )
    stacked = torch.stack(list(logits))
    stacked = stacked if stacked.dtype == torch.float64 else stacked.float()
    # A NaN confidence would pass no threshold: the network would silently stop teaching.
    if not (finite := stacked.isfinite().all(-1)).all():
        model, clip = (~finite).nonzero()[0].tolist()
        raise UserError(f"{name}[{model}] is not finite for clip {clip}")
    return stacked
