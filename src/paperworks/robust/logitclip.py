"""LogitClip: bound any classification loss by clipping the norm of the logit vector.

Wei et al., "Mitigating Memorization of Noisy Labels by Clipping the Model Prediction", ICML 2023.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.errors import UserError
from paperworks.train import Intervention, State


def clip_logits(
    logits: Float[Tensor, "*batch classes"],
    tau: float = 1.0,
    p: float = 2.0,
    *,
    dim: int = -1,
    eps: float = 1e-12,
    target_norm: float | None = None,
) -> Float[Tensor, "*batch classes"]:
    r"""Scale down the logit vectors whose norm exceeds a threshold (paper, eq. 4).

    $$\mathrm{clip}_\tau(z) = z \cdot \min\!\Big(1, \frac{\tau}{\lVert z \rVert_p}\Big)$$

    The gradient flows through the norm: for a clipped vector and $p = 2$ it is orthogonal to $z$ and shrinks as
    $1/\lVert z \rVert$, which, more than the bound itself, slows the memorisation of wrong labels. The ranking of
    the classes never changes.

    Args:
        logits: Logits, the classes in dimension ``dim``. The norm is taken in float32 at least.
        tau: Largest norm $\tau$ (the paper's $1/\delta$). Default: the reference implementation's.
        p: Order of the norm, at least 1 or ``inf``.
        dim: Dimension of the classes.
        eps: Smallest norm that is divided by.
        target_norm: Norm that vectors beyond ``tau`` are scaled to. The default ``tau`` is the paper's formula; the
            reference code scales to ``1 / tau``, which is discontinuous unless ``tau`` is 1.

    Returns:
        Clipped logits, of the same shape and dtype.

    Raises:
        UserError: If ``tau``, ``target_norm`` or ``p`` is out of range, or there are fewer than two classes.
    """
    _check_threshold(tau, p)
    norm = _norm(logits, p, dim, eps)
    if target_norm is None:
        scale = (tau / norm).clamp(max=1.0)
    else:
        _check_threshold(target_norm, p, "target_norm")
        scale = torch.where(norm > tau, target_norm / norm, 1.0)
    return logits * scale.to(logits.dtype)


def normalize_logits(
    logits: Float[Tensor, "*batch classes"],
    tau: float = 1.0,
    p: float = 2.0,
    *,
    dim: int = -1,
    eps: float = 1e-12,
) -> Float[Tensor, "*batch classes"]:
    r"""LogitNorm (Wei et al., ICML 2022): $\tau z / \lVert z \rVert_p$ for every vector, small ones too.

    The neighbour that LogitClip is compared with: clipping leaves vectors within the threshold alone.
    Arguments and errors are those of ``clip_logits``.
    """
    _check_threshold(tau, p)
    return logits * (tau / _norm(logits, p, dim, eps)).to(logits.dtype)


def ce_bounds(num_classes: int, tau: float = 1.0, p: float = 2.0) -> tuple[float, float]:
    r"""Bounds of the cross entropy of clipped logits (paper, proposition 3.1, for any norm).

    With $1/p + 1/q = 1$, a logit can exceed the mean of the others by at most $\tau (1 + (K-1)^{1-q})^{1/q}$ and any
    single other by at most $\tau 2^{1/q}$, hence

    $$\log(1 + (K-1) e^{-\tau (1 + (K-1)^{1-q})^{1/q}}) \le \ell_{CE} \le \log(1 + (K-1) e^{\tau 2^{1/q}}).$$

    The lower bound is attained; it is $-\log$ of the largest probability that a clipped model can give, which is
    0.027 for $K = 100$, $\tau = 1$: many classes need a larger $\tau$. The upper bound is attained for $p = \infty$.

    Returns:
        The lower and the upper bound, in nats.
    """
    _check_threshold(tau, p)
    if num_classes < 2:
        raise UserError(f"num_classes must be at least 2, got {num_classes}")
    others = num_classes - 1
    inverse_q = 1 - 1 / p
    if inverse_q == 0:  # p = 1: the dual norm is the maximum
        above_mean = above_one = 1.0
    else:
        above_mean = (1 + others ** (1 - 1 / inverse_q)) ** inverse_q
        above_one = 2**inverse_q
    lower, upper = math.log(others) - tau * above_mean, math.log(others) + tau * above_one
    return _softplus(lower), _softplus(upper)


def excess_risk_bound(num_classes: int, tau: float, noise_rate: float, p: float = 2.0) -> float:
    r"""How much clean risk a minimiser under symmetric label noise can lose (paper, theorem 3.2).

    $$R(f^\star_\eta) - R(f^\star) \le \frac{\eta K (U - L)}{(K - 1) - \eta K}$$

    with $L, U$ from ``ce_bounds`` and noise rate $\eta < 1 - 1/K$.
    """
    lower, upper = ce_bounds(num_classes, tau, p)
    if not 0 <= noise_rate < 1 - 1 / num_classes:
        raise UserError(f"noise_rate must be in [0, {1 - 1 / num_classes:.4g}), got {noise_rate}")
    flipped = noise_rate * num_classes
    return flipped * (upper - lower) / (num_classes - 1 - flipped)


class LogitClip(nn.Module, Intervention):
    r"""LogitClip as a layer, and as an intervention that clips what the loss of a training step sees.

    Evaluation stays on raw logits: predictions are the same, and probabilities are those of the raw logits.

    Args:
        tau: Largest norm; the paper tunes it per data set on noisy validation data.
        p: Order of the norm.
        always: Scale every vector to norm ``tau``: LogitNorm.

    Example:
        >>> loss = nn.functional.cross_entropy(LogitClip(tau=1.0)(model(images)), noisy_labels)
        >>> Trainer(epochs=40, interventions=[LogitClip(tau=1.0)])
    """

    def __init__(self, tau: float = 1.0, p: float = 2.0, *, always: bool = False) -> None:
        super().__init__()
        _check_threshold(tau, p)
        self.tau, self.p, self.always = tau, p, always

    def forward(self, logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
        return (normalize_logits if self.always else clip_logits)(logits, self.tau, self.p)

    def compute_loss(self, state: State, next: Callable[[State], Tensor]) -> Tensor:
        state.outputs = self(state.outputs)
        return next(state)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, p={self.p}" + (", always=True" if self.always else "")


class LogitClipLoss(nn.Module):
    r"""Any criterion on clipped logits: $\ell(\mathrm{clip}_\tau(z), y)$ (paper, eq. 5).

    Args:
        criterion: Callable ``(logits, target, **keywords) -> loss``; reduction, class weights and soft targets are
            its own affair.
        tau: Largest norm.
        p: Order of the norm.
        check_finite: Raise an error that names the first row with NaN or infinite logits. Waits for the device
            at every call, hence off by default.

    Example:
        >>> criterion = LogitClipLoss(nn.CrossEntropyLoss(label_smoothing=0.1), tau=1.0)
    """

    def __init__(
        self,
        criterion: Callable[..., Tensor],
        tau: float = 1.0,
        p: float = 2.0,
        *,
        check_finite: bool = False,
    ) -> None:
        super().__init__()
        self.criterion, self.clip, self.check_finite = criterion, LogitClip(tau, p), check_finite

    def forward(self, logits: Float[Tensor, "*batch classes"], target: Tensor, **keywords: Any) -> Tensor:
        if self.check_finite and not (finite := logits.isfinite().all(-1).flatten()).all():
            raise UserError(f"logits of row {int(finite.int().argmin())} are not finite")
        return self.criterion(self.clip(logits), target, **keywords)


def _norm(logits: Tensor, p: float, dim: int, eps: float) -> Tensor:
    if not logits.is_floating_point():
        raise UserError(f"logits must be floating point, got {logits.dtype}")
    if logits.ndim < 1 or logits.shape[dim] < 2:
        raise UserError(f"logits must hold at least 2 classes in dimension {dim}, got shape {tuple(logits.shape)}")
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(logits, ord=p, dim=dim, keepdim=True, dtype=wide).clamp(min=eps)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _check_threshold(tau: float, p: float, name: str = "tau") -> None:
    if not (math.isfinite(tau) and tau > 0):
        raise UserError(f"{name} must be positive and finite, got {tau}")
    if not p >= 1:
        raise UserError(f"p must be at least 1 or inf, got {p}")
