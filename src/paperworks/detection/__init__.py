"""Finding objects."""

from .samdetr import AlignedCrossAttention, SamDecoderLayer, SamDetr, SemanticsAligner, level_schedule, smca_prior

__all__ = [
    "AlignedCrossAttention",
    "SamDecoderLayer",
    "SamDetr",
    "SemanticsAligner",
    "level_schedule",
    "smca_prior",
]
