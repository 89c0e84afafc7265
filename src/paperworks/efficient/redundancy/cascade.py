"""Resolution cascade (R1): a small network looks at small images first, and only hard ones go on."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from paperworks.errors import UserError


class ResolutionCascade(nn.Module):
    r"""Classifies at low resolution, and again at full resolution where that was not confident.

    An image escalates if the largest probability of the low model is below $\tau$ (after RANet, Yang et al. 2020,
    with two separate networks). The expected cost is $c_{low} + P(\text{escalate})\, c_{full}$.

    Args:
        low: Classifies images that are ``scale`` times as wide.
        full: Classifies images as they are.
        scale: Scale of the low resolution.
        threshold: $\tau$: at 0 none escalates, above 1 all do. ``calibrate`` finds one.

    Attributes:
        escalated: Share of images of the last batch that escalated.

    Raises:
        UserError: If ``scale`` is not in (0, 1) or ``threshold`` is negative.
    """

    def __init__(self, low: nn.Module, full: nn.Module, scale: float = 0.5, threshold: float = 0.9) -> None:
        super().__init__()
        if not 0 < scale < 1:
            raise UserError(f"scale must be above 0 and below 1, got {scale}")
        if not threshold >= 0:
            raise UserError(f"threshold must be at least 0, got {threshold}")
        self.low, self.full, self.scale, self.threshold = low, full, scale, threshold
        self.escalated = 0.0

    def reduce(self, images: Float[Tensor, "n c height width"]) -> Float[Tensor, "n c rows columns"]:
        """The images at low resolution, averaged over the pixels of each new one."""
        size = [max(1, round(side * self.scale)) for side in images.shape[-2:]]
        return F.interpolate(images, size, mode="area")

    def forward(self, images: Float[Tensor, "n c height width"]) -> Float[Tensor, "n classes"]:
        logits = self.low(self.reduce(images))
        hard = confidence(logits) < self.threshold
        self.escalated = float(hard.float().mean())
        if not self.escalated:
            return logits
        index = hard.nonzero()[:, 0]
        return logits.index_copy(0, index, self.full(images[index]).to(logits))

    @torch.no_grad()
    def calibrate(
        self, images: Float[Tensor, "n c height width"], targets: Int64[Tensor, "n"], tolerance: float = 0.005
    ) -> float:
        """Set ``threshold`` to the cheapest that loses at most ``tolerance`` of the full model's accuracy.

        Args:
            images, targets: Validation data.
            tolerance: Share of images.

        Returns:
            The threshold.
        """
        low, full = self.low(self.reduce(images)), self.full(images)
        sure = confidence(low)
        right, right_full = (logits.argmax(1) == targets for logits in (low, full))
        order = sure.argsort(stable=True)
        # Escalating the k least confident images: correct answers of the full model on them, of the low one on others.
        gained = F.pad((right_full[order].long() - right[order].long()).cumsum(0), (1, 0))
        correct = right.sum() + gained
        enough = correct >= right_full.sum() - tolerance * len(images)
        # Images of equal confidence escalate together, so that k must end a group of them.
        values = sure[order]
        ends = torch.cat([values.new_ones(1).bool(), values[1:] != values[:-1], values.new_ones(1).bool()])
        k = int((enough & ends).nonzero()[0])
        self.threshold = float(values[k]) if k < len(values) else 1.1
        if k == 0:
            self.threshold = 0.0
        return self.threshold


def confidence(logits: Float[Tensor, "n classes"]) -> Float[Tensor, "n"]:
    """The largest probability."""
    return logits.softmax(1).amax(1)
