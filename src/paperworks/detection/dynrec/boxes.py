"""Boxes in pairs: how far they overlap, how often they hit, and what a miss costs."""

from jaxtyping import Float
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss

from paperworks.detection.core.targets import first_outside
from paperworks.errors import UserError


def paired_iou(one: Float[Tensor, "*pairs 4"], other: Float[Tensor, "*pairs 4"]) -> Float[Tensor, "*pairs"]:
    """Intersection over union of each box with its counterpart.

    Args:
        one, other: Centre x, centre y, width and height.
    """
    (x1, y1, x2, y2), (u1, v1, u2, v2) = (box_convert(box, "cxcywh", "xyxy").unbind(-1) for box in (one, other))
    width, height = x2.minimum(u2) - x1.maximum(u1), y2.minimum(v2) - y1.maximum(v1)
    common = width.clamp(min=0) * height.clamp(min=0)
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - common
    return common / union.clamp(min=1e-12)


def rec_accuracy(pred: Float[Tensor, "batch 4"], gt: Float[Tensor, "batch 4"], thr: float = 0.5) -> float:
    """Share of boxes that hit: IoU of at least ``thr``, exactly ``thr`` included.

    Args:
        pred: What was found, as centre x, centre y, width and height.
        gt: The truth.
        thr: In (0, 1].
    """
    if not 0 < thr <= 1:
        raise UserError(f"thr must be in (0, 1], got {thr}")
    if not len(pred):
        raise UserError("there is no box to score")
    return float((paired_iou(pred, gt) >= thr).double().mean())


def box_loss(
    pred: Float[Tensor, "*pairs 4"], gt: Float[Tensor, "*pairs 4"], l1: float = 5.0, giou: float = 2.0
) -> Float[Tensor, "*pairs"]:
    r"""TransVG's: $5 \sum |b - \hat b| + 2 (1 - \text{GIoU})$ of each pair."""
    corners = (box_convert(box, "cxcywh", "xyxy") for box in (pred, gt))
    return l1 * (pred - gt).abs().sum(-1) + giou * generalized_box_iou_loss(*corners, reduction="none")


def check_boxes(boxes: Float[Tensor, "examples 4"]) -> None:
    """Refuse boxes that are not within the picture.

    Raises:
        UserError: Naming the first of them.
    """
    if outside := first_outside(boxes):
        row, shown = outside
        raise UserError(f"example {row}: box ({shown}) is not within the picture; expected cx, cy, w, h in [0, 1]")
