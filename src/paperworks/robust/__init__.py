"""Noisy, few or biased labels."""

from .logitclip import LogitClip, LogitClipLoss, ce_bounds, clip_logits, excess_risk_bound, normalize_logits

__all__ = [
    "LogitClip",
    "LogitClipLoss",
    "ce_bounds",
    "clip_logits",
    "excess_risk_bound",
    "normalize_logits",
]
