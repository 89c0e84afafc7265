"""How far filtered gradients point where the exact ones do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperworks.errors import UserError

from .layers import FilteredConv2d


def gradient_agreement(
    model: nn.Module,
    batch: tuple[Any, Any],
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
) -> pd.DataFrame:
    r"""Compare a model's filtered gradients with the exact ones on one batch (paper, section 4: signal to noise).

    Filters act together, as they do in training: the gradient of a layer is filtered by those above it too.

    Args:
        model: A model with filtered convolutions. Its mode, buffers, gradients and the random state are left as
            they are.
        batch: Inputs and targets.
        loss: ``(outputs, targets) -> scalar``.

    Returns:
        One row a parameter that learns: ``cosine`` $\langle \hat g, g \rangle / \lVert \hat g \rVert \lVert g \rVert$
        and ``norm_ratio`` $\lVert \hat g \rVert / \lVert g \rVert$ of the filtered $\hat g$ to the exact $g$.

    Raises:
        UserError: If the model has no filtered convolution, or nothing of it learns.
    """
    filtered = [module for module in model.modules() if isinstance(module, FilteredConv2d)]
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not filtered:
        raise UserError(f"{type(model).__name__} has no filtered convolution: call apply_gradient_filter first")
    if not learning:
        raise UserError("no parameter of the model learns")
    inputs, targets = batch

    def gradients() -> tuple[Tensor | None, ...]:
        with torch.random.fork_rng(), _same_buffers(model), torch.enable_grad():
            value = loss(model(inputs), targets)
            return torch.autograd.grad(value, list(learning.values()), allow_unused=True)

    enabled = [conv.enabled for conv in filtered]
    try:
        for conv in filtered:
            conv.enabled = True
        approximate = gradients()
        for conv in filtered:
            conv.enabled = False
        exact = gradients()
    finally:
        for conv, was in zip(filtered, enabled, strict=True):
            conv.enabled = was
    rows = {
        name: (float(F.cosine_similarity(a.flatten(), e.flatten(), dim=0)), float(a.norm() / e.norm()))
        for name, a, e in zip(learning, approximate, exact, strict=True)
        if a is not None and e is not None
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["cosine", "norm_ratio"])


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass in training mode writes, such as running statistics."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, content in before:
            buffer.copy_(content)
