"""3D residual networks of any depth and width, and thin copies of a builder."""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.errors import UserError, check_counts

BASIC = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
BOTTLENECK = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class ResNet3d(nn.Module):
    """A residual network whose convolutions span time and space (Hara et al. 2018; Tran et al. 2018, "R3D").

    The stem is a 3x7x7 convolution that halves height and width; the second, third and fourth of the four stages
    halve frames, height and width. Stage k has ``width * 2**k`` channels, four times as many where its blocks are
    bottlenecks (depth 50 and more). Weights are drawn from torch's global generator: seed it for the same network.

    Args:
        depth: Layers: 10, 18, 34, 50, 101 or 152.
        width: Channels of the first stage.
        num_classes: Number of logits.
        in_channels: Channels of a frame.

    Raises:
        UserError: If the depth is none of these, or another argument is not positive.
    """

    def __init__(self, depth: int, width: int, num_classes: int, *, in_channels: int = 3) -> None:
        super().__init__()
        check_counts(width=width, num_classes=num_classes, in_channels=in_channels)
        if depth not in (depths := BASIC | BOTTLENECK):
            raise UserError(f"depth must be one of {', '.join(map(str, depths))}, got {depth}")
        expansion = 4 if depth in BOTTLENECK else 1
        self.stem = nn.Sequential(
            nn.Conv3d(in_channels, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )
        stages: list[nn.Module] = []
        channels = width
        for stage, blocks in enumerate(depths[depth]):
            inner = width * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(Residual(channels, inner, inner * expansion, stride))
                channels = inner * expansion
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(channels, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last_3d)  # a step is a fifth faster on a CPU, a third if it is thin

    def forward(self, clips: Float[Tensor, "batch channels frames height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.blocks(self.stem(clips)))


class Residual(nn.Module):
    """Two 3x3x3 convolutions, or 1x1x1, 3x3x3, 1x1x1 where the block is a bottleneck, and a shortcut."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        if inner == outputs:
            convolutions = [_conv(inputs, inner, 3, stride), _conv(inner, outputs, 3)]
        else:
            convolutions = [_conv(inputs, inner, 1), _conv(inner, inner, 3, stride), _conv(inner, outputs, 1)]
        layers: list[nn.Module] = []
        for convolution in convolutions:
            layers += [convolution, nn.BatchNorm3d(convolution.out_channels), nn.ReLU(inplace=True)]
        self.residual = nn.Sequential(*layers[:-1])  # the last activation follows the sum
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm3d(outputs))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Float[Tensor, "batch c t h w"]) -> Float[Tensor, "batch c2 t2 h2 w2"]:
        return self.activation(self.residual(x) + self.shortcut(x))


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, size, stride, size // 2, bias=False)


def resnet3d(depth: int = 18, width: int = 64, num_classes: int = 400, *, in_channels: int = 3) -> ResNet3d:
    """Build a 3D residual network; the defaults are torchvision's ``r3d_18`` (see `ResNet3d` for the arguments)."""
    return ResNet3d(depth, width, num_classes, in_channels=in_channels)


def thin(build: Callable[..., nn.Module], width: float = 0.25) -> Callable[..., nn.Module]:
    """Make a builder of networks with a share of the channels, e.g. ``thin(partial(resnet3d, 50))(num_classes=101)``.

    Args:
        build: A builder with an argument ``width`` that has a default.
        width: Share of the channels that is left; arithmetic falls with its square. Default: CMPL's auxiliary network.

    Raises:
        UserError: If ``width`` is not positive, or ``build`` has no default width.
    """
    if not width > 0:
        raise UserError(f"width must be positive, got {width}")
    parameter = inspect.signature(build).parameters.get("width")
    if parameter is None or not isinstance(parameter.default, int):
        raise UserError(f"build must take an argument width with a default, got {build}")
    return partial(build, width=max(1, round(parameter.default * width)))
