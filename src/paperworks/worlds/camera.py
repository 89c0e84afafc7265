"""What cameras see: colour, depth, masks and boxes, for many scenes at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from paperworks.errors import UserError
from paperworks.worlds.cast import Things, blocked, normals, trace
from paperworks.worlds.scene import Camera, Scene

HORIZON = 60.0
"""Metres; the ground ends there."""
_SHINE = torch.tensor([0.0, 0.35, 0.6])  # of matte, glossy and metal things


@dataclass(frozen=True)
class Views:
    """One picture of each of several scenes, and all that is known of it. Things are in the order of their scene.

    Attributes:
        image: RGB in [0, 1].
        depth: Along the optical axis, in metres; ``inf`` in the sky.
        instances: The thing that each pixel shows, −1 for ground and sky.
        amodal: For each thing, the pixels that it would cover if it stood alone. Scenes with fewer things than the
            most have empty masks at the end.
        shapes: Each thing's shape as its place in ``SHAPES``, −1 where there is none.
    """

    image: Float[Tensor, "scenes 3 height width"]
    depth: Float[Tensor, "scenes height width"]
    instances: Int[Tensor, "scenes height width"]
    amodal: Bool[Tensor, "scenes things height width"]
    shapes: Int[Tensor, "scenes things"]

    @property
    def modal(self) -> Bool[Tensor, "scenes things height width"]:
        """The pixels where each thing is seen."""
        return self.instances[:, None] == torch.arange(self.amodal.shape[1])[:, None, None]

    @property
    def semantic(self) -> Int[Tensor, "scenes height width"]:
        """1 + the place of the shape in ``SHAPES``; 0 for ground and sky."""
        table = F.pad(self.shapes + 1, (0, 1))  # an instance of -1 finds the 0 at the end
        return table.gather(1, self.instances.flatten(1) % table.shape[1]).view_as(self.instances)

    @property
    def visible(self) -> Float[Tensor, "scenes things"]:
        """The share of each thing's pixels that is seen; 0 out of the picture."""
        whole = self.amodal.sum((-2, -1))
        return self.modal.sum((-2, -1)) / whole.clamp(min=1)

    def boxes(self, *, amodal: bool = False) -> Float[Tensor, "scenes things 4"]:
        """The boxes ``x1, y1, x2, y2`` of the masks in pixel edges, so that one pixel has extent 1; zeros if empty."""
        return mask_boxes(self.amodal if amodal else self.modal)


def mask_boxes(masks: Bool[Tensor, "*n height width"]) -> Float[Tensor, "*n 4"]:
    """The smallest box of each mask, as ``Views.boxes``."""
    sides = []
    for lines in (masks.any(-2), masks.any(-1)):
        first = lines.to(torch.uint8).argmax(-1)
        last = lines.shape[-1] - lines.flip(-1).to(torch.uint8).argmax(-1)
        sides.append((first, torch.where(lines.any(-1), last, 0)))
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], -1).float()


@torch.no_grad()
def render(
    scenes: Scene | Sequence[Scene],
    cameras: Camera | Sequence[Camera] | None = None,
    *,
    shadows: bool = True,
    samples: int = 1,
) -> Views:
    """Draw scenes by casting a ray through the centre of each pixel.

    Args:
        scenes: One or several.
        cameras: One for all, or one a scene, of equal sizes; by default each scene's first.
        shadows: Of the first light.
        samples: Draw the image this many times as large each way and average, for smooth edges. Depth, masks and
            boxes stay those of the pixels' centres.

    Raises:
        UserError: If there is no scene, or cameras differ in number or size.
    """
    scenes = [scenes] if isinstance(scenes, Scene) else list(scenes)
    if not scenes:
        raise UserError("render needs at least one scene")
    if cameras is None:
        cameras = [scene.cameras[0] for scene in scenes]
    cameras = [cameras] * len(scenes) if isinstance(cameras, Camera) else list(cameras)
    sizes = {(camera.height, camera.width) for camera in cameras}
    if len(cameras) != len(scenes) or len(sizes) != 1:
        raise UserError(
            f"cameras must be one a scene and equally large, got {len(cameras)} for {len(scenes)} scenes of sizes "
            f"{', '.join(f'{w}x{h}' for h, w in sorted(sizes))}"
        )
    if samples < 1:
        raise UserError(f"samples must be at least 1, got {samples}")
    height, width = sizes.pop()
    things = Things.of(scenes)
    hit = fine = _cast(things, cameras)
    if samples > 1:
        fine = _cast(things, [camera.at(samples * width, samples * height) for camera in cameras])
    image = _shade(things, scenes, fine, shadows)
    image = image.view(len(scenes), samples * height, samples * width, 3).movedim(-1, 1)
    return Views(
        image=F.avg_pool2d(image, samples) if samples > 1 else image.contiguous(),
        depth=hit.depth.view(-1, height, width),
        instances=hit.instance.view(-1, height, width),
        amodal=hit.distances.isfinite().view(*things.radius.shape, height, width),
        shapes=things.shape.masked_fill(things.radius < 0, -1),
    )


def rays(camera: Camera) -> Float[Tensor, "pixels 3"]:
    """Unit directions in the world through the centres of the pixels, row by row."""
    x, y = torch.meshgrid(torch.arange(camera.width) + 0.5, torch.arange(camera.height) + 0.5, indexing="xy")
    local = torch.stack([x - camera.width / 2, y - camera.height / 2, torch.full_like(x, camera.focal)], -1)
    return F.normalize(local.view(-1, 3) @ camera.rotation.T, dim=1)


@dataclass(frozen=True)
class _Hit:
    """What each ray meets first; ``distances`` are those to every thing."""

    origin: Tensor
    directions: Tensor
    distances: Tensor
    distance: Tensor
    instance: Tensor
    depth: Tensor


def _cast(things: Things, cameras: Sequence[Camera]) -> _Hit:
    origin = torch.tensor([camera.position for camera in cameras])
    directions = torch.stack([rays(camera) for camera in cameras])
    ground = -origin[:, 2:] / directions[..., 2]
    ground = ground.masked_fill((ground <= 0) | (ground > HORIZON), torch.inf)
    distances = trace(things, origin, directions)
    nearest = torch.cat([ground[:, None], distances], 1).min(1)
    forward = torch.stack([camera.rotation[:, 2] for camera in cameras])
    along = (directions @ forward[..., None])[..., 0]
    return _Hit(origin, directions, distances, nearest.values, nearest.indices - 1, nearest.values * along)


def _shade(things: Things, scenes: Sequence[Scene], hit: _Hit, shadows: bool) -> Float[Tensor, "scenes pixels 3"]:
    """Ambient light, Lambert's law, Blinn and Phong's highlight, shadows of the first light, fog."""
    count = things.radius.shape[1]
    seen, solid = hit.distance.isfinite(), hit.instance >= 0
    reach = hit.distance.where(seen, torch.zeros(()))
    points = hit.origin[:, None] + reach[..., None] * hit.directions
    normal = torch.tensor([0.0, 0.0, 1.0]).expand_as(points).clone()
    colour = _ground(scenes, points)
    shine = torch.zeros_like(reach)
    tint = torch.ones_like(points)
    scene, ray = solid.nonzero(as_tuple=True)
    if len(scene):
        owner = scene * count + hit.instance[scene, ray]
        own = things.colour.view(-1, 3)[owner]
        material = things.material.view(-1)[owner]
        normal[scene, ray], colour[scene, ray] = normals(things, points[scene, ray], owner), own
        shine[scene, ray] = _SHINE[material]
        tint[scene, ray] = own.where((material == 2)[:, None], torch.ones(()))
    ambient = torch.tensor([scene.ambient for scene in scenes])[:, None, None]
    image = ambient * colour
    for place in range(max(len(scene.lights) for scene in scenes)):
        lights = [scene.lights[place] if place < len(scene.lights) else None for scene in scenes]
        position = torch.tensor([light.position if light else (0.0, 0.0, 1.0) for light in lights])
        power = torch.tensor([[light.intensity * c for c in light.colour] if light else [0.0] * 3 for light in lights])
        to_light = F.normalize(position[:, None] - points, dim=-1)
        facing = (normal * to_light).sum(-1)
        lit = seen & (facing > 0)
        if shadows and place == 0:
            lit = lit & ~blocked(things, position, points, lit)
        between = F.normalize(to_light - hit.directions, dim=-1)
        highlight = shine * (normal * between).sum(-1).clamp(min=0).pow(40)
        share = (1 - ambient) * colour * facing.clamp(min=0)[..., None] + highlight[..., None] * tint
        image = image + power[:, None] * share * lit[..., None]
    sky = torch.tensor([scene.sky for scene in scenes])[:, None]
    clear = torch.exp(-torch.tensor([scene.fog for scene in scenes])[:, None] * reach) * seen
    return torch.lerp(sky, image, clear[..., None]).clamp(0, 1)


def _ground(scenes: Sequence[Scene], points: Tensor) -> Tensor:
    """A chequer of one metre, so that the ground shows depth."""
    colour = torch.tensor([scene.ground for scene in scenes])[:, None].expand_as(points)
    dark = points[..., :2].floor().sum(-1).remainder(2) == 1
    return torch.where(dark[..., None], 0.88 * colour, colour)
