"""What the backward pass of each convolution costs, exact and filtered."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from paperworks.errors import UserError, unknown
from paperworks.nn import keeping_modes, removing

from .layers import FilteredConv2d, filterable

MIN_GAIN = 1.2
"""Predicted gain from which ``apply_gradient_filter(auto=True)`` filters a layer."""


class _Times(NamedTuple):
    """Milliseconds of a backward pass, linear in what it does."""

    call: float  # whatever the size
    macs: float  # per million multiply-accumulates
    pixels: float  # per million numbers of maps read or written
    weights: float  # per million weights

    def of(self, macs: int, pixels: int, weights: int) -> float:
        return self.call + (self.macs * macs + self.pixels * pixels + self.weights * weights) / 1e6


# Least squares over 136 layers (1x1 to 5x5, 16 to 512 channels, batches of 1 to 32), one thread of a Zen 5 CPU
# with oneDNN, contiguous maps. A gain is a ratio of two such times, so that the speed of the machine falls out.
_DENSE = _Times(0.12, 0.0094, 0.39, 1.5), _Times(0.18, 0.033, 0.46, 1.2)
_DEPTHWISE = _Times(0.12, 0.12, 0.0, 0.0), _Times(0.15, 1.4, 0.41, 0.0)


def backward_cost(
    model: nn.Module, input_shape: tuple[int, ...], layers: Iterable[str] | None = None, *, patch: int = 2
) -> pd.DataFrame:
    r"""Cost of the backward pass of a model's convolutions, exact and filtered.

    For a layer whose weight and input both need gradients, the exact pass takes
    $2 k_h k_w (C_i / G) C_o\, h w N$ multiply-accumulates and keeps the input, $C_i H W N$ numbers; the filtered one
    takes $2 (C_i / G) C_o\, P Q N$ and keeps $C_i P Q N + C_i C_o / G$. Gradients that are not needed, because a weight
    is frozen or everything below is, are not counted.

    Args:
        model: The model; it makes one forward pass on zeros in evaluation mode.
        input_shape: Shape of a batch, e.g. ``(32, 3, 224, 224)``.
        layers: Names of convolutions; by default all that can be filtered.
        patch: Side of a patch where a layer is not filtered yet.

    Returns:
        One row a call of a layer, in the order of the calls: ``patch``, ``exact_macs``, ``filtered_macs``,
        ``exact_bytes``, ``filtered_bytes`` (kept for the backward pass, without the weight itself) and ``gain``, the
        predicted ratio of the times on a CPU, with what the filter adds to the forward pass.

    Raises:
        UserError: If the model cannot take such a batch, or a layer is no convolution that can be filtered.
    """
    convs = {name: module for name, module in model.named_modules() if filterable(module)}
    if not convs:
        raise UserError(f"{type(model).__name__} has no convolution whose gradient could be filtered")
    chosen = list(convs) if layers is None else list(layers)
    for name in chosen:
        if name not in convs:
            raise unknown("layer", name, convs)
    rows: list[dict[str, Any]] = []
    hooks = [convs[name].register_forward_hook(_Hook(name, patch, rows)) for name in chosen]
    first = next(model.parameters())
    try:
        with removing(hooks), keeping_modes(model), torch.enable_grad():
            model.eval()
            model(torch.zeros(input_shape, dtype=first.dtype, device=first.device))
    except RuntimeError as error:
        raise UserError(f"the model takes no batch of shape {tuple(input_shape)}: {error}") from error
    columns = ["layer", "patch", "exact_macs", "filtered_macs", "exact_bytes", "filtered_bytes", "gain"]
    return pd.DataFrame(rows, columns=columns).set_index("layer")


class _Hook:
    def __init__(self, name: str, patch: int, rows: list[dict[str, Any]]) -> None:
        self.name, self.patch, self.rows = name, patch, rows

    def __call__(self, conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        patch = conv.patch if isinstance(conv, FilteredConv2d) else self.patch
        n, size = math.prod(x.shape[:-3]), x.element_size()
        h, w = output.shape[-2:]
        cells = -(-h // patch) * -(-w // patch)
        pairs = conv.out_channels * conv.in_channels // conv.groups
        needs_weight, needs_input = conv.weight.requires_grad, x.requires_grad
        terms = needs_weight + needs_input
        exact, filtered = terms * conv.weight.numel() * h * w * n, terms * pairs * cells * n
        kept = needs_weight * n * conv.in_channels * cells + needs_input * pairs
        times = _DENSE if conv.groups == 1 else _DEPTHWISE
        pixels, weights = terms * (x.numel() + output.numel()), conv.weight.numel()
        gain = times[0].of(exact, pixels, weights) / times[1].of(filtered, pixels, weights) if terms else 1.0
        self.rows.append(
            {
                "layer": self.name,
                "patch": patch,
                "exact_macs": exact,
                "filtered_macs": filtered,
                "exact_bytes": needs_weight * x.numel() * size,
                "filtered_bytes": kept * size,
                "gain": gain,
            }
        )
