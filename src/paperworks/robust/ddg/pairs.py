"""Positive pairs: other images of the same class."""

import warnings

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from paperworks.errors import UserError


def same_class_positives(
    labels: Int[Tensor, " n"],
    generator: torch.Generator,
    domains: Int[Tensor, " _"] | None = None,
    cross_domain: bool = False,
    *,
    rows: Int[Tensor, " rows"] | None = None,
    single: str = "refuse",
) -> Int64[Tensor, " drawn"]:
    """Draw for each image another one of its class, uniformly.

    What counts as a positive decides what the method can gain. The reference pairs a rotated digit with *the same*
    digit at another training angle, which is data augmentation; any image of the class is the default here.

    Args:
        labels: Classes of a batch or of a whole training set.
        generator: Source of all randomness, on any device.
        domains: Draw within the image's own domain (as the reference does on WILDS) or, with ``cross_domain``,
            from the other domains only. Without it, from any.
        cross_domain: See ``domains``.
        rows: Images that need a positive; by default every one.
        single: What becomes of an image without another to choose: ``"refuse"``, or ``"self"``, which makes it its
            own positive and warns.

    Returns:
        Positions into ``labels``, one for each of ``rows``.

    Raises:
        UserError: If ``labels`` and ``domains`` differ in length, or an image has no positive.

    Example:
        >>> positive = images[same_class_positives(labels, torch.Generator().manual_seed(0))]
    """
    if domains is not None and len(domains) != len(labels):
        raise UserError(f"labels and domains must be equally long, got {len(labels)} and {len(domains)}")
    if cross_domain and domains is None:
        raise UserError("cross_domain=True needs domains")
    if single not in ("refuse", "self"):
        raise UserError(f"single must be 'refuse' or 'self', got {single!r}")
    if not len(labels):
        return torch.zeros(0, dtype=torch.int64, device=labels.device)
    rows = torch.arange(len(labels), device=labels.device) if rows is None else rows
    cell = labels if domains is None else labels * (int(domains.max()) + 1) + domains

    # Sorted by class and then by domain, both a class and a cell (class and domain) are intervals. A draw is from
    # the outer interval without the inner one.
    order = cell.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    if cross_domain:
        (start, size), (hole, hole_size) = _intervals(labels), _intervals(cell)
    else:
        (start, size), (hole, hole_size) = _intervals(cell), (place, torch.ones_like(place))
    start, size, hole, hole_size = (t[rows] for t in (start, size, hole, hole_size))
    choices = size - hole_size

    lonely = choices == 0
    if lonely.any():
        worst = rows[lonely][0]
        where = ""
        if domains is not None:
            where = f" {'out' if cross_domain else 'in'}side domain {int(domains[worst])}"
        what = f"class {int(labels[worst])} has no second example{where}"
        if single == "refuse":
            raise UserError(f"{what} that could be its positive: add examples, or pass single='self'")
        warnings.warn(f"{what}: it is its own positive", stacklevel=2)
    draw = torch.rand(len(rows), generator=generator, device=generator.device, dtype=torch.float64).to(rows.device)
    drawn = start + (draw * choices).long().clamp(max=choices - 1)
    drawn = torch.where(drawn >= hole, drawn + hole_size, drawn)
    return torch.where(lonely, rows, order[drawn.clamp(max=len(order) - 1)])


def _intervals(group: Tensor) -> tuple[Tensor, Tensor]:
    """Where each element's group begins in sorted order, and how long it is."""
    _, inverse, counts = torch.unique(group, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - counts)[inverse], counts[inverse]
