"""Bases: from images to the feature maps that IERN takes apart."""

from typing import Any

from torch import nn

from paperworks.errors import unknown

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def resnet_base(name: str = "resnet50", channels: int = 512, *, weights: Any = None) -> nn.Sequential:
    """A torchvision ResNet without pooling and classifier, then a 1x1 convolution to ``channels`` (paper, section 4.2).

    Args:
        name: ``"resnet18"`` to ``"resnet152"``. 224x224 images give 7x7 maps.
        channels: Channels of the maps.
        weights: As in torchvision, e.g. ``"IMAGENET1K_V1"``, which downloads them where they are not cached.

    Raises:
        UserError: If ``name`` is unknown.
    """
    import torchvision

    if name not in RESNETS:
        raise unknown("ResNet", name, RESNETS)
    resnet = getattr(torchvision.models, name)(weights=weights)
    stages = list(resnet.children())[:-2]
    return nn.Sequential(*stages, nn.Conv2d(resnet.fc.in_features, channels, 1))
