"""Label noise: replace some of the labels of a clean set by wrong ones, in the ways the literature does."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from paperworks.data.labels import check_labels
from paperworks.errors import UserError, unknown

KINDS = ("symmetric", "pair", "asymmetric", "instance", "transition")


class NoisyLabels(NamedTuple):
    """Labels after noise.

    Attributes:
        noisy: The labels with noise, a new tensor.
        is_noisy: Where ``noisy`` differs from the clean labels.
        transition: The noise that was in fact drawn, row-stochastic: entry (i, j) is the share of class i's
            examples that now bear label j. A class without examples has the identity's row.
    """

    noisy: Int[Tensor, "n"]
    is_noisy: Bool[Tensor, "n"]
    transition: Float[Tensor, "classes classes"]


def noisify(
    labels: Int[Tensor, "n"],
    kind: str,
    rate: float | None,
    num_classes: int,
    generator: torch.Generator,
    transition: Float[Tensor, "classes classes"] | None = None,
    features: Float[Tensor, "n d ..."] | None = None,
) -> NoisyLabels:
    r"""Draw noisy labels; the clean ones are left as they are.

    For every kind but ``"transition"``, exactly ⌊``rate`` · n⌋ distinct examples are drawn uniformly, and a
    drawn example of class y receives the label

    - ``"symmetric"``: any *other* class, uniformly;
    - ``"pair"``: (y + 1) mod K;
    - ``"asymmetric"``: CIFAR-10's look-alike (`cifar10_asymmetric_map`). Classes outside the map stay clean:
      on balanced data a nominal 40 % is 20 % in fact;
    - ``"instance"``: a draw from softmax(xᵀW_y) over the other classes, the entries of W_y ∈ R^{D×K} being
      standard normal (after Xia et al., 2020, arXiv 2006.07836, who also draw the rate of each example). The
      scale of x is the sharpness of the noise.

    With ``"transition"``, every label is drawn anew from row y of ``transition``, which sets the rate.

    Args:
        labels: Clean labels, 0 to K - 1.
        kind: One of the kinds above.
        rate: Share of the examples that are drawn, 0 to 1; None with ``"transition"``.
        num_classes: K, at least 2.
        generator: Source of all randomness.
        transition: Row-stochastic [K, K], for ``"transition"``.
        features: x, one row an example (flattened to D values), for ``"instance"``; others do not read it.

    Raises:
        UserError: If an argument is out of its range or does not belong with ``kind``.
    """
    _check(labels, kind, rate, num_classes, transition, features)
    device = generator.device
    clean = labels.to(device, torch.int64)
    noisy = clean.clone()
    if transition is not None:
        noisy = _draw(transition.to(device)[clean], generator)
    else:
        assert rate is not None
        count = int(rate * len(clean))
        drawn = torch.randperm(len(clean), generator=generator, device=device)[:count]
        y = clean[drawn]
        if kind == "symmetric":
            offset = torch.randint(1, num_classes, y.shape, generator=generator, device=device)
            noisy[drawn] = (y + offset) % num_classes
        elif kind == "pair":
            noisy[drawn] = (y + 1) % num_classes
        elif kind == "asymmetric":
            noisy[drawn] = cifar10_asymmetric_map().to(device)[y]
        elif features is not None:  # "instance"
            x = features.to(device)[drawn].flatten(1).float()
            noisy[drawn] = _instance_labels(x, y, num_classes, generator)
    return NoisyLabels(
        noisy.to(labels),
        (noisy != clean).to(labels.device),
        _transition(clean, noisy, num_classes).to(labels.device),
    )


def cifar10_asymmetric_map() -> Int64[Tensor, "10"]:
    """The class that each CIFAR-10 class is mistaken for.

    Truck → automobile, bird → airplane, deer → horse, cat ↔ dog; the others are themselves
    (Patrini et al., 2017, arXiv 1609.03683).
    """
    return torch.tensor([0, 1, 0, 5, 7, 3, 6, 7, 8, 1])


def replace_inputs(
    inputs: Float[Tensor, "n ..."],
    outliers: Float[Tensor, "m ..."],
    rate: float,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n ..."], Bool[Tensor, "n"]]:
    """Open-set noise: put distinct outliers in the place of ⌊``rate`` · n⌋ inputs, whose labels remain.

    Args:
        inputs: The clean inputs; left as they are.
        outliers: Inputs of the same shape from outside the classes.
        rate: Share of the inputs to replace, 0 to 1.
        generator: Source of all randomness.

    Returns:
        The new inputs, and where they were replaced.

    Raises:
        UserError: If the shapes differ, the rate is outside [0, 1], or there are too few outliers.
    """
    _check_rate(rate)
    count, device = int(rate * len(inputs)), generator.device
    if inputs.shape[1:] != outliers.shape[1:]:
        raise UserError(
            f"outliers must have the inputs' shape {list(inputs.shape[1:])}, got {list(outliers.shape[1:])}"
        )
    if count > len(outliers):
        raise UserError(f"rate={rate} replaces {count} inputs, but there are {len(outliers)} outliers")
    drawn = torch.randperm(len(inputs), generator=generator, device=device)[:count].to(inputs.device)
    chosen = torch.randperm(len(outliers), generator=generator, device=device)[:count].to(outliers.device)
    mixed, replaced = inputs.clone(), torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
    mixed[drawn] = outliers[chosen].to(inputs)
    replaced[drawn] = True
    return mixed, replaced


def _draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


def _instance_labels(x: Tensor, y: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    flipped = torch.empty_like(y)
    for k in range(num_classes):  # one W_y at a time: all K would be K times the memory
        projection = torch.randn(x.shape[1], num_classes, generator=generator, device=x.device, dtype=x.dtype)
        rows = (y == k).nonzero().squeeze(1)
        if len(rows):
            logits = x[rows] @ projection
            logits[:, k] = -torch.inf
            flipped[rows] = _draw(logits.softmax(1), generator)
    return flipped


def _transition(clean: Tensor, noisy: Tensor, num_classes: int) -> Tensor:
    pairs = torch.bincount(clean * num_classes + noisy, minlength=num_classes**2)
    counts = pairs.view(num_classes, num_classes)
    members = counts.sum(1, keepdim=True)
    identity = torch.eye(num_classes, device=counts.device)
    return torch.where(members > 0, counts / members.clamp(min=1), identity)


def _check(
    labels: Tensor,
    kind: str,
    rate: float | None,
    num_classes: int,
    transition: Tensor | None,
    features: Tensor | None,
) -> None:
    if kind not in KINDS:
        raise unknown("noise kind", kind, KINDS)
    if num_classes < 2:
        raise UserError(f"num_classes must be at least 2, got {num_classes}")
    check_labels(labels, num_classes, "labels")
    if kind == "transition":
        if rate is not None:
            raise UserError(f"rate must be None with kind='transition' (the matrix sets it), got {rate}")
        _check_transition(transition, num_classes)
        return
    _check_rate(rate)
    if transition is not None:
        raise UserError(f"transition belongs to kind='transition', got kind={kind!r}")
    if kind == "asymmetric" and num_classes != 10:
        raise UserError(f"kind='asymmetric' is CIFAR-10's map and needs num_classes=10, got {num_classes}")
    if kind == "instance":
        if features is None or features.ndim < 2 or len(features) != len(labels):
            got = "none" if features is None else list(features.shape)
            raise UserError(f"kind='instance' needs features of shape [{len(labels)}, ...], got {got}")
        if not features.isfinite().all():
            row = (~features.flatten(1).isfinite().all(1)).nonzero()[0].item()
            raise UserError(f"features[{row}] holds a value that is not finite")


def _check_rate(rate: float | None) -> None:
    if rate is None or not 0 <= rate <= 1:
        raise UserError(f"rate must be from 0 to 1, got {rate}")


def _check_transition(transition: Tensor | None, num_classes: int) -> None:
    if transition is None or transition.shape != (num_classes, num_classes):
        got = "none" if transition is None else list(transition.shape)
        raise UserError(f"kind='transition' needs transition of shape [{num_classes}, {num_classes}], got {got}")
    stochastic = (transition >= 0).all(1) & ((transition.sum(1) - 1).abs() < 1e-4)
    if not stochastic.all():
        row = int((~stochastic).nonzero()[0])
        raise UserError(f"transition[{row}] must be non-negative and sum to 1, got {transition[row].tolist()}")
