"""The flat mode: shapes in the plane, a hundred times as fast as casting rays, for detectors and few-shot tasks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from paperworks.errors import UserError
from paperworks.worlds.camera import mask_boxes

Inside = Callable[[Tensor, Tensor], Tensor]
"""Which points (u, v), v down, of a plane whose unit is the shape's radius lie in it."""


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return (v <= 0.5) & (v >= 3**0.5 * u.abs() - 1)


def _star(u: Tensor, v: Tensor) -> Tensor:
    """Five points: within at least four of the five half-planes whose edges are its lines."""
    count = torch.zeros_like(u)
    for k in range(5):
        angle = 2 * np.pi * k / 5 + np.pi / 2
        count = count + (np.cos(angle) * u + np.sin(angle) * v <= np.cos(2 * np.pi / 5))
    return (count >= 4) & (u.square() + v.square() <= 1)


FLAT_SHAPES: dict[str, Inside] = {
    "disc": lambda u, v: u.square() + v.square() <= 1,
    "square": lambda u, v: u.abs().maximum(v.abs()) <= 0.7,
    "triangle": _triangle,
    "cross": lambda u, v: (u.abs().minimum(v.abs()) <= 0.3) & (u.abs().maximum(v.abs()) <= 0.95),
    "ring": lambda u, v: (u.square() + v.square() <= 1) & (u.square() + v.square() >= 0.3),
    "bar": lambda u, v: (u.abs() <= 0.95) & (v.abs() <= 0.3),
    "star": _star,
    "ell": lambda u, v: (u.abs().maximum(v.abs()) <= 0.7) & ((u <= -0.2) | (v >= 0.2)),
    "diamond": lambda u, v: u.abs() / 0.65 + v.abs() <= 1,
    "half-disc": lambda u, v: (u.square() + v.square() <= 1) & (v <= 0),
    "hexagon": lambda u, v: (u.abs() * 0.5 + v.abs() * 3**0.5 / 2).maximum(u.abs()) <= 0.85,
    "tee": lambda u, v: (u.abs().maximum(v.abs()) <= 0.7) & ((v <= -0.25) | (u.abs() <= 0.25)),
}
"""Each fits into the disc of radius 1."""


@dataclass(frozen=True)
class FlatScenes:
    """Pictures with what they show; the things of one picture follow one another, those behind first.

    Attributes:
        images: RGB in [0, 1].
        image: The picture of each thing.
        labels: Its shape, as its place in ``FLAT_SHAPES``.
        boxes: Around its whole (amodal) shape, as x1, y1, x2, y2 in pixel edges.
        masks: Its visible (modal) pixels.
    """

    images: Float[Tensor, "images 3 size size"]
    image: Int64[Tensor, " things"]
    labels: Int64[Tensor, " things"]
    boxes: Float[Tensor, "things 4"]
    masks: Bool[Tensor, "things size size"]

    def __len__(self) -> int:
        return len(self.images)


def flat_scenes(
    count: int,
    *,
    size: int = 64,
    classes: int = 12,
    objects: tuple[int, int] = (1, 4),
    radius: tuple[float, float] = (6.0, 14.0),
    rotate: bool = True,
    noise: float = 0.03,
    seed: int = 0,
) -> FlatScenes:
    """Draw pictures of coloured shapes on noisy gradients.

    Things overlap by at most a fifth of the smaller one's box; where no place is found for one, the picture has one
    less.

    Args:
        count: Pictures.
        size: Pixels a side.
        classes: The first so many of ``FLAT_SHAPES``.
        objects: Fewest and most things a picture.
        radius: Smallest and largest, in pixels.
        rotate: Turn each thing by any angle.
        noise: Standard deviation of each pixel.
        seed: Decides everything.

    Raises:
        UserError: If an argument is out of range, or the largest thing does not fit into the picture.
    """
    if count < 1:
        raise UserError(f"count must be at least 1, got {count}")
    if not 1 <= classes <= len(FLAT_SHAPES):
        raise UserError(f"classes must be 1 to {len(FLAT_SHAPES)}, got {classes}")
    if not 0 <= objects[0] <= objects[1] or objects[1] < 1:
        raise UserError(f"objects must be the fewest and most things, got {objects}")
    if not 1 <= radius[0] <= radius[1] <= size / 2:
        raise UserError(f"radius must be from 1 to half of size {size}, got {radius}")
    draw = np.random.default_rng(seed)
    image, radii, centres = _places(draw, count, size, objects, radius)
    things = len(image)
    labels = torch.from_numpy(draw.integers(classes, size=things))
    turn = torch.from_numpy(draw.uniform(0, 2 * np.pi, things) * rotate).float()
    amodal = _silhouettes(labels, radii, centres, turn, size)
    images = _backgrounds(draw, count, size)
    colours = torch.from_numpy(_colours(draw, things)).float()
    masks = amodal.clone()
    order = torch.arange(things)
    first = torch.searchsorted(image, torch.arange(count))
    for depth in range(objects[1]):  # the k-th thing of every picture at once: it covers those before it
        mine = order[(order - first[image]) == depth]
        where = amodal[mine]
        images[image[mine]] = torch.where(where[:, None], colours[mine, :, None, None], images[image[mine]])
        for back in range(1, depth + 1):
            masks[mine - back] &= ~where
    grain = torch.from_numpy(draw.standard_normal((count, 3, size, size), dtype=np.float32))
    return FlatScenes((images + noise * grain).clamp_(0, 1), image, labels, mask_boxes(amodal), masks)


def _places(
    draw: np.random.Generator, count: int, size: int, objects: tuple[int, int], radius: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The picture, radius and centre of each thing."""
    rows: list[tuple[int, float, float, float]] = []
    wanted = draw.integers(objects[0], objects[1] + 1, count)
    tries = draw.uniform(size=(count, objects[1], 20, 3)).tolist()
    for picture in range(count):
        taken: list[tuple[float, float, float]] = []
        for thing in range(wanted[picture]):
            for a, b, c in tries[picture][thing]:
                r = radius[0] + a * (radius[1] - radius[0])
                x, y = r + b * (size - 2 * r), r + c * (size - 2 * r)
                if all(_overlap(x, y, r, *other) <= 0.2 for other in taken):
                    taken.append((x, y, r))
                    rows.append((picture, r, x, y))
                    break
    table = torch.tensor(rows).view(-1, 4)
    return table[:, 0].long(), table[:, 1], table[:, 2:]


def _overlap(x: float, y: float, r: float, other_x: float, other_y: float, other_r: float) -> float:
    """Of the squares around two discs, as a share of the smaller one."""
    smaller = min(r, other_r)
    across, down = (min(max(r + other_r - abs(d), 0.0), 2 * smaller) for d in (x - other_x, y - other_y))
    return across * down / (4 * smaller * smaller)


def _silhouettes(
    labels: Tensor, radii: Tensor, centres: Tensor, turn: Tensor, size: int
) -> Bool[Tensor, "things size size"]:
    at = torch.arange(size) + 0.5
    x = ((at - centres[:, :1]) / radii[:, None])[:, None, :]
    y = ((at - centres[:, 1:]) / radii[:, None])[:, :, None]
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    masks = torch.zeros(len(labels), size, size, dtype=torch.bool)
    for kind, inside in enumerate(FLAT_SHAPES.values()):
        mine = (labels == kind).nonzero()[:, 0]
        if len(mine):
            u, v = cos[mine] * x[mine] + sin[mine] * y[mine], cos[mine] * y[mine] - sin[mine] * x[mine]
            masks[mine] = inside(u, v)
    return masks


def _backgrounds(draw: np.random.Generator, count: int, size: int) -> Tensor:
    """A gradient from one pale colour to another, in any direction."""
    ends = torch.from_numpy(draw.uniform(0.55, 0.95, (2, count, 3))).float()
    angle = torch.from_numpy(draw.uniform(0, 2 * np.pi, (count, 1, 1))).float()
    at = torch.linspace(-0.5, 0.5, size)
    share = (0.5 + (angle.cos() * at + angle.sin() * at[:, None]) / 2**0.5)[:, None]
    return torch.lerp(ends[0, :, :, None, None], ends[1, :, :, None, None], share)


def _colours(draw: np.random.Generator, count: int) -> np.ndarray:
    """Strong ones: one channel high, one low."""
    rows = np.stack([draw.uniform(0.65, 0.95, count), draw.uniform(0, 0.3, count), draw.uniform(0, 0.75, count)], 1)
    return draw.permuted(rows, axis=1)
