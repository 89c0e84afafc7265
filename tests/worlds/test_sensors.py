import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperworks.errors import UserError
from paperworks.worlds import (
    ACTIONS,
    FLAT_SHAPES,
    Lidar,
    Scene,
    Thing,
    animate,
    flat_scenes,
    make_scene,
    mask_boxes,
    scan,
)

BALL = Thing(shape="sphere", size=(1, 1, 1), colour="red", material="metal", position=(3, 0, 1.0))
STILL = Lidar(dropout=0, noise=0)

# LiDAR.


def test_rings_lie_on_circles_on_the_ground():
    cloud = scan(Scene(things=()), STILL)
    assert (cloud.instance == -1).all()
    away = cloud.points[:, :2].norm(dim=1)
    angles = torch.linspace(-30, 10, 32)
    for ring in cloud.ring.unique().tolist():
        expected = 1.8 / math.tan(math.radians(-float(angles[ring])))
        torch.testing.assert_close(away[cloud.ring == ring], torch.full((720,), expected), atol=1e-3, rtol=1e-3)
    assert cloud.points[:, 2].abs().max() < 1e-3
    assert away.max() < STILL.reach


def test_returns_lie_on_the_thing_that_they_name():
    cloud = scan(Scene(things=(BALL,)), Lidar(position=(0, 0, 1.0), dropout=0, noise=0))
    mine = cloud.instance == 0
    away = (cloud.points[mine] - torch.tensor(BALL.position)).norm(dim=1)
    torch.testing.assert_close(away, torch.full_like(away, 0.5), atol=1e-3, rtol=0)
    assert cloud.intensity[mine].max() == pytest.approx(0.95, abs=0.02)  # head on
    assert ((cloud.intensity >= 0) & (cloud.intensity <= 1)).all()
    assert cloud.kitti().shape == (len(cloud), 4)


def test_noise_and_dropout_are_as_large_as_said_and_repeat():
    scene, noisy = make_scene(0), Lidar(dropout=0.3, noise=0.1)
    clean, cloud = scan(scene, STILL), scan(scene, noisy, seed=1)
    assert len(cloud) / len(clean) == pytest.approx(0.7, abs=0.02)
    assert cloud.points[cloud.instance < 0][:, 2].std() == pytest.approx(0.1 * 0.25, abs=0.02)
    assert torch.equal(cloud.points, scan(scene, noisy, seed=1).points)
    assert not torch.equal(cloud.points[:9], scan(scene, noisy, seed=2).points[:9])


def test_lidars_that_cannot_be():
    for change, message in (
        ({"rings": 0}, "rings and steps must be at least 1, got 0"),
        ({"elevation": (10, -10)}, "elevation must be the lowest and highest"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ):
        with pytest.raises(UserError, match=message):
            Lidar(**change)


# Videos.


@pytest.mark.parametrize("action", ACTIONS)
def test_one_acts_and_the_others_stand_still(action):
    scene = make_scene(1, things=(4, 4), shapes=["box", "cone"])
    clip = animate(scene, action, frames=7, seed=3)
    assert len(clip.frames) == 7
    assert clip.frames[0] == scene
    for frame in clip.frames[1:]:
        for k, (before, after) in enumerate(zip(scene.things, frame.things, strict=True)):
            assert k == clip.actor or before == after
    assert any(frame.things[clip.actor] != scene.things[clip.actor] for frame in clip.frames)
    assert all(
        frame.things[clip.actor].position[2] >= frame.things[clip.actor].size[2] / 2 - 1e-9 for frame in clip.frames
    )


def test_actions_go_where_they_say():
    scene = make_scene(1, things=(3, 3), shapes=["box"])
    paths = {
        name: [frame.things[0] for frame in animate(scene, name, actor=0, frames=9, reach=2).frames] for name in ACTIONS
    }
    start = scene.things[0]
    gone = {name: math.dist(path[-1].position, start.position) for name, path in paths.items()}
    assert gone["slide"] == pytest.approx(2)
    assert gone["hop"] == pytest.approx(2)
    assert max(gone["jump"], gone["spin"]) == pytest.approx(0, abs=1e-9)
    assert max(gone["circle"], gone["go and return"]) == pytest.approx(0, abs=1e-9)
    assert max(thing.position[2] for thing in paths["jump"]) == pytest.approx(start.position[2] + 2)
    assert paths["spin"][-1].yaw == pytest.approx(start.yaw + 2 * math.pi)
    assert paths["grow"][-1].size == pytest.approx([1.6 * extent for extent in start.size])
    assert paths["shrink"][-1].size == pytest.approx([0.5 * extent for extent in start.size])


def test_videos_that_cannot_be():
    scene = make_scene(0, shapes=["cone"])
    for options, message in (
        ({"action": "fly"}, "unknown action 'fly'"),
        ({"action": "slide", "frames": 1}, "frames must be at least 2"),
        ({"action": "slide", "actor": 9}, "actor must be 0 to"),
        ({"action": "spin"}, "nothing in the scene could be seen to spin"),
    ):
        with pytest.raises(UserError, match=message):
            animate(scene, **options)


# The flat mode.


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 5))
def test_flat_scenes_are_as_their_labels_say(seed, classes, most):
    scenes = flat_scenes(6, classes=classes, objects=(0, most), noise=0.0, seed=seed)
    assert scenes.images.shape == (6, 3, 64, 64)
    assert ((scenes.images >= 0) & (scenes.images <= 1)).all()
    assert (scenes.labels < classes).all()
    assert (scenes.image.diff() >= 0).all()
    assert (scenes.image.bincount(minlength=6) <= most).all()
    assert (scenes.boxes[:, 2:] > scenes.boxes[:, :2]).all()
    for picture in range(6):
        mine = scenes.image == picture
        assert (scenes.masks[mine].sum(0) <= 1).all()  # a pixel shows one thing
        visible, whole = mask_boxes(scenes.masks[mine]), scenes.boxes[mine]
        assert (visible[:, :2] >= whole[:, :2]).all()
        assert (visible[:, 2:] <= whole[:, 2:]).all()
        for mask in scenes.masks[mine]:
            colours = scenes.images[picture][:, mask]
            assert (colours.amax(1) - colours.amin(1) < 1e-6).all()  # of one colour


def test_flat_things_hardly_overlap():
    """At most a fifth of the smaller disc's square; a turned shape fills at least half of that square's sides."""
    scenes = flat_scenes(200, objects=(4, 4), seed=1)
    for picture in range(200):
        mine = scenes.boxes[scenes.image == picture]
        area = (mine[:, 2:] - mine[:, :2]).prod(1)
        corner = mine[:, None, 2:].minimum(mine[None, :, 2:]) - mine[:, None, :2].maximum(mine[None, :, :2])
        shared = corner.clamp(min=0).prod(2) / area[:, None].minimum(area)
        assert (shared.fill_diagonal_(0) <= 0.45).all()


def test_every_flat_shape_fits_its_disc_and_differs():
    at = torch.linspace(-1.2, 1.2, 241)
    u, v = torch.meshgrid(at, at, indexing="xy")
    outside = u.square() + v.square() > 1.0001
    masks = [inside(u, v) for inside in FLAT_SHAPES.values()]
    assert not any((mask & outside).any() for mask in masks)
    assert all(mask.float().mean() > 0.04 for mask in masks)
    assert all((a ^ b).float().mean() > 0.03 for k, a in enumerate(masks) for b in masks[:k])


def test_the_number_of_flat_scenes_and_the_seed():
    assert torch.equal(flat_scenes(3, seed=4).images, flat_scenes(3, seed=4).images)
    assert not torch.equal(flat_scenes(3, seed=4).images, flat_scenes(3, seed=5).images)
    for options, message in (
        ({"count": 0}, "count must be at least 1"),
        ({"count": 1, "classes": 13}, "classes must be 1 to 12, got 13"),
        ({"count": 1, "radius": (6, 40)}, "radius must be from 1 to half of size 64"),
        ({"count": 1, "objects": (3, 2)}, "objects must be the fewest and most"),
    ):
        with pytest.raises(UserError, match=message):
            flat_scenes(**options)
