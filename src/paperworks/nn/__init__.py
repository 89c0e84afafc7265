"""Building blocks that two or more methods share."""

from .backbones import CifarResNet, ConvNet, mlp
from .hooks import removing
from .modes import keeping_modes
from .resnet3d import resnet3d, thin

__all__ = ["CifarResNet", "ConvNet", "keeping_modes", "mlp", "removing", "resnet3d", "thin"]
