"""The classes of data redundancy, each with its five labels."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RedundancyClass:
    """A way in which data repeat themselves, how it is found and what saves the repeated work.

    Attributes:
        id: R1 to R9.
        name: What repeats.
        data: The kinds of data that have it.
        location: Where it lies.
        unit: What is repeated or unimportant.
        detection: How the technique finds it.
        exploitation: Skip what is unimportant, reuse what was computed once, or reduce resolution or precision.
        measure: What the profiler measures.
        technique: The names in ``paperworks.efficient`` that exploit it; empty where another method does.
        scope: Whether the technique saves work in single layers, in the model as a whole, or is only reported.
    """

    id: str
    name: str
    data: Literal["image", "video", "sequence", "any"]
    location: Literal["input", "activation", "data set"]
    unit: Literal["value", "vector", "region", "channel", "token", "frame", "sample"]
    detection: Literal["static", "dynamic threshold", "hashing", "learned gate"]
    exploitation: Literal["skip", "reuse", "reduce"]
    measure: str
    technique: str
    scope: Literal["layer", "model", "report"]


_CLASSES = (
    RedundancyClass(
        "R1", "resolution", "image", "input", "region", "dynamic threshold", "reduce",
        "energy below half the Nyquist frequency", "ResolutionCascade", "model",
    ),
    RedundancyClass(
        "R2", "vector similarity", "image", "activation", "vector", "hashing", "reuse",
        "vectors per cluster of equal signatures", "ReuseConv2d, ReuseLinear", "layer",
    ),
    RedundancyClass(
        "R3", "empty regions", "image", "activation", "region", "dynamic threshold", "skip",
        "tiles that are zero with their surroundings", "TileSkipConv2d", "layer",
    ),
    RedundancyClass(
        "R4", "frames", "video", "input", "frame", "dynamic threshold", "reuse",
        "frames that differ little from the one before", "KeyFrameRunner", "model",
    ),
    RedundancyClass(
        "R5", "unchanged pixels", "video", "activation", "vector", "dynamic threshold", "reuse",
        "pixels that are those of the frame before", "DeltaSession", "layer",
    ),
    RedundancyClass(
        "R6", "channels", "any", "activation", "channel", "learned gate", "skip",
        "effective rank of the channels' covariance", "gate_channels, ChannelGate", "layer",
    ),
    RedundancyClass(
        "R7", "tokens", "sequence", "activation", "token", "dynamic threshold", "skip",
        "cosine of each token and its nearest", "TokenPruner, TokenMerger", "model",
    ),
    RedundancyClass(
        "R8", "samples", "any", "data set", "sample", "hashing", "reuse",
        "exact and near duplicates", "deduplicate, k_center, CachedModel", "model",
    ),
    RedundancyClass(
        "R9", "values", "any", "activation", "value", "static", "reduce",
        "entropy of an 8-bit histogram", "", "report",
    ),
)  # fmt: skip

TAXONOMY: dict[str, RedundancyClass] = {kind.id: kind for kind in _CLASSES}
"""The nine classes by id. It is an operational taxonomy of our own, after Chen et al. 2023, whose figure it is not."""
