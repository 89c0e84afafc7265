import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from paperworks.cli import main
from paperworks.errors import UserError
from paperworks.worlds import (
    animate,
    flat_scenes,
    make_scene,
    make_scenes,
    orbit,
    render,
    rig,
    write_coco,
    write_nerf,
    write_nuscenes,
)
from paperworks.worlds.lidar import Lidar
from paperworks.worlds.sheet import contact_sheet


def test_coco_is_read_back_by_its_own_tools(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    scenes = make_scenes(3, things=(3, 4))
    data = coco.COCO(str(write_coco(tmp_path / "set", scenes)))
    names = {category["id"]: category["name"] for category in data.loadCats(data.getCatIds())}
    for place, scene in enumerate(scenes):
        view = render(scene)
        image = data.loadImgs(place + 1)[0]
        pixels = np.asarray(Image.open(tmp_path / "set" / "images" / image["file_name"]))
        np.testing.assert_allclose(pixels / 255, view.image[0].permute(1, 2, 0), atol=1 / 255)
        found = data.loadAnns(data.getAnnIds(place + 1))
        seen = [k for k in range(len(scene.things)) if view.modal[0, k].sum() >= 4]
        assert [names[row["category_id"]] for row in found] == [scene.things[k].shape for k in seen]
        for row, k in zip(found, seen, strict=True):
            np.testing.assert_array_equal(data.annToMask(row), view.modal[0, k])
            x1, y1, x2, y2 = view.boxes()[0, k].tolist()
            assert row["bbox"] == [x1, y1, x2 - x1, y2 - y1]
            assert row["area"] == view.modal[0, k].sum()


def test_flat_scenes_as_coco(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    scenes = flat_scenes(4, noise=0, seed=2)
    data = coco.COCO(str(write_coco(tmp_path / "set", scenes)))
    rows = data.loadAnns(data.getAnnIds())
    assert len(rows) == int((scenes.masks.sum((1, 2)) >= 4).sum())
    np.testing.assert_array_equal(data.annToMask(rows[0]), scenes.masks[0])


def test_nerf_poses_project_as_the_cameras_do(tmp_path):
    """By the conventions of Blender's sets: camera to world, x right, y up, z backward."""
    scene = orbit(make_scene(1), 3, resolution=(24, 18))
    about = json.loads(write_nerf(tmp_path / "set", scene).read_text())
    point = torch.tensor([0.3, -0.4, 0.5, 1.0])
    for camera, frame in zip(scene.cameras, about["frames"], strict=True):
        assert Image.open(tmp_path / "set" / frame["file_path"]).size == (24, 18)
        x, y, z, _ = torch.linalg.inv(torch.tensor(frame["transform_matrix"])) @ point
        pixel = [about["cx"] + about["fl_x"] * x / -z, about["cy"] - about["fl_y"] * y / -z, -z]
        torch.testing.assert_close(
            torch.stack([torch.as_tensor(p) for p in pixel]), camera.project(point[:3]), atol=1e-3, rtol=1e-4
        )
    assert about["fl_x"] == pytest.approx(12 / np.tan(about["camera_angle_x"] / 2))
    mixed = scene.model_copy(update={"cameras": (scene.cameras[0], scene.cameras[1].at(10, 10))})
    with pytest.raises(UserError, match="those of the scene differ"):
        write_nerf(tmp_path / "other", mixed)


@pytest.fixture
def nuscenes(tmp_path):
    scene = rig(make_scene(2, things=(3, 3)), 2, resolution=(48, 32))
    clip = animate(scene, "slide", frames=3)
    tables = write_nuscenes(
        tmp_path / "set", [clip.frames], lidar=Lidar(position=(0, 0, 2.0), rings=16, steps=180, elevation=(-60, 0))
    )
    return SimpleNamespace(
        root=tmp_path / "set", clip=clip, **{file.stem: json.loads(file.read_text()) for file in tables.iterdir()}
    )


def test_nuscenes_tables_refer_to_rows_that_are_there(nuscenes):
    tables = {name: rows for name, rows in vars(nuscenes).items() if name not in ("root", "clip")}
    assert len(tables) == 13
    tokens = {name: {row["token"] for row in rows} for name, rows in tables.items()}
    assert all(len(tokens[name]) == len(rows) for name, rows in tables.items())
    for rows in tables.values():
        for row in rows:
            for field, value in row.items():
                if field.endswith("_token") and field[:-6] in tokens:
                    assert value in tokens[field[:-6]], field
    for row in nuscenes.sample_data:
        assert (nuscenes.root / row["filename"]).is_file()


def test_nuscenes_boxes_and_returns_are_where_the_things_are(nuscenes):
    sweeps = [row for row in nuscenes.sample_data if row["fileformat"] == "pcd"]
    stamps = {row["token"]: row["timestamp"] for row in nuscenes.sample}
    sweep = min(sweeps, key=lambda row: stamps[row["sample_token"]])
    points = np.fromfile(nuscenes.root / sweep["filename"], np.float32).reshape(-1, 5)[:, :3] + [0, 0, 2.0]
    first = [row for row in nuscenes.sample_annotation if row["sample_token"] == sweep["sample_token"]]
    for row, thing in zip(first, nuscenes.clip.frames[0].things, strict=True):
        width, length, height = row["size"]
        assert (length, width, height) == pytest.approx(thing.size)
        w, _, _, z = row["rotation"]
        yaw = 2 * np.arctan2(z, w)
        local = (points - row["translation"]) @ np.array(
            [[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]]
        )
        inside = (np.abs(local) <= np.array([length, width, height]) / 2 + 0.08).all(1) & (
            local[:, 2] > -height / 2 + 0.1
        )
        assert inside.sum() >= 0.6 * row["num_lidar_pts"]
        assert row["num_lidar_pts"] > 0


def test_nuscenes_is_read_back_by_its_own_tools(nuscenes):
    kit = pytest.importorskip("nuscenes.nuscenes")
    read = kit.NuScenes("v1.0-mini", str(nuscenes.root), verbose=False)
    sample = read.get("sample", read.scene[0]["first_sample_token"])
    assert set(sample["data"]) == {"camera_0", "camera_1", "LIDAR_TOP"}
    boxes = read.get_boxes(sample["data"]["LIDAR_TOP"])
    assert [box.name for box in boxes] == [f"shape.{thing.shape}" for thing in nuscenes.clip.frames[0].things]


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="is there already"):
        write_coco(tmp_path / "mine", [make_scene(0)])
    with pytest.raises(UserError, match="at least one clip"):
        write_nuscenes(tmp_path / "set", [])


def test_the_contact_sheet_shows_every_sensor():
    titles = [axes.get_title() for axes in contact_sheet(1).axes]
    assert len(titles) == 26
    assert {"camera", "depth", "instances", "LiDAR from above", "camera_5", "domain fog", "flat mode"} <= set(titles)


def test_the_command_writes_the_sheet(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["worlds", "--out", str(tmp_path / "sheet.png"), "--scene", str(tmp_path / "scene.json")])
    assert ended.value.code == 0
    assert Image.open(tmp_path / "sheet.png").size[0] > 1000
    assert json.loads((tmp_path / "scene.json").read_text())["things"]
    assert "sheet.png" in capsys.readouterr().out
