"""The layers whose bits are chosen, and the sizes that decide what they cost."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.errors import UserError
from paperworks.nn import keeping_modes, removing


@dataclass(frozen=True)
class LayerProfile:
    """One convolution or linear layer, as a product of an M x K by a K x N matrix for one example.

    Grouped convolutions run all groups side by side, so that K counts the inputs of one group.

    Attributes:
        name: Its name in the model.
        depthwise: Whether each channel has a filter of its own.
        in_channels, out_channels: Channels or features.
        stride: Of a convolution; 0 for a linear layer.
        kernel: Side of the kernel; 1 for a linear layer.
        weights: Numbers in the weight tensor.
        rows: M, the output channels.
        inner: K, products a sum.
        columns: N, outputs a channel: pixels or tokens.
        activations: Numbers in the input.
    """

    name: str
    depthwise: bool
    in_channels: int
    out_channels: int
    stride: int
    kernel: int
    weights: int
    rows: int
    inner: int
    columns: int
    activations: int

    @property
    def macs(self) -> int:
        """Multiplications for one example."""
        return self.rows * self.inner * self.columns

    @property
    def positions(self) -> int:
        """Pixels or tokens of the input."""
        return self.activations // self.in_channels


def quantizable(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """The plain ``nn.Conv2d`` and ``nn.Linear`` layers by name."""
    return {name: module for name, module in model.named_modules() if type(module) in (nn.Conv2d, nn.Linear)}


@torch.no_grad()
def profile_layers(model: nn.Module, inputs: Tensor) -> list[LayerProfile]:
    """Measure the layers that a forward pass uses, in the order of their use.

    These are plain ``nn.Conv2d`` and ``nn.Linear``: not the projections inside ``nn.MultiheadAttention``, which
    calls no layer for them. A layer that is used more than once counts with the sum of its inputs.

    Args:
        model: Any model; its mode and buffers are left as they are.
        inputs: A batch; sizes are those of one example.

    Raises:
        UserError: If the model uses no such layer.
    """
    found: dict[str, LayerProfile] = {}

    def record(name: str, layer: nn.Conv2d | nn.Linear, x: Tensor, y: Tensor) -> None:
        profile = _profile(name, layer, x, y, len(inputs))
        if earlier := found.get(name):
            columns, activations = earlier.columns + profile.columns, earlier.activations + profile.activations
            profile = replace(profile, columns=columns, activations=activations)
        found[name] = profile

    def hook(name: str, layer: nn.Conv2d | nn.Linear) -> torch.utils.hooks.RemovableHandle:
        return layer.register_forward_hook(lambda _, args, y: record(name, layer, args[0], y))

    handles = [hook(name, layer) for name, layer in quantizable(model).items()]
    with removing(handles), keeping_modes(model):
        model.eval()(inputs)
    if not found:
        raise UserError(f"{type(model).__name__} uses no plain nn.Conv2d or nn.Linear that could be quantized")
    return list(found.values())


def _profile(name: str, layer: nn.Conv2d | nn.Linear, x: Tensor, y: Tensor, batch: int) -> LayerProfile:
    shared: dict[str, Any] = {"name": name, "weights": layer.weight.numel(), "activations": x.numel() // batch}
    if isinstance(layer, nn.Linear):
        return LayerProfile(
            **shared,
            depthwise=False,
            in_channels=layer.in_features,
            out_channels=layer.out_features,
            stride=0,
            kernel=1,
            rows=layer.out_features,
            inner=layer.in_features,
            columns=y.numel() // (batch * layer.out_features),
        )
    return LayerProfile(
        **shared,
        depthwise=layer.groups == layer.in_channels > 1,
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        stride=layer.stride[0],
        kernel=layer.kernel_size[0],
        rows=layer.out_channels,
        inner=layer.weight[0].numel(),
        columns=y.numel() // (batch * layer.out_channels),
    )
