"""Sine codes of positions, and the levels of a feature pyramid."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def sine_embed(
    points: Float[Tensor, "*n 2"], d: int, temperature: float = 1e4, scale: float = 2 * math.pi
) -> Float[Tensor, "*n {d}"]:
    r"""DETR's code of positions (x, y) in [0, 1]: y in the first half of the channels, x in the second.

    Channels $2i$ and $2i + 1$ of a half are $\sin$ and $\cos$ of $2 \pi p / 10000^{2i / (d/2)}$. Queries and keys at
    the same place get the same vector.
    """
    frequency = temperature ** (2 * torch.div(torch.arange(d // 2), 2, rounding_mode="floor") / (d // 2))
    angles = points.flip(-1)[..., None] * scale / frequency.to(points)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(-3)


@dataclass(frozen=True)
class Level:
    """Encoded features of one resolution, as a sequence in rows.

    Attributes:
        features: The tokens.
        pos: Their positions' codes.
        pad: True where a token is padding.
        height, width: Of the map.
        valid: Share of the map's width and height that is no padding.
    """

    features: Float[Tensor, "batch tokens d"]
    pos: Float[Tensor, "batch tokens d"]
    pad: Bool[Tensor, "batch tokens"]
    height: int
    width: int
    valid: Float[Tensor, "batch 2"]

    def as_map(self) -> Float[Tensor, "batch d height width"]:
        """The tokens as a map."""
        return self.features.transpose(1, 2).reshape(len(self.features), -1, self.height, self.width)

    @property
    def centres(self) -> Float[Tensor, "batch tokens 2"]:
        """The middle (x, y) of every cell, as shares of what is no padding."""
        return grid(self.height, self.width).to(self.features) / self.valid[:, None]


def grid(height: int, width: int) -> Float[Tensor, "cells 2"]:
    """Centres (x, y) of the cells of a map, in [0, 1], in rows: cell (i, j) has ((j + ½) / W, (i + ½) / H)."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


def level(features: Float[Tensor, "batch d height width"], pad: Bool[Tensor, "batch rows columns"]) -> Level:
    """A map with the codes of its positions; ``pad`` is that of the picture."""
    _, d, height, width = features.shape
    small = F.interpolate(pad[:, None].float(), (height, width), mode="nearest")[:, 0].bool()
    valid = torch.stack([(~small[:, 0]).float().mean(1), (~small[:, :, 0]).float().mean(1)], -1)
    pos = sine_embed(grid(height, width).to(valid) / valid[:, None], d)
    tokens = features.flatten(2).transpose(1, 2)
    return Level(tokens, pos.to(features), small.flatten(1), height, width, valid.to(features))
