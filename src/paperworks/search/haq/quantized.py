"""Models whose layers round weights and activations to the bits of a policy, in place and undoably."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from paperworks.errors import unknown
from paperworks.nn import keeping_modes, removing

from .layers import quantizable
from .policy import MAX_BITS, MIN_BITS, check_policy
from .quantizers import clip_threshold, fake_quantize_activation, fake_quantize_weight

BITS = range(MIN_BITS, MAX_BITS + 1)
ACTIVATION_CAP = 6.0
"""Largest clip of activations, as in the released code, whose networks end their layers in ReLU6."""

SMALLEST_CLIP = 1e-6
"""Training does not bring a clip below this."""


@dataclass(frozen=True)
class LayerRange:
    """Where to clip a layer at each number of bits; activations that are always 0 have no clip."""

    signed: bool
    weight: Mapping[int, float]
    activation: Mapping[int, float]


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Tensor, layers: Sequence[str] | None = None) -> dict[str, LayerRange]:
    """Find where each layer's weights and activations are clipped, by ``clip_threshold`` at 2 to 8 bits.

    As in the released code, activations are seen as the unquantized model makes them, and their clips are at most
    ``ACTIVATION_CAP``. They are unsigned where no input of the layer is negative.

    Args:
        model: Not quantized; its mode and buffers are left as they are.
        inputs: A batch, the more typical the better.
        layers: Names of the layers, by default all that the forward pass uses.

    Raises:
        UserError: If a layer is unknown, or an activation not finite.
    """
    found: dict[str, LayerRange] = {}
    modules = quantizable(model)
    for name in layers or ():
        if name not in modules:
            raise unknown("layer", name, modules)

    def look(name: str, layer: nn.Conv2d | nn.Linear, x: Tensor) -> None:
        signed = bool((x < 0).any())
        weight = {bits: clip_threshold(layer.weight, bits) or 1.0 for bits in BITS}  # zeros fit any grid
        activation = {bits: min(clip_threshold(x, bits, signed=signed), ACTIVATION_CAP) for bits in BITS}
        if not all(activation.values()):
            warnings.warn(f"layer {name!r} gets nothing but zeros: its activations stay as they are", stacklevel=4)
            activation = {}
        found[name] = LayerRange(signed, weight, activation)

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        layer = modules[name]
        return layer.register_forward_pre_hook(lambda _, args: look(name, layer, args[0]))

    handles = [hook(name) for name in layers or modules]
    with removing(handles), keeping_modes(model):
        model.eval()(inputs)
    return found


class Quantized(nn.Module):
    """What ``QuantizedConv2d`` and ``QuantizedLinear`` have beside their weights.

    Attributes:
        weight_bits, weight_clip: Of the weights, rounded in every pass; the parameter itself stays exact.
        activation_bits: Of the input, or nothing to leave it as it is.
        activation_clip: A parameter, which training learns.
        signed: Whether the input has negative values to keep.
    """

    weight: Tensor
    weight_bits: int
    weight_clip: float
    activation_bits: int | None
    activation_clip: nn.Parameter
    signed: bool
    _input_hook: torch.utils.hooks.RemovableHandle

    @property
    def quantized_weight(self) -> Tensor:
        """The weights as the layer uses them."""
        return fake_quantize_weight(self.weight, self.weight_bits, self.weight_clip)


class QuantizedConv2d(Quantized, nn.Conv2d):
    """A convolution made by ``quantize_model``."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.quantized_weight, self.bias)


class QuantizedLinear(Quantized, nn.Linear):
    """A linear layer made by ``quantize_model``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.quantized_weight, self.bias)


def quantize_model(model: nn.Module, policy: ArrayLike, ranges: Mapping[str, LayerRange]) -> list[str]:
    """Round a model's weights and activations to the bits of a policy from now on, in place.

    Parameters, names, hooks and references to layers stay what they are; weights stay exact and are rounded in each
    pass. So it can be trained further at once (the gradient passes straight through the rounding); each layer has a
    new parameter ``activation_clip`` for that. ``restore_model`` undoes it.

    Args:
        model: Any model.
        policy: ``[layers, 2]`` bits of weights and activations, or ``[layers, 1]`` of weights alone, in the order
            of ``ranges``.
        ranges: From ``calibrate``.

    Returns:
        The names of the layers.

    Raises:
        UserError: If the policy is not one for these layers, or a layer is missing or quantized already. The model
            is unchanged then.
    """
    modules = quantizable(model)
    for name in ranges:
        if name not in modules:
            raise unknown("plain layer", name, modules)
    bits = check_policy(policy, len(ranges)).tolist()
    for (name, where), (weight_bits, *activation_bits) in zip(ranges.items(), bits, strict=True):
        layer: Any = modules[name]
        # Another module in its place would lose hooks and leave behind references to the old one.
        layer.__class__ = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
        layer.weight_bits, layer.weight_clip = weight_bits, where.weight[weight_bits]
        layer.activation_bits = activation_bits[0] if activation_bits and where.activation else None
        clip = where.activation[layer.activation_bits] if layer.activation_bits else ACTIVATION_CAP
        layer.signed = where.signed
        layer.activation_clip = nn.Parameter(torch.tensor(clip, device=layer.weight.device))
        layer.activation_clip.requires_grad_(layer.activation_bits is not None)
        layer._input_hook = layer.register_forward_pre_hook(_quantize_input)
    return list(ranges)


def restore_model(model: nn.Module) -> None:
    """Make quantized layers plain again; their weights stay as they are, exact but perhaps trained further."""
    for layer in quantized_layers(model).values():
        undone: Any = layer
        undone._input_hook.remove()
        for name in ("weight_bits", "weight_clip", "activation_bits", "activation_clip", "signed", "_input_hook"):
            delattr(undone, name)
        undone.__class__ = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """The layers that ``quantize_model`` changed, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    # A hook rather than part of forward, because PyTorch's fused transformer layers call no forward of their parts
    # unless one has a hook.
    assert isinstance(module, Quantized)
    if module.activation_bits is None:
        return None
    x, *rest = args
    clip = module.activation_clip.clamp(min=SMALLEST_CLIP)
    return fake_quantize_activation(x, module.activation_bits, clip, signed=module.signed), *rest
