"""Patches of an image: reducing each to one cell, and spreading cells over their patches again."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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
    (tall, wide), rows_summed = patch, 1
    if images.device.type == "cpu":  # pools channels-last maps several times faster, even with the copy
        if images.is_contiguous() and tall > 1 and images.shape[2] % tall == 0:
            # Whole rows add up at full speed in the layout that is there, and leave less to copy.
            summed = images[:, :, ::tall] + images[:, :, 1::tall]
            for row in range(2, tall):
                summed += images[:, :, row::tall]
            images, offset, rows_summed, tall = summed, (0, offset[1]), tall, 1
        images = images.contiguous(memory_format=torch.channels_last)
    pooled = F.avg_pool2d(
        images, (tall, wide), padding=offset, count_include_pad=False, divisor_override=divisor
    ).contiguous(memory_format=torch.channels_last)
    return pooled.div_(rows_summed) if divisor is None and rows_summed > 1 else pooled


def _cells_of_pixels(length: int, count: int, size: int, offset: int, device: torch.device) -> tuple[Tensor, int, int]:
    """The cell of each pixel along one axis, and how many pixels before and behind belong to none."""
    before = max(0, -offset)
    behind = max(0, length + offset - count * size)
    pixels = torch.arange(before + offset, length - behind + offset, device=device)
    return pixels.div(size, rounding_mode="floor"), before, behind
