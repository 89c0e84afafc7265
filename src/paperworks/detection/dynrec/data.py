"""Expressions with their pictures and boxes: generated ones, RefCOCO's and Ref-Reasoning's."""

import io
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader

from paperworks.detection.dynrec.boxes import check_boxes
from paperworks.detection.dynrec.expressions import FlatScene, Relations, draw_scenes, expressions2d
from paperworks.detection.dynrec.model import Inputs
from paperworks.detection.dynrec.text import Vocabulary
from paperworks.errors import UserError, unknown
from paperworks.worlds import Expression

REFER: dict[str, tuple[str, ...]] = {
    "refcoco": ("unc", "google"),
    "refcoco+": ("unc",),
    "refcocog": ("umd", "google"),
}
"""The collections and who split them."""


@dataclass(frozen=True)
class ReferringData:
    """Expressions about pictures, several a picture.

    Attributes:
        images: RGB pictures.
        picture: The picture of each expression.
        tokens: Numbers of its words.
        mask: True where there are words.
        boxes: Of what it means: centre x, centre y, width and height in [0, 1].
        hops: Other things that it goes by.
        texts: In words.
    """

    images: Float[Tensor, "pictures 3 height width"]
    picture: Int64[Tensor, " examples"]
    tokens: Int64[Tensor, "examples words"]
    mask: Bool[Tensor, "examples words"]
    boxes: Float[Tensor, "examples 4"]
    hops: Int64[Tensor, " examples"]
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        check_boxes(self.boxes)

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, rows: Sequence[int] | Tensor) -> tuple[Inputs, Float[Tensor, "batch 4"]]:
        """Inputs and boxes of some examples, with no more columns of words than they need."""
        index = rows if isinstance(rows, Tensor) else torch.tensor(list(rows))
        mask = self.mask[index]
        length = int(mask.sum(1).max())
        pictures = self.images[self.picture[index]]
        return (pictures, self.tokens[index, :length], mask[:, :length]), self.boxes[index]

    def loader(
        self, batch_size: int, *, shuffle: bool = False, generator: torch.Generator | None = None
    ) -> DataLoader[Any]:
        """Batches for ``DynamicReasoner`` and ``GroundingLoss``; a generator makes their order repeatable."""
        rows: Any = range(len(self))
        return DataLoader(rows, batch_size, shuffle=shuffle, generator=generator, collate_fn=self.batch)


def flat_expressions(
    scenes: Sequence[FlatScene],
    counts: Mapping[int, int],
    *,
    per_scene: int = 1,
    relations: Relations = "beside",
    vocabulary: Vocabulary | None = None,
    max_words: int = 20,
    noise: float = 0.03,
    seed: int = 0,
) -> tuple[ReferringData, Vocabulary]:
    """So many expressions of each number of hops, about the first scenes of which they can be said.

    Args:
        scenes: E.g. of ``labelled_scenes``; those of which nothing is said are left out.
        counts: Number of hops to number of expressions; those of many hops are rare, so that it takes many scenes.
        per_scene: Expressions a scene and number of hops, at most.
        relations: As in ``expressions2d``.
        vocabulary: Whose numbers words have; by default one of these very texts.
        max_words: Longest expression.
        noise: Of the pictures.
        seed: Decides everything.

    Raises:
        UserError: If the scenes are too few for so many expressions.
    """
    found: list[tuple[int, Expression]] = []
    for hops, count in counts.items():
        before = len(found)
        for place, scene in enumerate(scenes):
            wanted = min(per_scene, before + count - len(found))
            if not wanted:
                break
            said = expressions2d(scene, hops, count=wanted, relations=relations, seed=seed * len(scenes) + place)
            found += [(place, expression) for expression in said]
        if (got := len(found) - before) < count:
            raise UserError(f"{len(scenes)} scenes have {got} expressions of {hops} hops, and {count} are wanted")
    if not found:
        raise UserError(f"counts must ask for an expression, got {dict(counts)}")
    texts = tuple(expression.text for _, expression in found)
    vocabulary = vocabulary or Vocabulary(texts)
    tokens, mask = vocabulary.encode(texts, max_words)
    used = sorted({place for place, _ in found})
    row = {place: k for k, place in enumerate(used)}
    data = ReferringData(
        draw_scenes([scenes[place] for place in used], noise=noise, seed=seed),
        torch.tensor([row[place] for place, _ in found]),
        tokens,
        mask,
        torch.stack([scenes[place].boxes[expression.target] for place, expression in found]),
        torch.tensor([expression.hops for _, expression in found]),
        texts,
    )
    return data, vocabulary


@dataclass(frozen=True)
class Referred:
    """One expression of an official collection.

    Attributes:
        text: As it was written.
        image: File name of the picture.
        box: x, y, width and height in pixels.
        split: ``train``, ``val``, ``testA`` …
        size: Width and height of the picture, where the collection tells.
        info: What else stands in the collection: ids, number of objects …
    """

    text: str
    image: str
    box: tuple[float, float, float, float]
    split: str
    size: tuple[int, int] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


class _Plain(pickle.Unpickler):
    """Reads containers, numbers and texts; a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(f"it names {module}.{name}, and only plain data is read")


def load_refer(
    root: str | Path, name: Literal["refcoco", "refcoco+", "refcocog"] = "refcoco", split_by: str = "unc"
) -> list[Referred]:
    """Read RefCOCO, RefCOCO+ or RefCOCOg: ``root/name/refs(split_by).p`` and ``root/name/instances.json``.

    The pickle may hold plain data alone, so that it runs no code.

    Args:
        root: Folder of the collections.
        name: Which.
        split_by: Who split it: ``unc``, ``google`` or ``umd``.

    Raises:
        UserError: If there is no such collection, a file is missing or broken, or a box lies outside its picture.
    """
    if name not in REFER:
        raise unknown("collection", name, REFER)
    if split_by not in REFER[name]:
        raise unknown(f"split of {name}", split_by, REFER[name])
    file = Path(root) / name / f"refs({split_by}).p"
    try:
        refs = _Plain(io.BytesIO(_bytes(file)), encoding="utf-8").load()
    except UserError as error:
        raise UserError(f"{file} is refused: {error}") if "only plain data" in str(error) else error from None
    except Exception as error:  # whatever a broken pickle makes the unpickler raise
        raise UserError(f"{file} is no pickle of references: {error}") from error
    content = _json(file.with_name("instances.json"))
    found = []
    try:
        sizes = {row["id"]: (int(row["width"]), int(row["height"]), row["file_name"]) for row in content["images"]}
        boxes = {row["id"]: row["bbox"] for row in content["annotations"]}
        for ref in refs:
            width, height, picture = sizes[ref["image_id"]]
            box = _box(f"{file.name}: reference {ref['ref_id']}", boxes[ref["ann_id"]], (width, height))
            ids = {key: ref[key] for key in ("ref_id", "ann_id", "image_id", "category_id")}
            for sentence in ref["sentences"]:
                text = sentence.get("raw") or sentence["sent"]
                info = ids | {"sent_id": sentence["sent_id"]}
                found.append(Referred(text, picture, box, ref["split"], (width, height), info))
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} does not fit instances.json: {error} is missing") from error
    return found


def load_ref_reasoning(file: str | Path) -> list[Referred]:
    """Read Ref-Reasoning: a ``train_expressions.json``, ``val_…`` or ``test_…``; pictures are those of GQA.

    ``info`` keeps the expression's id and all of its other fields, the number of objects among them.

    Raises:
        UserError: If the file is missing or broken.
    """
    file = Path(file)
    split, found = file.name.split("_")[0], []
    for key, row in _json(file).items():
        if not isinstance(row, dict) or (missing := {"image_id", "expression", "bbox"} - row.keys()):
            raise UserError(
                f"{file}: expression {key} has no {'fields' if not isinstance(row, dict) else min(missing)}"
            )
        rest = {name: value for name, value in row.items() if name not in ("expression", "bbox")}
        box = _box(f"{file.name}: expression {key}", row["bbox"])
        found.append(Referred(row["expression"], f"{row['image_id']}.jpg", box, split, None, {"id": key} | rest))
    return found


def _box(what: str, box: Any, size: tuple[int, int] | None = None) -> tuple[float, float, float, float]:
    """Four numbers, within the picture to half a pixel."""
    if not (isinstance(box, list | tuple) and len(box) == 4 and all(isinstance(n, int | float) for n in box)):
        raise UserError(f"{what}: box {box!r} is not x, y, width and height")
    x, y, width, height = (float(n) for n in box)
    across, down = size or (float("inf"), float("inf"))
    if not (width > 0 and height > 0 and min(x, y) >= -0.5 and x + width <= across + 0.5 and y + height <= down + 0.5):
        raise UserError(f"{what}: box {box} is not within its picture")
    return x, y, width, height


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_bytes(file))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no annotations: expected a JSON object")
    return content
