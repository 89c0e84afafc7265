import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from paperworks.errors import UserError
from paperworks.worlds import Camera, Scene, Thing, corners, make_scene, make_scenes, orbit, rig

CUBE = Thing(shape="box", size=(1, 1, 1), colour="red", position=(0, 0, 0.5))


@given(st.integers(0, 2**40))
def test_a_scene_survives_json(seed):
    scene = make_scene(seed)
    assert Scene.model_validate_json(scene.model_dump_json()) == scene


def test_a_scene_survives_the_disk(tmp_path):
    scene = make_scene(3, domain="fog")
    scene.save(tmp_path / "scene.json")
    assert Scene.load(tmp_path / "scene.json") == scene


def test_a_bad_file_is_answered_in_one_line(tmp_path):
    file = tmp_path / "scene.json"
    file.write_text(make_scene(0).model_dump_json().replace('"shape":"', '"shape":"un', 1))
    with pytest.raises(UserError, match=r"scene.json is no scene: things\.0\.shape: Input should be 'box'"):
        Scene.load(file)
    file.write_text("{")
    with pytest.raises(UserError, match="is no scene"):
        Scene.load(file)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Scene.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "mauve"}, "unknown colour 'mauve'"),
        ({"size": (1, 1, 0)}, "greater than 0"),
        ({"shape": "sphere", "size": (1, 1, 2)}, "a sphere has one extent"),
        ({"shape": "cone", "size": (1, 2, 1)}, "a cone is as wide as deep"),
        ({"shape": "capsule", "size": (1, 1, 0.5)}, "at least as high as wide"),
        ({"shape": "torus", "size": (1, 1, 0.6)}, "at most half as high as wide"),
        ({"yaw": math.nan}, "finite"),
        ({"weight": 3}, "Extra inputs"),
    ],
)
def test_things_that_cannot_be(change, message):
    with pytest.raises(ValidationError, match=message):
        Thing(**CUBE.model_dump() | change)


def test_a_camera_must_not_look_straight_down():
    with pytest.raises(ValidationError, match="straight up or down"):
        Camera(position=(0, 0, 5), target=(0, 0, 0))


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0.5, 5), st.floats(20, 100))
def test_the_target_falls_on_the_middle_of_the_picture(x, y, z, fov):
    camera = Camera(position=(x + 6, y, z), target=(0, 0, 0.3), fov=fov, width=40, height=30)
    away = math.dist(camera.position, camera.target)
    pixel = camera.project(torch.tensor(camera.target))
    torch.testing.assert_close(pixel, torch.tensor([20.0, 15.0, away]), atol=1e-3, rtol=1e-4)
    rotation = camera.rotation
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(3), atol=1e-5, rtol=0)
    assert rotation.det() > 0.99
    assert rotation[2, 0].abs() < 1e-6  # level
    assert rotation[2, 1] < 0  # the picture's y axis points down


def test_the_angle_of_view_is_that_of_the_height():
    camera = Camera(position=(0, -5, 1), target=(0, 0, 1), fov=60, width=80, height=40)
    edge = camera.project(torch.tensor([0.0, 0.0, 1 + 5 * math.tan(math.radians(30))]))
    torch.testing.assert_close(edge[:2], torch.tensor([40.0, 0.0]), atol=1e-4, rtol=0)


def test_corners_turn_with_their_thing():
    turned = CUBE.model_copy(update={"size": (2, 1, 1), "yaw": math.pi / 2})
    found = corners(Scene(things=(turned,)).boxes3d())[0]
    torch.testing.assert_close(found[0], torch.tensor([0.5, -1.0, 0.0]))
    torch.testing.assert_close(found[6], torch.tensor([-0.5, 1.0, 1.0]))


@given(st.integers(0, 2**40))
def test_things_stand_on_the_ground_and_apart(seed):
    scene = make_scene(seed, things=(4, 6), radius=3.0)
    assert 4 <= len(scene.things) <= 6
    for k, thing in enumerate(scene.things):
        assert thing.position[2] == pytest.approx(thing.size[2] / 2)
        for other in scene.things[:k]:
            apart = math.dist(thing.position[:2], other.position[:2])
            assert apart >= thing.footprint + other.footprint + 0.15 - 1e-9


def test_a_seed_decides_and_the_number_of_scenes_does_not():
    assert make_scenes(2, seed=5) == make_scenes(4, seed=5)[:2]
    assert len({scene.model_dump_json() for scene in make_scenes(8)}) == 8


def test_a_cue_ties_colours_to_shapes():
    for strength, low, high in ((1.0, 1, 1), (0.5, 0.35, 0.75)):
        things = [
            thing
            for scene in make_scenes(60, things=(2, 4), cue={"box": "red"}, cue_strength=strength)
            for thing in scene.things
            if thing.shape == "box"
        ]
        assert low <= sum(thing.colour == "red" for thing in things) / len(things) <= high


@pytest.mark.usefixtures("unchecked")
def test_recipes_that_cannot_be_followed():
    for change, message in (
        ({"shapes": ["cube"]}, "unknown shape 'cube'"),
        ({"domain": "dask"}, "unknown domain 'dask'. Did you mean 'dusk'"),
        ({"cue": {"box": "rad"}}, "unknown colour 'rad'. Did you mean 'red'"),
        ({"things": (3, 2)}, "things must be a positive smallest and largest"),
        ({"cue_strength": 2.0}, "cue_strength must be in"),
        ({"colors": ["red"]}, "unknown field of a recipe 'colors'. Did you mean 'colours'"),
        ({"things": (30, 30)}, r"things of up to 1.1 m do not fit within 2.2 m"),
    ):
        with pytest.raises(UserError, match=message):
            make_scene(0, **change)


def test_an_orbit_surrounds_and_a_rig_looks_out():
    scene = make_scene(0)
    around = orbit(scene, 20, distance=6.0, elevation=(20, 50))
    for camera in around.cameras:
        offset = torch.tensor(camera.position) - torch.tensor(camera.target)
        assert offset.norm() == pytest.approx(6.0, abs=1e-4)
        assert math.sin(math.radians(20)) <= offset[2] / 6 <= math.sin(math.radians(50))
    assert len({camera.name for camera in around.cameras}) == 20
    mast = rig(scene, 6)
    directions = torch.stack([camera.rotation[:, 2] for camera in mast.cameras])
    torch.testing.assert_close(directions[:, :2].sum(0), torch.zeros(2), atol=1e-5, rtol=0)
