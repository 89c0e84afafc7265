"""Features inside boxes."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def sample(
    features: Float[Tensor, "batch d height width"],
    places: Float[Tensor, "batch queries points 2"],
    valid: Float[Tensor, "batch 2"] | None = None,
) -> Float[Tensor, "batch d queries points"]:
    """Maps at places, bilinear, as RoIAlign takes them: up to a cell outside the nearest border counts, beyond it 0.

    Args:
        features: Maps.
        places: x, y as shares of what is no padding.
        valid: Share of each map's width and height that is no padding; by default all.
    """
    cells = features.new_tensor([features.shape[-1], features.shape[-2]])
    extent = cells if valid is None else (valid * cells)[:, None, None]
    at = places * extent
    outside = ((at < -0.5) | (at > extent + 0.5)).any(-1, keepdim=True)
    within = at.clamp(min=0.5).minimum(extent - 0.5)
    return F.grid_sample(features, (2 * within / cells - 1).masked_fill(outside, -3), align_corners=False)


def roi_sample(
    features: Float[Tensor, "batch d height width"],
    boxes: Float[Tensor, "batch queries 4"],
    bins: int = 7,
    valid: Float[Tensor, "batch 2"] | None = None,
) -> Float[Tensor, "batch queries d bins bins"]:
    """One sample in the middle of each of ``bins`` × ``bins`` parts of each box, for all boxes in one call.

    Equal to ``torchvision.ops.roi_align(aligned=True, sampling_ratio=1)``, but that boxes get a gradient.

    Args:
        features: Maps.
        boxes: cx, cy, w, h as shares of what is no padding.
        bins: Parts of a side.
        valid: As of ``sample``.
    """
    places = in_box(boxes, bin_centres(bins).to(boxes))  # [batch, queries, bins · bins, 2]
    sampled = sample(features, places, valid)
    return sampled.view(*sampled.shape[:3], bins, bins).transpose(1, 2)


def bin_centres(bins: int) -> Float[Tensor, "cells 2"]:
    """The middles (x, y) of a box's parts, in rows, in its own frame: its edges are at ±1."""
    middle = (2 * torch.arange(bins) + 1.0) / bins - 1
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


def in_box(
    boxes: Float[Tensor, "batch queries 4"], points: Float[Tensor, "*batch_queries points 2"]
) -> Float[Tensor, "batch queries points 2"]:
    """Points of the boxes' own frame (edges at ±1) as shares of the map."""
    return boxes[..., None, :2] + boxes[..., None, 2:] / 2 * points
