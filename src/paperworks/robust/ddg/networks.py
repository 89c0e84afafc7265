"""Encoders and decoders for small images (vectors as codes) and large ones (a map and AdaIN).

No network here uses batch statistics. The reference has batch normalisation at 28x28; with group and layer
normalisation in its place, passes over several sets of images can be joined into one without changing a number.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.errors import UserError, check_counts

from .blocks import SLOPE, ResidualBlock, convolution, group_norm, instance_norm, upsampler

Images = Float[Tensor, "batch channels height width"]
Vectors = Float[Tensor, "batch features"]
Codes = Float[Tensor, "batch ..."]


class SemanticEncoder(nn.Sequential):
    r"""$s(x)$ for small images: the four convolutions of DomainBed's ``MNIST_CNN``, averaged to a vector.

    Args:
        channels: Channels of an image.
        width: Channels of the first convolution; the others have twice as many. 64 is the reference's, for 28x28.
    """

    def __init__(self, channels: int = 1, width: int = 64) -> None:
        check_counts(channels=channels, width=width)
        self.out_features = wide = 2 * width
        layers: list[nn.Module] = []
        for before, after, stride in [(channels, width, 1), (width, wide, 2), (wide, wide, 1), (wide, wide, 1)]:
            groups = 8 if after % 8 == 0 else 1
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.ReLU(), nn.GroupNorm(groups, after)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class VariationEncoder(nn.Module):
    r"""$v(x)$: what of an image is not its class, from its grey-scale version.

    Both limits matter: without a bottleneck, $v(x) = x$ satisfies the constraint and the decoder need not look at the
    semantics. Grey input withholds colour, and a small code withholds detail.

    Args:
        code: Length of the code vector; ``None`` returns the feature map instead, which is what `AdaINDecoder` takes.
        downsamplings: Halvings of the side. The reference has 2 for 28x28 and 4 for 224x224.
        blocks: Residual blocks behind them; the reference has 1 and 4.
        width: Channels after the first convolution; they double with every halving but the first, and once more.

    The reference's code at 28x28 is the average of 64 maps (``code=64, width=16``); a linear layer behind the average
    makes its length free here.
    """

    def __init__(self, code: int | None = 64, *, downsamplings: int = 2, blocks: int = 1, width: int = 16) -> None:
        super().__init__()
        check_counts(code=code or 1, downsamplings=downsamplings, blocks=blocks, width=width)
        norm = group_norm if code else instance_norm
        layers = [convolution(1, width, 3, 2, norm=norm), convolution(width, 2 * width, 3, norm=norm)]
        channels = 2 * width
        for _ in range(downsamplings - 1):
            layers += [
                convolution(channels, channels, 3, norm=norm),
                convolution(channels, 2 * channels, 3, 2, norm=norm),
            ]
            channels *= 2
        layers += [ResidualBlock(channels, norm) for _ in range(blocks)]
        if code:
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, code)]
        self.body = nn.Sequential(*layers)
        self.out_features = code or channels

    def forward(self, images: Images) -> Codes:
        return self.body(images.mean(1, keepdim=True))


class SwapDecoder(nn.Module):
    r"""$D(v, s)$ for small images: both codes in one vector, then upwards.

    Args:
        variation: Length of $v(x)$.
        semantics: Length of $s(x)$.
        image_shape: ``(channels, height, width)`` of the images; the sides must be multiples of 4.
        width: Channels of the smallest map; the reference's is 64. A multiple of 8.

    Raises:
        UserError: If the sides or ``width`` do not divide.
    """

    def __init__(self, variation: int, semantics: int, image_shape: tuple[int, int, int], width: int = 64) -> None:
        super().__init__()
        channels, height, side = image_shape
        check_counts(variation=variation, semantics=semantics, channels=channels, height=height, width=side)
        if height % 4 or side % 4:
            raise UserError(f"image_shape must have sides that are multiples of 4, got {tuple(image_shape)}")
        if width < 8 or width % 8:
            raise UserError(f"width must be a multiple of 8, got {width}")
        self.joint = nn.Sequential(
            nn.Linear(variation + semantics, width),
            nn.LayerNorm(width),
            nn.LeakyReLU(SLOPE),
            nn.Unflatten(1, (width, 1, 1)),
        )
        self.body = nn.Sequential(
            nn.ConvTranspose2d(width, width, (height // 4, side // 4), bias=False),
            group_norm(width),
            nn.LeakyReLU(SLOPE),
            ResidualBlock(width, group_norm),
            upsampler(width, channels, doublings=2),
        )

    def forward(self, variation: Float[Tensor, "batch code"], semantics: Vectors) -> Images:
        return self.body(self.joint(torch.cat([variation, semantics], 1)))


class AdaINDecoder(nn.Module):
    r"""$D(v, s)$ for large images: the map $v$ is rebuilt upwards in the style that $s$ dictates (DG-Net's design).

    Semantics are max-pooled to four horizontal stripes. Each stripe drives one residual block, whose two instance
    normalisations take scale and bias from it through two three-layer perceptrons.

    Args:
        variation: Channels of $v(x)$, a map; 256 from ``VariationEncoder(None, downsamplings=4, blocks=4)``.
        semantics: Channels of $s(x)$: maps ``[batch, semantics, rows, columns]``, or vectors, which are then the same
            in every stripe.
        channels: Channels of an image.
        doublings: Doublings of the side of the map; those that the encoder halved.
        hidden: Width of the perceptrons.

    The reference reads its four chunks out of ``[channels, stripes]`` flattened channel by channel, so that each holds
    all stripes of a quarter of the channels; here each is one stripe.
    """

    STRIPES = 4

    def __init__(
        self, variation: int = 256, semantics: int = 512, channels: int = 3, *, doublings: int = 4, hidden: int = 512
    ) -> None:
        super().__init__()
        check_counts(semantics=semantics, channels=channels, doublings=doublings, hidden=hidden)
        if variation < 1 or variation % 2**doublings:
            raise UserError(f"variation must be a multiple of {2**doublings} (2**doublings), got {variation}")
        self.stripes = nn.AdaptiveMaxPool2d((self.STRIPES, 1))
        self.blocks = nn.ModuleList(AdaINBlock(variation, semantics, hidden) for _ in range(self.STRIPES))
        self.body = upsampler(variation, channels, doublings)

    def forward(
        self, variation: Float[Tensor, "batch maps rows columns"], semantics: Float[Tensor, "batch features ..."]
    ) -> Images:
        maps = semantics[..., None, None] if semantics.ndim == 2 else semantics
        for block, stripe in zip(self.blocks, self.stripes(maps).squeeze(-1).unbind(-1), strict=True):
            variation = block(variation, stripe)
        return self.body(variation)


class AdaINBlock(nn.Module):
    r"""Residual block with adaptive instance normalisation (Huang & Belongie 2017): $w(s)\,\mathrm{IN}(x) + b(s)$."""

    def __init__(self, channels: int, semantics: int, hidden: int) -> None:
        super().__init__()
        self.scale, self.bias = (_perceptron(semantics, hidden, 2 * channels) for _ in range(2))
        self.first, self.second = (
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect") for _ in range(2)
        )
        self.norm = nn.InstanceNorm2d(channels)

    def forward(self, x: Images, semantics: Vectors) -> Images:
        scales = self.scale(semantics)[..., None, None].chunk(2, 1)
        biases = self.bias(semantics)[..., None, None].chunk(2, 1)
        inner = nn.functional.leaky_relu(scales[0] * self.norm(self.first(x)) + biases[0], SLOPE)
        return x + scales[1] * self.norm(self.second(inner)) + biases[1]


def _perceptron(before: int, hidden: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(before, hidden),
        nn.LeakyReLU(SLOPE),
        nn.Linear(hidden, hidden),
        nn.LeakyReLU(SLOPE),
        nn.Linear(hidden, after),
    )
