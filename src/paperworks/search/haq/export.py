"""Handing a quantized model to torchao, whose integer tensors hold the very values that the search scored."""

import copy
from typing import Literal, get_args

import torch
from torch import nn

from paperworks.errors import MissingExtra, UserError, unknown

from .quantized import Quantized, quantized_layers, restore_model

Activations = Literal["int8", "float"]


def export_torchao(model: nn.Module, activations: Activations = "int8") -> nn.Module:
    """A copy of a quantized model whose layers hold torchao's integer weights of 2 to 8 bits.

    The weights are ``IntxUnpackedToInt8Tensor`` with one scale a layer and dequantize to what ``quantized_weight`` is,
    to the last bit; ``torch.save`` and ``torch.export`` take them. Biases and norms stay in floating point.

    torchao rounds activations to 8 bits only, with a range of its own for each row of the input as it comes; clips of
    the calibration are not exported. Nothing is rounded up in silence:

    Args:
        model: Quantized by ``quantize_model`` and perhaps trained further; it is not changed.
        activations: ``"int8"`` refuses a layer whose activations have other than 8 bits; activations that the policy
            leaves alone stay in floating point. ``"float"`` leaves them all in floating point, whatever the policy.

    Raises:
        MissingExtra: Without torchao.
        UserError: If the model is not quantized, or torchao cannot hold a layer's bits; it names the layer.
    """
    try:
        from torchao.quantization import IntxUnpackedToInt8Tensor  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtra("torchao", "export", "export_torchao") from error
    if activations not in get_args(Activations):
        raise unknown("activations", activations, get_args(Activations))
    layers = quantized_layers(model)
    if not layers:
        raise UserError(f"{type(model).__name__} has no quantized layer: call quantize_model first")
    for name, layer in layers.items():
        _check(name, layer, activations)
    exported = copy.deepcopy(model)
    tensors = {}
    for name, layer in quantized_layers(exported).items():
        weight, bits = layer.weight.detach(), layer.weight_bits
        one = (1,) * weight.ndim
        tensors[name] = IntxUnpackedToInt8Tensor.from_hp(
            weight.clamp(-layer.weight_clip, layer.weight_clip),
            tuple(weight.shape),
            getattr(torch, f"int{bits}"),
            activation_quantization="int8_asym_per_token" if activations == "int8" and layer.activation_bits else None,
            intx_choose_qparams_algorithm=None,
            custom_scale=weight.new_full(one, layer.weight_clip / (2 ** (bits - 1) - 1)),
            custom_zero_point=torch.zeros(one, dtype=torch.int8, device=weight.device),
        )
    restore_model(exported)
    for name, tensor in tensors.items():
        exported.get_submodule(name).weight = nn.Parameter(tensor, requires_grad=False)
    return exported


def _check(name: str, layer: Quantized, activations: Activations) -> None:
    if not hasattr(torch, f"int{layer.weight_bits}"):
        raise UserError(f"layer {name!r}: weights of {layer.weight_bits} bits cannot be exported to torchao")
    if activations == "int8" and layer.activation_bits not in (None, 8):
        raise UserError(
            f"layer {name!r}: activations of {layer.activation_bits} bits cannot be exported to torchao, which has 8; "
            "activations='float' exports weights alone"
        )
