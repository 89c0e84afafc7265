"""What training costs: floating-point operations, with dead weights and left-out gradients not counted."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from paperworks.errors import UserError
from paperworks.nn import keeping_modes

from .masks import SparsityMask, check_sparsity


def layer_training_flops(forward: float, density: float = 1.0, update_density: float = 1.0) -> float:
    r"""FLOPs of one example through one layer, forward and backward.

    $$f (1 - s) + f (1 - s) + f \min(1 - q, 1 - s)$$

    for the forward pass, the gradients of the inputs, and the gradients of the weights that get one. A dense layer
    costs $3 f$. As is usual, the first layer is counted so too, though nobody needs its inputs' gradients; batch
    norms, activations and the optimizer are left out.

    Args:
        forward: FLOPs of the layer's dense forward pass, $f$.
        density: Share of live weights, $1 - s$.
        update_density: Share of weights whose gradients are computed, $1 - q$.
    """
    return forward * (2 * density + min(density, update_density))


def forward_flops(model: nn.Module, input_shape: Sequence[int]) -> dict[str, float]:
    """FLOPs of the dense forward pass on one example, by module; ``""`` is the whole model.

    Args:
        model: Left as it is.
        input_shape: Shape of one example.
    """
    parameter = next(model.parameters())
    counter = FlopCounterMode(display=False)
    with keeping_modes(model), torch.no_grad(), counter:
        model.eval()
        model(torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype))
    by_name = {
        name.partition(".")[2]: float(sum(operations.values()))
        for name, operations in counter.get_flop_counts().items()
    }
    return by_name | {"": float(counter.get_total_flops())}


def training_flops(
    model: nn.Module,
    input_shape: Sequence[int],
    mask: SparsityMask | None = None,
    gradient_sparsity: float = 0.0,
) -> float:
    """FLOPs of training on one example, forward and backward: see ``layer_training_flops``.

    Layers that are not masked count as dense.

    Args:
        model: The model; left as it is.
        input_shape: Shape of one example.
        mask: What is live in it.
        gradient_sparsity: Share $q$ of the masked layers' weights that get no gradient.

    Raises:
        UserError: If ``gradient_sparsity`` is not in [0, 1), or given without a mask.
    """
    return flops_with(forward_flops(model, input_shape), mask, gradient_sparsity)


def flops_with(forward: dict[str, float], mask: SparsityMask | None, gradient_sparsity: float = 0.0) -> float:
    """``training_flops`` from what ``forward_flops`` returned."""
    check_sparsity("gradient_sparsity", gradient_sparsity)
    if mask is None:
        if gradient_sparsity:
            raise UserError("gradient_sparsity needs a mask: it is a share of the masked layers' weights")
        return layer_training_flops(forward[""])
    dense = forward[""] - sum(forward[name] for name in mask.names)
    return layer_training_flops(dense) + sum(
        layer_training_flops(forward[name], mask.density(name), 1 - gradient_sparsity) for name in mask.names
    )
