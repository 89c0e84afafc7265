"""Penalties that DDG is compared with, as DomainBed defines them, each a short function."""

from itertools import combinations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.errors import UserError

Scalar = Float[Tensor, ""]


def coral_penalty(features: Float[Tensor, "batch features"], domains: Int[Tensor, " _"]) -> Scalar:
    r"""CORAL (Sun & Saenko 2016): means and covariances of the features should agree between domains.

    $$\operatorname{mean}_{a<b}\ \tfrac1F \lVert \mu_a - \mu_b \rVert^2 + \tfrac1{F^2} \lVert C_a - C_b \rVert_F^2$$

    over the pairs of domains with at least two images in the batch; 0 if there is no pair. DomainBed's weight is 1.

    Raises:
        UserError: If the lengths differ.
    """
    if len(features) != len(domains):
        raise UserError(f"features and domains must be equally long, got {len(features)} and {len(domains)}")
    moments = []
    for domain in sorted(set(domains.tolist())):
        group = features[domains == domain]
        if len(group) > 1:
            centred = group - (mean := group.mean(0))
            moments.append((mean, centred.T @ centred / (len(group) - 1)))
    pairs = [((a - b) ** 2).mean() + ((c - d) ** 2).mean() for (a, c), (b, d) in combinations(moments, 2)]
    return torch.stack(pairs).mean() if pairs else features.new_zeros(())


def irm_penalty(logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> Scalar:
    r"""IRMv1 (Arjovsky et al. 2019) on the images of one domain: no rescaling of the logits should lower the risk.

    $$\partial_w \ell(w z_{\mathrm{even}}, y) \cdot \partial_w \ell(w z_{\mathrm{odd}}, y) \big|_{w = 1}$$

    Two disjoint halves make the squared gradient's estimate unbiased; it can be negative. Average it over domains.
    DomainBed's weight is 1 for 500 steps and 100 from then on.

    Raises:
        UserError: If there are fewer than two images.
    """
    if len(logits) < 2:
        raise UserError(f"irm_penalty needs at least 2 images of a domain, got {len(logits)}")
    scale = torch.ones((), device=logits.device, dtype=logits.dtype, requires_grad=True)
    gradients = [
        torch.autograd.grad(F.cross_entropy(logits[half::2] * scale, targets[half::2]), scale, create_graph=True)[0]
        for half in (0, 1)
    ]
    return gradients[0] * gradients[1]


def jensen_shannon(*logits: Float[Tensor, "batch classes"]) -> Scalar:
    r"""AugMix's consistency (Hendrycks et al. 2020): divergence of several predictions from their mean, in nats.

    $$\tfrac1K \sum_k \mathrm{KL}\big(p_k \,\Vert\, \bar p\big),\qquad \bar p = \tfrac1K \sum_k p_k$$

    averaged over the batch; the mean is clamped at 1e-7. AugMix and the reference weigh it by 12.
    """
    probabilities = torch.stack([z.softmax(-1) for z in logits])
    log_mean = probabilities.mean(0).clamp(min=1e-7).log()
    return (torch.xlogy(probabilities, probabilities) - probabilities * log_mean).sum(-1).mean()
