"""Augmentations of whole batches of clips as tensors: one draw a clip, the same for all of its frames."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from paperworks.errors import UserError

Clips = Float[Tensor, "batch channels frames height width"]
ClipTransform = Callable[[Clips, torch.Generator], Clips]
"""Draws its parameters from the generator, one set a clip, and changes clips with values in [0, 1]."""


def check_clips(clips: Tensor, what: str = "clips") -> None:
    """Raise unless ``clips`` is a floating-point tensor ``[B, C, T, H, W]``."""
    if clips.ndim != 5 or not clips.is_floating_point():
        raise UserError(f"{what}: expected floating-point [B, C, T, H, W], got {clips.dtype} {list(clips.shape)}")


def uniform(generator: torch.Generator, clips: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw one number for each clip: ``[batch, 1, 1, 1, 1]`` on the clips' device, wherever the generator is."""
    drawn = torch.rand(len(clips), 1, 1, 1, 1, generator=generator, device=generator.device)
    return (low + (high - low) * drawn).to(clips)


def warp(clips: Clips, matrix: Float[Tensor, "batch 2 3"]) -> Clips:
    """Resample every frame of clip b, bilinearly, at ``matrix[b] @ (x, y, 1)``; outside is 0.

    Coordinates are pixels relative to the frame's centre, x to the right and y down.
    """
    height, width = clips.shape[-2:]
    half = matrix.new_tensor([width / 2, height / 2])
    normalised = matrix * torch.cat([half, half.new_ones(1)]) / half[:, None]
    images = clips.flatten(1, 2)
    grid = F.affine_grid(normalised.to(clips), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).view_as(clips)


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cut out a box of random area and aspect ratio and resize it to the frame (Szegedy et al. 2015).

    Attributes:
        scale: Range of the box's area, as a share of the frame's.
        ratio: Range of its width over its height, relative to the frame's own.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale must be a range within (0, 1], got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"ratio must be a range of positive numbers, got {self.ratio}")

    def __call__(self, clips: Clips, generator: torch.Generator) -> Clips:
        area = uniform(generator, clips, *self.scale).flatten()
        low, high = torch.tensor(self.ratio).log().tolist()
        root = uniform(generator, clips, low / 2, high / 2).flatten().exp()
        # A box wider or higher than the frame is cut to it.
        shares = torch.stack([area.sqrt() * root, area.sqrt() / root], 1).clamp(max=1)  # of width, of height
        size = shares.new_tensor([clips.shape[-1], clips.shape[-2]])
        place = torch.stack([uniform(generator, clips, -0.5, 0.5).flatten() for _ in range(2)], 1)
        centre = place * (1 - shares) * size
        return warp(clips, torch.cat([torch.diag_embed(shares), centre[..., None]], 2))


@dataclass(frozen=True)
class RandomFlip:
    """Mirror left and right in some of the clips. Not for classes that tell left from right."""

    p: float = 0.5

    def __call__(self, clips: Clips, generator: torch.Generator) -> Clips:
        return torch.where(uniform(generator, clips) < self.p, clips.flip(-1), clips)


@dataclass(frozen=True)
class RandomShift:
    """Move by up to ``pixels`` whole pixels each way; the border is repeated."""

    pixels: int = 1

    def __call__(self, clips: Clips, generator: torch.Generator) -> Clips:
        batch, _, _, height, width = clips.shape

        def sources(length: int) -> Tensor:
            reach = (batch, 1)
            moved = torch.randint(-self.pixels, self.pixels + 1, reach, generator=generator, device=generator.device)
            return (torch.arange(length, device=clips.device) + moved.to(clips.device)).clamp_(0, length - 1)

        rows, columns = sources(height), sources(width)
        each = torch.arange(batch, device=clips.device)
        moved = clips.permute(0, 3, 4, 1, 2)[each[:, None, None], rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 4, 1, 2)


@dataclass(frozen=True)
class RandomContrast:
    """Stretch the values around the clip's mean by a factor from ``contrast``, and add up to ±``brightness``."""

    contrast: tuple[float, float] = (0.5, 1.5)
    brightness: float = 0.3

    def __call__(self, clips: Clips, generator: torch.Generator) -> Clips:
        mean = clips.mean((1, 2, 3, 4), keepdim=True)
        factor = uniform(generator, clips, *self.contrast)
        added = uniform(generator, clips, -self.brightness, self.brightness)
        return ((clips - mean) * factor + mean + added).clamp_(0, 1)


@dataclass(frozen=True)
class RandomInvert:
    """Turn some of the clips into their negatives, 1 - x."""

    p: float = 0.3

    def __call__(self, clips: Clips, generator: torch.Generator) -> Clips:
        return torch.where(uniform(generator, clips) < self.p, 1 - clips, clips)


@dataclass(frozen=True)
class RandomNoise:
    """Add normal noise of a random deviation up to ``most``: one noise image a clip, as flicker would be motion."""

    most: float = 0.25

    def __call__(self, clips: Clips, generator: torch.Generator) -> Clips:
        shape = (len(clips), clips.shape[1], 1, *clips.shape[3:])
        noise = torch.randn(shape, generator=generator, device=generator.device).to(clips)
        return (clips + uniform(generator, clips, 0.0, self.most) * noise).clamp_(0, 1)


@dataclass(frozen=True)
class Cutout:
    """Paint one grey box at a random place (DeVries & Taylor 2017); its sides are up to ``most`` of the frame's."""

    most: float = 0.5

    def __call__(self, clips: Clips, generator: torch.Generator) -> Clips:
        share = uniform(generator, clips, 0.0, self.most)
        inside = None
        for axis, length in ((-1, clips.shape[-1]), (-2, clips.shape[-2])):
            shape = [1] * 5
            shape[axis] = length
            pixel = (torch.arange(length, device=clips.device) + 0.5).view(shape) / length
            near = (pixel - uniform(generator, clips)).abs() < share / 2
            inside = near if inside is None else inside & near
        assert inside is not None
        return clips.masked_fill(inside, 0.5)
