"""Features inside boxes."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def roi_sample(
    features: Float[Tensor, "batch d height width"], boxes: Float[Tensor, "batch queries 4"], bins: int = 7
) -> Float[Tensor, "batch queries d bins bins"]:
    """One sample in the middle of each of ``bins`` × ``bins`` parts of each box, for all boxes in one call.

    Equal to ``torchvision.ops.roi_align(aligned=True, sampling_ratio=1)`` where no sample lies more than a cell outside
    the map; farther out this takes the nearest border, not 0.

    Args:
        features: Maps.
        boxes: cx, cy, w, h as shares of the map.
        bins: Parts of a side.
    """
    middle = (torch.arange(bins, device=boxes.device, dtype=boxes.dtype) + 0.5) / bins - 0.5
    x = boxes[..., 0, None] + boxes[..., 2, None] * middle
    y = boxes[..., 1, None] + boxes[..., 3, None] * middle
    rows = torch.stack([x[..., None, :].expand(*x.shape, bins), y[..., None].expand(*y.shape, bins)], -1)
    places = rows.flatten(2, 3)  # [batch, queries, bins · bins, 2]
    sampled = F.grid_sample(features, 2 * places - 1, padding_mode="border", align_corners=False)
    return sampled.view(*sampled.shape[:3], bins, bins).transpose(1, 2)
