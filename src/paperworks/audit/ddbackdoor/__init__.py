"""DOORPING: backdoors planted while a data set is distilled, and the defences to test against them.

Liu et al., "Backdoor Attacks Against Dataset Distillation", NDSS 2023.
For testing one's own pipelines and detectors.
"""

from .attacks import DoorpingAttack, NaiveAttack, TriggerUpdate, update_trigger
from .condensation import distill_dc
from .defences import (
    ReverseEngineered,
    activation_clustering,
    anomaly_index,
    crop_and_cutout,
    fine_pruning,
    neural_cleanse,
    penultimate,
    range_check,
    spectral_signature,
    strip_entropy,
)
from .distilled import DistilledSet, DistilledSteps, unroll
from .evaluate import Evaluation, attack_success, clean_accuracy, evaluate_distilled
from .hooks import DistillationHook
from .matching import class_gradients, gradient_distance
from .networks import distillation_alexnet, distillation_convnet
from .pixels import Normalization
from .trigger import Trigger, poison
from .unrolled import distill_dd

__all__ = [
    "DistillationHook",
    "DistilledSet",
    "DistilledSteps",
    "DoorpingAttack",
    "Evaluation",
    "NaiveAttack",
    "Normalization",
    "ReverseEngineered",
    "Trigger",
    "TriggerUpdate",
    "activation_clustering",
    "anomaly_index",
    "attack_success",
    "class_gradients",
    "clean_accuracy",
    "crop_and_cutout",
    "distill_dc",
    "distill_dd",
    "distillation_alexnet",
    "distillation_convnet",
    "evaluate_distilled",
    "fine_pruning",
    "gradient_distance",
    "neural_cleanse",
    "penultimate",
    "poison",
    "range_check",
    "spectral_signature",
    "strip_entropy",
    "unroll",
    "update_trigger",
]
