"""What each stage of DDG minimises, term by term, on one batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from .constraint import reconstruction_violation, swap
from .penalties import jensen_shannon

Images = Float[Tensor, "batch ..."]
Labels = Int[Tensor, " batch"]
Scalar = Float[Tensor, ""]


class Stage0(NamedTuple):
    """Two of the generator's terms in stage 0, each a mean over the batch, and the swaps that the third judges."""

    reconstruction: Scalar
    cycle: Scalar
    swaps: Images


class Stage1(NamedTuple):
    """The terms of stage 1, each a mean over the batch."""

    risk: Scalar
    positive_risk: Scalar
    violation: Scalar
    distance: Scalar
    augmented_risk: Scalar
    consistency: Scalar


def stage0_terms(
    semantic: nn.Module,
    variation: nn.Module,
    decoder: nn.Module,
    x: Images,
    perm: Int[Tensor, " batch"],
    *,
    cycle: bool,
    train_encoder: bool,
) -> Stage0:
    r"""The generator learns to rebuild and to swap, with the semantics as they are.

    With $v_i = v(x_i)$, $s_i = s(x_i)$ detached, and swaps $\tilde x_i = D(v_i, s_{\pi(i)})$:

    - reconstruction: $|D(v_i, s_i) - x_i|$;
    - cycle: both codes are read again from the swaps, swapped back and decoded,
      $|D(v(\tilde x_i), s(\tilde x_{\pi^{-1}(i)})) - x_i|$.

    Args:
        semantic, variation, decoder: $s$, $v$, $D$.
        x: Images.
        perm: $\pi$, whose semantics each image gets.
        cycle: Whether the cycle is wanted; otherwise it is 0 and costs nothing.
        train_encoder: In the cycle, train the encoder $v$ on swaps that are held fixed; otherwise, with the encoder
            held fixed, train what made the swaps. The reference tosses a coin at every step.

    The third term, `MultiScaleDiscriminator.generator_loss` of the swaps, is the caller's.
    """
    with torch.no_grad():
        s = semantic(x)
    v = variation(x)
    rebuilt, swaps = decoder(torch.cat([v, v]), torch.cat([s, swap(v, s, perm)[1]])).split(len(x))
    reconstruction = reconstruction_violation(x, rebuilt, 0.0)[1]
    if not cycle:
        return Stage0(reconstruction, x.new_zeros(()), swaps)
    with torch.no_grad():
        s_again = semantic(swaps)
    if train_encoder:
        v_again = variation(swaps.detach())
    else:
        fixed = {name: parameter.detach() for name, parameter in variation.named_parameters()}
        v_again = functional_call(variation, fixed, (swaps,))
    back = decoder(*swap(v_again, s_again, perm.argsort()))
    return Stage0(reconstruction, reconstruction_violation(x, back, 0.0)[1], swaps)


def stage1_terms(
    semantic: nn.Module,
    classifier: nn.Module,
    variation: nn.Module,
    decoder: nn.Module,
    x: Images,
    labels: Labels,
    positives: Images,
    augmented: Sequence[Images] = (),
    augmented_labels: Labels | None = None,
    *,
    margin: float,
    p: float = 1.0,
) -> Stage1:
    r"""The risk of the classifier, and the constraint on its semantics (paper, eq. 3-5).

    - risk: $\ell(h(s(x_i)), y_i)$, and that of the positives, $\ell(h(s(x'_i)), y_i)$;
    - violation and distance: of $D(v(x_i), s(x'_i))$ from $x_i$, see `reconstruction_violation`;
    - augmented risk: $\ell(h(s(\tilde x_i)), \tilde y_i)$, averaged over the sets of augmented images;
    - consistency: `jensen_shannon` between the predictions on $x$ and on those sets, where there are several.

    All images go through the encoder in one pass; unless it has batch statistics, this changes no number.
    """
    n = len(x)
    s = semantic(torch.cat([x, positives, *augmented]))
    plain, positive, *rest = classifier(s).split(n)
    violation, distance = reconstruction_violation(x, decoder(variation(x), s[n : 2 * n]), margin, p=p)
    nothing = x.new_zeros(())
    labels_of_rest = labels if augmented_labels is None else augmented_labels
    return Stage1(
        risk=F.cross_entropy(plain, labels),
        positive_risk=F.cross_entropy(positive, labels),
        violation=violation,
        distance=distance,
        augmented_risk=torch.stack([F.cross_entropy(z, labels_of_rest) for z in rest]).mean() if rest else nothing,
        consistency=jensen_shannon(plain, *rest) if len(rest) > 1 else nothing,
    )
