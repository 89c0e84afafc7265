"""Robustar: find the pixels that a classifier wrongly relies on, mask them, and train on without them.

Chen et al., "Robustar: Interactive Toolbox Supporting Precise Data Annotation for Robust Vision Learning", ICML 2022
workshop. ``paperworks robustar serve DIR`` is its page.
"""

from .fills import FILLS, fill_masked
from .influence import last_layer, last_layer_influence, lissa_influence
from .masks import mask_from_white, shrink_mask
from .paired import PairedImages, PairedTraining, consistency, paired_loss
from .preprocess import Preprocess
from .project import Evaluation, Imported, Influences, Page, RobustarProject
from .proposals import (
    PROPOSERS,
    Background,
    OcclusionProposer,
    Proposer,
    SaliencyOutsideObject,
    estimate_foreground,
    superpixels,
)
from .saliency import saliency, saliency_share
from .tasks import Busy, Cancelled, Task, TaskManager

__all__ = [
    "FILLS",
    "PROPOSERS",
    "Background",
    "Busy",
    "Cancelled",
    "Evaluation",
    "Imported",
    "Influences",
    "OcclusionProposer",
    "Page",
    "PairedImages",
    "PairedTraining",
    "Preprocess",
    "Proposer",
    "RobustarProject",
    "SaliencyOutsideObject",
    "Task",
    "TaskManager",
    "consistency",
    "estimate_foreground",
    "fill_masked",
    "last_layer",
    "last_layer_influence",
    "lissa_influence",
    "mask_from_white",
    "paired_loss",
    "saliency",
    "saliency_share",
    "shrink_mask",
    "superpixels",
]
