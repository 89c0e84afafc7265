"""Shared weights: each layer's weights become one of 2^b centroids found by k-means."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from paperworks.errors import UserError, unknown
from paperworks.train import Intervention, State

from .layers import quantizable


class Clusters(NamedTuple):
    """Shared weights of a layer: ``centroids[labels]``."""

    centroids: Float[Tensor, "centroids"]
    labels: Int64[Tensor, "*shape"]

    @property
    def weight(self) -> Float[Tensor, "*shape"]:
        """The weights."""
        return self.centroids[self.labels]


def kmeans_quantize(weight: Float[Tensor, "*shape"], bits: int, seed: int = 0) -> Clusters:
    """Share weights among $2^b$ centroids, fewer where there are fewer different weights.

    k-means starts once from k-means++ and takes 50 rounds at most, as in the released code.

    Args:
        weight: Of any shape.
        bits: $b$, from 1 to 8.
        seed: Of the start.

    Raises:
        UserError: If ``bits`` is out of range.
    """
    # Imported here as it takes a second.
    from sklearn.cluster import KMeans

    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise UserError(f"bits must be an integer in [1, 8], got {bits!r}")
    flat = weight.detach().cpu().double().numpy().reshape(-1, 1)
    count = min(2**bits, len(np.unique(flat)))
    found = KMeans(count, n_init=1, max_iter=50, random_state=seed).fit(flat)
    centroids = torch.from_numpy(found.cluster_centers_[:, 0]).to(weight)
    return Clusters(centroids, torch.from_numpy(found.labels_).long().view(weight.shape).to(weight.device))


@torch.no_grad()
def cluster_weights(model: nn.Module, bits: Mapping[str, int], seed: int = 0) -> dict[str, Int64[Tensor, "..."]]:
    """Give layers shared weights, in place.

    Args:
        model: Any model.
        bits: By name of the layer.
        seed: Of k-means.

    Returns:
        The cluster of each weight, for ``SharedWeights``.

    Raises:
        UserError: If a layer is unknown or ``bits`` out of range.
    """
    modules, labels = quantizable(model), {}
    for name, number in bits.items():
        if name not in modules:
            raise unknown("layer", name, modules)
        clusters = kmeans_quantize(modules[name].weight, number, seed)
        modules[name].weight.copy_(clusters.weight)
        labels[name] = clusters.labels
    return labels


class SharedWeights(Intervention):
    """Fine-tunes shared weights: after each step, the weights of a cluster become their mean.

    Args:
        labels: From ``cluster_weights``.

    Example:
        >>> labels = cluster_weights(model, {"conv1": 4, "fc": 3})
        >>> Trainer(epochs=30, interventions=[SharedWeights(labels)]).fit(model, ...)
    """

    def __init__(self, labels: Mapping[str, Int64[Tensor, "..."]]) -> None:
        self.labels = dict(labels)

    def on_step_end(self, state: State) -> None:
        modules = quantizable(state.module)
        with torch.no_grad():
            for name, labels in self.labels.items():
                weight = modules[name].weight
                flat = labels.to(weight.device).flatten()
                sums = torch.zeros(int(flat.max()) + 1, device=weight.device, dtype=weight.dtype)
                means = sums.index_add(0, flat, weight.flatten()) / flat.bincount()
                weight.copy_(means[flat].view_as(weight))
