"""HAQ: bits for the weights and activations of every layer, searched under a budget of simulated cost.

Wang et al., "HAQ: Hardware-Aware Automated Quantization with Mixed Precision", CVPR 2019. ``search`` and
``QuantizationEnv`` need the extra ``agents``, ``export_torchao`` needs ``export``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .agent import DDPGAgent
from .export import export_torchao
from .hardware import DEVICES, BitFusion, BitSerial, Hardware, LookupTable, ModelSize, load_hardware
from .kmeans import Clusters, SharedWeights, cluster_weights, kmeans_quantize
from .layers import LayerProfile, profile_layers
from .policy import bits_of_action, costliest_first, enforce_budget, fixed_policy, policy_cost, uniform_policy
from .problem import QuantizationProblem
from .quantized import (
    LayerRange,
    QuantizedConv2d,
    QuantizedLinear,
    calibrate,
    quantize_model,
    quantized_layers,
    restore_model,
)
from .quantizers import clip_threshold, fake_quantize_activation, fake_quantize_weight
from .searches import Found, PolicyResult, greedy_sensitivity, random_search, search

if TYPE_CHECKING:
    from .env import QuantizationEnv

__all__ = [
    "DEVICES",
    "BitFusion",
    "BitSerial",
    "Clusters",
    "DDPGAgent",
    "Found",
    "Hardware",
    "LayerProfile",
    "LayerRange",
    "LookupTable",
    "ModelSize",
    "PolicyResult",
    "QuantizationEnv",
    "QuantizationProblem",
    "QuantizedConv2d",
    "QuantizedLinear",
    "SharedWeights",
    "bits_of_action",
    "calibrate",
    "clip_threshold",
    "cluster_weights",
    "costliest_first",
    "enforce_budget",
    "export_torchao",
    "fake_quantize_activation",
    "fake_quantize_weight",
    "fixed_policy",
    "greedy_sensitivity",
    "kmeans_quantize",
    "load_hardware",
    "policy_cost",
    "profile_layers",
    "quantize_model",
    "quantized_layers",
    "random_search",
    "restore_model",
    "search",
    "uniform_policy",
]


def __getattr__(name: str) -> Any:
    if name == "QuantizationEnv":
        return import_module(".env", __name__).QuantizationEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
