"""From pixels to what a model is given."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from paperworks.errors import UserError

from .fills import Pixels


class Preprocess:
    """Pixels to what a model is given: channels first in [0, 1], scaled to one size, normalised.

    Args:
        image_size: Height and width; must be given unless all images are of one size.
        channels: 3, or 1 for luma.
        mean, std: Subtracted from and divided by, a number a channel.
    """

    def __init__(
        self,
        image_size: tuple[int, int] | None = None,
        channels: Literal[1, 3] = 3,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        if image_size is not None and min(image_size) < 1:
            raise UserError(f"image_size must be positive, got {image_size}")
        if channels not in (1, 3) or {len(mean), len(std)} - {1, channels}:
            raise UserError(f"channels must be 1 or 3, with as many of mean and std, got {channels}, {mean}, {std}")
        self.image_size, self.channels = image_size, channels
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, pixels: Pixels) -> Float[Tensor, "planes rows columns"]:
        x = torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)
        if self.channels == 1:
            x = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
        if self.image_size and tuple(x.shape[1:]) != self.image_size:
            x = F.interpolate(x[None], self.image_size, mode="bilinear", antialias=True)[0].clamp(0, 1)
        return (x - self.mean) / self.std

    def __repr__(self) -> str:
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return f"Preprocess({self.image_size}, {self.channels}, {mean}, {std})"
