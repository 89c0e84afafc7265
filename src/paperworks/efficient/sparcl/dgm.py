"""Dynamic gradient masking (DGM): only the most important gradients are computed and applied."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paperworks.errors import UserError

from .masks import SparsityMask, check_sparsity


def gradient_mask(importance: Float[Tensor, "*shape"], sparsity: float) -> Bool[Tensor, "*shape"]:
    r"""Keep the top $1 - q$ of *all* entries of a layer, and of these the non-zero ones.

    As dead weights have gradient zero, the density of updates is $\min(1 - q, 1 - s)$: the quantile is not one of
    live entries only.

    Args:
        importance: Absolute gradients, or ``CGI``; zero where the weight is dead.
        sparsity: Share $q$ of the entries that are left out, in [0, 1).
    """
    keep = max(1, round(importance.numel() * (1 - sparsity)))
    kept = torch.zeros_like(importance, dtype=torch.bool)
    kept.view(-1)[importance.flatten().topk(keep, sorted=False).indices] = True
    return kept & (importance != 0)


class DynamicGradientMask:
    r"""Masks the gradients of a ``SparsityMask``'s weights; a mask serves ``refresh`` steps (paper, section 3.4).

    $$\mathrm{CGI}(w) = \alpha \left|\frac{\partial \tilde L(D_t)}{\partial w}\right|
    + \beta \left|\frac{\partial L(M)}{\partial w}\right| \qquad \text{(eq. 3)}$$

    Call ``apply`` between the backward pass and the optimizer's step.

    Args:
        mask: The weights, and which of them live.
        sparsity: Share $q$ of all entries of a layer that get no update, in [0, 1). The released script's 0.8 leaves,
            with a quarter of the weights live, 80 % of the live ones.
        refresh: Steps that a gradient mask serves; 30 as in the released code.
        alpha, beta: Weights of the two gradients.

    Raises:
        UserError: If ``sparsity`` or ``refresh`` is out of range.
    """

    def __init__(
        self,
        mask: SparsityMask,
        sparsity: float = 0.8,
        refresh: int = 30,
        *,
        alpha: float = 0.5,
        beta: float = 1.0,
    ) -> None:
        check_sparsity("gradient sparsity", sparsity)
        if refresh < 1:
            raise UserError(f"refresh must be at least 1 step, got {refresh}")
        self.mask, self.sparsity, self.refresh, self.alpha, self.beta = mask, sparsity, refresh, alpha, beta
        self.masks: list[Tensor] = []
        self._left = 0

    @property
    def due(self) -> bool:
        """Whether the next ``apply`` draws up a new mask."""
        return self._left == 0

    def expire(self) -> None:
        """Have the next ``apply`` draw up a new mask: call it when the weights' mask has changed."""
        self._left = 0

    @torch.no_grad()
    def apply(self, current: Sequence[Tensor] | None = None, memory: Sequence[Tensor] | None = None) -> None:
        """Zero the gradients of dead weights and of unimportant ones.

        Args:
            current, memory: The two losses' gradients, looked at when a mask is ``due``. Without them importance is
                the absolute gradient of the whole loss, as in the released code.
        """
        gradients = []
        for name, weight in self.mask:
            if weight.grad is None:
                raise UserError(f"{name}.weight has no gradient: apply comes after the backward pass")
            gradients.append(weight.grad)
        if self.due:
            self.mask.apply_grads()
            self._draw_up(gradients, current, memory)
            self._left = self.refresh
        elif self.masks[0].device != gradients[0].device:
            self.masks = [mask.to(gradients[0].device) for mask in self.masks]
        torch._foreach_mul_(gradients, self.masks)
        self._left -= 1

    def _draw_up(
        self, gradients: Sequence[Tensor], current: Sequence[Tensor] | None, memory: Sequence[Tensor] | None
    ) -> None:
        scores = [gradient.abs() for gradient in gradients]
        if current is not None:
            scores = [self.alpha * gradient.abs() for gradient in current]
        if current is not None and memory is not None:
            scores = [score + self.beta * gradient.abs() for score, gradient in zip(scores, memory, strict=True)]
        live = zip(scores, self.mask.masks, strict=True)
        self.masks = [gradient_mask(score * mask, self.sparsity).to(score.dtype) for score, mask in live]

    def state_dict(self) -> dict[str, Any]:
        """The masks and the steps they still serve."""
        return {"masks": [mask.bool() for mask in self.masks], "left": self._left}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.masks = [mask.to(weight) for mask, weight in zip(state_dict["masks"], self.mask.parameters, strict=False)]
        self._left = state_dict["left"]
