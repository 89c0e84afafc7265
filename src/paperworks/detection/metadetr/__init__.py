"""Meta-DETR (Zhang et al. 2022): few-shot detection on the level of the picture."""

from .aggregation import CorrelationalAggregation, slot_codes
from .codes import CodeBook
from .episodes import augmented, episode_targets, inference_episodes, sample_episode
from .model import CosineClassifier, MetaDetr, MetaPrediction, MetaTask, PointDecoder, plain_detr
from .training import (
    EpisodeSampler,
    MetaCriterion,
    MetaTargets,
    finetuning_factor,
    parameter_groups,
    prepare_finetuning,
)

__all__ = [
    "CodeBook",
    "CorrelationalAggregation",
    "CosineClassifier",
    "EpisodeSampler",
    "MetaCriterion",
    "MetaDetr",
    "MetaPrediction",
    "MetaTargets",
    "MetaTask",
    "PointDecoder",
    "augmented",
    "episode_targets",
    "finetuning_factor",
    "inference_episodes",
    "parameter_groups",
    "plain_detr",
    "prepare_finetuning",
    "sample_episode",
    "slot_codes",
]
