"""The back-door adjustment: a prediction averaged over the strata of the confounder."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.errors import UserError

AVERAGES = ("logit", "prob")


def backdoor_average(
    emotion: Float[Tensor, "batch *feature"],
    prototypes: Float[Tensor, "strata *context"],
    combine: Callable[[Tensor, Tensor], Tensor],
    classify: Callable[[Tensor], Tensor],
    prior: Float[Tensor, " _"] | None = None,
    average: str = "logit",
    *,
    one_pass: bool = True,
) -> Float[Tensor, "batch classes"]:
    r"""Classify each example under every stratum of the confounder and average (paper, section 3.3).

    $$P(y \mid do(x)) = \sum_m P(y \mid x, z_m)\, P(z_m), \qquad
    o = \sum_m P(z_m)\, \mathrm{classify}(\mathrm{combine}(e, z_m))$$

    Averaging logits, as the paper does, is the normalised weighted geometric mean of the strata's
    probabilities; averaging probabilities is the adjustment itself.

    Args:
        emotion: What the examples themselves contribute, $e$.
        prototypes: One context a stratum, $z_m$.
        combine: Maps ``(emotion, context)``, both ``[n, ...]``, to features of ``n`` examples.
        classify: Maps these to logits ``[n, classes]``.
        prior: $P(z_m)$; uniform if not given.
        average: Average ``"logit"``s, or probabilities (``"prob"``).
        one_pass: Stack all strata into one batch. Layers that look across the batch (batch normalisation in
            training mode) then see them together; without it they see one stratum at a time, as in the
            reference implementation.

    Returns:
        Logits; for ``"prob"`` the logarithms of the averaged probabilities. Their softmax is the prediction.

    Raises:
        UserError: If there is no stratum, ``average`` is unknown, or ``prior`` is not a distribution over the
            strata.
    """
    if not len(prototypes):
        raise UserError("prototypes must hold at least 1 stratum, got 0")
    check_average(average)
    if prior is not None:
        check_prior(prior, len(prototypes))
    logits = strata_logits(emotion, prototypes, combine, classify, one_pass=one_pass)
    return average_strata(logits, prior, average)


def strata_logits(
    emotion: Float[Tensor, "batch *feature"],
    prototypes: Float[Tensor, "strata *context"],
    combine: Callable[[Tensor, Tensor], Tensor],
    classify: Callable[[Tensor], Tensor],
    *,
    one_pass: bool = True,
) -> Float[Tensor, "strata batch classes"]:
    """The logits of every example under each stratum; arguments as in `backdoor_average`."""
    strata, batch = len(prototypes), len(emotion)
    if not one_pass:
        each = [classify(combine(emotion, z.expand(batch, *z.shape))) for z in prototypes]
        return torch.stack(each)
    repeated = emotion.expand(strata, *emotion.shape).flatten(0, 1)
    contexts = prototypes.unsqueeze(1).expand(-1, batch, *prototypes.shape[1:]).flatten(0, 1)
    return classify(combine(repeated, contexts)).view(strata, batch, -1)


def average_strata(
    logits: Float[Tensor, "strata batch classes"], prior: Float[Tensor, " strata"] | None, average: str
) -> Float[Tensor, "batch classes"]:
    """Average over the first dimension; arguments as in `backdoor_average`."""
    weights = logits.new_full((len(logits),), 1 / len(logits)) if prior is None else prior.to(logits)
    if average == "logit":
        return torch.einsum("m,mbk->bk", weights, logits)
    return (logits.log_softmax(-1) + weights.log()[:, None, None]).logsumexp(0)


def strata_spread(logits: Float[Tensor, "strata batch classes"]) -> Float[Tensor, " batch"]:
    r"""How much a prediction depends on the stratum: the mean total variation from the average prediction.

    $\frac{1}{M} \sum_m \frac12 \lVert p_m - \bar p \rVert_1$, from 0 (counterfactually consistent) to just
    below 1.
    """
    probabilities = logits.softmax(-1)
    return 0.5 * (probabilities - probabilities.mean(0)).abs().sum(-1).mean(0)


def check_average(average: str) -> None:
    """Raise unless ``average`` is one of those that `backdoor_average` knows."""
    if average not in AVERAGES:
        raise UserError(f"average must be 'logit' or 'prob', got {average!r}")


def check_prior(prior: Tensor, strata: int) -> None:
    """Raise unless ``prior`` is a probability vector over the strata."""
    if prior.shape != (strata,):
        raise UserError(f"prior must hold one entry for each of {strata} strata, got {list(prior.shape)}")
    if not (prior >= 0).all() or abs(float(prior.sum()) - 1) > 1e-4:
        raise UserError(f"prior must be non-negative and sum to 1, got {prior.tolist()}")
