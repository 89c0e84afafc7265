import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperworks.errors import UserError
from paperworks.worlds import SHAPES, Camera, Light, Scene, Thing, corners, make_scene, make_scenes, mask_boxes, render

CAMERA = Camera(position=(0, -6, 2), target=(0, 0, 0.5), fov=40, width=96, height=72)
BALL = Thing(shape="sphere", size=(1, 1, 1), colour="red", position=(0, 0, 0.5))
BOX = Thing(shape="box", size=(1, 0.6, 0.8), colour="blue", position=(0.5, 1.0, 0.4), yaw=0.5)


@settings(max_examples=15)
@given(st.floats(-3, 3), st.floats(-1.2, 1.2), st.floats(-1, 1.5), st.floats(0.4, 1.2))
def test_a_box_rendered_is_the_box_labelled(yaw, x, y, width):
    """The silhouette of a convex solid with corners reaches exactly as far as its corners' projections."""
    box = Thing(shape="box", size=(width, 0.6, 0.8), colour="blue", position=(x, y, 0.4), yaw=yaw)
    scene = Scene(things=(box,), cameras=(CAMERA,))
    (found,) = render(scene).boxes()[0]
    pixels = CAMERA.project(corners(scene.boxes3d()))[0, :, :2]
    expected = torch.cat([pixels.amin(0), pixels.amax(0)])
    assert (found - expected).abs().max() <= 1.0


def test_a_sphere_covers_the_solid_angle_that_it_has():
    camera = Camera(position=(0, -6, 0.5), target=(0, 0, 0.5), fov=20, width=200, height=200)
    view = render(Scene(things=(BALL,), cameras=(camera,)))
    radius = camera.focal * 0.5 / math.sqrt(36 - 0.25)  # of the circle that the tangent cone cuts out
    assert int(view.amodal.sum()) == pytest.approx(math.pi * radius**2, rel=0.01)
    assert view.depth[0, 100, 100] == pytest.approx(5.5, abs=0.01)


def test_depth_and_pixel_lead_back_to_the_point():
    scene = Scene(things=(BALL, BOX), cameras=(CAMERA,))
    view = render(scene)
    row, column = 20, 30
    x, y = column + 0.5, row + 0.5
    for row, column in ((36, 48), (60, 10), (30, 60)):
        x, y = column + 0.5, row + 0.5
        depth = view.depth[0, row, column]
        local = depth * torch.linalg.inv(CAMERA.intrinsics) @ torch.tensor([x, y, 1.0])
        point = CAMERA.rotation @ local + torch.tensor(CAMERA.position)
        back = CAMERA.project(point)
        torch.testing.assert_close(back, torch.stack([torch.tensor(x), torch.tensor(y), depth]), atol=1e-3, rtol=0)
        instance = int(view.instances[0, row, column])
        if instance < 0:
            assert abs(point[2]) < 1e-3
        elif instance == 0:
            assert (point - torch.tensor(BALL.position)).norm() == pytest.approx(0.5, abs=1e-3)


def test_masks_agree():
    for view in map(render, make_scenes(6, seed=1, things=(5, 6))):
        assert (view.modal <= view.amodal).all()
        assert torch.equal(view.modal.sum(1), (view.instances >= 0).long())
        assert ((view.visible >= 0) & (view.visible <= 1)).all()
        assert torch.equal(view.semantic > 0, view.instances >= 0)
        for k, shape in enumerate(view.shapes[0].tolist()):
            assert (view.semantic[0][view.modal[0, k]] == shape + 1).all()


def test_what_is_in_front_hides():
    front = BALL.model_copy(update={"position": (0, -2, 0.5), "colour": "green"})
    view = render(Scene(things=(BALL, front), cameras=(Camera(position=(0, -6, 0.5), target=(0, 0, 0.5)),)))
    assert view.visible[0].tolist() == [0, 1]
    assert view.boxes()[0, 0].tolist() == [0, 0, 0, 0]
    assert view.boxes(amodal=True)[0, 0, 2] > 30


def test_what_is_alone_looks_the_same_amodal():
    scene = Scene(things=(BALL, BOX), cameras=(CAMERA,))
    both = render(scene)
    for k, thing in enumerate(scene.things):
        alone = render(scene.model_copy(update={"things": (thing,)}))
        assert torch.equal(alone.modal[0, 0], both.amodal[0, k])


def test_several_at_once_are_as_one_by_one():
    scenes = make_scenes(4, seed=2, things=(1, 5))
    together = render(scenes)
    for k, scene in enumerate(scenes):
        alone = render(scene)
        n = len(scene.things)
        torch.testing.assert_close(together.image[k], alone.image[0], atol=2e-3, rtol=0)
        assert torch.equal(together.instances[k], alone.instances[0])
        assert torch.equal(together.amodal[k, :n], alone.amodal[0])
        assert not together.amodal[k, n:].any()
        assert together.shapes[k, n:].tolist() == [-1] * (together.shapes.shape[1] - n)
        assert torch.equal(together.semantic[k], alone.semantic[0])


def test_an_empty_scene_is_ground_and_sky():
    view = render(Scene(things=(), cameras=(CAMERA.at(20, 40),)))
    assert view.image.shape == (1, 3, 40, 20)
    assert view.amodal.shape == (1, 0, 40, 20)
    assert (view.instances == -1).all()
    assert (view.semantic == 0).all()
    assert view.depth.isfinite().any()


def test_the_sky_is_infinitely_far():
    up = Camera(position=(0, -6, 1), target=(0, 0, 4))
    view = render(Scene(things=(), cameras=(up,), sky=(0.1, 0.2, 0.3)))
    assert view.depth.isinf().all()
    torch.testing.assert_close(view.image[0, :, 0, 0], torch.tensor([0.1, 0.2, 0.3]))


def test_light_shadow_and_fog():
    lamp = Light(position=(-20, 0, 20))
    scene = Scene(things=(BALL,), cameras=(CAMERA,), lights=(lamp,), ambient=0.3)
    bright, dark = render(scene, shadows=False).image, render(scene).image
    fell = (bright - dark).amax(1)[0] > 0.1
    assert fell.any()
    pixel = CAMERA.project(torch.tensor([0.5, 0.0, 0.0]))[:2].long()  # behind the ball as the lamp sees it
    assert fell[pixel[1], pixel[0]]
    assert not fell[:, : 96 // 3].any()
    image = render(scene, shadows=False).image[0]
    left, right = (image[:, row, column].sum() for row, column in ((34, 45), (34, 51)))
    assert left > right  # the lamp is on the left
    foggy = render(scene.model_copy(update={"fog": 5.0})).image
    torch.testing.assert_close(foggy, torch.tensor(scene.sky)[None, :, None, None].expand_as(foggy), atol=1e-3, rtol=0)
    unlit = render(scene.model_copy(update={"lights": (lamp.model_copy(update={"intensity": 0.0}),)}))
    red = unlit.image[0][:, unlit.instances[0] == 0]
    torch.testing.assert_close(red, 0.3 * torch.tensor([[0.82], [0.16], [0.14]]).expand_as(red))


def test_samples_smooth_the_image_and_nothing_else():
    scene = make_scene(4)
    plain, smooth = render(scene), render(scene, samples=3)
    assert smooth.image.shape == plain.image.shape
    assert torch.equal(smooth.instances, plain.instances)
    assert (smooth.image - plain.image).abs().mean() < 0.03
    across = [image.diff(dim=-1).abs().mean() for image in (smooth.image, plain.image)]
    assert across[0] < across[1]


def test_boxes_of_masks():
    mask = torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[0, 1:4, 2] = mask[0, 2, 3] = True
    assert mask_boxes(mask).tolist() == [[2, 1, 4, 4], [0, 0, 0, 0]]


def test_what_cannot_be_rendered():
    scene = make_scene(0)
    for arguments, options, message in (
        ([[]], {}, "at least one scene"),
        ([scene], {"samples": 0}, "samples must be at least 1"),
        ([[scene, scene], [CAMERA]], {}, "got 1 for 2 scenes"),
        ([[scene, scene], [CAMERA, CAMERA.at(10, 10)]], {}, "of sizes 10x10, 96x72"),
    ):
        with pytest.raises(UserError, match=message):
            render(*arguments, **options)


def test_shapes_are_in_the_order_of_labels():
    view = render([make_scene(0, shapes=[shape], things=(1, 1)) for shape in SHAPES])
    assert view.shapes[:, 0].tolist() == list(range(len(SHAPES)))
