"""Signed distances of the solids in their own frame: negative inside, zero on the surface, exact outside.

``p`` is ``[n, 3]``, ``half`` the half extents ``[n, 3]`` along x, y and z.
"""

from collections.abc import Callable
from typing import get_args

from jaxtyping import Float
from torch import Tensor

from paperworks.worlds.scene import Shape

Points = Float[Tensor, "n 3"]
Distances = Float[Tensor, " n"]
Solid = Callable[[Tensor, Tensor], Tensor]


def box(p: Points, half: Points) -> Distances:
    """$|\\max(q, 0)| + \\min(\\max_k q_k, 0)$ with $q = |p| - h$."""
    q = p.abs() - half
    return q.clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0)


def sphere(p: Points, half: Points) -> Distances:
    """$|p| - r$."""
    return p.norm(dim=1) - half[:, 0]


def cylinder(p: Points, half: Points) -> Distances:
    """A rectangle in the plane of the distance from the axis and the height."""
    across, along = p[:, :2].norm(dim=1) - half[:, 0], p[:, 2].abs() - half[:, 2]
    outside = (across.clamp(min=0).square() + along.clamp(min=0).square()).sqrt()
    return outside + across.maximum(along).clamp(max=0)


def cone(p: Points, half: Points) -> Distances:
    """A right triangle in that plane: its tip at the top, on the axis."""
    radius, height = half[:, 0], 2 * half[:, 2]
    across, up = p[:, :2].norm(dim=1), p[:, 2] + half[:, 2]  # above the base
    # Along the slant from the rim (radius, 0) to the tip (0, height).
    share = ((radius - across) * radius + up * height) / (radius.square() + height.square())
    share = share.clamp(0, 1)
    to_slant = ((across - radius * (1 - share)).square() + (up - height * share).square()).sqrt()
    to_base = ((across - radius).clamp(min=0).square() + up.square()).sqrt()
    inside = (up > 0) & (across * height < radius * (height - up))
    distance = to_slant.minimum(to_base)
    return distance.where(~inside, -distance)


def torus(p: Points, half: Points) -> Distances:
    """A disc of half the height, turned about the axis."""
    tube = half[:, 2]
    return ((p[:, :2].norm(dim=1) - (half[:, 0] - tube)).square() + p[:, 2].square()).sqrt() - tube


def capsule(p: Points, half: Points) -> Distances:
    """What is within a radius of an upright stretch."""
    stretch = half[:, 2] - half[:, 0]
    z = p[:, 2] - p[:, 2].maximum(-stretch).minimum(stretch)
    return (p[:, :2].square().sum(1) + z.square()).sqrt() - half[:, 0]


SHAPES: tuple[Shape, ...] = get_args(Shape)
SOLIDS: tuple[Solid, ...] = (box, sphere, cylinder, cone, torus, capsule)
"""In the order of ``SHAPES``."""
