"""The constraint: an image must be rebuilt with the semantics of another image of its class."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.errors import UserError


def swap(
    variation: Float[Tensor, "n ..."], semantics: Float[Tensor, "_ ..."], perm: Int[Tensor, " _"]
) -> tuple[Float[Tensor, "n ..."], Float[Tensor, "n ..."]]:
    r"""Give each image the semantics of another: $(v_i, s_i) \mapsto (v_i, s_{\pi(i)})$.

    Swapping again with the inverse permutation restores the codes.

    Args:
        variation: $v(x)$; stays where it is.
        semantics: $s(x)$; vectors or maps.
        perm: $\pi$.

    Raises:
        UserError: If the three differ in length.
    """
    if not len(variation) == len(semantics) == len(perm):
        raise UserError(
            f"variation, semantics and perm must be equally long, got {len(variation)}, {len(semantics)}, {len(perm)}"
        )
    return variation, semantics[perm]


def partners(size: int, device: torch.device | str | None = None) -> Int[Tensor, " size"]:
    """Whom each image of a batch swaps with: the one half a batch away, so that two halves swap with each other."""
    return torch.arange(size, device=device).roll(size // 2)


def reconstruction_violation(
    x: Float[Tensor, "n ..."], x_hat: Float[Tensor, "_ ..."], margin: float, *, p: float = 1.0
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    r"""How far reconstructions exceed the margin (paper, eq. 4).

    $$d_i = \tfrac1P \sum_k |\hat x_{ik} - x_{ik}|^p, \qquad
      \Big(\tfrac1N \sum_i \max(0,\, d_i - \gamma),\ \ \tfrac1N \sum_i d_i\Big)$$

    The first is what the primal step descends: images within the margin exert no force. The second is what the
    dual step is taken on. The target ``x`` is detached.

    Args:
        x: Images, any shape.
        x_hat: Their reconstructions, of the same shape.
        margin: $\gamma$, in the units of the pixels (to the power ``p``). The reference's 0.025 is meant for
            pixels in [0, 1], its 0.25 for pixels in units of ImageNet's standard deviations.
        p: 1 is the paper's distance, 2 the squared error.

    Raises:
        UserError: If the shapes differ or ``margin`` or ``p`` is out of range.
    """
    if x.shape != x_hat.shape:
        raise UserError(f"the decoder must return images of shape {tuple(x.shape)}, got {tuple(x_hat.shape)}")
    if not margin >= 0:
        raise UserError(f"margin must not be negative, got {margin}")
    if not (p >= 1 and math.isfinite(p)):
        raise UserError(f"p must be finite and at least 1, got {p}")
    distance = (x_hat - x.detach()).abs().pow(p).flatten(1).mean(1)
    return (distance - margin).relu().mean(), distance.mean()
