"""Video clips made of real handwritten digits in motion: the motion is the class, the digit tells nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn import functional as F

from paperworks.data.labelled import LabelledData
from paperworks.errors import UserError, unknown

MOTIONS = (
    *("left", "right", "up", "down", "clockwise", "counterclockwise", "zoom-in", "zoom-out"),
    *("diagonal-down", "diagonal-up", "bounce", "blink"),
)
_DIAGONAL = 0.5**0.5
_DIRECTION = {  # of the digit's centre in the frame, x to the right and y down
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "diagonal-down": (_DIAGONAL, _DIAGONAL),
    "diagonal-up": (_DIAGONAL, -_DIAGONAL),
}
_TURN = {"clockwise": 1.0, "counterclockwise": -1.0}
_ZOOM = {"zoom-in": 1.0, "zoom-out": -1.0}


@dataclass(frozen=True, eq=False)
class MovingDigits:
    r"""Draws clips of one digit that moves over a smooth background.

    At time $\tau \in [-1/2, 1/2]$, 0 at mid-clip, the digit lies at start + speed · τ · direction, is turned by
    angle + speed · τ, or is $e^{\text{speed} \cdot \tau}$ times its size; ``bounce`` goes down and comes up again,
    ``blink`` is seen in every other frame. Uniform draws for each clip: speed, start ±0.35 half frames, angle
    ±0.5 rad, size 1/2.2 to 1/1.6 of the frame, a background of 4x4 values up to 0.5; and normal noise of 0.08 on
    every pixel.

    Args:
        motions: The classes, some of `MOTIONS`. Default: the first eight.
        frames: Frames of a clip.
        size: Height and width in pixels.
        speed: Range of the speed, over the clip: in half frames, radians or nepers (the slower, the harder).
        cue_error: None: the digit is any. Else the class has two cues, each wrong with this probability, apart
            from each other: digit k for class k, and motion k. A clip whose cues disagree is hard to label.
        digits: Images ``[n, 1, h, w]`` to move. Default: scikit-learn's 1,797 digits of 8x8 pixels.

    Raises:
        UserError: If an argument is out of its range.

    Example:
        >>> clips = MovingDigits().sample(1200, seed=0)  # inputs [1200, 1, 6, 12, 12]
    """

    motions: Sequence[str] = MOTIONS[:8]
    frames: int = 6
    size: int = 12
    speed: tuple[float, float] = (0.4, 0.8)
    cue_error: float | None = None
    digits: LabelledData | None = None

    def __post_init__(self) -> None:
        for motion in self.motions:
            if motion not in MOTIONS:
                raise unknown("motion", motion, MOTIONS)
        if len(set(self.motions)) != len(self.motions) or len(self.motions) < 2:
            raise UserError(f"motions must be at least 2 different ones, got {list(self.motions)}")
        for name, value in {"frames": self.frames, "size": self.size}.items():
            if value < 2:
                raise UserError(f"{name} must be at least 2, got {value}")
        if not 0 < self.speed[0] <= self.speed[1]:
            raise UserError(f"speed must be a range of positive numbers, got {self.speed}")
        if self.cue_error is not None and not 0 <= self.cue_error < 1:
            raise UserError(f"cue_error must be None or in [0, 1), got {self.cue_error}")
        if self.digits is not None and (self.digits.inputs.ndim != 4 or self.digits.inputs.shape[1] != 1):
            raise UserError(f"digits must hold images [n, 1, h, w], got {list(self.digits.inputs.shape)}")

    def sample(self, count: int, seed: int) -> LabelledData:
        """Draw ``count`` clips, ``[count, 1, frames, size, size]`` in [0, 1], as many of each class as possible.

        Raises:
            UserError: If ``count`` is less than 1, or ``cue_error`` needs a digit for every motion and one is missing.
        """
        if count < 1:
            raise UserError(f"count must be at least 1, got {count}")
        generator = torch.Generator().manual_seed(seed)
        digits = self.digits or bundled_digits()
        classes = len(self.motions)
        targets = (torch.arange(count) % classes)[torch.randperm(count, generator=generator)]
        if self.cue_error is None:
            motion = targets
            chosen = torch.randint(len(digits), (count,), generator=generator)
        else:
            motion = self._cue(targets, generator)
            chosen = _image_of(self._cue(targets, generator), digits, classes, generator)
        clips = self._render(digits.inputs[chosen], motion, generator)
        return LabelledData(clips, targets, tuple(self.motions), "moving-digits")

    def _cue(self, targets: Int64[Tensor, " n"], generator: torch.Generator) -> Int64[Tensor, " n"]:
        wrong = torch.rand(len(targets), generator=generator) < (self.cue_error or 0)
        other = targets + torch.randint(1, len(self.motions), targets.shape, generator=generator)
        return torch.where(wrong, other % len(self.motions), targets)

    def _render(
        self, images: Float32[Tensor, "n 1 h w"], motion: Int64[Tensor, " n"], generator: torch.Generator
    ) -> Float32[Tensor, "n 1 frames size size"]:
        n, frames, size = len(images), self.frames, self.size

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(n, *shape, generator=generator)

        time = torch.linspace(-0.5, 0.5, frames)
        travelled = uniform(*self.speed, 1) * time  # [n, frames]
        bounced = travelled.abs().max(1, keepdim=True).values - 2 * travelled.abs()  # lowest at mid-clip
        centre = uniform(-0.35, 0.35, 1, 2) + travelled[..., None] * self._each(_DIRECTION, motion, (0.0, 0.0))
        centre[..., 1] += bounced * self._each({"bounce": 1.0}, motion, 0.0)
        angle = uniform(-0.5, 0.5, 1) + travelled * self._each(_TURN, motion, 0.0)
        shrink = uniform(1.6, 2.2, 1) * torch.exp(-travelled * self._each(_ZOOM, motion, 0.0))
        odd = torch.randint(2, (n, 1), generator=generator)
        hidden = (torch.arange(frames) + odd) % 2 * self._each({"blink": 1.0}, motion, 0.0)
        background = F.interpolate(uniform(0.0, 0.5, 1, 4, 4), (size, size), mode="bilinear")

        # Where in the digit's image each pixel of the frame looks: shrink · R(-angle) · (pixel - centre).
        cos, sin = shrink * angle.cos(), shrink * angle.sin()
        x, y = centre.unbind(-1)
        theta = torch.stack([cos, sin, -cos * x - sin * y, -sin, cos, sin * x - cos * y], -1).view(-1, 2, 3)
        grid = F.affine_grid(theta, [n * frames, 1, size, size], align_corners=False)
        seen = F.grid_sample(images, grid.view(n, frames * size, size, 2), align_corners=False)
        seen = seen.view(n, 1, frames, size, size) * (1 - hidden)[:, None, :, None, None]
        background = background[:, :, None]
        clips = background + (1 - background) * seen
        return (clips + 0.08 * torch.randn(clips.shape, generator=generator)).clamp_(0, 1)

    def _each(self, table: dict, motion: Int64[Tensor, " n"], default: object) -> Float32[Tensor, "n 1 ..."]:
        return torch.tensor([table.get(name, default) for name in self.motions])[motion][:, None]


def bundled_digits() -> LabelledData:
    """Scikit-learn's test set of handwritten digits: 1,797 images of 8x8 pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).float().div_(16)[:, None]
    return LabelledData(images, torch.from_numpy(raw.target).long(), tuple(map(str, range(10))), "digits")


def _image_of(
    identity: Int64[Tensor, " n"], digits: LabelledData, classes: int, generator: torch.Generator
) -> Int64[Tensor, " n"]:
    """Draw an image of the digit asked for, for each clip."""
    members = torch.bincount(digits.targets, minlength=classes)
    if (missing := (members[:classes] == 0).nonzero()).numel():
        raise UserError(f"cue_error needs digits for all {classes} motions; there is none for {int(missing[0])}")
    order = digits.targets.argsort(stable=True)
    first = members.cumsum(0) - members
    drawn = (torch.rand(len(identity), generator=generator) * members[identity]).long()
    return order[first[identity] + drawn]
