"""Which query stands for which object: the assignment of least cost."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from paperworks.detection.core.targets import Prediction, Targets
from paperworks.errors import UserError

Cost = Callable[[Prediction, int, Targets], Tensor]
"""``(prediction, picture of the batch, its targets) -> [queries, objects]``."""
Match = tuple[Int64[Tensor, " matched"], Int64[Tensor, " matched"]]
"""Queries and the objects that they stand for."""

ALPHA, GAMMA = 0.25, 2.0
"""Of the focal loss (Lin et al. 2017)."""


def focal_class_cost(prediction: Prediction, image: int, targets: Targets) -> Float[Tensor, "queries objects"]:
    r"""$\alpha (1-p)^\gamma (-\log p) - (1-\alpha) p^\gamma (-\log(1-p))$ of the object's class (Deformable DETR)."""
    p = prediction.logits[image].sigmoid()
    present = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
    absent = (1 - ALPHA) * p**GAMMA * -(1 - p + 1e-8).log()
    return (present - absent)[:, targets.labels]


def softmax_class_cost(prediction: Prediction, image: int, targets: Targets) -> Float[Tensor, "queries objects"]:
    """$-p$ of the object's class, where the last logit is that of no object (DETR)."""
    return -prediction.logits[image].softmax(-1)[:, targets.labels]


def l1_cost(prediction: Prediction, image: int, targets: Targets) -> Float[Tensor, "queries objects"]:
    """Sum of absolute differences of the four numbers of boxes."""
    return torch.cdist(prediction.boxes[image], targets.boxes, p=1)


def giou_cost(prediction: Prediction, image: int, targets: Targets) -> Float[Tensor, "queries objects"]:
    """$-$GIoU."""
    a, b = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (prediction.boxes[image], targets.boxes))
    return -generalized_box_iou(a, b)


DEFAULT_COSTS: dict[str, tuple[Cost, float]] = {
    "class": (focal_class_cost, 2.0),
    "l1": (l1_cost, 5.0),
    "giou": (giou_cost, 2.0),
}


class HungarianMatcher:
    """Assigns objects to queries, each at most once, at the least sum of costs.

    Costs are computed for each picture by itself, never for queries of one and objects of another, and reach the host
    in one copy a batch.

    Args:
        costs: By name, the function and its weight; by default those of Deformable DETR: class 2, L1 5, GIoU 2.

    Example:
        >>> for queries, objects in HungarianMatcher()(prediction, targets): ...
    """

    def __init__(self, costs: Mapping[str, tuple[Cost, float]] = DEFAULT_COSTS) -> None:
        if not costs:
            raise UserError("costs must name at least one")
        self.costs = dict(costs)

    @torch.no_grad()
    def __call__(self, prediction: Prediction, targets: Sequence[Targets]) -> list[Match]:
        """A match for each picture.

        Raises:
            UserError: If a cost is not finite, naming it.
        """
        queries = prediction.logits.shape[1]
        blocks = [self._block(prediction, image, target).flatten() for image, target in enumerate(targets)]
        together = torch.cat(blocks).double().cpu().numpy()
        if not np.isfinite(together).all():
            raise UserError(f"the {self._culprit(prediction, targets)} cost of the matcher is not finite")
        matches, start = [], 0
        for target in targets:
            block = together[start : start + queries * len(target)].reshape(queries, len(target))
            start += block.size
            rows, columns = linear_sum_assignment(block)
            device = prediction.logits.device
            matches.append((torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)))
        return matches

    def _block(self, prediction: Prediction, image: int, target: Targets) -> Tensor:
        if not len(target):
            return prediction.boxes.new_zeros(prediction.boxes.shape[1], 0)
        return torch.stack([weight * cost(prediction, image, target) for cost, weight in self.costs.values()]).sum(0)

    def _culprit(self, prediction: Prediction, targets: Sequence[Targets]) -> str:
        return next(
            name
            for name, (cost, _) in self.costs.items()
            for image, target in enumerate(targets)
            if len(target) and not cost(prediction, image, target).isfinite().all()
        )
