"""One context prototype a stratum of the confounder."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.data.labels import check_labels
from paperworks.errors import UserError


class ConfounderBank(nn.Module):
    r"""Learnable centres $Z_m$ of the context features of each source: the strata of the confounder.

    They learn by the centre loss (Wen et al., ECCV 2016) that also pulls the context features together, and
    are used, detached, as prototypes in the back-door adjustment.

    Args:
        num_strata: Number of sources, $M$.
        feature_shape: Shape of one context feature.
        weight: $\lambda_z$, the weight of the centre loss. It scales the gradient of the features only:
            centres move at full rate. The paper's 5e-4 goes with 512·7·7 features, over which the loss sums.
        generator: Draws the centres from a standard normal distribution.

    Attributes:
        centers: The centres, ``[strata, *feature_shape]``.
        seen: How many examples of each stratum have been observed; travels in the state_dict.

    Raises:
        UserError: If there are fewer than two strata or ``weight`` is not positive.
    """

    seen: Tensor

    def __init__(
        self,
        num_strata: int,
        feature_shape: Sequence[int],
        *,
        weight: float = 5e-4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_strata < 2:
            raise UserError(f"num_strata must be at least 2, got {num_strata}")
        if not weight > 0:
            raise UserError(f"weight must be positive, got {weight}")
        self.weight = weight
        self.centers = nn.Parameter(torch.randn(num_strata, *feature_shape, generator=generator))
        self.register_buffer("seen", torch.zeros(num_strata, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.centers)

    def center_loss(self, context: Float[Tensor, "batch *feature"], strata: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        r"""$\frac{\lambda_z}{B} \sum_i \lVert c_i - Z_{d_i} \rVert^2$, its gradient on $Z$ divided by $\lambda_z$.

        Raises:
            UserError: If a stratum is out of range or the features are not of the bank's shape.
        """
        check_labels(strata, len(self), "strata")
        if context.shape[1:] != self.centers.shape[1:]:
            got, expected = list(context.shape[1:]), list(self.centers.shape[1:])
            raise UserError(f"context must be features of shape {expected}, got {got}")
        own = self.centers[strata]
        if own.requires_grad:
            own.register_hook(lambda gradient: gradient / self.weight)  # type: ignore[no-untyped-call]
        return self.weight * (context - own).square().flatten(1).sum(1).mean()

    @torch.no_grad()
    def observe(self, strata: Int[Tensor, " batch"]) -> None:
        """Count the strata of a batch."""
        self.seen += strata.bincount(minlength=len(self))

    def prototypes(self) -> Float[Tensor, "strata *feature"]:
        """The centres, detached."""
        return self.centers.detach()

    def prior(self) -> Float[Tensor, " strata"]:
        """The share of each stratum among the examples observed so far; uniform before the first."""
        total = self.seen.sum()
        return torch.where(total > 0, self.seen / total, 1 / len(self))
