"""COCO's format: a folder of pictures and a JSON of annotations."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
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
        self.rows = {row["id"]: row for row in self.content["images"]}
        self.image_ids = list(self.rows)
        self.targets = coco_targets(self.content)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[self.image_ids[index]]
        file = self.folder / row["file_name"]
        try:
            with Image.open(file) as opened:
                picture = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            what = f"image {row['id']} of {self.name}: {file}"
            raise UserError(f"{what} cannot be read as an image ({type(error).__name__})") from error
        if picture.size != (row["width"], row["height"]):
            size = f"{picture.width}x{picture.height}"
            said = f"{self.name} says {row['width']}x{row['height']} of image {row['id']}"
            raise UserError(f"{file} is {size}, and {said}")
        if self.longest:
            scale = self.longest / max(picture.size)
            scaled = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            picture = picture.resize(scaled, Image.Resampling.BILINEAR)
        return pil_to_tensor(picture).float().div(255), self.targets[index]

    def loader(
        self, batch_size: int, *, shuffle: bool = False, generator: torch.Generator | None = None, multiple: int = 32
    ) -> DataLoader[Any]:
        """Batches ``((images, pad), targets)`` for ``Detr`` and ``SetCriterion``."""

        together = partial(collated, multiple=multiple)
        return DataLoader(self, batch_size, shuffle=shuffle, generator=generator, collate_fn=together)


def collated(examples: Sequence[Example], multiple: int = 32) -> tuple[tuple[Tensor, Tensor], list[Targets]]:
    """Pictures of any sizes as a batch, ``((images, pad), targets)``; sides are filled up to a multiple."""
    return padded([image for image, _ in examples], multiple), [target for _, target in examples]


def coco_splits(path: str | Path, longest: int | None = None, seed: int = 0) -> tuple[CocoData, CocoData]:
    """Pictures to learn from and to measure on, from a folder in COCO's format.

    It holds ``annotations.json`` beside ``images``, of whose pictures a fifth is for measuring, of those with objects
    as of those without; or ``train`` and ``val`` of that kind; or it is COCO 2017 as published.

    Args:
        path: The folder, or an annotation file.
        longest: As in ``CocoData``.
        seed: Of the choice of pictures to measure on, where there are not two parts.

    Raises:
        UserError: If there is no such folder, a part has no picture with objects, files are missing, or categories
            differ between parts.
    """
    path, parts = Path(path), ("train", "val")
    pairs = (
        [(path / "annotations" / f"instances_{part}2017.json", path / f"{part}2017") for part in parts],
        [(path / part / "annotations.json", None) for part in parts],
    )
    pair = next((pair for pair in pairs if all(file.is_file() for file, _ in pair)), None)
    single = path / "annotations.json" if path.is_dir() else path
    if pair:
        train, val = (CocoData(file, images, longest) for file, images in pair)
    elif single.is_file():
        train, val = _divided(CocoData(single, longest=longest), seed)
    elif path.exists():
        raise UserError(f"{path} holds neither annotations.json nor train/annotations.json and val/annotations.json")
    else:
        raise UserError(f"{path} is not there")
    for part in (train, val):
        if not any(map(len, part.targets)):
            raise UserError(f"{part.name} has no picture with objects")
        lost = [id for id, row in part.rows.items() if not (part.folder / row["file_name"]).is_file()]
        _refuse(part.name, f"images without a file in {part.folder}", lost)
    if (train.category_ids, train.classes) != (val.category_ids, val.classes):
        raise UserError(f"{train.name} and {val.name} differ in their categories")
    return train, val


def _divided(whole: CocoData, seed: int) -> tuple[CocoData, CocoData]:
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    busy = [whole.image_ids[k] for k in order if len(whole.targets[k])]
    empty = [whole.image_ids[k] for k in order if not len(whole.targets[k])]
    if len(busy) < 2:
        count = f"{len(busy)} picture{'s' * (len(busy) != 1)} with objects"
        raise UserError(f"{whole.name} has {count}: expected at least 2, one of them to measure on")
    held_out = {*busy[: max(1, len(busy) // 5)], *empty[: len(empty) // 5]}
    return _part(whole, set(whole.image_ids) - held_out), _part(whole, held_out)


def _part(whole: CocoData, image_ids: set[int]) -> CocoData:
    content = {
        **whole.content,
        "images": [row for row in whole.content["images"] if row["id"] in image_ids],
        "annotations": [row for row in whole.content["annotations"] if row["image_id"] in image_ids],
    }
    part = CocoData(content, whole.folder, whole.longest)
    part.name = whole.name
    return part


def coco_targets(content: dict[str, Any]) -> list[Targets]:
    """The objects of each picture, in the order of the pictures; classes are the categories in the order of their ids.

    Crowds and boxes without area are left out; boxes end where their picture does.
    """
    place = {id: k for k, id in enumerate(sorted(row["id"] for row in content["categories"]))}
    found: dict[int, list[dict[str, Any]]] = {row["id"]: [] for row in content["images"]}
    for row in content["annotations"]:
        if not row.get("iscrowd") and min(row["bbox"][2:]) > 0:
            found[row["image_id"]].append(row)
    targets = []
    for picture in content["images"]:
        rows, width, height = found[picture["id"]], picture["width"], picture["height"]
        x, y, w, h = torch.tensor([row["bbox"] for row in rows]).view(-1, 4).float().unbind(1)
        x2, y2 = (x + w).clamp(max=width), (y + h).clamp(max=height)
        x, y = x.clamp(min=0), y.clamp(min=0)
        boxes = torch.stack([(x + x2) / 2 / width, (y + y2) / 2 / height, (x2 - x) / width, (y2 - y) / height], 1)
        labels = torch.tensor([place[row["category_id"]] for row in rows], dtype=torch.int64)
        ids = tuple(row["id"] for row in rows)
        targets.append(Targets(labels, boxes, picture["id"], (height, width), ids))
    return targets


def to_coco(
    targets: Sequence[Targets], classes: Sequence[str], category_ids: Sequence[int] | None = None
) -> dict[str, Any]:
    """Targets as the content of an annotation file, e.g. as the ground truth of an evaluation.

    Annotations keep their ids if all targets have them, and are numbered from 1 otherwise.
    """
    named = all(len(target.ids) == len(target) for target in targets)
    ids = list(category_ids or range(1, len(classes) + 1))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for target in targets:
        height, width = target.size
        images.append({"id": target.image_id, "width": width, "height": height, "file_name": f"{target.image_id}.png"})
        for place, (label, (x, y, w, h)) in enumerate(
            zip(target.labels.tolist(), _pixels(target).tolist(), strict=True)
        ):
            id = target.ids[place] if named else len(annotations) + 1
            row = {"id": id, "image_id": target.image_id, "category_id": ids[label], "iscrowd": 0}
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
            for field in fields:
                if not isinstance(row, dict) or field not in row:
                    raise UserError(f"{name}: row {place} of {key} has no {field!r}")
                if field in ("width", "height") and not (type(row[field]) is int and row[field] > 0):
                    raise UserError(f"{name}: row {place} of {key} has {field} {row[field]!r}, expected pixels")
                if field.endswith("id") and type(row[field]) is not int:
                    raise UserError(f"{name}: row {place} of {key} has {field} {row[field]!r}, expected a whole number")
                if field == "file_name" and not isinstance(row[field], str):
                    raise UserError(f"{name}: row {place} of {key} has {field} {row[field]!r}, expected text")
        doubled = [id for id, count in Counter(row["id"] for row in rows).items() if count > 1]
        _refuse(name, f"{key} with an id that occurs before", doubled)
    images, categories = ({row["id"] for row in content[key]} for key in ("images", "categories"))
    rows = content["annotations"]
    _refuse(name, "annotations of an unknown image", [r["id"] for r in rows if r["image_id"] not in images])
    _refuse(name, "annotations of an unknown category", [r["id"] for r in rows if r["category_id"] not in categories])
    _refuse(
        name, "annotations whose bbox is not four finite numbers", [r["id"] for r in rows if not _is_box(r["bbox"])]
    )
    _refuse(name, "annotations whose bbox has a negative side", [r["id"] for r in rows if min(r["bbox"][2:]) < 0])
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
