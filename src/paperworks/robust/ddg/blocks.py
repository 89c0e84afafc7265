"""Convolution blocks of the generator and the discriminator: reflect padding, leaky ReLU of slope 0.2."""

from collections.abc import Callable

from torch import Tensor, nn

SLOPE = 0.2
Norm = Callable[[int], nn.Module]
"""Makes a normalisation layer for a number of channels."""


def group_norm(channels: int) -> nn.Module:
    """Groups of eight channels."""
    return nn.GroupNorm(max(1, channels // 8), channels)


def instance_norm(channels: int) -> nn.Module:
    """Every channel by itself, without parameters."""
    return nn.InstanceNorm2d(channels)


def layer_norm(channels: int) -> nn.Module:
    """All channels and pixels of an image together."""
    return nn.GroupNorm(1, channels)


def no_norm(channels: int) -> nn.Module:
    """None."""
    return nn.Identity()


def convolution(before: int, after: int, kernel: int, stride: int = 1, *, norm: Norm, active: bool = True) -> nn.Module:
    """Convolution that keeps the side (or divides it by ``stride``), normalisation, leaky ReLU."""
    layers = [nn.Conv2d(before, after, kernel, stride, kernel // 2, padding_mode="reflect"), norm(after)]
    return nn.Sequential(*layers, *[nn.LeakyReLU(SLOPE)] * active)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            convolution(channels, channels, 3, norm=norm), convolution(channels, channels, 3, norm=norm, active=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


def upsampler(channels: int, out_channels: int, doublings: int) -> nn.Sequential:
    """From feature maps to an image: double the side and halve the channels, then three convolutions to pixels."""
    layers: list[nn.Module] = []
    for _ in range(doublings):
        layers += [nn.Upsample(scale_factor=2), convolution(channels, channels // 2, 5, norm=layer_norm)]
        channels //= 2
    layers += [convolution(channels, channels, 3, norm=no_norm) for _ in range(2)]
    return nn.Sequential(*layers, nn.Conv2d(channels, out_channels, 1))
