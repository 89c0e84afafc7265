"""Few shots: which instances of which classes a detector may learn from."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paperworks.errors import UserError

COCO_NOVEL = (*range(1, 8), 9, *range(16, 22), 44, 62, 63, 64, 67, 72)
"""COCO's category ids of VOC's 20 classes, which few-shot detection takes for novel."""
VOC_NOVEL = {1: (3, 6, 10, 14, 18), 2: (1, 5, 10, 13, 18), 3: (4, 8, 14, 17, 18)}
"""Of VOC's classes 1 to 20, the novel ones of each split."""


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
    """Exactly ``k`` instances of each category; other boxes of their pictures are dropped from the annotations, as in
    the public k-shot files.

    Raises:
        UserError: If a category has fewer instances.
    """
    if k < 1:
        raise UserError(f"k must be at least 1, got {k}")
    draw, rows = np.random.default_rng(seed), []
    for category in category_ids or [row["id"] for row in content["categories"]]:
        mine = [row for row in content["annotations"] if row["category_id"] == category and not row.get("iscrowd")]
        if len(mine) < k:
            raise UserError(f"category {category} has {len(mine)} instances, fewer than {k} shots")
        rows += [mine[place] for place in sorted(draw.choice(len(mine), k, replace=False).tolist())]
    return _with(content, rows)


def check_shots(content: dict[str, Any], k: int) -> None:
    """Refuse a k-shot file whose counts differ.

    Raises:
        UserError: Naming the categories.
    """
    counts = Counter(row["category_id"] for row in content["annotations"])
    if wrong := {id: count for id, count in sorted(counts.items()) if count != k}:
        shown = ", ".join(f"{id} ({count})" for id, count in wrong.items())
        raise UserError(f"expected {k} instances of every category, but not so for {shown}")


def _with(content: dict[str, Any], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    seen = {row["image_id"] for row in annotations}
    images = [row for row in content["images"] if row["id"] in seen]
    return {**content, "images": images, "annotations": annotations}
