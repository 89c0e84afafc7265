"""What is to be found in a picture, and what was found."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchvision.ops import box_convert

from paperworks.errors import UserError
from paperworks.worlds import FlatScenes


@dataclass(frozen=True)
class Targets:
    """The objects of one picture; there may be none.

    Attributes:
        labels: Classes, from 0.
        boxes: Centre x, centre y, width and height, as shares of the picture without its padding.
        image_id: For messages and evaluation.
        size: Height and width of the original picture.
        ids: Of the annotations, where there are some.
    """

    labels: Int64[Tensor, " objects"]
    boxes: Float[Tensor, "objects 4"]
    image_id: int = 0
    size: tuple[int, int] = (1, 1)
    ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, *_: Any, **__: Any) -> "Targets":
        """On another device."""
        return replace(self, labels=self.labels.to(device), boxes=self.boxes.to(device))

    def check(self, num_classes: int) -> None:
        """Refuse what cannot be learned.

        Raises:
            UserError: If a label or box is out of range; it names picture and row.
        """
        if len(self.labels) != len(self.boxes):
            raise UserError(f"image {self.image_id}: {len(self.labels)} labels and {len(self.boxes)} boxes")
        outside, shown = first_outside(self.boxes) or (len(self), "")
        for row, label in enumerate(self.labels[: outside + 1].tolist()):
            if not 0 <= label < num_classes:
                raise UserError(f"image {self.image_id}, object {row}: label {label} is not 0 to {num_classes - 1}")
        if shown:
            raise UserError(f"image {self.image_id}, object {outside}: box ({shown}) is not within the picture")


@dataclass(frozen=True)
class Detections:
    """What was found in one picture, the surest first.

    Attributes:
        scores: In [0, 1].
        labels: Classes.
        boxes: x1, y1, x2, y2 in pixels of the original picture.
    """

    scores: Float[Tensor, " found"]
    labels: Int64[Tensor, " found"]
    boxes: Float[Tensor, "found 4"]


class Prediction(NamedTuple):
    """What one decoder layer says.

    Attributes:
        logits: Of each class, for a sigmoid.
        boxes: As in ``Targets``.
    """

    logits: Float[Tensor, "batch queries classes"]
    boxes: Float[Tensor, "batch queries 4"]


def flat_targets(scenes: FlatScenes) -> list[Targets]:
    """The objects of flat scenes, picture by picture; boxes are around whole shapes."""
    size = scenes.images.shape[-1]
    boxes = box_convert(scenes.boxes / size, "xyxy", "cxcywh")
    return [
        Targets(scenes.labels[mine], boxes[mine], k, (size, size))
        for k, mine in enumerate(scenes.image == torch.arange(len(scenes))[:, None])
    ]


def pack(targets: Sequence[Targets]) -> Float[Tensor, "images objects 5"]:
    """Targets as one tensor, for tensor datasets: label and box a row; −1 fills up."""
    most = max((len(target) for target in targets), default=0)
    packed = torch.full((len(targets), max(most, 1), 5), -1.0)
    for row, target in zip(packed, targets, strict=True):
        row[: len(target), 0], row[: len(target), 1:] = target.labels, target.boxes
    return packed


def unpack(packed: Float[Tensor, "images objects 5"], size: tuple[int, int] = (1, 1)) -> list[Targets]:
    """And back; pictures are numbered from 0."""
    found = []
    for image_id, rows in enumerate(packed):
        rows = rows[rows[:, 0] >= 0]
        found.append(Targets(rows[:, 0].long(), rows[:, 1:], image_id, size))
    return found


@torch.no_grad()
def post_process(prediction: Prediction, sizes: Sequence[tuple[int, int]], top: int = 100) -> list[Detections]:
    """The ``top`` surest pairs of query and class of each picture; one query may give several classes.

    Args:
        prediction: Of the last layer.
        sizes: Height and width of each original picture.
        top: How many, at most; pairs of chance 0, where a class was not asked for, are none.

    Raises:
        UserError: If there are not as many sizes as pictures.
    """
    if len(sizes) != len(prediction.logits):
        raise UserError(f"sizes must be those of {len(prediction.logits)} pictures, got {len(sizes)}")
    classes = prediction.logits.shape[-1]
    scores, places = prediction.logits.sigmoid().flatten(1).topk(min(top, prediction.logits[0].numel()))
    queries = places // classes
    boxes = box_convert(prediction.boxes, "cxcywh", "xyxy").gather(1, queries[..., None].expand(-1, -1, 4))
    scale = torch.tensor([[w, h, w, h] for h, w in sizes]).to(boxes)
    boxes = boxes * scale[:, None]
    found = zip(scores, places % classes, boxes, scores > 0, strict=True)
    return [Detections(s[kept], label[kept], b[kept]) for s, label, b, kept in found]


def first_outside(boxes: Float[Tensor, "n 4"]) -> tuple[int, str] | None:
    """The first box (centre, width and height) without extent or not within its picture, with its numbers; or none."""
    edges = box_convert(boxes, "cxcywh", "xyxy")
    good = (boxes[:, 2:] > 0).all(1) & (edges >= -1e-3).all(1) & (edges <= 1 + 1e-3).all(1)
    if good.all():
        return None
    row = int(good.int().argmin())
    return row, ", ".join(f"{value:.4g}" for value in boxes[row].tolist())


def split_padding(
    inputs: Float[Tensor, "batch 3 height width"] | tuple[Tensor, Tensor] | list[Tensor],
) -> tuple[Float[Tensor, "batch 3 height width"], Bool[Tensor, "batch height width"]]:
    """Pictures and their mask of padding, from both or from pictures alone."""
    images, pad = inputs if isinstance(inputs, tuple | list) else (inputs, None)
    return images, clear_padding(pad, images)


def extents(pad: Bool[Tensor, "batch height width"]) -> Int64[Tensor, "batch 2"]:
    """Rows and columns of each picture that are no padding."""
    return torch.stack([(~pad).any(2).sum(1), (~pad).any(1).sum(1)], -1)


def clear_padding(pad: Bool[Tensor, "batch height width"] | None, images: Tensor) -> Bool[Tensor, "batch height width"]:
    """The mask of padding (true there), or none of it."""
    if pad is None:
        return torch.zeros(images.shape[0], *images.shape[-2:], dtype=torch.bool, device=images.device)
    if pad.all(-1).all(-1).any():
        raise UserError(f"picture {int(pad.all(-1).all(-1).int().argmax())} of the batch is nothing but padding")
    return pad
