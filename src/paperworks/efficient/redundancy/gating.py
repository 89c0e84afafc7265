"""Dynamic channel gating (R6): for each input, only the channels that matter are computed."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.errors import UserError, unknown

from .layers import check_convolution, replace_layers

OVERHEAD = 25.0
"""Channels whose convolution takes as long as choosing and picking channels do beside it; on CPUs, one image."""


def gate_cost(channels: int, density: float) -> float:
    """Predicted time of a gated convolution over the whole one's."""
    return density + OVERHEAD / channels


def gate_channels(
    model: nn.Module, layers: Mapping[str, str | None], density: float = 0.5, *, seed: int = 0
) -> list["ChannelGate"]:
    """Put gates in the place of a model's convolutions, and nothing in that of the batch norms behind them.

    Gates have to be learned: train the model for some passes more.

    Args:
        model: The model, changed in place; what it does with all channels kept is only the same once gates are learned.
        layers: Names of convolutions, each with that of the batch norm behind it, or nothing.
        density: Share of channels that stay.
        seed: Draws the start of the gates.

    Returns:
        The gates.

    Raises:
        UserError: If an argument is out of range, a name unknown or a layer of another kind.

    Example:
        >>> gates = gate_channels(model, {"conv2": "bn2", "conv3": "bn3"}, density=0.5)
    """
    modules = dict(model.named_modules())
    gates: list[ChannelGate] = []
    for name, norm in layers.items():
        for wanted in filter(None, (name, norm)):
            if wanted not in modules:
                raise unknown("layer", wanted, modules)
        behind = modules[norm] if norm else None
        if behind is not None and not isinstance(behind, nn.BatchNorm2d):
            raise UserError(f"layer {norm!r} must be an nn.BatchNorm2d, got {type(behind).__name__}")
        gates.append(ChannelGate(check_convolution(modules[name], "ChannelGate"), behind, density, seed + len(gates)))
    norms = [norm for norm in layers.values() if norm]
    if norms:
        replace_layers(model, norms, lambda _: nn.Identity())
    made = iter(gates)
    replace_layers(model, layers, lambda _: next(made))
    return gates


class ChannelGate(nn.Module):
    r"""A convolution, with its batch norm, whose output channels are chosen for each image (FBS, Gao et al. 2019).

    Saliencies $s = \mathrm{ReLU}(W \bar x + b)$ are predicted of the means $\bar x$ of $|x|$ over each input channel;
    the largest $\lceil dC \rceil$ stay, the others become zero:
    $y = \mathrm{top}(s) \odot \mathrm{norm}(\mathrm{conv}(x))$.

    In evaluation mode, channels that no image of the batch keeps are not computed, and input channels that are zero
    in all of it are not read: with one image, a share $d$ of the work, and $d^2$ behind another gate.

    Args:
        layer: An ungrouped convolution; its parameters are used, not copied.
        norm: The batch norm behind it, if there is one; then put ``nn.Identity()`` in its place.
        density: Share $d$ of channels that stay.
        seed: Draws the start of ``predict``.

    Attributes:
        predict: The linear layer that predicts saliencies; biases start at 1, as in the paper. Add
            ``1e-8 * gate.saliency`` to the loss to make saliencies sparse.
        saliency: Mean saliency in the last call.

    Raises:
        UserError: If ``density`` is not in (0, 1], or the layer is of another kind.
    """

    def __init__(
        self, layer: nn.Conv2d, norm: nn.BatchNorm2d | None = None, density: float = 0.5, seed: int = 0
    ) -> None:
        super().__init__()
        if not 0 < density <= 1:
            raise UserError(f"density must be above 0 and at most 1, got {density}")
        self.layer = check_convolution(layer, "ChannelGate")
        self.norm, self.density = norm, density
        predict = nn.Linear(layer.in_channels, layer.out_channels, device="meta").to_empty(device=layer.weight.device)
        nn.init.kaiming_normal_(predict.weight, generator=torch.Generator().manual_seed(seed))
        nn.init.ones_(predict.bias)
        self.predict = predict.to(layer.weight)
        self.saliency = torch.zeros(())
        self.train(layer.training)

    @property
    def kept(self) -> int:
        """Channels that stay."""
        return math.ceil(self.density * self.layer.out_channels)

    def gate(self, means: Float[Tensor, "n c"]) -> Float[Tensor, "n m"]:
        """Saliencies of the channels that stay, zero for the others."""
        saliencies = F.relu(self.predict(means))
        self.saliency = saliencies.mean()
        top = saliencies.topk(self.kept, dim=1)
        return torch.zeros_like(saliencies).scatter(1, top.indices, top.values)

    def forward(self, x: Float[Tensor, "n c height width"]) -> Float[Tensor, "n m rows columns"]:
        means = x.abs().mean((2, 3))
        gate = self.gate(means)
        if self.training:
            y = self.layer(x)
            return (y if self.norm is None else self.norm(y)) * gate[:, :, None, None]
        conv, norm = self.layer, self.norm
        keep, read = gate.any(0).nonzero()[:, 0], means.any(0).nonzero()[:, 0]
        weight, bias = conv.weight[keep], None if conv.bias is None else conv.bias[keep]
        if len(read) < conv.in_channels:
            x, weight = x[:, read], weight[:, read]
        y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)
        if norm is not None:
            mean, var, scale, shift = (
                None if t is None else t[keep] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            )
            y = F.batch_norm(y, mean, var, scale, shift, eps=norm.eps)
        y = y * gate[:, keep, None, None]
        return y.new_zeros(len(y), conv.out_channels, *y.shape[2:]).index_copy(1, keep, y)
