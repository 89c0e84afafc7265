"""A spinning LiDAR: rings of beams, with dropouts and noise."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.errors import UserError
from paperworks.worlds.cast import Things, normals, trace
from paperworks.worlds.scene import Scene, Vector

REFLECTIVITY = torch.tensor([0.5, 0.7, 0.95])
"""Of matte, glossy and metal things; the ground's is 0.2."""


@dataclass(frozen=True)
class Lidar:
    """The sensor.

    Attributes:
        position: Where it stands.
        rings: Beams from the lowest to the highest angle.
        steps: Shots a turn.
        elevation: Lowest and highest angle, in degrees.
        reach: Metres; what is farther gives no return.
        dropout: Chance that a return is lost.
        noise: Standard deviation of the measured distance, in metres.
    """

    position: Vector = (0.0, 0.0, 1.8)
    rings: int = 32
    steps: int = 720
    elevation: tuple[float, float] = (-30.0, 10.0)
    reach: float = 50.0
    dropout: float = 0.05
    noise: float = 0.02

    def __post_init__(self) -> None:
        if self.rings < 1 or self.steps < 1:
            raise UserError(f"rings and steps must be at least 1, got {self.rings} and {self.steps}")
        if not -90 < self.elevation[0] <= self.elevation[1] < 90:
            raise UserError(f"elevation must be the lowest and highest angle within ±90°, got {self.elevation}")
        if not 0 <= self.dropout < 1 or self.noise < 0 or self.reach <= 0:
            raise UserError(
                f"dropout must be in [0, 1), noise at least 0 and reach above 0, got {self.dropout}, {self.noise}, "
                f"{self.reach}"
            )

    def directions(self) -> Float[Tensor, "beams 3"]:
        """Unit directions, ring by ring from the lowest, anticlockwise from the x axis."""
        low, high = (math.radians(angle) for angle in self.elevation)
        up = torch.linspace(low, high, self.rings)
        around = torch.arange(self.steps) * (2 * math.pi / self.steps)
        up, around = torch.meshgrid(up, around, indexing="ij")
        return torch.stack([up.cos() * around.cos(), up.cos() * around.sin(), up.sin()], -1).view(-1, 3)


@dataclass(frozen=True)
class PointCloud:
    """The returns.

    Attributes:
        points: In the world.
        intensity: Reflectivity by the cosine of the angle at which the beam meets the surface, in [0, 1].
        ring: Which beam, from the lowest.
        instance: The thing, −1 for the ground.
    """

    points: Float[Tensor, "returns 3"]
    intensity: Float[Tensor, " returns"]
    ring: Int[Tensor, " returns"]
    instance: Int[Tensor, " returns"]

    def __len__(self) -> int:
        return len(self.points)

    def kitti(self) -> Float[Tensor, "returns 4"]:
        """x, y, z and intensity: the rows of a KITTI ``.bin`` file."""
        return torch.cat([self.points, self.intensity[:, None]], 1)


@torch.no_grad()
def scan(scene: Scene, lidar: Lidar | None = None, *, seed: int = 0) -> PointCloud:
    """One turn of a LiDAR in a scene; ``seed`` decides dropouts and noise."""
    lidar = lidar or Lidar()
    things, directions = Things.of([scene]), lidar.directions()
    origin = torch.tensor([lidar.position])
    ground = -lidar.position[2] / directions[:, 2]
    ground = ground.masked_fill(ground <= 0, torch.inf)
    distance, nearest = torch.cat([ground[None], trace(things, origin, directions[None])[0]]).min(0)
    draw = torch.Generator().manual_seed(seed)
    lost = torch.rand(len(distance), generator=draw) < lidar.dropout
    wobble = lidar.noise * torch.randn(len(distance), generator=draw)
    kept = ((distance <= lidar.reach) & ~lost).nonzero()[:, 0]
    heading, met, owner = directions[kept], nearest[kept] - 1, (nearest[kept] - 1).clamp(min=0)
    normal = torch.tensor([0.0, 0.0, 1.0]).expand(len(kept), 3)
    reflectivity = torch.full((len(kept),), 0.2)
    if scene.things:
        surface = origin + distance[kept, None] * heading
        solid = met >= 0
        normal = normals(things, surface, owner).where(solid[:, None], normal)
        reflectivity = REFLECTIVITY[things.material[0, owner]].where(solid, reflectivity)
    return PointCloud(
        points=origin + (distance[kept] + wobble[kept])[:, None] * heading,
        intensity=reflectivity * (normal * heading).sum(1).abs().clamp(max=1),
        ring=kept // lidar.steps,
        instance=met,
    )
