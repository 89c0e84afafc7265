"""SENT: learn which noisy labels to trust by giving a small clean set the same noise.

Wang et al., "Learning to Detect Noisy Labels Using Model-Based Features", Findings of EMNLP 2022.
Reconstructed from its abstract and introduction.
"""

from .detector import NoisyLabelDetector, OneClassError
from .dynamics import PADDING, STATISTICS, DynamicsRecorder, RecordDynamics, centroid_cosine, label_statistics
from .fitting import Fit, fit_with_trainer, predict_logits
from .selection import confident, confident_learning, small_loss
from .sent import SENT
from .transfer import (
    TransferredLabels,
    estimate_transition,
    transcripts_match,
    transfer_noise,
    transfer_pseudo_label_noise,
)

__all__ = [
    "PADDING",
    "SENT",
    "STATISTICS",
    "DynamicsRecorder",
    "Fit",
    "NoisyLabelDetector",
    "OneClassError",
    "RecordDynamics",
    "TransferredLabels",
    "centroid_cosine",
    "confident",
    "confident_learning",
    "estimate_transition",
    "fit_with_trainer",
    "label_statistics",
    "predict_logits",
    "small_loss",
    "transcripts_match",
    "transfer_noise",
    "transfer_pseudo_label_noise",
]
