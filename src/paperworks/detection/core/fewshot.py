"""Few shots: which instances of which classes a detector may learn from."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.detection.core.coco import CocoData, Example
from paperworks.errors import UserError

COCO_NOVEL = (*range(1, 8), 9, *range(16, 22), 44, 62, 63, 64, 67, 72)
"""COCO's category ids of VOC's 20 classes, which few-shot detection takes for novel."""
VOC_NOVEL = {1: (3, 6, 10, 14, 18), 2: (1, 5, 10, 13, 18), 3: (4, 8, 14, 17, 18)}
"""Of VOC's classes 1 to 20, the novel ones of each split."""

LEAST_AREA = 5.0
"""Pixels of an instance that can be a support."""


@dataclass(frozen=True)
class FewShotSplit:
    """Category ids that are learned first, and those that come later with few instances.

    Raises:
        UserError: If they overlap or there are none.
    """

    base: tuple[int, ...]
    novel: tuple[int, ...]

    def __post_init__(self) -> None:
        if both := sorted(set(self.base) & set(self.novel)):
            raise UserError(f"categories {', '.join(map(str, both))} are both base and novel")
        if not self.base or not self.novel:
            raise UserError("a split needs base and novel categories")


def keep_categories(content: dict[str, Any], category_ids: Sequence[int]) -> dict[str, Any]:
    """The annotations of some categories; pictures without any stay out."""
    wanted = set(category_ids)
    rows = [row for row in content["annotations"] if row["category_id"] in wanted]
    return _with(content, rows)


def sample_k_shot(
    content: dict[str, Any], k: int, seed: int, category_ids: Sequence[int] | None = None
) -> dict[str, Any]:
    """Exactly ``k`` instances of each category; other boxes of their pictures are dropped from the annotations.

    Drawn are those that can be supports: no crowds, nothing that says ``ignore``, no box of less than 5 pixels.

    Raises:
        UserError: If a category has fewer instances.
    """
    if k < 1:
        raise UserError(f"k must be at least 1, got {k}")
    draw, rows = np.random.default_rng(seed), []
    for category in category_ids or [row["id"] for row in content["categories"]]:
        mine = [row for row in content["annotations"] if row["category_id"] == category and _usable(row)]
        if len(mine) < k:
            raise UserError(f"category {category} has {len(mine)} usable instances, fewer than {k} shots")
        rows += [mine[place] for place in sorted(draw.choice(len(mine), k, replace=False).tolist())]
    return _with(content, rows)


def check_shots(content: dict[str, Any], k: int, novel: Sequence[int] | None = None) -> None:
    """Refuse a k-shot file whose counts differ.

    The public files for COCO and VOC have k instances of each novel category, and more of base ones: those that their
    pictures show besides.

    Args:
        content: Of the file.
        k: Instances of a category.
        novel: Categories that must have exactly k, while others may have more; by default all.

    Raises:
        UserError: Naming the categories.
    """
    counts = Counter(row["category_id"] for row in content["annotations"])
    exact = set(counts if novel is None else novel)
    wrong = {
        row["id"]: counts[row["id"]]
        for row in content["categories"]
        if counts[row["id"]] < k or (row["id"] in exact and counts[row["id"]] > k)
    }
    if wrong:
        shown = ", ".join(f"{id} ({count})" for id, count in sorted(wrong.items()))
        raise UserError(f"expected {k} instances of every category, but not so for {shown}")


@dataclass(frozen=True)
class Shot:
    """One instance of a class, in its picture.

    Attributes:
        image: The picture.
        box: Centre x, centre y, width and height, as shares of the picture.
        label: The class.
        key: The picture's id, and the annotation's (where it has none, the object's place in its picture).
    """

    image: Float[Tensor, "3 _ _"]
    box: Float[Tensor, "4"]
    label: int
    key: tuple[int, int]


class SupportSet:
    """Instances by class, to show a detector what it is to find. Pictures are read when they are wanted.

    Annotations that say ``ignore`` (VOC's difficult ones, in the public files) support nothing.

    Args:
        data: Pictures and targets.
        least_area: Smaller instances are left out; in pixels of the original picture.

    Attributes:
        classes: Labels of which there are instances.

    Raises:
        UserError: If a box is degenerate or outside its picture, or no instance is left.
    """

    def __init__(self, data: CocoData | Sequence[Example], *, least_area: float = LEAST_AREA) -> None:
        self._data = data
        self._places: dict[int, list[tuple[int, int]]] = {}
        ignored = set[int]()
        if isinstance(data, CocoData):
            targets = data.targets
            ignored = {row["id"] for row in data.content["annotations"] if row.get("ignore")}
        else:
            targets = [target for _, target in data]
        for picture, target in enumerate(targets):
            target.check(max(target.labels.tolist(), default=0) + 1)
            height, width = target.size
            areas = target.boxes[:, 2:].prod(1) * height * width
            for row, (label, area) in enumerate(zip(target.labels.tolist(), areas.tolist(), strict=True)):
                if area >= least_area and not (target.ids and target.ids[row] in ignored):
                    self._places.setdefault(label, []).append((picture, row))
        if not self._places:
            shown = ", ".join(f"{h}x{w}" for h, w in sorted({target.size for target in targets})[:3])
            what = f"instance of {least_area:g} pixels or more to support a class"
            raise UserError(f"there is no {what}; pictures are {shown or 'none'}")
        self.classes = tuple(sorted(self._places))

    def count(self, label: int) -> int:
        """How many instances of a class there are.

        Raises:
            UserError: If there is none.
        """
        if label not in self._places:
            raise UserError(f"no support for class {label}; there are instances of {', '.join(map(str, self.classes))}")
        return len(self._places[label])

    def shot(self, label: int, place: int) -> Shot:
        """One of them, from 0."""
        self.count(label)
        picture, row = self._places[label][place]
        image, target = self._data[picture]
        return Shot(image, target.boxes[row], label, (target.image_id, target.ids[row] if target.ids else row))

    def draw(self, label: int, generator: torch.Generator) -> Shot:
        """Any of them."""
        return self.shot(label, int(torch.randint(self.count(label), (), generator=generator)))


def _usable(row: dict[str, Any]) -> bool:
    _, _, width, height = row["bbox"]
    return not row.get("iscrowd") and not row.get("ignore") and width * height >= LEAST_AREA


def _with(content: dict[str, Any], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    seen = {row["image_id"] for row in annotations}
    images = [row for row in content["images"] if row["id"] in seen]
    return {**content, "images": images, "annotations": annotations}
