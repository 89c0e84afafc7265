"""RandAugment for clips: a few operations drawn for each clip, applied to the whole batch operation by operation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.errors import UserError, unknown

from .transforms import Clips, warp

Magnitude = Float[Tensor, " batch"]

# Each operation takes clips and a magnitude in [0, 1] for each; ranges are those of FixMatch.


def _blend(clips: Clips, other: Tensor, magnitude: Magnitude) -> Clips:
    return torch.lerp(other, clips, (0.05 + 0.9 * magnitude).view(-1, 1, 1, 1, 1)).clamp_(0, 1)


def _gray(clips: Clips) -> Float[Tensor, "batch 1 frames height width"]:
    if clips.shape[1] != 3:
        return clips.mean(1, keepdim=True)
    return (clips * clips.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1, 1)).sum(1, keepdim=True)


def identity(clips: Clips, magnitude: Magnitude) -> Clips:
    """Leave the clips alone."""
    return clips


def brightness(clips: Clips, magnitude: Magnitude) -> Clips:
    """Blend with black: 0.05 to 0.95 of the clip stay."""
    return _blend(clips, clips.new_zeros(()), magnitude)


def contrast(clips: Clips, magnitude: Magnitude) -> Clips:
    """Blend with the clip's mean grey."""
    return _blend(clips, _gray(clips).mean((1, 2, 3, 4), keepdim=True), magnitude)


def color(clips: Clips, magnitude: Magnitude) -> Clips:
    """Blend with the grey clip."""
    return _blend(clips, _gray(clips), magnitude)


def sharpness(clips: Clips, magnitude: Magnitude) -> Clips:
    """Blend with a blurred clip."""
    if min(clips.shape[-2:]) < 3:
        return clips
    blurred = clips.clone()  # the border stays as it is
    # Weights are 1 around and 5 at the centre, over 13; sums are many times faster than a one-channel convolution.
    rows = clips[..., :-2] + clips[..., 1:-1] + clips[..., 2:]
    inner = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]
    blurred[..., 1:-1, 1:-1] = inner.add_(clips[..., 1:-1, 1:-1], alpha=4).div_(13)
    return _blend(clips, blurred, magnitude)


def autocontrast(clips: Clips, magnitude: Magnitude) -> Clips:
    """Stretch each channel to [0, 1]."""
    low, high = clips.amin((2, 3, 4), keepdim=True), clips.amax((2, 3, 4), keepdim=True)
    return torch.where(high > low, (clips - low) / (high - low), clips)


def equalize(clips: Clips, magnitude: Magnitude) -> Clips:
    """Spread each channel's values evenly, by its histogram."""
    levels = (clips * 255 + 0.5).long().flatten(2)  # [batch, channels, pixels of all frames]
    counts = clips.new_zeros(*clips.shape[:2], 256).scatter_add_(2, levels, clips.flatten(2).new_ones(levels.shape))
    below = counts.cumsum(2)
    first = below.gather(2, levels.amin(2, keepdim=True))
    table = (below - first) / (levels.shape[2] - first)
    spread = table.nan_to_num(0).gather(2, levels).view_as(clips)
    flat = (first == levels.shape[2]).to(clips.dtype)  # one level only: nothing to spread
    return torch.lerp(spread, clips, flat[..., None, None])


def posterize(clips: Clips, magnitude: Magnitude) -> Clips:
    """Keep 8 to 4 bits."""
    step = 2.0 ** (4 - (4 * magnitude).round()).view(-1, 1, 1, 1, 1)  # 8 to 4 bits are left
    return ((clips * 255 + 0.5).floor() / step).floor() * step / 255


def solarize(clips: Clips, magnitude: Magnitude) -> Clips:
    """Invert what is above a threshold."""
    above = clips >= magnitude.view(-1, 1, 1, 1, 1)
    return torch.lerp(clips, 1 - clips, above.to(clips.dtype))  # a third of the time of torch.where


def _affine(clips: Clips, *entries: tuple[int, int, Tensor]) -> Clips:
    matrix = torch.eye(2, 3, device=clips.device, dtype=clips.dtype).repeat(len(clips), 1, 1)
    for row, column, values in entries:
        matrix[:, row, column] = values
    return warp(clips, matrix)


def rotate(clips: Clips, magnitude: Magnitude) -> Clips:
    """Turn by up to 30 degrees, clockwise for more than 0.5."""
    angle = (2 * magnitude - 1) * torch.pi / 6
    cos, sin = angle.cos(), angle.sin()
    return _affine(clips, (0, 0, cos), (0, 1, sin), (1, 0, -sin), (1, 1, cos))


def shear_x(clips: Clips, magnitude: Magnitude) -> Clips:
    """Shear rows by up to 0.3."""
    return _affine(clips, (0, 1, 0.6 * magnitude - 0.3))


def shear_y(clips: Clips, magnitude: Magnitude) -> Clips:
    """Shear columns by up to 0.3."""
    return _affine(clips, (1, 0, 0.6 * magnitude - 0.3))


def translate_x(clips: Clips, magnitude: Magnitude) -> Clips:
    """Move by up to 0.3 of the width."""
    return _affine(clips, (0, 2, (0.6 * magnitude - 0.3) * clips.shape[-1]))


def translate_y(clips: Clips, magnitude: Magnitude) -> Clips:
    """Move by up to 0.3 of the height."""
    return _affine(clips, (1, 2, (0.6 * magnitude - 0.3) * clips.shape[-2]))


OPERATIONS: dict[str, Callable[[Clips, Magnitude], Clips]] = {
    operation.__name__: operation
    for operation in (
        *(identity, autocontrast, brightness, color, contrast, equalize, posterize, sharpness, solarize),
        *(rotate, shear_x, shear_y, translate_x, translate_y),
    )
}


@dataclass(frozen=True)
class RandAugment:
    """Apply operations drawn for each clip, each with a magnitude drawn for each clip (Cubuk et al. 2020).

    As FixMatch has it, magnitudes are uniform over their range. Statistics that an operation needs (the mean for
    ``contrast``, the histogram for ``equalize``) are those of the clip, not of a frame.

    Args:
        num_ops: Operations a clip goes through.
        operations: What is drawn from, names in `OPERATIONS`. Leave out the five geometric ones (``rotate``,
            ``shear_x`` …) where a motion's direction is the class.

    Raises:
        UserError: If there is no such operation.
    """

    num_ops: int = 2
    operations: Sequence[str] = tuple(OPERATIONS)

    def __post_init__(self) -> None:
        for name in self.operations:
            if name not in OPERATIONS:
                raise unknown("operation", name, OPERATIONS)
        if self.num_ops < 0 or not self.operations:
            raise UserError(
                f"num_ops must be at least 0, operations not empty; got {self.num_ops} and {self.operations}"
            )

    def __call__(self, clips: Clips, generator: torch.Generator) -> Clips:
        batch, out = len(clips), clips.clone()
        for _ in range(self.num_ops):
            chosen = torch.randint(len(self.operations), (batch,), generator=generator, device=generator.device)
            magnitude = torch.rand(batch, generator=generator, device=generator.device).to(clips)
            for number, name in enumerate(self.operations):
                rows = (chosen == number).nonzero().flatten().to(clips.device)
                if len(rows):
                    out.index_copy_(0, rows, OPERATIONS[name](out.index_select(0, rows), magnitude[rows]))
        return out
