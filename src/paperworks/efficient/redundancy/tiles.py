"""Tile skipping (R3): where a map is zero, a convolution is its bias."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperworks.errors import UserError

from .layers import BackOff, check_convolution
from .patches import Patches

DENSE_ABOVE = 0.5
"""Share of active tiles from which the whole convolution is faster, on CPUs."""


class TileSkipConv2d(nn.Module):
    """A convolution that computes only the tiles of its output that look at anything but zeros. It is exact.

    Active tiles are gathered with their surroundings, convolved as one batch and scattered (SBNet, Ren et al. 2018);
    the others are the bias. Where more than ``dense_above`` of them are active, the whole convolution is computed;
    it then looks again after 1, 2, 4 … 32 calls.

    Args:
        layer: An ungrouped convolution with zero padding; its parameters are used, not copied.
        tile: Side of a tile of the output in pixels; 8 or 16 are usual.
        dense_above: See above; 1 never computes all.

    Attributes:
        active: Share of tiles computed in the last call.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(self, layer: nn.Conv2d, tile: int = 8, dense_above: float = DENSE_ABOVE) -> None:
        super().__init__()
        self.layer = check_convolution(layer, "TileSkipConv2d")
        if tile < 1:
            raise UserError(f"tile must be at least 1, got {tile}")
        if not 0 <= dense_above <= 1:
            raise UserError(f"dense_above must be from 0 to 1, got {dense_above}")
        self.tile, self.dense_above, self.active = tile, dense_above, 1.0
        self._back_off = BackOff()
        self.train(layer.training)

    def forward(self, x: Float[Tensor, "n c height width"]) -> Float[Tensor, "n m rows columns"]:
        if self._back_off.resting():
            return self.layer(x)
        patches = Patches.of(self.layer, x.shape)
        grid = tuple(-(-side // self.tile) for side in patches.maps)
        steps = [self.tile * stride for stride in patches.stride]
        sizes = [
            (self.tile - 1) * stride + dilation * (kernel - 1) + 1
            for stride, dilation, kernel in zip(patches.stride, patches.dilation, patches.kernel, strict=True)
        ]
        over = [
            max(0, (cells - 1) * step + size - side)
            for cells, step, size, side in zip(grid, steps, sizes, patches.image, strict=True)
        ]
        vertical, horizontal = patches.padding
        padding = (horizontal, horizontal + over[1], vertical, vertical + over[0])
        zero = (x.amax(1) <= 0) & (x.amin(1) >= 0)  # two passes without a copy; NaN is not zero
        seen = F.max_pool2d(F.pad((~zero)[:, None].float(), padding), sizes, steps)
        mask = seen[:, 0, : grid[0], : grid[1]] > 0
        self.active = float(mask.float().mean())
        few = self.active <= self.dense_above
        self._back_off.report(few)
        if not few:
            return self.layer(x)
        return self._tiles(F.pad(x, padding), mask, sizes, steps)[:, :, : patches.maps[0], : patches.maps[1]]

    def _tiles(self, x: Tensor, mask: Bool[Tensor, "n p q"], sizes: list[int], steps: list[int]) -> Tensor:
        conv, (n, p, q) = self.layer, mask.shape
        windows = x.unfold(2, sizes[0], steps[0]).unfold(3, sizes[1], steps[1])[:, :, :p, :q]
        active = windows.permute(0, 2, 3, 1, 4, 5)[mask]
        computed = F.conv2d(active, conv.weight, conv.bias, conv.stride, 0, conv.dilation)
        y = x.new_zeros(n, conv.out_channels, p * self.tile, q * self.tile)
        if conv.bias is not None:
            y += conv.bias[:, None, None]
        y.view(n, -1, p, self.tile, q, self.tile).permute(0, 2, 4, 1, 3, 5)[mask] = computed
        return y
