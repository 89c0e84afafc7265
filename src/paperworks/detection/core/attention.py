"""Deformable attention in plain PyTorch."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.detection.core.embedding import Level
from paperworks.errors import UserError


class MSDeformAttn(nn.Module):
    r"""Attention of each query to a few points around its reference, on every level (Zhu et al. 2021, equation 3).

    $$\sum_m W_m \sum_{l, k} A_{mlk} \, W'_m x^l(\hat p + \Delta p_{mlk})$$

    with weights $A$ that a softmax over levels and points makes of the query, and offsets $\Delta p$ in cells (for
    reference points) or in half extents over the number of points (for reference boxes).

    Args:
        d: Channels.
        heads: $m$; divides ``d``.
        levels: $l$.
        points: $k$ a level.

    Raises:
        UserError: If ``heads`` does not divide ``d``.
    """

    def __init__(self, d: int, heads: int, levels: int = 1, points: int = 4) -> None:
        super().__init__()
        if d % heads:
            raise UserError(f"heads must divide d, got {heads} and {d}")
        self.d, self.heads, self.levels, self.points = d, heads, levels, points
        self.offsets = nn.Linear(d, heads * levels * points * 2)
        self.weights = nn.Linear(d, heads * levels * points)
        self.value, self.out = nn.Linear(d, d), nn.Linear(d, d)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: heads look in different directions, point k is k + 1 steps away, all weights are equal."""
        nn.init.zeros_(self.offsets.weight)
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angles.cos(), angles.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1.0)
        bias = direction[:, None, None] * steps[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_(bias.expand(-1, self.levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for layer in (self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Float[Tensor, "batch queries d"],
        reference: Float[Tensor, "batch queries coordinates"],
        memory: Sequence[Level],
    ) -> Float[Tensor, "batch queries d"]:
        """``reference``: points (x, y) or boxes (cx, cy, w, h) as shares of what is no padding."""
        batch, count, _ = query.shape
        shape = (batch, count, self.heads, self.levels, self.points)
        offsets = self.offsets(query).view(*shape, 2)
        weights = self.weights(query).view(*shape[:3], -1).softmax(-1).view(shape)
        mixed = 0
        for at, level in enumerate(memory):
            cells = query.new_tensor([level.width, level.height])
            if reference.shape[-1] == 2:
                places = reference[:, :, None, None] + offsets[:, :, :, at] / cells / level.valid[:, None, None, None]
            else:
                centre, extent = reference[:, :, None, None, :2], reference[:, :, None, None, 2:]
                places = centre + offsets[:, :, :, at] / self.points * extent / 2
            places = 2 * places * level.valid[:, None, None, None] - 1
            value = self.value(level.features).masked_fill(level.pad[..., None], 0)
            value = value.view(batch, -1, self.heads, self.d // self.heads).permute(0, 2, 3, 1)
            sampled = F.grid_sample(
                value.reshape(batch * self.heads, -1, level.height, level.width),
                places.transpose(1, 2).reshape(batch * self.heads, count, self.points, 2),
                align_corners=False,
            )  # [batch · heads, channels, queries, points]
            weight = weights[:, :, :, at].transpose(1, 2).reshape(batch * self.heads, 1, count, self.points)
            mixed = mixed + (sampled * weight).sum(-1)
        assert isinstance(mixed, Tensor)
        return self.out(mixed.view(batch, self.d, count).transpose(1, 2))
