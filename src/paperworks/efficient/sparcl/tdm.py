"""Task-aware dynamic masking (TDM): which weights live changes with the tasks, how many does not."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.errors import UserError

from .masks import SparsityMask


def weight_importance(
    weight: Float[Tensor, "*shape"],
    current: Float[Tensor, "*shape"] | None = None,
    memory: Float[Tensor, "*shape"] | None = None,
    *,
    alpha: float = 0.5,
    beta: float = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""Continual weight importance (paper, eq. 1).

    $$\mathrm{CWI}(w) = |w| + \alpha \left|\frac{\partial \tilde L(D_t)}{\partial w}\right|
    + \beta \left|\frac{\partial L(M)}{\partial w}\right|$$

    Args:
        weight: Weights $w$.
        current: Gradient of the single-head loss $\tilde L$ on the current task's data; left out if ``None``.
        memory: Gradient of the loss on the rehearsal memory $M$; left out if ``None``.
        alpha: Weight of the current task, $\alpha$. The released code merges both gradients into one, with 0.5.
        beta: Weight of the memory, $\beta$.
    """
    importance = weight.abs()
    for factor, gradient in ((alpha, current), (beta, memory)):
        if gradient is not None:
            importance = importance + factor * gradient.abs()
    return importance


class TaskAwareDynamicMask:
    r"""Changes a ``SparsityMask`` from task to task and within a task (paper, section 3.2).

    With sparsity $s$ and period $\delta_k$: a task starts by freeing random weights, so that $s - p_\mathrm{inter}$
    are dead. From epoch $\delta_k$ on, every $\delta_k$ epochs, the weights of lowest importance die until
    $s + p_\mathrm{intra}$ are dead, and random ones are freed until $s$ are: the first of these updates ends the
    expansion. In the last epochs of a task the mask is fixed. With ``alpha=beta=0, p_inter=0`` this is SET.

    Call ``on_task_start``, at every epoch ``on_epoch_start``, and ``on_task_end``, which ends an expansion for which
    the task was too short.

    Args:
        mask: The mask; its ``sparsity`` is $s$.
        p_inter: Share freed at the start of a task. Default: the released script's, as all below.
        p_intra: Share exchanged by an update.
        period: Epochs between updates, $\delta_k$.
        alpha, beta: Those of ``weight_importance``.
        frozen: Share of a task's epochs, at its end, in which the mask is fixed.
        generator: Draws which weights are freed.

    Raises:
        UserError: If a share or the period is out of range.
    """

    def __init__(
        self,
        mask: SparsityMask,
        *,
        p_inter: float = 0.01,
        p_intra: float = 0.01,
        period: int = 5,
        alpha: float = 0.5,
        beta: float = 1.0,
        frozen: float = 0.1,
        generator: torch.Generator,
    ) -> None:
        if not 0 <= p_inter <= mask.sparsity:
            raise UserError(f"p_inter must be from 0 to the sparsity {mask.sparsity}, got {p_inter}")
        if not 0 <= p_intra < 1 - mask.sparsity:
            raise UserError(f"p_intra must be from 0 to below 1 - sparsity = {1 - mask.sparsity:g}, got {p_intra}")
        if period < 1:
            raise UserError(f"period must be at least 1 epoch, got {period}")
        if not 0 <= frozen < 1:
            raise UserError(f"frozen must be in [0, 1), got {frozen}")
        self.mask, self.p_inter, self.p_intra, self.period = mask, p_inter, p_intra, period
        self.alpha, self.beta, self.frozen, self.generator = alpha, beta, frozen, generator
        self._fixed_from = 0

    def on_task_start(self, epochs: int) -> None:
        """Begin a task of that many epochs."""
        self._fixed_from = epochs - round(self.frozen * epochs)

    def due(self, epoch: int) -> Literal["expand", "update"] | None:
        """What happens at the start of an epoch, counted from 0 in its task."""
        if epoch == 0:
            return "expand"
        return "update" if epoch % self.period == 0 and epoch < self._fixed_from else None

    def on_epoch_start(
        self, epoch: int, current: Sequence[Tensor] | None = None, memory: Sequence[Tensor] | None = None
    ) -> bool:
        """Change the mask if it is time to.

        Args:
            epoch: From 0 in each task.
            current, memory: Gradients by which importance is judged, one a masked weight. Without them an update
                goes by magnitude alone, and says so in a warning.

        Returns:
            Whether the mask changed.
        """
        due, mask = self.due(epoch), self.mask
        if due == "expand":
            mask.grow(mask.sparsity - self.p_inter, self.generator)
        elif due == "update":
            if current is None and memory is None and (self.alpha or self.beta):
                warnings.warn("no gradients were given: weights are ranked by magnitude alone", stacklevel=2)
            mask.shrink(mask.sparsity + self.p_intra, self._importance(current, memory))
            mask.grow(mask.sparsity, self.generator)
        return due is not None

    def on_task_end(self) -> None:
        """Back to the sparsity, by magnitude, if no update came after the expansion."""
        self.mask.shrink(self.mask.sparsity)

    def _importance(self, current: Sequence[Tensor] | None, memory: Sequence[Tensor] | None) -> list[Tensor]:
        return [
            weight_importance(
                weight.detach(),
                current[i] if current else None,
                memory[i] if memory else None,
                alpha=self.alpha,
                beta=self.beta,
            )
            for i, weight in enumerate(self.mask.parameters)
        ]

    def state_dict(self) -> dict[str, Any]:
        """The state of the draws and of the task; the mask has its own."""
        return {"generator": self.generator.get_state(), "fixed_from": self._fixed_from}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the moment at which ``state_dict`` was taken."""
        self.generator.set_state(state_dict["generator"])
        self._fixed_from = state_dict["fixed_from"]
