"""COCO's format: a folder of pictures and a JSON of annotations."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from paperworks.detection.core.detr import padded
from paperworks.detection.core.targets import Targets
from paperworks.errors import UserError

Example = tuple[Tensor, Targets]
SHOWN = 5
"""Bad rows that a message names."""


class CocoData(Dataset[Example]):
    """Pictures and targets of an annotation file.

    Category ids need not be contiguous; ``category_ids`` maps classes back. Crowds and boxes without area are left out
    of targets, and stay in ``content``, the ground truth of an evaluation.

    Args:
        annotations: The JSON file, or what it holds.
        images: Folder of the pictures; by default ``images`` beside the file, or its own folder.
        longest: Scale pictures so that the longer side has so many pixels; None keeps them.

    Attributes:
        classes: Names, in the order of classes.
        category_ids: Of the file, by class.
        image_ids: In the order of items.

    Raises:
        UserError: If the file is no such JSON, or annotations are bad: it names the file and their ids.
    """

    def __init__(
        self, annotations: str | Path | dict[str, Any], images: str | Path | None = None, longest: int | None = None
    ) -> None:
        if isinstance(annotations, dict):
            self.name, self.content = "annotations", annotations
            if images is None:
                raise UserError("images must name the folder of the pictures")
            self.folder = Path(images)
        else:
            file = Path(annotations)
            self.name, self.content = str(file), _read(file)
            beside = file.parent / "images"
            self.folder = Path(images) if images else beside if beside.is_dir() else file.parent
        self.longest = longest
        _check(self.name, self.content)
        categories = sorted(self.content["categories"], key=lambda row: row["id"])
        self.classes = tuple(str(row["name"]) for row in categories)
        self.category_ids = [row["id"] for row in categories]
        place = {id: k for k, id in enumerate(self.category_ids)}
        self.rows = {row["id"]: row for row in self.content["images"]}
        self.image_ids = list(self.rows)
        objects: dict[int, list[tuple[int, list[float]]]] = {id: [] for id in self.image_ids}
        for row in self.content["annotations"]:
            if not row.get("iscrowd") and min(row["bbox"][2:]) > 0:
                objects[row["image_id"]].append((place[row["category_id"]], row["bbox"]))
        self.targets = [self._targets(id, found) for id, found in objects.items()]

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[self.image_ids[index]]
        file = self.folder / row["file_name"]
        try:
            with Image.open(file) as opened:
                picture = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{file} cannot be read as an image ({type(error).__name__})") from error
        if picture.size != (row["width"], row["height"]):
            size = f"{picture.width}x{picture.height}"
            raise UserError(f"{file} is {size}, and {self.name} says {row['width']}x{row['height']}")
        if self.longest:
            scale = self.longest / max(picture.size)
            scaled = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            picture = picture.resize(scaled, Image.Resampling.BILINEAR)
        return pil_to_tensor(picture).float().div(255), self.targets[index]

    def _targets(self, image_id: int, found: Sequence[tuple[int, list[float]]]) -> Targets:
        row = self.rows[image_id]
        width, height = row["width"], row["height"]
        boxes = torch.tensor([box for _, box in found]).view(-1, 4).float()
        x, y, w, h = boxes.unbind(1)
        x2, y2 = (x + w).clamp(max=width), (y + h).clamp(max=height)
        x, y = x.clamp(min=0), y.clamp(min=0)
        inside = torch.stack([(x + x2) / 2 / width, (y + y2) / 2 / height, (x2 - x) / width, (y2 - y) / height], 1)
        labels = torch.tensor([label for label, _ in found], dtype=torch.int64)
        return Targets(labels, inside, image_id, (height, width))

    def loader(
        self, batch_size: int, *, shuffle: bool = False, generator: torch.Generator | None = None, multiple: int = 32
    ) -> DataLoader[Any]:
        """Batches ``((images, pad), targets)`` for ``Detr`` and ``SetCriterion``."""

        def collate(examples: list[Example]) -> tuple[tuple[Tensor, Tensor], list[Targets]]:
            return padded([image for image, _ in examples], multiple), [target for _, target in examples]

        return DataLoader(self, batch_size, shuffle=shuffle, generator=generator, collate_fn=collate)


def to_coco(
    targets: Sequence[Targets], classes: Sequence[str], category_ids: Sequence[int] | None = None
) -> dict[str, Any]:
    """Targets as the content of an annotation file, e.g. as the ground truth of an evaluation."""
    ids = list(category_ids or range(1, len(classes) + 1))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for target in targets:
        height, width = target.size
        images.append({"id": target.image_id, "width": width, "height": height, "file_name": f"{target.image_id}.png"})
        for label, (x, y, w, h) in zip(target.labels.tolist(), _pixels(target).tolist(), strict=True):
            row = {"id": len(annotations) + 1, "image_id": target.image_id, "category_id": ids[label], "iscrowd": 0}
            annotations.append({**row, "bbox": [x, y, w, h], "area": w * h})
    categories = [{"id": id, "name": name} for id, name in zip(ids, classes, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _pixels(target: Targets) -> Float[Tensor, "objects 4"]:
    height, width = target.size
    boxes = target.boxes * torch.tensor([width, height, width, height])
    return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], 1)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no COCO annotations: expected images, annotations and categories")
    return content


def _check(name: str, content: dict[str, Any]) -> None:
    for key, fields in {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }.items():
        rows = content.get(key)
        if not isinstance(rows, list):
            raise UserError(f"{name} holds no list {key!r}: expected images, annotations and categories")
        for place, row in enumerate(rows):
            if missing := [field for field in fields if not isinstance(row, dict) or field not in row]:
                raise UserError(f"{name}: row {place} of {key} has no {missing[0]!r}")
        doubled = [id for id, count in Counter(row["id"] for row in rows).items() if count > 1]
        _refuse(name, f"{key} with an id that occurs before", doubled)
    images, categories = ({row["id"] for row in content[key]} for key in ("images", "categories"))
    rows = content["annotations"]
    _refuse(name, "annotations of an unknown image", [r["id"] for r in rows if r["image_id"] not in images])
    _refuse(name, "annotations of an unknown category", [r["id"] for r in rows if r["category_id"] not in categories])
    _refuse(
        name, "annotations whose bbox is not four finite numbers", [r["id"] for r in rows if not _is_box(r["bbox"])]
    )
    size = {row["id"]: (row["width"], row["height"]) for row in content["images"]}
    _refuse(
        name,
        "annotations whose bbox lies outside its image",
        [r["id"] for r in rows if not _touches(r["bbox"], *size[r["image_id"]])],
    )


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e9 for n in box)
    )


def _touches(box: list[float], width: int, height: int) -> bool:
    x, y, w, h = box
    return x < width and y < height and x + w > 0 and y + h > 0 if min(w, h) > 0 else True


def _refuse(name: str, what: str, ids: list[Any]) -> None:
    if ids:
        shown = ", ".join(map(str, ids[:SHOWN])) + (", …" if len(ids) > SHOWN else "")
        raise UserError(f"{name}: {len(ids)} {what}: id {shown}")
