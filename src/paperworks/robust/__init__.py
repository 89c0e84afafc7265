"""Noisy, few or biased labels."""

from .cmpl import CMPL, ClipAugment, CMPLModule, cross_pseudo_label_loss
from .ddg import DDG, DualVariable, SwapConstraint, reconstruction_violation, same_class_positives
from .groups import DANN, GroupDRO
from .iern import IERN, ConfounderBank, Disentangle, backdoor_average, confusion_loss
from .logitclip import LogitClip, LogitClipLoss, ce_bounds, clip_logits, excess_risk_bound, normalize_logits
from .mixing import CutMix, Mixup
from .rmix import RMix, input_saliency, mix_by_saliency, saliency_mask
from .sent import SENT, DynamicsRecorder, NoisyLabelDetector, RecordDynamics, estimate_transition, transfer_noise

__all__ = [
    "CMPL",
    "DANN",
    "DDG",
    "IERN",
    "SENT",
    "CMPLModule",
    "ClipAugment",
    "ConfounderBank",
    "CutMix",
    "Disentangle",
    "DualVariable",
    "DynamicsRecorder",
    "GroupDRO",
    "LogitClip",
    "LogitClipLoss",
    "Mixup",
    "NoisyLabelDetector",
    "RMix",
    "RecordDynamics",
    "SwapConstraint",
    "backdoor_average",
    "ce_bounds",
    "clip_logits",
    "confusion_loss",
    "cross_pseudo_label_loss",
    "estimate_transition",
    "excess_risk_bound",
    "input_saliency",
    "mix_by_saliency",
    "normalize_logits",
    "reconstruction_violation",
    "saliency_mask",
    "same_class_positives",
    "transfer_noise",
]
