"""Average precision as COCO defines it, by faster-coco-eval or pycocotools."""

import contextlib
import copy
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch

from paperworks.detection.core.detr import Detr
from paperworks.detection.core.targets import Detections, post_process
from paperworks.errors import MissingExtra, UserError, unknown
from paperworks.nn import keeping_modes

NAMES = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
Backend = Literal["faster", "pycocotools"]


def coco_evaluate(
    truth: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    *,
    category_ids: Sequence[int] | None = None,
    image_ids: Sequence[int] | None = None,
    backend: Backend = "faster",
) -> dict[str, float]:
    """COCO's twelve figures.

    Args:
        truth: Content of an annotation file.
        detections: Rows ``image_id, category_id, bbox, score``; see ``coco_rows``. There may be none.
        category_ids: Only these categories.
        image_ids: Only these pictures.
        backend: faster-coco-eval, or pycocotools; they agree.

    Returns:
        By name, NaN where there is no such object.

    Raises:
        MissingExtra: Without the package.
        UserError: If a detection names an image or category that is not there.
    """
    if backend not in get_args(Backend):
        raise unknown("backend", backend, get_args(Backend))
    for key, rows in (("image", truth["images"]), ("category", truth["categories"])):
        known = {row["id"] for row in rows}
        for detection in detections:
            if detection[f"{key}_id"] not in known:
                raise UserError(f"a detection is of {key} {detection[f'{key}_id']}, which the truth does not have")
    COCO, Evaluation = _backend(backend)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = _with_areas(truth)
        reference.createIndex()
        found = COCO()
        found.dataset = {**reference.dataset, "annotations": [_numbered(*row) for row in enumerate(detections, 1)]}
        found.createIndex()
        evaluation = Evaluation(reference, found, "bbox")
        if category_ids is not None:
            evaluation.params.catIds = list(category_ids)
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        name: math.nan if value == -1 else float(value) for name, value in zip(NAMES, evaluation.stats, strict=False)
    }


def coco_rows(
    detections: Sequence[Detections], image_ids: Sequence[int], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections as rows of COCO's results."""
    rows = []
    for image_id, found in zip(image_ids, detections, strict=True):
        for score, label, box in zip(found.scores.tolist(), found.labels.tolist(), found.boxes.tolist(), strict=True):
            x1, y1, x2, y2 = box
            row = {"image_id": image_id, "category_id": category_ids[label], "score": score}
            rows.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    return rows


@torch.no_grad()
def detect(
    model: Detr, batches: Iterator[Any] | Sequence[Any], sizes: Sequence[tuple[int, int]], *, top: int = 100
) -> list[Detections]:
    """What the model finds in batches of inputs; ``sizes`` are those of the original pictures, in order."""
    found = list[Detections]()
    with keeping_modes(model):
        model.eval()
        for inputs in batches:
            prediction = model(inputs)[-1]
            found += post_process(prediction, sizes[len(found) : len(found) + len(prediction.logits)], top)
    return found


def _backend(name: Backend) -> tuple[Any, Any]:
    try:
        if name == "faster":
            from faster_coco_eval import COCO, COCOeval_faster

            return COCO, COCOeval_faster
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    except ImportError as error:
        package = "faster-coco-eval" if name == "faster" else "pycocotools"
        raise MissingExtra(package, "detection", "average precision") from error


def _with_areas(truth: dict[str, Any]) -> dict[str, Any]:
    rows = copy.deepcopy(truth["annotations"])
    for id, row in enumerate(rows, 1):
        row["id"] = id  # the libraries take an object of id 0 for none
        row.setdefault("iscrowd", 0)
        row.setdefault("area", row["bbox"][2] * row["bbox"][3])
    return {**truth, "annotations": rows, "info": truth.get("info", {})}


def _numbered(id: int, detection: dict[str, Any]) -> dict[str, Any]:
    area = detection["bbox"][2] * detection["bbox"][3]
    return {**detection, "id": id, "area": area, "iscrowd": 0}
