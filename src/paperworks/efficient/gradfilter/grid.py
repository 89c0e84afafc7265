"""Patches of an image: reducing each to one cell, and spreading cells over their patches again."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CACHED_BYTES = 2**20
"""Size of a copy that a core's cache holds."""


@dataclass(frozen=True)
class PatchGrid:
    r"""A grid of patches laid centrally over an image.

    Along an axis of length $L$ with $P$ cells of $R$ pixels, the first cell begins $\lceil (PR - L)/2 \rceil$ pixels
    before the image. What sticks out of the image does not count. Where the cells are too few for the image, the
    pixels around them belong to no cell.

    Attributes:
        image: Height and width of the image.
        cells: Cells along the height and the width.
        patch: Height and width of a cell, in pixels.
    """

    image: tuple[int, int]
    cells: tuple[int, int]
    patch: tuple[int, int]

    @property
    def overhang(self) -> tuple[int, int]:
        """Pixels by which the cells exceed the image, on both sides together; negative where they fall short."""
        (height, width), (rows, columns), (tall, wide) = self.image, self.cells, self.patch
        return rows * tall - height, columns * wide - width

    @property
    def offset(self) -> tuple[int, int]:
        """Pixels from the first cell's beginning to the image's."""
        vertical, horizontal = self.overhang
        return -(-vertical // 2), -(-horizontal // 2)

    def sum(self, images: Float[Tensor, "n c height width"]) -> Float[Tensor, "n c p q"]:
        """The sum of each patch; in channels-last memory."""
        fits = all(0 <= over < size for over, size in zip(self.overhang, self.patch, strict=True))
        if not fits:  # more or fewer cells than the image fills, which average pooling cannot express
            (over_y, over_x), (y, x) = self.overhang, self.offset
            images = F.pad(images, (x, over_x - x, y, over_y - y))
        return _pool(images, self.patch, self.offset if fits else (0, 0), divisor=1)

    def mean(self, images: Float[Tensor, "n c height width"]) -> Float[Tensor, "n c p q"]:
        """The mean of each patch over its pixels inside the image; in channels-last memory."""
        return _pool(images, self.patch, self.offset, divisor=None)

    def spread(self, cells: Float[Tensor, "n c p q"], *, channels_last: bool) -> Float[Tensor, "n c height width"]:
        """Give each pixel its cell's value, and zero to pixels outside all cells."""
        axes = [
            _cells_of_pixels(length, count, size, offset, cells.device)
            for length, count, size, offset in zip(self.image, self.cells, self.patch, self.offset, strict=True)
        ]
        (rows, top, bottom), (columns, left, right) = axes
        n, c, p, q = cells.shape
        picked = (rows[:, None] * q + columns).flatten()
        # One gather writes the result once, whatever sticks out. Along dimension 1 its inner loop is a block copy.
        if channels_last:
            pixels = cells.permute(0, 2, 3, 1).reshape(n, p * q, c).index_select(1, picked)
            images = pixels.view(n, len(rows), len(columns), c).permute(0, 3, 1, 2)
        else:
            pixels = cells.reshape(n * c, p * q).index_select(1, picked)
            images = pixels.view(n, c, len(rows), len(columns))
        return F.pad(images, (left, right, top, bottom)) if top or bottom or left or right else images


def _pool(
    images: Float[Tensor, "n c height width"], patch: tuple[int, int], offset: tuple[int, int], divisor: int | None
) -> Float[Tensor, "n c p q"]:
    def pooled(part: Tensor) -> Tensor:
        return F.avg_pool2d(
            part, patch, stride=patch, padding=offset, count_include_pad=False, divisor_override=divisor
        )

    channels_last = torch.channels_last
    if images.device.type != "cpu" or images.is_contiguous(memory_format=channels_last) or not len(images):
        return pooled(images).contiguous(memory_format=channels_last)
    # CPUs pool channels-last maps several times faster than others, even with the copy, if that stays in the cache.
    part = max(1, CACHED_BYTES // (images[0].numel() * images.element_size()))
    parts = [pooled(some.contiguous(memory_format=channels_last)) for some in torch.split(images, part)]
    return torch.cat(parts).contiguous(memory_format=channels_last)


def _cells_of_pixels(length: int, count: int, size: int, offset: int, device: torch.device) -> tuple[Tensor, int, int]:
    """The cell of each pixel along one axis, and how many pixels before and behind belong to none."""
    before = max(0, -offset)
    behind = max(0, length + offset - count * size)
    pixels = torch.arange(before + offset, length - behind + offset, device=device)
    return pixels.div(size, rounding_mode="floor"), before, behind
