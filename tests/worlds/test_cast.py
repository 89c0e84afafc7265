import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperworks.worlds import SHAPES, Scene, Thing
from paperworks.worlds.cast import Things, normals, trace
from paperworks.worlds.solids import SOLIDS

SIZES = {
    "box": (1.0, 0.7, 1.3),
    "sphere": (1.0, 1.0, 1.0),
    "cylinder": (1.0, 1.0, 0.8),
    "cone": (1.0, 1.0, 1.2),
    "torus": (1.0, 1.0, 0.3),
    "capsule": (0.6, 0.6, 1.4),
}
VOLUMES = {
    "box": 1.0 * 0.7 * 1.3,
    "sphere": math.pi / 6,
    "cylinder": math.pi / 4 * 0.8,
    "cone": math.pi / 12 * 1.2,
    "torus": 2 * math.pi**2 * 0.35 * 0.15**2,
    "capsule": math.pi * 0.09 * (0.8 + 0.4),
}
solids = pytest.mark.parametrize(("shape", "solid"), list(zip(SHAPES, SOLIDS, strict=True)), ids=SHAPES)


def half(shape, n):
    return torch.tensor(SIZES[shape]).div(2).expand(n, 3)


def draws(seed, n):
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) * 2.4 - 1.2


@solids
def test_volume(shape, solid):
    points = draws(0, 200_000)
    inside = (solid(points, half(shape, len(points))) < 0).float().mean()
    assert inside * 2.4**3 == pytest.approx(VOLUMES[shape], rel=0.03)


@solids
def test_distance_is_that_to_the_nearest_point_of_the_surface(shape, solid):
    """Outside: as far as the surface, so a step of that length down the slope arrives at it."""
    points = draws(1, 2000).requires_grad_()
    distance = solid(points, half(shape, len(points)))
    (slope,) = torch.autograd.grad(distance.sum(), points)
    outside = distance.detach() > 0.01
    torch.testing.assert_close(slope[outside].norm(dim=1), torch.ones(int(outside.sum())), atol=1e-3, rtol=0)
    arrived = (points - distance[:, None] * slope).detach()[outside]
    assert solid(arrived, half(shape, len(arrived))).abs().max() < 1e-4


@solids
def test_the_surface_stays_within_the_box_and_the_ball(shape, solid):
    thing = Thing(shape=shape, size=SIZES[shape], colour="red", position=(0, 0, 0))
    points = draws(2, 50_000)
    within = points[solid(points, half(shape, len(points))) < 0]
    assert (within.abs() <= half(shape, len(within)) + 1e-6).all()
    assert within.norm(dim=1).max() <= thing.radius + 1e-6
    assert within[:, :2].norm(dim=1).max() <= thing.footprint + 1e-6
    assert within.abs().amax(0).tolist() == pytest.approx([extent / 2 for extent in SIZES[shape]], abs=0.09)


@settings(max_examples=25)
@given(st.sampled_from(SHAPES), st.floats(-3, 3), st.integers(0, 2**31))
def test_rays_end_on_the_surface(shape, yaw, seed):
    thing = Thing(shape=shape, size=SIZES[shape], colour="red", position=(0.3, -0.2, 0.9), yaw=yaw)
    things = Things.of([Scene(things=(thing,))])
    origin = torch.tensor([[3.0, -4.0, 2.0]])
    aims = torch.tensor(thing.position) + 0.4 * draws(seed, 64)
    directions = torch.nn.functional.normalize(aims - origin, dim=1)
    reach = trace(things, origin, directions[None])[0, 0]
    met = reach.isfinite()
    assert met.any()
    points = origin + reach[met, None] * directions[met]
    owner = torch.zeros(len(points), dtype=torch.long)
    solid = SOLIDS[SHAPES.index(shape)]
    local = things.into(points - things.centre[0], owner)
    assert solid(local, half(shape, len(local))).abs().max() < 2e-4
    # Nothing was stepped over: just before the hit the ray is outside all the way.
    for share in torch.linspace(0.5, 0.999, 40):
        before = things.into(origin + share * reach[met, None] * directions[met] - things.centre[0], owner)
        assert (solid(before, half(shape, len(before))) > -1e-4).all()
    outward = normals(things, points, owner)
    torch.testing.assert_close(outward.norm(dim=1), torch.ones(len(outward)), atol=1e-4, rtol=0)
    assert ((outward * directions[met]).sum(1) < 0.15).all()  # edges have no slope of their own


def test_a_sphere_is_met_where_the_quadratic_says():
    things = Things.of([Scene(things=(Thing(shape="sphere", size=(2, 2, 2), colour="red", position=(0, 0, 1)),))])
    origin = torch.tensor([[0.5, -6.0, 2.0]])
    directions = torch.nn.functional.normalize(torch.tensor([0.0, 0.0, 1.0]) + draws(3, 500) - origin, dim=1)
    offset = origin - torch.tensor([0.0, 0.0, 1.0])
    b, c = directions @ offset[0], offset.square().sum() - 1
    under = b.square() - c
    exact = torch.where(under > 0, -b - under.clamp(min=0).sqrt(), torch.inf)
    found = trace(things, origin, directions[None])[0, 0]
    clear = under.abs() > 1e-2  # of the rim
    assert torch.equal(found.isfinite()[clear], exact.isfinite()[clear])
    both = clear & exact.isfinite()
    torch.testing.assert_close(found[both], exact[both], atol=1e-3, rtol=0)


def test_scenes_of_different_sizes_do_not_mix():
    ball = Thing(shape="sphere", size=(1, 1, 1), colour="red", position=(0, 0, 0.5))
    far = ball.model_copy(update={"position": (0, 2, 0.5)})
    things = Things.of([Scene(things=(far, ball)), Scene(things=()), Scene(things=(ball,))])
    origin, direction = torch.tensor([[0.0, -5.0, 0.5]]).expand(3, 3), torch.tensor([[[0.0, 1.0, 0.0]]]).expand(3, 1, 3)
    inf = math.inf
    found = trace(things, origin, direction)[..., 0]
    torch.testing.assert_close(found, torch.tensor([[6.5, 4.5], [inf, inf], [4.5, inf]]), atol=1e-3, rtol=0)
