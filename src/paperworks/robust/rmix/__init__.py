"""R-Mix and RL-Mix: saliency-guided Mixup with a randomly drawn, or learned, saliency threshold.

Luu et al., "Expeditious Saliency-guided Mix-up through Random Gradient Thresholding", Practical-DL workshop
at AAAI 2023. RL-Mix (``RLMixEnv``, ``SaliencyPolicyExtractor``, ``train_rl_mix``) needs the extra ``agents``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .measures import expected_calibration_error, fgsm
from .mix import QUANTILES, Draw, RMix, mix_by_saliency
from .saliency import input_saliency, normalize_saliency, pool_saliency, row_quantile, saliency_mask

if TYPE_CHECKING:
    from .agent import SaliencyPolicyExtractor, train_rl_mix
    from .env import RLMixEnv

__all__ = [
    "QUANTILES",
    "Draw",
    "RLMixEnv",
    "RMix",
    "SaliencyPolicyExtractor",
    "expected_calibration_error",
    "fgsm",
    "input_saliency",
    "mix_by_saliency",
    "normalize_saliency",
    "pool_saliency",
    "row_quantile",
    "saliency_mask",
    "train_rl_mix",
]

_NEED_AGENTS = {"RLMixEnv": ".env", "SaliencyPolicyExtractor": ".agent", "train_rl_mix": ".agent"}


def __getattr__(name: str) -> Any:
    if name in _NEED_AGENTS:
        return getattr(import_module(_NEED_AGENTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
