"""One small DETR kit, so that methods and baselines share encoder, matcher, losses and metric."""

from .attention import MSDeformAttn
from .coco import CocoData, coco_splits, coco_targets, collated, to_coco
from .criterion import SetCriterion
from .detr import Decoder, Detr, Encoder, TinyBackbone, baseline, padded
from .embedding import Level, grid, level, sine_embed
from .evaluate import coco_evaluate, coco_rows, detect
from .fewshot import FewShotSplit, Shot, SupportSet, check_shots, keep_categories, sample_k_shot
from .layers import (
    ConditionalDecoderLayer,
    DeformableDecoderLayer,
    DeformableEncoderLayer,
    DetrDecoderLayer,
    EncoderLayer,
    FeedForward,
    mlp,
)
from .matcher import HungarianMatcher, Objects
from .roi import roi_sample
from .targets import Detections, Prediction, Targets, flat_targets, pack, post_process, unpack

__all__ = [
    "CocoData",
    "ConditionalDecoderLayer",
    "Decoder",
    "DeformableDecoderLayer",
    "DeformableEncoderLayer",
    "Detections",
    "Detr",
    "DetrDecoderLayer",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "FewShotSplit",
    "HungarianMatcher",
    "Level",
    "MSDeformAttn",
    "Objects",
    "Prediction",
    "SetCriterion",
    "Shot",
    "SupportSet",
    "Targets",
    "TinyBackbone",
    "baseline",
    "check_shots",
    "coco_evaluate",
    "coco_rows",
    "coco_splits",
    "coco_targets",
    "collated",
    "detect",
    "flat_targets",
    "grid",
    "keep_categories",
    "level",
    "mlp",
    "pack",
    "padded",
    "post_process",
    "roi_sample",
    "sample_k_shot",
    "sine_embed",
    "to_coco",
    "unpack",
]
