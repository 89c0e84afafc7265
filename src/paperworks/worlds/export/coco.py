"""COCO: ``annotations.json`` beside a folder ``images``."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from paperworks.worlds.camera import render
from paperworks.worlds.export.pictures import new_folder, save_image
from paperworks.worlds.flat import FLAT_SHAPES, FlatScenes
from paperworks.worlds.scene import Scene
from paperworks.worlds.solids import SHAPES


def write_coco(path: str | Path, scenes: Sequence[Scene] | FlatScenes, *, least: int = 4, shadows: bool = True) -> Path:
    """Write pictures and annotations: category, box, visible mask as RLE, its area.

    Args:
        path: A new or empty folder.
        scenes: Scenes, seen by their first cameras, or flat ones. Boxes of the former are around what is visible,
            those of the latter around the whole shape.
        least: Things with fewer visible pixels are left out.
        shadows: As in `render`.

    Returns:
        The file of annotations.

    Raises:
        UserError: If the folder holds something already.
    """
    folder = new_folder(path)
    (folder / "images").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    if isinstance(scenes, FlatScenes):
        names = list(FLAT_SHAPES)
        pictures = list(scenes.images)
        things = list(zip(scenes.image.tolist(), scenes.labels.tolist(), scenes.masks, scenes.boxes, strict=True))
    else:
        names, pictures, things = list(SHAPES), [], []
        for place, scene in enumerate(scenes):
            view = render(scene, shadows=shadows)
            pictures.append(view.image[0])
            shapes = view.shapes[0].tolist()
            things += zip([place] * len(shapes), shapes, view.modal[0], view.boxes()[0], strict=True)
    for place, picture in enumerate(pictures):
        file = f"{place:06}.png"
        save_image(folder / "images" / file, picture)
        height, width = picture.shape[1:]
        images.append({"id": place + 1, "file_name": file, "width": width, "height": height})
    for place, label, mask, box in things:
        area = int(mask.sum())
        if area >= least:
            x1, y1, x2, y2 = box.tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": place + 1,
                    "category_id": label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": 0,
                    "segmentation": run_lengths(mask),
                }
            )
    categories = [{"id": k, "name": name, "supercategory": "shape"} for k, name in enumerate(names, 1)]
    target = folder / "annotations.json"
    target.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}), "utf-8")
    return target


def run_lengths(mask: Bool[Tensor, "height width"]) -> dict[str, list[int]]:
    """COCO's uncompressed RLE: lengths of runs down the columns, of zeros first."""
    counts: list[int] = []
    for value, run in groupby(mask.T.flatten().tolist()):
        if not counts and value:
            counts.append(0)
        counts.append(len(list(run)))
    return {"size": list(mask.shape), "counts": counts}
