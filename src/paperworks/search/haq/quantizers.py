"""Linear fake quantization of weights and activations, and where to clip them."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.special import rel_entr
from torch import Tensor

from paperworks.errors import UserError

HISTOGRAM_BITS = 5
"""Below so many bits the range is clipped where the histogram diverges least, as in the released code."""


def fake_quantize_weight(
    weight: Float[Tensor, "*shape"], bits: int, clip: Float[Tensor, ""] | float | None = None
) -> Float[Tensor, "*shape"]:
    r"""Round weights to a symmetric grid of $2^b - 1$ values, the paper's linear quantization (section 3).

    $$\hat w = s \cdot \operatorname{round}\left(\frac{\operatorname{clamp}(w, -c, c)}{s}\right), \qquad
      s = \frac{c}{2^{b-1} - 1}$$

    The gradient passes straight through inside the grid and is 0 outside.

    Args:
        weight: Of any shape.
        bits: $b$, from 2 to 24.
        clip: $c > 0$, by default the largest magnitude; see ``clip_threshold``.

    Returns:
        Weights of the same type that take at most $2^b - 1$ values.

    Raises:
        UserError: If ``bits`` or ``clip`` is out of range.
    """
    _check_bits(bits)
    clip = float(weight.detach().abs().amax()) if clip is None else _check_clip(clip)
    return _round(weight.clamp(-clip, clip), clip / (2 ** (bits - 1) - 1))


def fake_quantize_activation(
    x: Float[Tensor, "*shape"], bits: int, clip: Float[Tensor, ""] | float, *, signed: bool = False
) -> Float[Tensor, "*shape"]:
    r"""Round activations to a grid of at most $2^b$ values on $[0, c]$, or on $[-c, c]$ if ``signed``.

    $$\hat x = s \cdot \operatorname{round}\left(\frac{\operatorname{clamp}(x, 0, c)}{s}\right), \qquad
      s = \frac{c}{2^b - 1}$$

    With a sign, $b - 1$ bits are left for the magnitude. The gradient passes straight through inside the range; to
    the clip goes that of everything beyond it, as in PACT, so that a ``clip`` that requires gradients is learned.

    Args:
        x: Of any shape.
        bits: $b$, from 2 to 24.
        clip: $c > 0$.
        signed: Whether there are negative values to keep.

    Raises:
        UserError: If ``bits`` or ``clip`` is out of range.
    """
    _check_bits(bits)
    top = _check_clip(clip)
    if isinstance(clip, Tensor) and clip.requires_grad and torch.is_grad_enabled():
        x = x.clamp(-clip if signed else torch.zeros_like(clip), clip)
    else:
        x = x.clamp(-top if signed else 0.0, top)
    return _round(x, top / (2 ** (bits - 1) - 1 if signed else 2**bits - 1))


def clip_threshold(values: Float[Tensor, "*shape"], bits: int, *, signed: bool = True) -> float:
    r"""Where to clip before rounding to ``bits``: the $c$ of the quantizers.

    From 5 bits up the largest magnitude. Below, as in the paper's section 3, the $c$ that minimises
    $D_\mathrm{KL}(P_c \,\|\, Q_c)$, where $P_c$ is the histogram of magnitudes with what lies beyond $c$ in its last
    bin, and $Q_c$ spreads the mass of each level evenly over the bins that are rounded to it. As in the released code
    there are $\sqrt n$ bins for $n$ values, at most 1024; zeros are left out, since every grid holds them exactly.

    Args:
        values: Weights, or activations of a calibration batch.
        bits: $b$, from 2 to 24.
        signed: Whether one bit is the sign's.

    Returns:
        $c$, which is 0 if all values are.

    Raises:
        UserError: If ``bits`` is out of range or a value is not finite.
    """
    _check_bits(bits)
    magnitudes = values.detach().abs().flatten().float().cpu()
    top = float(magnitudes.max()) if len(magnitudes) else 0.0
    if not math.isfinite(top):
        raise UserError(f"values must be finite, got {top}")
    levels = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    magnitudes = magnitudes[magnitudes > 0]
    bins = min(math.isqrt(len(magnitudes)), 1024)
    if bits >= HISTOGRAM_BITS or bins <= levels + 1:
        return top
    histogram = torch.histc(magnitudes.double(), bins, 0, top).numpy() / len(magnitudes)
    beyond = 1 - histogram.cumsum()
    candidates = range(levels + 1, bins + 1)
    divergences = [_divergence(histogram[:kept], beyond[kept - 1], levels) for kept in candidates]
    return top * candidates[int(np.argmin(divergences))] / bins


def _divergence(inside: Float64[np.ndarray, "bins"], beyond: float, levels: int) -> float:
    """KL divergence when these bins lie within the clip, and a share ``beyond`` of the values does not."""
    if not inside.any():
        return math.inf
    level = np.rint((np.arange(len(inside)) + 0.5) * (levels / len(inside))).astype(int)
    mass = np.bincount(level, inside, levels + 1)
    used = np.bincount(level, inside > 0, levels + 1).clip(min=1)
    q = np.where(inside > 0, (mass / used)[level], 0)
    p = inside.copy()
    p[-1] += max(beyond, 0.0)
    return float(rel_entr(p, q / q.sum()).sum())


def _round(clamped: Tensor, scale: float) -> Tensor:
    """To the nearest multiple of ``scale``, with the gradient of the identity; reuses memory where it can."""
    scale = max(scale, torch.finfo(torch.float32).tiny)  # a range of nothing but zeros
    if not clamped.requires_grad:
        return clamped.div_(scale).round_().mul_(scale)
    rounded: Tensor = _Round.apply(clamped, scale)
    return rounded


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        return (x / scale).round_().mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _check_clip(clip: Tensor | float) -> float:
    value = float(clip.detach() if isinstance(clip, Tensor) else clip)
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"clip must be a positive number, got {value}")
    return value


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 24:
        raise UserError(f"bits must be an integer in [2, 24], got {bits!r}")
