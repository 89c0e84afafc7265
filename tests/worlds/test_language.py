import pytest
from hypothesis import given
from hypothesis import strategies as st

from paperworks.errors import UserError
from paperworks.worlds import Camera, Scene, Thing, execute, make_scene, refer, state


def thing(shape, colour, x, y, material="matte"):
    sizes = {"box": (1, 1, 1), "sphere": (1, 1, 1), "cone": (1, 1, 1)}
    return Thing(shape=shape, size=sizes[shape], colour=colour, material=material, position=(x, y, 0.5))


SCENE = Scene(
    things=(
        thing("box", "red", -2, 0),
        thing("box", "blue", 2, 0, "metal"),
        thing("sphere", "red", 0, 2),
        thing("sphere", "red", -2, 2, "metal"),
    ),
    cameras=(Camera(position=(0, -8, 3)),),
)


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ((), [0, 1, 2, 3]),
        ((("filter", "shape", "box"),), [0, 1]),
        ((("filter", "colour", "red"), ("filter", "shape", "sphere")), [2, 3]),
        ((("filter", "colour", "blue"), ("unique",), ("relate", "left")), [0, 2, 3]),
        ((("filter", "colour", "blue"), ("unique",), ("relate", "behind")), [2, 3]),
        ((("filter", "colour", "blue"), ("unique",), ("relate", "before")), []),
        ((("filter", "shape", "cone"), ("count", "0")), True),
        ((("filter", "shape", "box"), ("count", "3")), False),
        ((("filter", "colour", "blue"), ("unique",), ("relate", "right"), ("exist",)), False),
    ],
)
def test_programs(program, result):
    assert execute(program, SCENE) == result


def test_left_is_the_camera_s():
    behind = Camera(position=(0, 8, 3))
    program = (("filter", "colour", "blue"), ("unique",), ("relate", "left"))
    assert execute(program, SCENE, behind) == []


def test_programs_that_cannot_run():
    with pytest.raises(UserError, match="unique needs one thing, and there are 2"):
        execute((("filter", "shape", "box"), ("unique",)), SCENE)
    with pytest.raises(UserError, match="unknown step 'filter size big'"):
        execute((("filter", "size", "big"),), SCENE)
    with pytest.raises(UserError, match="hops must be at least 0"):
        refer(SCENE, hops=-1)


@given(st.integers(0, 2**31), st.integers(0, 3))
def test_expressions_mean_one_thing_and_need_their_hops(seed, hops):
    scene = make_scene(seed, things=(4, 6), radius=3.0)
    found = refer(scene, hops=hops, count=4, seed=seed)
    assert len({expression.program for expression in found}) == len(found)
    for expression in found:
        assert execute(expression.program, scene) == [expression.target]
        relates = [place for place, step in enumerate(expression.program) if step[0] == "relate"]
        assert len(relates) == expression.hops == hops
        assert expression.text.startswith("the ")
        if hops:
            own = expression.program[relates[-1] + 1 : -1]
            assert execute(own, scene) != [expression.target]


def test_expressions_in_words():
    found = {expression.text for expression in refer(SCENE, hops=0, count=10)}
    assert found <= {
        "the blue thing",
        "the blue box",
        "the metal box",
        "the red box",
        "the matte box",
        "the metal sphere",
        "the metal red thing",
        "the matte sphere",
    }
    assert "the blue thing" in found
    two = refer(SCENE, hops=2, count=1, seed=3)[0]
    assert " that is " in two.text
    assert refer(Scene(things=()), hops=0) == []


@given(st.integers(0, 2**31))
def test_statements_are_as_true_as_they_say(seed):
    scene = make_scene(seed)
    found = state(scene, count=6, seed=seed)
    assert len(found) >= 4
    for statement in found:
        assert execute(statement.program, scene) is statement.truth
        assert statement.text.startswith(("there is ", "there are "))
    assert 0 < sum(statement.truth for statement in found) < len(found)


def test_numbers_agree_with_nouns():
    texts = {statement.text for seed in range(30) for statement in state(SCENE, count=6, seed=seed)}
    assert "there are two boxes" in texts
    assert "there is one blue box" in texts or "there is one blue thing" in texts
    assert not any("boxs" in text or "is two" in text or "are one" in text for text in texts)
