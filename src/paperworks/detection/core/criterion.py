"""DETR's loss: match, then focal, L1 and GIoU losses, in every decoder layer."""

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from paperworks.detection.core.matcher import ALPHA, GAMMA, HungarianMatcher
from paperworks.detection.core.targets import Prediction, Targets, unpack

WEIGHTS = {"class": 2.0, "l1": 5.0, "giou": 2.0}
"""Of Deformable DETR."""


class SetCriterion(nn.Module):
    r"""The loss of a set of predictions (DETR, with the focal loss of Deformable DETR).

    $$\frac{1}{n} \Big( 2 \sum_{q, c} \text{focal} + 5 \sum |b - \hat b|_1 + 2 \sum (1 - \text{GIoU}) \Big)$$

    over all queries and classes, and over the matched boxes; $n$ is the number of objects in the batch, averaged over
    processes, at least 1. Every decoder layer is matched anew and adds the same loss.

    Args:
        matcher: Assigns objects to queries.
        weights: Of ``class``, ``l1`` and ``giou``.
        aux: Whether layers before the last count.

    Example:
        >>> trainer.fit(detector, data, loss=SetCriterion(), optimizer=partial(AdamW, lr=1e-3))
    """

    def __init__(
        self, matcher: HungarianMatcher | None = None, weights: dict[str, float] = WEIGHTS, *, aux: bool = True
    ) -> None:
        super().__init__()
        self.matcher, self.weights, self.aux = matcher or HungarianMatcher(), dict(weights), aux

    def forward(
        self, predictions: Sequence[Prediction], targets: Sequence[Targets] | Float[Tensor, "images objects 5"]
    ) -> Float[Tensor, ""]:
        """The weighted sum; ``targets`` may be packed (``pack``)."""
        parts = self.parts(predictions, targets)
        return torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()

    def parts(
        self, predictions: Sequence[Prediction], targets: Sequence[Targets] | Float[Tensor, "images objects 5"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Each loss before its weight, summed over layers."""
        objects = unpack(targets) if isinstance(targets, Tensor) else targets
        queries = predictions[-1].logits.shape[1]
        if any(len(target) > queries for target in objects):
            warnings.warn(
                f"a picture has more objects than there are queries ({queries}): some go unlearned", stacklevel=2
            )
        count = self._count(objects, predictions[-1].logits)
        layers = [self._layer(layer, objects, count) for layer in (predictions if self.aux else predictions[-1:])]
        return {name: torch.stack([layer[name] for layer in layers]).sum() for name in self.weights}

    def _layer(self, layer: Prediction, targets: Sequence[Targets], count: Tensor) -> dict[str, Tensor]:
        matches = self.matcher(layer, targets)
        images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(matches)])
        queries = torch.cat([queries for queries, _ in matches])
        labels = torch.cat([t.labels[objects] for t, (_, objects) in zip(targets, matches, strict=True)])
        boxes = torch.cat([t.boxes[objects] for t, (_, objects) in zip(targets, matches, strict=True)])
        wanted = torch.zeros_like(layer.logits)
        wanted[images, queries, labels] = 1
        found = layer.boxes[images, queries]
        corners = (box_convert(b, "cxcywh", "xyxy") for b in (found, boxes))
        return {
            "class": sigmoid_focal_loss(layer.logits, wanted, ALPHA, GAMMA, reduction="sum") / count,
            "l1": F.l1_loss(found, boxes, reduction="sum") / count,
            "giou": generalized_box_iou_loss(*corners, reduction="sum") / count,
        }

    @staticmethod
    def _count(targets: Sequence[Targets], like: Tensor) -> Tensor:
        count = torch.as_tensor(sum(map(len, targets)), dtype=like.dtype, device=like.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(count)
            count = count / torch.distributed.get_world_size()
        return count.clamp(min=1)
