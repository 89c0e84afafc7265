"""Casts rays from a point into scenes: which thing each ray meets, and where.

A ray is tested against the ball around each thing, all rays with all things in one matrix product. Those that pass
step along the ray by the signed distance (sphere tracing, Hart 1996), in the thing's own frame, solids of one shape
together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperworks.worlds.scene import COLOURS, Scene
from paperworks.worlds.solids import SHAPES, SOLIDS, Solid

TOLERANCE = 1e-4
"""Metres from the surface at which a ray has met it."""
STEPS = 64
"""After as many steps a ray that only grazes counts as a miss."""
_MATERIALS = ("matte", "glossy", "metal")


@dataclass(frozen=True)
class Things:
    """The things of several scenes as tensors; where a scene has fewer than the most, rows are empty (radius < 0)."""

    centre: Float[Tensor, "scenes things 3"]
    half: Float[Tensor, "scenes things 3"]
    yaw: Float[Tensor, "scenes things"]
    radius: Float[Tensor, "scenes things"]
    shape: Int[Tensor, "scenes things"]
    colour: Float[Tensor, "scenes things 3"]
    material: Int[Tensor, "scenes things"]

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> "Things":
        """Gather them."""
        most = max((len(scene.things) for scene in scenes), default=0)
        table = torch.zeros(len(scenes), most, 13)
        table[..., 7] = -1.0
        for row, scene in zip(table, scenes, strict=True):
            for at, thing in enumerate(scene.things):
                numbers = [*thing.position, *(extent / 2 for extent in thing.size), thing.yaw, thing.radius]
                numbers += [SHAPES.index(thing.shape), *COLOURS[thing.colour], _MATERIALS.index(thing.material)]
                row[at] = torch.tensor(numbers)
        return cls(
            centre=table[..., :3],
            half=table[..., 3:6],
            yaw=table[..., 6],
            radius=table[..., 7],
            shape=table[..., 8].long(),
            colour=table[..., 9:12],
            material=table[..., 12].long(),
        )

    def into(self, vectors: Float[Tensor, "n 3"], owner: Int[Tensor, " n"]) -> Float[Tensor, "n 3"]:
        """World directions in the frames of their owners, which are flat indices."""
        return _turn(vectors, -self.yaw.view(-1)[owner])

    def out_of(self, vectors: Float[Tensor, "n 3"], owner: Int[Tensor, " n"]) -> Float[Tensor, "n 3"]:
        """And back."""
        return _turn(vectors, self.yaw.view(-1)[owner])


def trace(
    things: Things, origin: Float[Tensor, "scenes 3"], directions: Float[Tensor, "scenes rays 3"]
) -> Float[Tensor, "scenes things rays"]:
    """The distance along each ray to each thing, ``inf`` where they do not meet; directions have length 1."""
    scenes, count, rays = *things.radius.shape, directions.shape[1]
    found = torch.full((scenes, count, rays), torch.inf)
    if not found.numel():
        return found
    to_centre = things.centre - origin[:, None]
    along = to_centre @ directions.transpose(1, 2)  # distance to the point nearest to the centre
    reach = things.radius.square().copysign(things.radius) - to_centre.square().sum(-1)
    inside = along.square() + reach[..., None]  # square of half the way through the ball
    scene, thing, ray = ((inside > 0) & (along > -things.radius[..., None])).nonzero(as_tuple=True)
    owner = scene * count + thing
    middle, half_way = along[scene, thing, ray], inside[scene, thing, ray].sqrt()
    start = things.into(-to_centre.view(-1, 3)[owner], owner)
    heading = things.into(directions[scene, ray], owner)
    near, far = (middle - half_way).clamp(min=0), middle + half_way
    half, shape = things.half.view(-1, 3)[owner], things.shape.view(-1)[owner]
    distance = torch.full_like(near, torch.inf)
    for kind, solid in enumerate(SOLIDS):
        mine = (shape == kind).nonzero()[:, 0]
        if len(mine):
            distance[mine] = _march(solid, start[mine], heading[mine], half[mine], near[mine], far[mine])
    found[scene, thing, ray] = distance
    return found


def normals(things: Things, points: Float[Tensor, "n 3"], owner: Int[Tensor, " n"]) -> Float[Tensor, "n 3"]:
    """Outward unit normals at surface points of their owners: the slope of the distance, from four corners."""
    local = things.into(points - things.centre.view(-1, 3)[owner], owner)
    half, shape = things.half.view(-1, 3)[owner], things.shape.view(-1)[owner]
    corners = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    slope = torch.zeros_like(local)
    for kind, solid in enumerate(SOLIDS):
        mine = (shape == kind).nonzero()[:, 0]
        if len(mine):
            around = local[mine, None] + 1e-3 * corners
            extents = half[mine, None].expand_as(around)
            height = solid(around.reshape(-1, 3), extents.reshape(-1, 3)).view(-1, 4, 1)
            slope[mine] = (height * corners).sum(1)
    return torch.nn.functional.normalize(things.out_of(slope, owner), dim=1)


def blocked(
    things: Things,
    light: Float[Tensor, "scenes 3"],
    points: Float[Tensor, "scenes rays 3"],
    lit: Bool[Tensor, "scenes rays"],
) -> Bool[Tensor, "scenes rays"]:
    """Whether something stands between the light and each point. Points that are not ``lit`` anyway are left out."""
    way = points - light[:, None]
    length = way.norm(dim=-1, keepdim=True)
    # A direction of length 0 meets nothing but what the light is in.
    directions = torch.where(lit[..., None], way / length, torch.tensor([0.0, 0.0, 1.0]))
    nearest = trace(things, light, directions)
    return lit & (nearest < length[..., 0][:, None] - 0.01).any(1)


def _march(solid: Solid, start: Tensor, heading: Tensor, half: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """Sphere tracing; rays that met the solid or left the ball are taken out as it goes."""
    met_at, ray, at = torch.full_like(near, torch.inf), torch.arange(len(near)), near
    for _ in range(STEPS):
        gap = solid(start + at[:, None] * heading, half)
        met = gap < TOLERANCE
        met_at[ray[met]] = at[met]
        at = at + gap
        going = ~met & (at < far)
        if not going.all():
            ray, at, far = ray[going], at[going], far[going]
            start, heading, half = start[going], heading[going], half[going]
        if not len(ray):
            break
    return met_at


def _turn(vectors: Tensor, angle: Tensor) -> Tensor:
    """About the vertical axis, anticlockwise from above."""
    cos, sin = angle.cos(), angle.sin()
    x, y, z = vectors.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1)
