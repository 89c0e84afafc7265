"""COCO's format, average precision, few shots."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from PIL import Image
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from paperworks.detection.core import (
    CocoData,
    Detections,
    FewShotSplit,
    SetCriterion,
    baseline,
    check_shots,
    coco_evaluate,
    coco_rows,
    coco_splits,
    detect,
    flat_targets,
    keep_categories,
    pack,
    sample_k_shot,
    to_coco,
)
from paperworks.errors import UserError
from paperworks.train import Trainer
from paperworks.worlds import flat_scenes, write_coco

BOX = [10.0, 20.0, 30.0, 40.0]


def content(annotations=((1, 1, 3, BOX),)):
    return {
        "images": [{"id": k, "file_name": f"{k}.png", "width": 100, "height": 80} for k in (1, 2)],
        "annotations": [
            {"id": id, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0}
            for id, image, category, box in annotations
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}],
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for k in (1, 2):
        Image.new("RGB", (100, 80), (255, 0, 0)).save(tmp_path / "images" / f"{k}.png")
    (tmp_path / "annotations.json").write_text(json.dumps(content()))
    return tmp_path


def test_a_folder_is_read(folder):
    data = CocoData(folder / "annotations.json")
    assert data.classes == ("cat", "dog")
    assert data.category_ids == [3, 90]
    image, target = data[0]
    assert image.shape == (3, 80, 100)
    assert target.labels.tolist() == [0]
    torch.testing.assert_close(target.boxes, torch.tensor([[0.25, 0.5, 0.3, 0.5]]))
    assert target.size == (80, 100)
    assert len(data[1][1]) == 0
    small, again = CocoData(folder / "annotations.json", longest=50)[0]
    assert small.shape == (3, 40, 50)
    assert torch.equal(again.boxes, target.boxes)
    (images, pad), targets = next(iter(data.loader(2)))
    assert images.shape == (2, 3, 96, 128)
    assert [t.image_id for t in targets] == [1, 2]
    assert int((~pad).sum()) == 2 * 8000


def test_crowds_and_empty_boxes_are_not_learned():
    rows = content([(1, 1, 3, BOX), (2, 1, 3, [0, 0, 0, 5]), (3, 1, 90, BOX), (4, 1, 90, [-5, -5, 20, 20])])
    rows["annotations"][2]["iscrowd"] = 1
    data = CocoData(rows, images=".")
    assert data.targets[0].labels.tolist() == [0, 1]
    torch.testing.assert_close(data.targets[0].boxes[1], torch.tensor([0.075, 0.09375, 0.15, 0.1875]))
    assert len(data.content["annotations"]) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "annotations.json holds no list 'images'"),
        (lambda c: c["annotations"][0].pop("bbox"), "row 0 of annotations has no 'bbox'"),
        (lambda c: c["annotations"].append(c["annotations"][0]), "1 annotations with an id that occurs before: id 1"),
        (lambda c: c["annotations"][0].update(image_id=9), "1 annotations of an unknown image: id 1"),
        (lambda c: c["annotations"][0].update(category_id=9), "1 annotations of an unknown category: id 1"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "whose bbox is not four finite numbers: id 1"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, math.inf]), "whose bbox is not four finite numbers: id 1"),
        (lambda c: c["annotations"][0].update(bbox=[200, 2, 3, 4]), "whose bbox lies outside its image: id 1"),
        (lambda c: c["annotations"][0].update(bbox=[20, 2, -3, 4]), "whose bbox has a negative side: id 1"),
        (lambda c: c["images"][1].update(width="100"), "row 1 of images has width '100', expected pixels"),
        (lambda c: c["images"][1].update(height=0), "row 1 of images has height 0, expected pixels"),
        (lambda c: c["images"][0].update(id=[1]), r"row 0 of images has id \[1\], expected a whole number"),
        (lambda c: c["annotations"][0].update(image_id="1"), "row 0 of annotations has image_id '1', expected a whole"),
        (lambda c: c["images"][0].update(file_name=3), "row 0 of images has file_name 3, expected text"),
    ],
)
def test_bad_annotations_are_named_by_file_and_id(folder, change, message):
    rows = content()
    change(rows)
    (folder / "annotations.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        CocoData(folder / "annotations.json")


def test_bad_files_are_named(folder):
    (folder / "images" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"image 1 of .*annotations\.json: .*1\.png cannot be read as an image"):
        CocoData(folder / "annotations.json")[0]
    Image.new("RGB", (10, 10)).save(folder / "images" / "2.png")
    with pytest.raises(UserError, match=r"2\.png is 10x10, and .*annotations\.json says 100x80 of image 2"):
        CocoData(folder / "annotations.json")[1]
    (folder / "annotations.json").write_text("{")
    with pytest.raises(UserError, match=r"annotations\.json is no JSON"):
        CocoData(folder / "annotations.json")
    with pytest.raises(UserError, match="images must name the folder"):
        CocoData(content())


def test_flat_scenes_survive_the_disk(tmp_path):
    scenes = flat_scenes(5, seed=3)
    data = CocoData(write_coco(tmp_path / "set", scenes))
    for k in range(5):
        mine = (scenes.image == k) & (scenes.masks.sum((1, 2)) >= 4)
        assert data.targets[k].labels.tolist() == scenes.labels[mine].tolist()
        x, y, w, h = (data.targets[k].boxes * 64).unbind(1)
        torch.testing.assert_close(torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1), scenes.boxes[mine])


# To learn from and to measure on.


def test_a_fifth_of_the_pictures_is_for_measuring(tmp_path):
    file = write_coco(tmp_path / "set", flat_scenes(12, seed=0))
    rows = json.loads(file.read_text())
    busy = [row["id"] for row in rows["images"]][:10]
    rows["annotations"] = [row for row in rows["annotations"] if row["image_id"] in busy]
    file.write_text(json.dumps(rows))
    train, val = coco_splits(file.parent, seed=0)
    assert [len(part) for part in (train, val)] == [10, 2]
    assert all(map(len, val.targets))  # both of those with objects
    assert not set(train.image_ids) & set(val.image_ids)
    assert (train.classes, train.folder, train.name) == (val.classes, val.folder, str(file))
    assert {row["image_id"] for row in val.content["annotations"]} == set(val.image_ids)
    assert coco_splits(file, seed=0)[1].image_ids == val.image_ids
    assert any(coco_splits(file, seed=seed)[1].image_ids != val.image_ids for seed in range(1, 4))
    assert val[0][0].shape == (3, 64, 64)
    assert coco_splits(file.parent, longest=32)[0][0][0].shape == (3, 32, 32)


def test_parts_that_are_there_are_taken(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        write_coco(tmp_path / "set" / part, flat_scenes(count, seed=count))
        published = tmp_path / "coco"
        file = write_coco(tmp_path / "raw" / part, flat_scenes(count, seed=count))
        (published / "annotations").mkdir(parents=True, exist_ok=True)
        file.rename(published / "annotations" / f"instances_{part}2017.json")
        (file.parent / "images").rename(published / f"{part}2017")
    for folder in ("set", "coco"):
        parts = coco_splits(tmp_path / folder)
        assert [len(part) for part in parts] == [3, 2]
        assert parts[1][1][0].shape == (3, 64, 64)


def test_parts_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not there"):
        coco_splits(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds neither annotations\.json nor train/annotations\.json and val"):
        coco_splits(tmp_path)
    write_coco(tmp_path / "train", flat_scenes(2))
    with pytest.raises(UserError, match=r"holds neither annotations\.json nor train/annotations\.json and val"):
        coco_splits(tmp_path)
    write_coco(tmp_path / "one", flat_scenes(1))
    with pytest.raises(UserError, match=r"annotations\.json has 1 picture with objects: expected at least 2"):
        coco_splits(tmp_path / "one")
    file = write_coco(tmp_path / "val", flat_scenes(2))
    rows = json.loads(file.read_text())
    file.write_text(json.dumps(rows | {"annotations": []}))
    with pytest.raises(UserError, match=r"val/annotations\.json has no picture with objects"):
        coco_splits(tmp_path)
    (tmp_path / "val" / "images" / "000001.png").rename(tmp_path / "gone.png")
    file.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"1 images without a file in .*val/images: id 2"):
        coco_splits(tmp_path)
    (tmp_path / "gone.png").rename(tmp_path / "val" / "images" / "000001.png")
    rows["categories"][0]["name"] = "another"
    file.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"val/annotations\.json differ in their categories"):
        coco_splits(tmp_path)


# Average precision.

TRUTH = content([(1, 1, 3, BOX), (2, 2, 3, [5, 5, 50, 50]), (3, 2, 90, [60, 10, 30, 30])])
backends = pytest.mark.parametrize("backend", ["faster", "pycocotools"])


def found(*rows):
    return [{"image_id": i, "category_id": c, "bbox": box, "score": s} for i, c, box, s in rows]


@backends
def test_perfect_and_useless_detections(backend):
    pytest.importorskip("faster_coco_eval" if backend == "faster" else "pycocotools")
    perfect = found(*((r["image_id"], r["category_id"], r["bbox"], 0.9) for r in TRUTH["annotations"]))
    assert coco_evaluate(TRUTH, perfect, backend=backend)["AP"] == pytest.approx(1)
    shifted = [{**row, "bbox": [row["bbox"][0] + 60, *row["bbox"][1:]]} for row in perfect]
    assert coco_evaluate(TRUTH, shifted, backend=backend)["AP"] == pytest.approx(0)
    assert coco_evaluate(TRUTH, [], backend=backend)["AP"] == 0


@backends
def test_ids_may_begin_at_0(backend):
    pytest.importorskip("faster_coco_eval" if backend == "faster" else "pycocotools")
    truth = {
        "images": [{"id": 0, "file_name": "0.png", "width": 100, "height": 80}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": BOX}],
        "categories": [{"id": 0, "name": "cat"}],
    }
    assert coco_evaluate(truth, found((0, 0, BOX, 0.9)), backend=backend)["AP"] == pytest.approx(1)
    assert truth["annotations"][0]["id"] == 0


@backends
def test_precision_and_recall_by_hand(backend):
    """One of two objects found, then a false alarm: precision 1 up to a recall of a half, at 51 of 101 points."""
    pytest.importorskip("faster_coco_eval" if backend == "faster" else "pycocotools")
    truth = content([(1, 1, 3, [0, 0, 20, 20]), (2, 1, 3, [50, 50, 20, 20])])
    figures = coco_evaluate(truth, found((1, 3, [0, 0, 20, 20], 0.9), (1, 3, [70, 0, 20, 20], 0.8)), backend=backend)
    assert figures["AP"] == figures["AP50"] == pytest.approx(51 / 101)
    assert math.isnan(figures["AP_large"])


def test_the_two_libraries_agree():
    pytest.importorskip("faster_coco_eval")
    pytest.importorskip("pycocotools")
    scenes, g = flat_scenes(30, seed=1), torch.Generator().manual_seed(0)
    targets = flat_targets(scenes)
    truth, rows = to_coco(targets, list("abcdefghijkl")), []
    for annotation in truth["annotations"]:
        box = (torch.tensor(annotation["bbox"]) + 2 * torch.randn(4, generator=g)).clamp(min=1).tolist()
        row = {"image_id": annotation["image_id"], "category_id": annotation["category_id"], "bbox": box}
        rows.append({**row, "score": float(torch.rand((), generator=g))})
    one, other = (coco_evaluate(truth, rows, backend=backend) for backend in ("faster", "pycocotools"))
    assert one == pytest.approx(other, abs=1e-9, nan_ok=True)
    assert 0.05 < one["AP"] < 0.95


def test_categories_and_images_can_be_chosen():
    pytest.importorskip("faster_coco_eval")
    cats = found((1, 3, BOX, 0.9), (2, 3, [5, 5, 50, 50], 0.8))
    assert coco_evaluate(TRUTH, cats, category_ids=[3])["AP"] == pytest.approx(1)
    assert coco_evaluate(TRUTH, cats, category_ids=[90])["AP"] == 0
    assert coco_evaluate(TRUTH, cats, image_ids=[1])["AP"] == pytest.approx(1)
    with pytest.raises(UserError, match="a detection is of category 4, which the truth does not have"):
        coco_evaluate(TRUTH, found((1, 4, BOX, 0.9)))
    with pytest.raises(UserError, match="a detection is of image 9"):
        coco_evaluate(TRUTH, found((9, 3, BOX, 0.9)))


def test_detections_become_rows_of_the_original_categories():
    detections = [Detections(torch.tensor([0.5]), torch.tensor([1]), torch.tensor([[1.0, 2.0, 4.0, 8.0]]))]
    assert coco_rows(detections, [7], [3, 90]) == [
        {"image_id": 7, "category_id": 90, "score": 0.5, "bbox": [1, 2, 3, 6]}
    ]


def test_a_detector_learns_a_picture_by_heart():
    pytest.importorskip("faster_coco_eval")
    scenes = flat_scenes(4, classes=3, objects=(1, 2), radius=(10, 16), noise=0.0, seed=0)
    targets = flat_targets(scenes)
    torch.manual_seed(0)
    model = baseline("deformable", 3, d=32, heads=4, hidden=64, queries=6, encoders=1, decoders=2)
    data = TensorDataset(scenes.images, pack(targets))
    trainer = Trainer(epochs=80, batch_size=4, clip_norm=1.0, accelerator="cpu")
    history = trainer.fit(model, data, loss=SetCriterion(), optimizer=partial(AdamW, lr=3e-3))
    assert history.last["train/loss"] < 0.4 * history[0]["train/loss"]
    rows = coco_rows(detect(model, [scenes.images], [(64, 64)] * 4), range(4), [1, 2, 3])
    assert coco_evaluate(to_coco(targets, ("a", "b", "c")), rows)["AP50"] > 0.5


# Few shots.


def many(per_category=6):
    rows = [(10 * c + k + 1, 1 + k % 2, c, BOX) for c in (3, 90) for k in range(per_category)]
    return content(rows)


def test_k_shots_are_k_of_each_and_repeat():
    few = sample_k_shot(many(), 2, seed=1)
    assert sorted(row["category_id"] for row in few["annotations"]) == [3, 3, 90, 90]
    assert few == sample_k_shot(many(), 2, seed=1)
    assert few != sample_k_shot(many(), 2, seed=2)
    assert {row["id"] for row in few["images"]} == {row["image_id"] for row in few["annotations"]}
    check_shots(few, 2)
    with pytest.raises(UserError, match=r"expected 3 instances of every category, but not so for 3 \(2\), 90 \(2\)"):
        check_shots(few, 3)
    with pytest.raises(UserError, match="category 3 has 6 usable instances, fewer than 7"):
        sample_k_shot(many(), 7, seed=0)


def test_base_and_novel():
    split = FewShotSplit(base=(3,), novel=(90,))
    base = keep_categories(many(), split.base)
    assert {row["category_id"] for row in base["annotations"]} == {3}
    before = copy.deepcopy(many())
    assert many() == before
    with pytest.raises(UserError, match="categories 3 are both base and novel"):
        FewShotSplit((3, 4), (3,))
