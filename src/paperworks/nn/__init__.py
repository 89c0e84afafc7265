"""Building blocks that two or more methods share."""

from .backbones import CifarResNet, ConvNet, mlp
from .resnet3d import resnet3d, thin

__all__ = ["CifarResNet", "ConvNet", "mlp", "resnet3d", "thin"]
