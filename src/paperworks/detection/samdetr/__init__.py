"""SAM-DETR++: decoder queries resampled from the image, so that matching them to regions is easy."""

from .align import Aligned, SemanticsAligner, smca_prior
from .attention import AlignedCrossAttention, PlacedSelfAttention
from .model import SamDecoderLayer, SamDetr, level_schedule

__all__ = [
    "Aligned",
    "AlignedCrossAttention",
    "PlacedSelfAttention",
    "SamDecoderLayer",
    "SamDetr",
    "SemanticsAligner",
    "level_schedule",
    "smca_prior",
]
