"""Masks that a person may start from: guesses of what a classifier should not look at."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from torch import Tensor, nn

from paperworks.errors import UserError
from paperworks.nn import keeping_modes

from .fills import Mask, Pixels
from .saliency import saliency

Transform = Callable[[np.ndarray], Tensor]

Proposer = Callable[[np.ndarray, nn.Module, Transform], np.ndarray]
"""Guesses the spurious pixels of an image; the transform makes of pixels what the model is given."""


def estimate_foreground(image: Pixels, sigmas: float = 3.0) -> Mask:
    """Where an image differs from its border: Mahalanobis distance of the colour from the border pixels' colours.

    A stand-in for a segmentation network, good where the object does not touch the border much and the background
    is of few colours.
    """
    pixels = image.astype(np.float64)
    width = max(1, min(image.shape[:2]) // 16)
    inside = np.zeros(image.shape[:2], bool)
    inside[width:-width, width:-width] = True
    border = pixels[~inside]
    away = pixels - np.median(border, axis=0)
    spread = np.atleast_2d(np.cov(border.T)) + 25.0 * np.eye(image.shape[2])  # not below 5 of 255 levels
    return np.einsum("hwc,cd,hwd->hw", away, np.linalg.inv(spread), away) > sigmas**2


def superpixels(image: Pixels, segments: int = 64, compactness: float = 10.0) -> Int[np.ndarray, "height width"]:
    """Label pixels by regions of like colour and place: k-means on both, started from a grid (SLIC, Achanta 2012).

    Args:
        image: 8-bit pixels.
        segments: About how many regions.
        compactness: How many levels of colour weigh as much as one side of the grid.
    """
    height, width, channels = image.shape
    side = max(1.0, (height * width / segments) ** 0.5)
    rows, columns = np.mgrid[:height, :width]
    place = np.stack([rows, columns], 2) * (compactness / side)
    features = np.concatenate([image, place], 2).astype(np.float32)
    grid = [np.arange(side / 2, length, side).astype(int) for length in (height, width)]
    centres = features[np.ix_(*grid)].reshape(-1, channels + 2)
    model = KMeans(len(centres), init=centres, n_init=1, max_iter=10, algorithm="lloyd")
    with np.errstate(all="ignore"):
        return model.fit_predict(features.reshape(-1, channels + 2)).reshape(height, width)


@dataclass(frozen=True)
class SaliencyOutsideObject:
    """The most salient pixels that are not part of the object.

    Attributes:
        quantile: Pixels above this quantile of the saliency are salient.
        foreground: Estimates the object; any segmentation of your own may stand here.
    """

    quantile: float = 0.9
    foreground: Callable[[Pixels], Mask] = estimate_foreground

    def __call__(self, image: Pixels, model: nn.Module, transform: Transform) -> Mask:
        x = _input(image, model, transform)
        maps = F.interpolate(saliency(model, x)[:, None], image.shape[:2], mode="bilinear")[0, 0].cpu().numpy()
        return (maps > np.quantile(maps, self.quantile)) & ~self.foreground(image)


@dataclass(frozen=True)
class OcclusionProposer:
    """The superpixels without which the predicted class loses most probability.

    Each is replaced by the image's mean colour. Whether such a region is spurious or the true cue, only a person
    can tell.

    Attributes:
        segments: About how many superpixels.
        top: How many of them are proposed; those that lose nothing are not.
    """

    segments: int = 64
    top: int = 3

    def __call__(self, image: Pixels, model: nn.Module, transform: Transform) -> Mask:
        labels = superpixels(image, self.segments)
        mean = image.mean((0, 1)).astype(np.uint8)
        regions = np.unique(labels)
        occluded = [np.where((labels == region)[..., None], mean, image) for region in regions]
        drop = np.asarray(_probability_drop(model, transform, image, occluded))
        best = regions[np.argsort(-drop, kind="stable")[: self.top]]
        return np.isin(labels, best[np.sort(-drop)[: self.top] < 0])


@dataclass(frozen=True)
class Background:
    """All that is not the object, as the reference implementation proposes with U²-Net.

    Attributes:
        foreground: Estimates the object: a network's segmentation where its weights are at hand.
    """

    foreground: Callable[[Pixels], Mask] = estimate_foreground

    def __call__(self, image: Pixels, model: nn.Module, transform: Transform) -> Mask:
        return ~self.foreground(image)


PROPOSERS: dict[str, Proposer] = {
    "saliency": SaliencyOutsideObject(),
    "occlusion": OcclusionProposer(),
    "background": Background(),
}


def _input(image: Pixels, model: nn.Module, transform: Transform) -> Float[Tensor, "1 channels height width"]:
    device = next(model.parameters(), torch.empty(0)).device
    return transform(image)[None].to(device)


@torch.no_grad()
def _probability_drop(
    model: nn.Module, transform: Transform, image: Pixels, occluded: list[np.ndarray]
) -> Float[np.ndarray, " regions"]:
    with keeping_modes(model):
        model.eval()
        batch = torch.cat([_input(pixels, model, transform) for pixels in [image, *occluded]])
        probs = torch.cat([model(part).softmax(1) for part in torch.split(batch, 64)])
    if not probs.isfinite().all():
        raise UserError("the model's output is not finite")
    kept = probs[:, probs[0].argmax()]
    return (kept[0] - kept[1:]).cpu().numpy()
