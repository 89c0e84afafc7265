"""A scene is data: things on the ground, lights, cameras. It is made by seed, saved as JSON and drawn by the sensors.

Right-handed world, in metres: x and y along the ground, z up, the ground at z = 0.
"""

import math
from pathlib import Path
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from paperworks.errors import UserError

Shape = Literal["box", "sphere", "cylinder", "cone", "torus", "capsule"]
Material = Literal["matte", "glossy", "metal"]
Vector = tuple[float, float, float]
RGB = tuple[
    Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]
]

COLOURS: dict[str, RGB] = {
    "red": (0.82, 0.16, 0.14),
    "green": (0.16, 0.62, 0.26),
    "blue": (0.15, 0.35, 0.85),
    "yellow": (0.93, 0.80, 0.15),
    "purple": (0.55, 0.22, 0.70),
    "cyan": (0.16, 0.72, 0.76),
    "orange": (0.95, 0.50, 0.12),
    "grey": (0.55, 0.56, 0.58),
}
"""The colours that things have, by the name that sentences use."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Thing(_Data):
    """A coloured solid.

    Attributes:
        shape: Its form, upright: the axis of a cylinder, cone, torus or capsule is vertical.
        size: Extents along its own x, y and z, in metres. Round shapes are as wide as deep; a capsule is at least as
            high as wide, and a torus at most half as high as wide.
        colour: A name in ``COLOURS``.
        material: ``matte`` scatters light; ``glossy`` and ``metal`` also have a highlight, white or of their colour.
        position: Its centre.
        yaw: Turn about the vertical axis, radians, anticlockwise from above.
    """

    shape: Shape
    size: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    colour: str
    material: Material = "matte"
    position: Vector
    yaw: float = 0.0

    def model_post_init(self, _: object) -> None:
        x, y, z = self.size
        if self.colour not in COLOURS:
            raise ValueError(f"unknown colour {self.colour!r}; choose from {', '.join(COLOURS)}")
        if self.shape != "box" and not math.isclose(x, y):
            raise ValueError(f"a {self.shape} is as wide as deep, got size {self.size}")
        if self.shape == "sphere" and not math.isclose(x, z):
            raise ValueError(f"a sphere has one extent, got size {self.size}")
        if self.shape == "capsule" and z < x:
            raise ValueError(f"a capsule is at least as high as wide, got size {self.size}")
        if self.shape == "torus" and 2 * z > x:
            raise ValueError(f"a torus is at most half as high as wide, got size {self.size}")

    @property
    def radius(self) -> float:
        """Of the ball about its centre that holds it."""
        x, y, z = (extent / 2 for extent in self.size)
        if self.shape == "box":
            return math.sqrt(x * x + y * y + z * z)
        return {"sphere": x, "cylinder": math.hypot(x, z), "cone": math.hypot(x, z), "torus": x, "capsule": z}[
            self.shape
        ]

    @property
    def footprint(self) -> float:
        """Radius of the circle on the ground that holds it."""
        x, y, _ = self.size
        return math.hypot(x, y) / 2 if self.shape == "box" else x / 2


class Light(_Data):
    """A lamp at a point; its light does not fade with distance."""

    position: Vector
    colour: RGB = (1.0, 1.0, 1.0)
    intensity: float = Field(default=1.0, ge=0)


class Camera(_Data):
    """A pinhole camera, with the axes of OpenCV: x right, y down, z forward.

    Attributes:
        position: Its centre.
        target: The point in the middle of its picture.
        fov: Vertical angle of view, in degrees.
        width: Pixels across.
        height: Pixels down.
        name: For exports.
    """

    position: Vector
    target: Vector = (0.0, 0.0, 0.3)
    fov: float = Field(default=45.0, gt=0, lt=180)
    width: int = Field(default=64, ge=1)
    height: int = Field(default=64, ge=1)
    name: str = "camera"

    def model_post_init(self, _: object) -> None:
        if math.dist(self.position[:2], self.target[:2]) < 1e-9:
            raise ValueError("a camera must not look straight up or down; move position or target")

    @property
    def focal(self) -> float:
        """Focal length in pixels, the same both ways."""
        return self.height / 2 / math.tan(math.radians(self.fov) / 2)

    @property
    def intrinsics(self) -> Float[Tensor, "3 3"]:
        """$K$: a point $(x, y, z)$ before the camera falls on pixel coordinates $K (x, y, z)^T / z$.

        Pixel (i, j) covers [j, j+1) × [i, i+1), so that its centre is at (j + ½, i + ½).
        """
        return torch.tensor([[self.focal, 0, self.width / 2], [0, self.focal, self.height / 2], [0, 0, 1.0]])

    @property
    def rotation(self) -> Float[Tensor, "3 3"]:
        """Camera to world: its columns are the camera's axes."""
        forward = torch.tensor(self.target, dtype=torch.float64) - torch.tensor(self.position, dtype=torch.float64)
        forward = forward / forward.norm()
        right = torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
        right = right / right.norm()
        return torch.stack([right, torch.linalg.cross(forward, right), forward], 1).float()

    @property
    def pose(self) -> Float[Tensor, "4 4"]:
        """Camera to world, homogeneous."""
        pose = torch.eye(4)
        pose[:3, :3], pose[:3, 3] = self.rotation, torch.tensor(self.position)
        return pose

    def project(self, points: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3"]:
        """World points as pixel coordinates x and y, and depth along the optical axis (negative: behind)."""
        local = (points - torch.tensor(self.position)) @ self.rotation
        pixels = local @ self.intrinsics.T
        return torch.cat([pixels[..., :2] / local[..., 2:], local[..., 2:]], -1)

    def at(self, width: int, height: int) -> "Camera":
        """The same view with other pixels."""
        return self.model_copy(update={"width": width, "height": height})


class Scene(_Data):
    """Things, lights and cameras, and what is around them.

    Attributes:
        things: What stands there; sensors name them by their place in this list.
        lights: The first one casts shadows.
        cameras: Any number of calibrated cameras.
        ground: Colour of the ground, a chequer of it and a shade of it.
        sky: Colour where nothing is.
        ambient: Share of light that comes from everywhere.
        fog: Per metre: light is lost to the sky's colour as ``exp(-fog · distance)``.
    """

    things: tuple[Thing, ...]
    lights: tuple[Light, ...] = Field(default=(Light(position=(-13.0, -16.0, 28.0)),), min_length=1)
    cameras: tuple[Camera, ...] = Field(default=(Camera(position=(0.0, -6.0, 3.5)),), min_length=1)
    ground: RGB = (0.62, 0.60, 0.57)
    sky: RGB = (0.74, 0.82, 0.92)
    ambient: float = Field(default=0.35, ge=0, le=1)
    fog: float = Field(default=0.0, ge=0)

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Scene":
        """Read JSON.

        Raises:
            UserError: If it is not a scene; the message says where.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path} is no scene: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error

    def boxes3d(self) -> Float[Tensor, "things 7"]:
        """Every thing's box: centre x, y, z, extents along its own x, y, z, and yaw."""
        rows = [[*thing.position, *thing.size, thing.yaw] for thing in self.things]
        return torch.tensor(rows).view(-1, 7)


def corners(boxes: Float[Tensor, "n 7"]) -> Float[Tensor, "n 8 3"]:
    """The corners of boxes of ``Scene.boxes3d``; those below come first, anticlockwise from above."""
    unit = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=boxes.dtype)
    unit = torch.cat([torch.cat([unit, torch.full((4, 1), z)], 1) for z in (-1.0, 1.0)])
    local = unit * boxes[:, None, 3:6] / 2
    cos, sin = boxes[:, 6:7].cos(), boxes[:, 6:7].sin()
    turned = [cos * local[..., 0] - sin * local[..., 1], sin * local[..., 0] + cos * local[..., 1], local[..., 2]]
    return torch.stack(turned, -1) + boxes[:, None, :3]
