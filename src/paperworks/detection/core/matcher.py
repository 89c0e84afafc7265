"""Which query stands for which object: the assignment of least cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

from paperworks.detection.core.targets import Prediction, Targets
from paperworks.errors import UserError


@dataclass(frozen=True)
class Objects:
    """The objects of a batch, picture after picture.

    Attributes:
        image: The picture of each.
        labels: Of all.
        boxes: Of all.
        targets: As they were, for costs that need more of them.
    """

    image: Int64[Tensor, " objects"]
    labels: Int64[Tensor, " objects"]
    boxes: Float[Tensor, "objects 4"]
    targets: Sequence[Targets]

    @classmethod
    def of(cls, targets: Sequence[Targets]) -> "Objects":
        """Gather them."""
        labels = torch.cat([target.labels for target in targets])
        image = np.repeat(np.arange(len(targets)), [len(target) for target in targets])
        return cls(torch.from_numpy(image).to(labels.device), labels, torch.cat([t.boxes for t in targets]), targets)


Cost = Callable[[Prediction, Objects], Tensor]
"""``(prediction, objects) -> [objects, queries]``: of each object with the queries of its own picture."""
Match = tuple[Int64[Tensor, " matched"], Int64[Tensor, " matched"]]
"""Queries and the objects that they stand for."""

ALPHA, GAMMA = 0.25, 2.0
"""Of the focal loss (Lin et al. 2017)."""


def focal_class_cost(prediction: Prediction, objects: Objects) -> Float[Tensor, "objects queries"]:
    r"""$\alpha (1-p)^\gamma (-\log p) - (1-\alpha) p^\gamma (-\log(1-p))$ of the object's class (Deformable DETR)."""
    p = prediction.logits[objects.image, :, objects.labels].sigmoid()
    present = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
    absent = (1 - ALPHA) * p**GAMMA * -(1 - p + 1e-8).log()
    return present - absent


def softmax_class_cost(prediction: Prediction, objects: Objects) -> Float[Tensor, "objects queries"]:
    """$-p$ of the object's class, where the last logit is that of no object (DETR)."""
    return -prediction.logits.softmax(-1)[objects.image, :, objects.labels]


def l1_cost(prediction: Prediction, objects: Objects) -> Float[Tensor, "objects queries"]:
    """Sum of absolute differences of the four numbers of boxes."""
    return (prediction.boxes[objects.image] - objects.boxes[:, None]).abs().sum(-1)


def giou_cost(prediction: Prediction, objects: Objects) -> Float[Tensor, "objects queries"]:
    """$-$GIoU."""
    a = box_convert(prediction.boxes, "cxcywh", "xyxy")[objects.image]
    b = box_convert(objects.boxes, "cxcywh", "xyxy")[:, None]
    low, high = a.minimum(b), a.maximum(b)
    both = (low[..., 2:] - high[..., :2]).clamp(min=0).prod(-1)
    either = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both
    hull = (high[..., 2:] - low[..., :2]).prod(-1)
    return (hull - either) / hull - both / either


DEFAULT_COSTS: dict[str, tuple[Cost, float]] = {
    "class": (focal_class_cost, 2.0),
    "l1": (l1_cost, 5.0),
    "giou": (giou_cost, 2.0),
}


class HungarianMatcher:
    """Assigns objects to queries, each at most once, at the least sum of costs.

    Costs are computed for the whole batch at once, but never for queries of one picture and objects of another, and
    reach the host in one copy.

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
        objects = Objects.of(targets)
        costs = torch.stack([weight * cost(prediction, objects) for cost, weight in self.costs.values()]).sum(0)
        table = costs.double().cpu().numpy()
        if not np.isfinite(table).all():
            raise UserError(f"the {self._culprit(prediction, objects)} cost of the matcher is not finite")
        device, start, matches = costs.device, 0, []
        for target in targets:
            queries, mine = linear_sum_assignment(table[start : start + len(target)].T)
            start += len(target)
            matches.append((torch.from_numpy(queries).to(device), torch.from_numpy(mine).to(device)))
        return matches

    def _culprit(self, prediction: Prediction, objects: Objects) -> str:
        return next(name for name, (cost, _) in self.costs.items() if not cost(prediction, objects).isfinite().all())
