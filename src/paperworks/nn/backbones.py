"""Small image classifiers, trained in seconds to minutes on one core.

The convolutional ones end in a global average and one linear layer, ``classifier``, over the feature maps
that ``features`` returns, so that class activation maps can be read off them.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.errors import UserError, check_counts

Images = Float[Tensor, "batch channels height width"]
Maps = Float[Tensor, "batch features rows columns"]
Logits = Float[Tensor, "batch classes"]


def mlp(in_features: int, hidden: Sequence[int], num_classes: int) -> nn.Sequential:
    """A multilayer perceptron with ReLU between its layers; flattens what it is given.

    Args:
        in_features: Numbers in one example: channels x height x width.
        hidden: Widths of the hidden layers; none makes it linear.
        num_classes: Logits.
    """
    check_counts(in_features=in_features, hidden=min(hidden, default=1), num_classes=num_classes)
    widths = [in_features, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))


class ConvNet(nn.Module):
    """A plain stack of 3x3 convolution, batch norm and ReLU, then global average and a linear layer.

    Args:
        in_channels: Channels of an image.
        num_classes: Logits.
        widths: Output channels of each convolution.
        strides: Stride of each. The defaults fit 8x8 digits: maps of 2x2 are averaged.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int] = (16, 16, 32, 32, 64),
        strides: Sequence[int] = (1, 1, 2, 1, 2),
    ) -> None:
        super().__init__()
        check_counts(in_channels=in_channels, num_classes=num_classes, widths=min(widths, default=0))
        if len(widths) != len(strides):
            raise UserError(f"strides must be as many as widths, got {len(strides)} and {len(widths)}")
        blocks = [
            nn.Sequential(*_conv_norm(before, after, stride), nn.ReLU())
            for before, after, stride in zip([in_channels, *widths], widths, strides, strict=False)
        ]
        self.body = nn.Sequential(*blocks)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def features(self, images: Images) -> Maps:
        """The maps that are averaged."""
        return self.body(images)

    def forward(self, images: Images) -> Logits:
        return self.classifier(self.features(images).mean((-2, -1)))


class CifarResNet(nn.Module):
    r"""The residual network for 32x32 images (He et al. 2016, section 4.2) with parameter-free shortcuts.

    A 3x3 convolution, three stages of $n = (\text{depth} - 2) / 6$ blocks with ``width``, 2 ``width`` and
    4 ``width`` channels on maps of full, half and quarter side, global average, linear layer. Where a block
    halves the side, its shortcut takes every second pixel and fills the new channels with zeros (option A).
    Depth 20 has 269,722 parameters for 3 channels and 10 classes.

    Args:
        depth: Layers with weights: 6 n + 2, e.g. 8, 14, 20, 32, 56.
        width: Channels of the first stage; the paper's is 16.
        in_channels: Channels of an image.
        num_classes: Logits.
    """

    def __init__(self, depth: int = 20, width: int = 16, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        check_counts(width=width, in_channels=in_channels, num_classes=num_classes)
        if depth < 8 or depth % 6 != 2:
            raise UserError(f"depth must be 6 n + 2 (8, 14, 20, 26, 32 …), got {depth}")
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_ResidualBlock(channels, width << stage, stride))
                channels = width << stage
        self.body = nn.Sequential(*_conv_norm(in_channels, width, 1), nn.ReLU(), *blocks)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def features(self, images: Images) -> Maps:
        """The maps that are averaged."""
        return self.body(images)

    def forward(self, images: Images) -> Logits:
        return self.classifier(self.features(images).mean((-2, -1)))


class _ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_conv_norm(in_channels, out_channels, stride),
            nn.ReLU(),
            *_conv_norm(out_channels, out_channels, 1),
        )
        self.stride, self.new_channels = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[..., :: self.stride, :: self.stride]
        # Channels are the third dimension from the end.
        shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels)) if self.new_channels else shortcut
        return F.relu(self.residual(x) + shortcut)


def _conv_norm(in_channels: int, out_channels: int, stride: int) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out_channels)
