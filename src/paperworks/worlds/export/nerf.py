"""NeRF: ``transforms.json`` beside a folder ``images``, as Blender's synthetic sets and instant-ngp have it."""

import json
from pathlib import Path

import torch

from paperworks.errors import UserError
from paperworks.worlds.camera import render
from paperworks.worlds.export.pictures import new_folder, save_image
from paperworks.worlds.scene import Scene

OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
"""From the axes of OpenCV (x right, y down, z forward) to those of OpenGL (x right, y up, z backward)."""


def write_nerf(path: str | Path, scene: Scene, *, samples: int = 2) -> Path:
    """Write a picture from each camera, with its pose and intrinsics.

    Args:
        path: A new or empty folder.
        scene: With its cameras, e.g. from ``orbit``.
        samples: As in `render`.

    Returns:
        The file ``transforms.json``.

    Raises:
        UserError: If the folder holds something already, or cameras differ in size or angle.
    """
    first = scene.cameras[0]
    if any((c.width, c.height, c.fov) != (first.width, first.height, first.fov) for c in scene.cameras):
        raise UserError("transforms.json has one size and angle for all cameras, and those of the scene differ")
    folder = new_folder(path)
    (folder / "images").mkdir()
    frames = []
    for place, camera in enumerate(scene.cameras):
        file = f"images/{place:04}.png"
        save_image(folder / file, render(scene, camera, samples=samples).image[0])
        frames.append({"file_path": file, "transform_matrix": (camera.pose @ OPENGL).tolist()})
    focal = first.focal
    about = {
        "camera_angle_x": 2 * float(torch.atan(torch.tensor(first.width / 2 / focal))),
        "fl_x": focal,
        "fl_y": focal,
        "cx": first.width / 2,
        "cy": first.height / 2,
        "w": first.width,
        "h": first.height,
    }
    transforms = folder / "transforms.json"
    transforms.write_text(json.dumps({**about, "frames": frames}, indent=1), "utf-8")
    return transforms
