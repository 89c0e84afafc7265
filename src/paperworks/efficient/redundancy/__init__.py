"""Redundancy: what of a model's work its data make unnecessary, and one technique for each kind of it.

After Chen et al., "Survey: Exploiting Data Redundancy for Optimization of Deep Learning", ACM Computing Surveys 2023.
The classes (``TAXONOMY``) are an operational taxonomy of our own, reconstructed from the survey's scope.
"""

from .cascade import ResolutionCascade
from .delta import DeltaConv2d, DeltaSession
from .duplicates import CachedModel, cover_radius, deduplicate, k_center
from .gating import ChannelGate, gate_channels
from .keyframes import KeyFrameRunner
from .layers import replace_layers
from .measures import (
    attention_redundancy,
    channel_redundancy,
    duplicate_redundancy,
    lsh_redundancy,
    spectral_redundancy,
    temporal_redundancy,
    token_redundancy,
    value_redundancy,
    zero_redundancy,
)
from .profiler import RedundancyProfiler
from .report import RedundancyReport
from .reuse import ReuseConv2d, ReuseLinear, deep_reuse
from .taxonomy import TAXONOMY, RedundancyClass
from .tiles import TileSkipConv2d
from .tokens import TokenMerger, TokenPruner, merge_tokens, significance
from .tradeoff import measure_tradeoff

__all__ = [
    "TAXONOMY",
    "CachedModel",
    "ChannelGate",
    "DeltaConv2d",
    "DeltaSession",
    "KeyFrameRunner",
    "RedundancyClass",
    "RedundancyProfiler",
    "RedundancyReport",
    "ResolutionCascade",
    "ReuseConv2d",
    "ReuseLinear",
    "TileSkipConv2d",
    "TokenMerger",
    "TokenPruner",
    "attention_redundancy",
    "channel_redundancy",
    "cover_radius",
    "deduplicate",
    "deep_reuse",
    "duplicate_redundancy",
    "gate_channels",
    "k_center",
    "lsh_redundancy",
    "measure_tradeoff",
    "merge_tokens",
    "replace_layers",
    "significance",
    "spectral_redundancy",
    "temporal_redundancy",
    "token_redundancy",
    "value_redundancy",
    "zero_redundancy",
]
