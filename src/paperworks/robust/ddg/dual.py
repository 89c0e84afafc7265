"""The multiplier of one inequality constraint, learnt by projected gradient ascent."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.errors import UserError


class DualVariable(nn.Module):
    r"""Lagrange multiplier of a constraint $\mathbb E[d] \le \gamma$, for any quantity $d$ (paper, algorithm 1).

    $$\lambda \leftarrow \mathrm{clip}\big(\lambda + \eta\,(d - \gamma),\ \lambda_{\min},\ \lambda_{\max}\big)$$

    The multiplier grows while the constraint is violated and shrinks while there is slack. It is a buffer, so that
    checkpoints of the module that owns it carry it. One that stays at the upper bound says that $\gamma$ is out of
    reach; see `saturated`.

    Args:
        init: First value $\lambda_0$. Default: the reference implementation's.
        lr: Step size $\eta$; 0 keeps the multiplier fixed, which makes the constraint a penalty.
        margin: $\gamma$, in the units of the constrained quantity.
        bounds: $(\lambda_{\min}, \lambda_{\max})$.

    Raises:
        UserError: If a value is out of range.

    Example:
        >>> multiplier = DualVariable(margin=0.025)
        >>> loss = risk + multiplier.update(distance) * violation
    """

    value: Float[Tensor, ""]

    def __init__(
        self,
        init: float = 0.5,
        lr: float = 0.01,
        margin: float = 0.025,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        low, high = bounds
        if not 0 <= low < high:
            raise UserError(f"bounds must be (low, high) with 0 <= low < high, got {bounds}")
        if not low <= init <= high:
            raise UserError(f"init must be within bounds {bounds}, got {init}")
        if not (lr >= 0 and math.isfinite(lr)):
            raise UserError(f"lr must be finite and not negative, got {lr}")
        if not margin >= 0:
            raise UserError(f"margin must not be negative, got {margin}")
        self.lr, self.margin, self.bounds = lr, margin, (low, high)
        self.register_buffer("value", torch.tensor(float(init)))

    @torch.no_grad()
    def update(self, constrained: Float[Tensor, ""] | float) -> Float[Tensor, ""]:
        """Take one dual step on the mean of the constrained quantity and return the new value, detached.

        Nothing waits for the device.
        """
        self.value += self.lr * (constrained - self.margin)
        self.value.clamp_(*self.bounds)
        return self.value.clone()  # a loss that was built with it keeps it

    @property
    def saturated(self) -> bool:
        """Whether the multiplier is at its upper bound. Waits for the device."""
        return float(self.value) >= self.bounds[1]

    def extra_repr(self) -> str:
        return f"lr={self.lr}, margin={self.margin}, bounds={self.bounds}"
