"""The networks that take features apart, judge the parts, and put them together again."""

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.errors import UserError

Feature = Float[Tensor, "batch channels height width"]


def normalization(kind: str, channels: int) -> nn.Module:
    """Group normalisation (32 groups at 512 channels, never fewer than 4 channels a group), or batch's."""
    if kind not in ("group", "batch"):
        raise UserError(f"norm must be 'group' or 'batch', got {kind!r}")
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(32, max(channels // 4, 1)), channels)


class ResidualBlock(nn.Module):
    """``x + norm(conv(relu(norm(conv(x)))))``: identity skip, and no ReLU after it."""

    def __init__(self, channels: int, norm: str = "group") -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            normalization(norm, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            normalization(norm, channels),
        )

    def forward(self, x: Feature) -> Feature:
        return x + self.body(x)


class Encoder(nn.Sequential):
    """Extracts the emotion, or the context, from the features of the base: one convolution and residual blocks."""

    def __init__(self, channels: int = 512, blocks: int = 2, norm: str = "group") -> None:
        first = nn.Conv2d(channels, channels, 3, padding=1)
        super().__init__(first, *(ResidualBlock(channels, norm) for _ in range(blocks)))


class Reconstructor(nn.Module):
    r"""Puts emotion and context features together: $R(e, c)$.

    The first convolution of the concatenation $[e, c]$ is held as its two halves, $W_e * e + W_c * c$: the
    same function, but the half of a fixed context is computed once for all examples.
    """

    def __init__(self, channels: int = 512, blocks: int = 3, norm: str = "group") -> None:
        super().__init__()
        self.emotion = nn.Conv2d(channels, channels, 3, padding=1)
        self.context = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(ResidualBlock(channels, norm) for _ in range(blocks)))

    def merge(self, emotion_half: Feature, context_half: Feature) -> Feature:
        """What follows the two halves of the first convolution."""
        return self.blocks(emotion_half + context_half)

    def forward(self, emotion: Feature, context: Feature) -> Feature:
        return self.merge(self.emotion(emotion), self.context(context))


class Discriminator(nn.Module):
    """Classifies a feature map: a 4x4 convolution of stride 2, three 1x1 that halve the channels, one over all.

    Raises:
        UserError: If the map is too small for the strided convolution, or has too few channels to halve.
    """

    def __init__(self, channels: int, num_classes: int, feature_size: tuple[int, int] = (7, 7)) -> None:
        super().__init__()
        kernel = (feature_size[0] // 2, feature_size[1] // 2)
        if min(kernel) < 1:
            size = f"{feature_size[0]}x{feature_size[1]}"
            left = f"{kernel[0]}x{kernel[1]}"
            raise UserError(f"feature_size {size} is too small: the discriminator's 4x4 kernel leaves {left}")
        if channels < 8:
            raise UserError(f"channels must be at least 8, as discriminators halve them thrice, got {channels}")
        widths = [channels, channels // 2, channels // 4, channels // 8]
        layers: list[nn.Module] = [nn.Conv2d(channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.01)]
        for wide, narrow in pairwise(widths):
            layers += [nn.Conv2d(wide, narrow, 1), nn.LeakyReLU(0.01)]
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], num_classes, kernel, bias=False))

    def forward(self, feature: Feature) -> Float[Tensor, "batch classes"]:
        return self.body(feature).flatten(1)


class Head(nn.Sequential):
    """Global average pooling and a linear classifier."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, num_classes))


@torch.no_grad()
def initialize(network: nn.Module, std: float, generator: torch.Generator | None = None) -> None:
    """Draw weights of convolutions and linear layers from N(0, std²), of norms from N(1, 0.02²); biases are 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.normal_(0, std, generator=generator)
        elif isinstance(layer, nn.GroupNorm | nn.BatchNorm2d):
            layer.weight.normal_(1, 0.02, generator=generator)
        else:
            continue
        if layer.bias is not None:
            layer.bias.zero_()
