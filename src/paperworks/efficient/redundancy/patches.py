"""The patches that a convolution looks at, as rows of pixels in a padded table."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn


@dataclass(frozen=True)
class Patches:
    """Where the patches of a convolution lie.

    Pixels are the rows of a table ``[n (height + 2 p) (width + 2 p), channels]``: the maps with their padding,
    channels last. Outputs are counted by image, row and column.

    Attributes:
        images: Number of images.
        image: Height and width with the padding.
        maps: Height and width of the output.
        kernel, stride, dilation, padding: As of the convolution.
    """

    images: int
    image: tuple[int, int]
    maps: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]

    @classmethod
    def of(cls, conv: nn.Conv2d, shape: torch.Size) -> "Patches":
        """The patches of an input of a shape ``[n, channels, height, width]``."""
        kernel, stride, dilation, padding = (
            _pair(value) for value in (conv.kernel_size, conv.stride, conv.dilation, conv.padding)
        )
        image = (shape[2] + 2 * padding[0], shape[3] + 2 * padding[1])
        rows, columns = ((image[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1 for axis in (0, 1))
        return cls(shape[0], image, (rows, columns), kernel, stride, dilation, padding)

    @property
    def outputs(self) -> int:
        """The number of outputs, and of patches."""
        return self.images * self.maps[0] * self.maps[1]

    def pixels(self, maps: Float[Tensor, "n c h w"]) -> Float[Tensor, "pixels c"]:
        """The table of pixels."""
        vertical, horizontal = self.padding
        last = maps.permute(0, 2, 3, 1)
        return F.pad(last, (0, 0, horizontal, horizontal, vertical, vertical)).reshape(-1, maps.shape[1])

    def taps(self, device: torch.device) -> Int64[Tensor, "taps"]:
        """How far each tap of the kernel lies behind its first pixel in the table."""
        rows, columns = (torch.arange(k, device=device) * d for k, d in zip(self.kernel, self.dilation, strict=True))
        return (rows[:, None] * self.image[1] + columns).flatten()

    def corners(self, outputs: Int64[Tensor, "m"]) -> Int64[Tensor, "m"]:
        """The first pixel of each output's patch."""
        column = outputs % self.maps[1]
        row = outputs.div(self.maps[1], rounding_mode="floor")
        image = row.div(self.maps[0], rounding_mode="floor")
        row = row % self.maps[0]
        return (image * self.image[0] + row * self.stride[0]) * self.image[1] + column * self.stride[1]

    def gather(self, pixels: Float[Tensor, "pixels c"], outputs: Int64[Tensor, "m"]) -> Float[Tensor, "m taps_c"]:
        """The patches of some outputs, tap by tap."""
        index = self.corners(outputs)[:, None] + self.taps(outputs.device)
        return pixels.index_select(0, index.flatten()).view(len(outputs), -1)

    def unflatten(self, rows: Float[Tensor, "outputs m"]) -> Float[Tensor, "n m h w"]:
        """Rows of outputs as maps, channels last in memory."""
        return rows.view(self.images, *self.maps, rows.shape[1]).permute(0, 3, 1, 2)


def kernel_rows(weight: Float[Tensor, "m c kh kw"]) -> Float[Tensor, "taps_c m"]:
    """Kernels as a matrix that multiplies gathered patches."""
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _pair(value: int | tuple[int, ...] | str) -> tuple[int, int]:
    assert not isinstance(value, str)
    return (value, value) if isinstance(value, int) else (value[0], value[1])
