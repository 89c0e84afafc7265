"""Deep Reuse (R2): vectors that look alike are multiplied once."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.errors import UserError

from .clusters import Clusters, check_bits, cluster, projections, signatures
from .layers import BackOff, check_convolution
from .measures import check_block
from .patches import Patches, kernel_rows

TRAFFIC = 60.0
"""Output columns whose product takes as long as gathering and scattering do beside it; on CPUs."""


def reuse_cost(bits: int, out_features: int, cluster_ratio: float) -> float:
    r"""Cost of Deep Reuse over that of the product, in operations: $H / M + u$."""
    return bits / out_features + cluster_ratio


def predicted_cost(bits: int, out_features: int, cluster_ratio: float) -> float:
    """The same in time, as measured on CPUs: $2 (H / M + u) + 60 / M$.

    Products on gathered rows take twice as long, and memory traffic does not shrink with the clusters.
    """
    return 2 * reuse_cost(bits, out_features, cluster_ratio) + TRAFFIC / out_features


def deep_reuse(
    x: Float[Tensor, "n k"],
    weight: Float[Tensor, "m k"],
    bias: Float[Tensor, "m"] | None = None,
    *,
    bits: int = 12,
    block: int | None = None,
    seed: int = 0,
) -> Float[Tensor, "n m"]:
    r"""``F.linear`` on the centroids of similar vectors (Ning & Shen 2019).

    Columns are cut in blocks of $L$. In each, vectors with equal signatures (the signs of $(x - \mu) p_h$ for
    $h = 1 \dots H$) are a cluster, and

    $$Y = \sum_{\text{blocks}} (X_c W_{\text{block}}^\top)[\text{cluster}] + b$$

    with the centroids $X_c$. It costs $H/M + n_c/N$ of the product. Gradients flow through the centroids.

    Args:
        x: Vectors.
        weight, bias: As in ``F.linear``.
        bits: $H$, from 0 (one cluster: the mean) to 62.
        block: $L$, a divisor of $k$; by default $k$.
        seed: Draws the directions.

    Raises:
        UserError: If an argument is out of range.
    """
    check_bits(bits)
    block = x.shape[1] if block is None else block
    check_block(block, x.shape[1])
    clusters = _hash(x, _directions(x.shape[1], block, bits, seed).to(x))
    return _products(x, weight, bias, clusters)


def _directions(columns: int, block: int, bits: int, seed: int) -> Float[Tensor, "blocks block bits"]:
    return torch.stack([projections(block, bits, seed + start) for start in range(0, columns, block)])


def _hash(x: Float[Tensor, "n k"], directions: Float[Tensor, "blocks block bits"]) -> list[Clusters]:
    """The clusters in each block of columns."""
    parts = torch.split(x.detach(), directions.shape[1], 1)
    return [cluster(signatures(part @ axes)) for part, axes in zip(parts, directions, strict=True)]


def _products(
    x: Float[Tensor, "n k"],
    weight: Float[Tensor, "m k"],
    bias: Float[Tensor, "m"] | None,
    clusters: Sequence[Clusters],
) -> Float[Tensor, "n m"]:
    block = x.shape[1] // len(clusters)
    shares = [
        (found.mean(part) @ kernel.T).index_select(0, found.ids)
        for found, part, kernel in zip(clusters, torch.split(x, block, 1), torch.split(weight, block, 1), strict=True)
    ]
    y = sum(shares[1:], shares[0])
    return y if bias is None else y + bias


class _Reuse(nn.Module):
    """What both layers share: the directions, when to fall back to the original, and the last cluster ratio."""

    directions: Tensor

    def __init__(self, training: bool, directions: Tensor, out_features: int, auto: bool) -> None:
        super().__init__()
        self.register_buffer("directions", directions, persistent=False)
        self.auto, self.cluster_ratio = auto, math.nan
        self._out_features, self._back_off = out_features, BackOff()
        self.train(training)

    @property
    def bits(self) -> int:
        """Bits of a signature."""
        return self.directions.shape[-1]

    def _resting(self) -> bool:
        return self.auto and not self.training and self._back_off.resting()

    def _pays(self, clusters: Sequence[Clusters]) -> bool:
        """Whether to reuse in this call."""
        self.cluster_ratio = sum(found.number / len(found.ids) for found in clusters) / len(clusters)
        if not self.auto or self.training:
            return True
        gains = predicted_cost(self.bits, self._out_features, self.cluster_ratio) < 1
        self._back_off.report(gains)
        return gains


class ReuseLinear(_Reuse):
    """``nn.Linear`` by Deep Reuse; see ``deep_reuse``. Made by ``from_layer``.

    Attributes:
        layer: The original.
        auto: Whether a call is computed densely where reuse is not predicted to pay; it looks again after 1, 2, 4 …
            32 calls. While training, reuse is always on, so that the weights learn to do with it.
        cluster_ratio: $u$ of the last call that looked.
    """

    layer: nn.Linear

    @classmethod
    def from_layer(
        cls, layer: nn.Linear, bits: int = 12, block: int | None = None, *, auto: bool = True, seed: int = 0
    ) -> "ReuseLinear":
        """The layer that computes another by reuse, with the very parameters of it.

        Args:
            layer: The other.
            bits: $H$, bits of a signature.
            block: $L$, columns of a block; by default all.
            auto: See the attributes.
            seed: Draws the directions.

        Raises:
            UserError: If an argument is out of range.
        """
        if not isinstance(layer, nn.Linear):
            raise UserError(f"ReuseLinear takes an nn.Linear, got {type(layer).__name__}")
        check_bits(bits)
        block = layer.in_features if block is None else block
        check_block(block, layer.in_features)
        directions = _directions(layer.in_features, block, bits, seed).to(layer.weight)
        new = cls(layer.training, directions, layer.out_features, auto)
        new.layer = layer
        return new

    def forward(self, x: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch m"]:
        if self._resting():
            return self.layer(x)
        rows = x.flatten(0, -2)
        clusters = _hash(rows, self.directions)
        if not self._pays(clusters):
            return self.layer(x)
        return _products(rows, self.layer.weight, self.layer.bias, clusters).view(*x.shape[:-1], -1)


class ReuseConv2d(_Reuse):
    """``nn.Conv2d`` by Deep Reuse: one product a cluster of similar patches. Made by ``from_layer``.

    Signatures are the signs of a convolution with $H$ random filters, so that no patch is copied for them.

    Attributes:
        layer: The original.
        auto, cluster_ratio: As for ``ReuseLinear``.
    """

    layer: nn.Conv2d

    @classmethod
    def from_layer(
        cls,
        layer: nn.Conv2d,
        bits: int = 12,
        *,
        auto: bool = True,
        seed: int = 0,
    ) -> "ReuseConv2d":
        """The layer that computes another by reuse, with the very parameters of it.

        Args:
            layer: The other: ungrouped, with zero padding.
            bits: $H$, bits of a signature.
            auto: See the attributes.
            seed: Draws the filters.

        Raises:
            UserError: If an argument is out of range, or the layer of another kind.
        """
        conv = check_convolution(layer, "ReuseConv2d")
        check_bits(bits)
        columns = conv.weight[0].numel()
        filters = projections(columns, bits, seed).to(conv.weight).T.reshape(bits, *conv.weight.shape[1:])
        new = cls(conv.training, filters.movedim(0, -1), conv.out_channels, auto)
        new.layer = conv
        return new

    def forward(self, x: Float[Tensor, "n c height width"]) -> Float[Tensor, "n m rows columns"]:
        conv = self.layer
        if self._resting():
            return conv(x)
        patches = Patches.of(conv, x.shape)
        found = cluster(signatures(self._projected(x.detach(), patches)))
        if not self._pays([found]):
            return conv(x)
        product = _means(patches, patches.pixels(x), found) @ kernel_rows(conv.weight)
        if conv.bias is not None:
            product = product + conv.bias
        return patches.unflatten(product.index_select(0, found.ids))

    def _projected(self, x: Tensor, patches: Patches) -> Float[Tensor, "outputs bits"]:
        if not self.bits:
            return x.new_empty(patches.outputs, 0)
        conv = self.layer
        filters = self.directions.movedim(-1, 0)
        maps = F.conv2d(x, filters, None, conv.stride, conv.padding, conv.dilation)
        return maps.permute(0, 2, 3, 1).reshape(-1, self.bits)


def _means(patches: Patches, pixels: Float[Tensor, "pixels c"], found: Clusters) -> Float[Tensor, "clusters taps_c"]:
    """The mean patch of each cluster, summed tap by tap without a copy of all patches."""
    order, starts, sizes = found.members()
    corners = patches.corners(order)
    sums = [F.embedding_bag(corners + tap, pixels, starts, mode="sum") for tap in patches.taps(pixels.device).tolist()]
    return torch.cat(sums, dim=1) / sizes[:, None]
