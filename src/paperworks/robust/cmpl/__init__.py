"""CMPL: two differently built video networks label each other's unlabelled clips.

Xu et al., "Cross-Model Pseudo-Labeling for Semi-Supervised Action Recognition", CVPR 2022. There is no official code;
this is a reconstruction from the paper.
"""

from .augment import ClipAugment
from .intervention import CMPL
from .loss import PseudoLabelStats, cross_pseudo_label_loss
from .module import CMPLModule
from .randaugment import OPERATIONS, RandAugment
from .transforms import (
    ClipTransform,
    Cutout,
    RandomContrast,
    RandomFlip,
    RandomInvert,
    RandomNoise,
    RandomResizedCrop,
    RandomShift,
)

__all__ = [
    "CMPL",
    "OPERATIONS",
    "CMPLModule",
    "ClipAugment",
    "ClipTransform",
    "Cutout",
    "PseudoLabelStats",
    "RandAugment",
    "RandomContrast",
    "RandomFlip",
    "RandomInvert",
    "RandomNoise",
    "RandomResizedCrop",
    "RandomShift",
    "cross_pseudo_label_loss",
]
