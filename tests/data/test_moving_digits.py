import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperworks.data.labelled import LabelledData
from paperworks.data.moving_digits import MOTIONS, MovingDigits, bundled_digits
from paperworks.errors import UserError


def square(size=8):
    """One image: a bright block, off centre to the upper right."""
    image = torch.zeros(1, 1, size, size)
    image[..., 1:4, 4:7] = 1
    return LabelledData(image, torch.tensor([0]), ("block",), "block")


def mass(clips):
    """Centre of the brightness above the background, [n, frames] for x and y."""
    bright = (clips[:, 0] - 0.6).clamp(min=0)
    grid = torch.arange(clips.shape[-1]) - (clips.shape[-1] - 1) / 2
    total = bright.sum((2, 3))
    return (bright.sum(2) * grid).sum(2) / total, (bright.sum(3) * grid).sum(2) / total, total


@pytest.fixture(scope="module")
def clips():
    digits = bundled_digits()
    fast = MovingDigits(MOTIONS, frames=9, size=32, speed=(0.7, 0.8), digits=digits)
    return fast.sample(1200, seed=0)


def of(clips, motion):
    return clips.inputs[clips.targets == MOTIONS.index(motion)]


@pytest.mark.parametrize(
    ("motion", "dx", "dy"),
    [
        ("left", -1, 0),
        ("right", 1, 0),
        ("up", 0, -1),
        ("down", 0, 1),
        ("diagonal-down", 0.7, 0.7),
        ("diagonal-up", 0.7, -0.7),
    ],
)
def test_digits_travel_where_the_class_says(clips, motion, dx, dy):
    x, y, _ = mass(of(clips, motion))
    # 0.75 half frames of 16 pixels; digits that leave the frame shorten it.
    assert (x[:, -1] - x[:, 0]).nanmean() == pytest.approx(12 * dx, abs=2)
    assert (y[:, -1] - y[:, 0]).nanmean() == pytest.approx(12 * dy, abs=2)


def test_digits_grow_shrink_and_blink(clips):
    for motion, sign in (("zoom-in", 1), ("zoom-out", -1)):
        size = mass(of(clips, motion))[2]
        assert (sign * (size[:, -1] - size[:, 0]) > 0).float().mean() > 0.95
    lit = of(clips, "blink")[:, 0].amax((2, 3))
    dark = torch.minimum(lit[:, 0::2].amax(1), lit[:, 1::2].amax(1))
    assert (dark < lit.amax(1) - 0.1).all()


def test_bounce_goes_down_and_comes_up(clips):
    _, y, _ = mass(of(clips, "bounce"))
    y = y.nanmean(0)
    assert y[4] - y[0] == pytest.approx(12, abs=3)
    assert y[8] == pytest.approx(float(y[0]), abs=1)


def test_rotation_is_seen_on_a_block_that_is_off_centre():
    source = MovingDigits(["clockwise", "counterclockwise"], frames=5, size=32, digits=square())
    data = source.sample(200, seed=1)
    x, y, _ = mass(data.inputs)
    x0, y0, x1, y1 = x[:, 0], y[:, 0], x[:, -1], y[:, -1]
    # A block to the upper right of the centre of rotation goes right and down when turned clockwise (y is down).
    moved_down = (y1 - y0 + x1 - x0) > 0
    assert (moved_down == (data.targets == 0)).float().mean() > 0.97


def test_classes_are_balanced_and_the_same_seed_gives_the_same_clips():
    source = MovingDigits()
    one, two, other = source.sample(100, 3), source.sample(100, 3), source.sample(100, 4)
    assert torch.equal(one.inputs, two.inputs)
    assert torch.equal(one.targets, two.targets)
    assert not torch.equal(one.inputs, other.inputs)
    assert one.targets.bincount().tolist() == [13] * 4 + [12] * 4
    assert one.classes == MOTIONS[:8]


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(2, 6), st.integers(2, 16), st.integers(1, 20))
def test_shapes_and_range(classes, frames, size, count):
    data = MovingDigits(MOTIONS[:classes], frames=frames, size=size).sample(count, 0)
    assert data.inputs.shape == (count, 1, frames, size, size)
    assert data.inputs.min() >= 0
    assert data.inputs.max() <= 1


def test_the_digit_tells_nothing_unless_it_is_made_a_cue(monkeypatch):
    def identities(cue_error):
        seen = {}
        source = MovingDigits(cue_error=cue_error)

        def spy(self, images, motion, generator):
            seen.update(images=images, motion=motion)
            return torch.zeros(len(images), 1, 2, 2, 2)

        monkeypatch.setattr(MovingDigits, "_render", spy)
        targets = source.sample(4000, 0).targets
        digits = bundled_digits()
        names = [tuple(image.flatten().tolist()) for image in digits.inputs]
        lookup = dict(zip(names, digits.targets.tolist(), strict=True))
        digit = torch.tensor([lookup[tuple(image.flatten().tolist())] for image in seen["images"]])
        return digit == targets, seen["motion"] == targets

    digit, motion = identities(None)
    assert motion.all()
    assert digit.float().mean() == pytest.approx(0.1, abs=0.02)
    digit, motion = identities(0.25)
    assert digit.float().mean() == pytest.approx(0.75, abs=0.03)
    assert motion.float().mean() == pytest.approx(0.75, abs=0.03)
    assert (digit & motion).float().mean() == pytest.approx(0.75**2, abs=0.03)
    digit, motion = identities(0.0)
    assert digit.all()
    assert motion.all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MovingDigits(["left", "rigth"]), "unknown motion 'rigth'. Did you mean 'right'"),
        (lambda: MovingDigits(["left"]), "at least 2 different ones"),
        (lambda: MovingDigits(["left", "left"]), "at least 2 different ones"),
        (lambda: MovingDigits(frames=1), "frames must be at least 2, got 1"),
        (lambda: MovingDigits(size=1), "size must be at least 2, got 1"),
        (lambda: MovingDigits(speed=(0.8, 0.4)), "speed must be a range"),
        (lambda: MovingDigits(cue_error=1.0), r"cue_error must be None or in \[0, 1\), got 1.0"),
        (lambda: MovingDigits().sample(0, 0), "count must be at least 1, got 0"),
        (lambda: MovingDigits(cue_error=0.1, digits=square()).sample(9, 0), "there is none for 1"),
        (lambda: MovingDigits(MOTIONS, cue_error=0.1).sample(9, 0), "there is none for 10"),
        (
            lambda: MovingDigits(digits=LabelledData(torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), ("a",), "rgb")),
            r"digits must hold images \[n, 1, h, w\], got \[2, 3, 8, 8\]",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(UserError, match=message):
        make()
