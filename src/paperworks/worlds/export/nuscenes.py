"""nuScenes: the thirteen tables of the official development kit, camera pictures and LiDAR sweeps."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from paperworks.errors import UserError
from paperworks.worlds.camera import render
from paperworks.worlds.export.pictures import new_folder, save_image
from paperworks.worlds.lidar import Lidar, scan
from paperworks.worlds.scene import Scene
from paperworks.worlds.solids import SHAPES

VERSION = "v1.0-mini"
INTERVAL = 500_000
"""Microseconds between samples: 2 Hz, as nuScenes annotates."""
LEVELS = ("v0-40", "v40-60", "v60-80", "v80-100")
"""Of visibility, in per cent over all cameras."""


def write_nuscenes(path: str | Path, clips: Sequence[Sequence[Scene]], *, lidar: Lidar | None = None) -> Path:
    """Write clips as nuScenes scenes, a sample a frame, with every camera of the frame and ``LIDAR_TOP``.

    The vehicle stands at the world's origin, with the axes of the world.

    Args:
        path: A new or empty folder, the development kit's ``dataroot``.
        clips: Frames, each with the same things and cameras: ``animate(rig(scene, 6), …).frames``.
        lidar: The sensor.

    Returns:
        The folder of the tables.

    Raises:
        UserError: If the folder holds something already, or a clip has no frames.
    """
    if not clips or not all(clips):
        raise UserError("write_nuscenes needs at least one clip, each with at least one frame")
    folder, lidar = new_folder(path), lidar or Lidar()
    tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
    log = _row(tables, "log", "log", logfile="", vehicle="mast", date_captured="2020-01-01", location="world")
    for shape in SHAPES:
        _row(tables, "category", shape, name=f"shape.{shape}", description="")
    for level in LEVELS:
        row = {"token": str(LEVELS.index(level) + 1), "level": level, "description": ""}
        tables["visibility"].append(row)
    tables["attribute"] = []
    (folder / "maps").mkdir()
    Image.new("L", (8, 8), 255).save(folder / "maps" / "world.png")
    _row(tables, "map", "map", log_tokens=[log], category="semantic_prior", filename="maps/world.png")
    for place, frames in enumerate(clips):
        _clip(tables, folder, f"scene-{place:04}", frames, log, lidar, place * 10**9)
    target = folder / VERSION
    target.mkdir()
    for name, rows in tables.items():
        (target / f"{name}.json").write_text(json.dumps(rows), "utf-8")
    return target


def _clip(
    tables: dict[str, list[dict[str, Any]]],
    folder: Path,
    name: str,
    frames: Sequence[Scene],
    log: str,
    lidar: Lidar,
    start: int,
) -> None:
    scene = _token("scene", name)
    samples = [_token("sample", name, str(k)) for k in range(len(frames))]
    _row(
        tables,
        "scene",
        name,
        name=name,
        description="",
        log_token=log,
        nbr_samples=len(frames),
        first_sample_token=samples[0],
        last_sample_token=samples[-1],
    )
    for k, thing in enumerate(frames[0].things):
        _row(
            tables,
            "instance",
            name,
            str(k),
            category_token=_token("category", thing.shape),
            nbr_annotations=len(frames),
            first_annotation_token=_token("sample_annotation", name, str(k), "0"),
            last_annotation_token=_token("sample_annotation", name, str(k), str(len(frames) - 1)),
        )
    for time, frame in enumerate(frames):
        stamp = start + time * INTERVAL
        _row(tables, "sample", name, str(time), scene_token=scene, timestamp=stamp, **_neighbours(samples, time))
        pose = _row(
            tables, "ego_pose", name, str(time), timestamp=stamp, translation=[0.0] * 3, rotation=[1.0, 0.0, 0.0, 0.0]
        )
        shared = {"sample_token": samples[time], "ego_pose_token": pose, "timestamp": stamp, "is_key_frame": True}
        seen = torch.zeros(len(frame.things))
        for camera in frame.cameras:
            view, file = render(frame, camera), _place(folder, camera.name, f"{name}-{time:03}.png")
            save_image(folder / file, view.image[0])
            if len(seen):
                seen = seen.maximum(view.visible[0])
            rotation, translation = quaternion(camera.rotation), list(camera.position)
            sensor = _sensor(tables, camera.name, "camera", name, translation, rotation, camera.intrinsics.tolist())
            _data(tables, name, camera.name, time, len(frames), file, sensor, camera.width, camera.height, shared)
        cloud, file = scan(frame, lidar, seed=time), _place(folder, "LIDAR_TOP", f"{name}-{time:03}.pcd.bin")
        rows = torch.cat([cloud.kitti(), cloud.ring[:, None].float()], 1)
        rows[:, :3] -= torch.tensor(lidar.position)
        (folder / file).write_bytes(rows.numpy().tobytes())
        sensor = _sensor(tables, "LIDAR_TOP", "lidar", name, list(lidar.position), [1.0, 0.0, 0.0, 0.0], [])
        _data(tables, name, "LIDAR_TOP", time, len(frames), file, sensor, 0, 0, shared)
        for k, thing in enumerate(frame.things):
            length, width, height = thing.size
            history = [_token("sample_annotation", name, str(k), str(t)) for t in range(len(frames))]
            _row(
                tables,
                "sample_annotation",
                name,
                str(k),
                str(time),
                sample_token=samples[time],
                instance_token=_token("instance", name, str(k)),
                attribute_tokens=[],
                visibility_token=str(1 + sum(float(seen[k]) >= bound for bound in (0.4, 0.6, 0.8))),
                translation=list(thing.position),
                size=[width, length, height],
                rotation=[math.cos(thing.yaw / 2), 0.0, 0.0, math.sin(thing.yaw / 2)],
                num_lidar_pts=int((cloud.instance == k).sum()),
                num_radar_pts=0,
                **_neighbours(history, time),
            )


def _sensor(
    tables: dict[str, list[dict[str, Any]]],
    channel: str,
    modality: str,
    clip: str,
    translation: list[float],
    rotation: list[float],
    intrinsic: list[list[float]],
) -> str:
    """The calibrated sensor; a row of each kind the first time it is asked for."""
    sensor, calibrated = _token("sensor", channel), _token("calibrated_sensor", clip, channel)
    if all(row["token"] != sensor for row in tables["sensor"]):
        _row(tables, "sensor", channel, channel=channel, modality=modality)
    if all(row["token"] != calibrated for row in tables["calibrated_sensor"]):
        about = {"translation": translation, "rotation": rotation, "camera_intrinsic": intrinsic}
        _row(tables, "calibrated_sensor", clip, channel, sensor_token=sensor, **about)
    return calibrated


def _data(
    tables: dict[str, list[dict[str, Any]]],
    clip: str,
    channel: str,
    time: int,
    times: int,
    file: str,
    calibrated: str,
    width: int,
    height: int,
    shared: dict[str, Any],
) -> None:
    history = [_token("sample_data", clip, channel, str(t)) for t in range(times)]
    _row(
        tables,
        "sample_data",
        clip,
        channel,
        str(time),
        calibrated_sensor_token=calibrated,
        fileformat=file.rpartition(".")[2] if width else "pcd",
        filename=file,
        width=width,
        height=height,
        **shared,
        **_neighbours(history, time),
    )


def quaternion(rotation: Float[Tensor, "3 3"]) -> list[float]:
    """A rotation as ``w, x, y, z``."""
    from scipy.spatial.transform import Rotation

    x, y, z, w = Rotation.from_matrix(rotation.double().numpy()).as_quat().tolist()
    return [w, x, y, z]


def _row(tables: dict[str, list[dict[str, Any]]], table: str, *key: str, **fields: Any) -> str:
    token = _token(table, *key)
    tables[table].append({"token": token, **fields})
    return token


def _token(*key: str) -> str:
    return hashlib.md5("/".join(key).encode(), usedforsecurity=False).hexdigest()


def _neighbours(tokens: Sequence[str], place: int) -> dict[str, str]:
    return {
        "prev": tokens[place - 1] if place else "",
        "next": tokens[place + 1] if place + 1 < len(tokens) else "",
    }


def _place(folder: Path, channel: str, file: str) -> str:
    (folder / "samples" / channel).mkdir(parents=True, exist_ok=True)
    return f"samples/{channel}/{file}"
