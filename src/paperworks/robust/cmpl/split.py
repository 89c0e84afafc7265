"""Which few clips are labelled."""

from collections.abc import Sequence

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from paperworks.errors import UserError


def semi_supervised_split(
    labels: Int[Tensor, " n"],
    generator: torch.Generator,
    *,
    fraction: float | None = None,
    per_class: int | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Int64[Tensor, " labelled"], Int64[Tensor, " unlabelled"]]:
    """Draw the labelled examples, class by class; the others are unlabelled.

    Args:
        labels: Class index of each example.
        generator: Source of the draw.
        fraction: Share of each class that is labelled, e.g. 0.01; to the nearest example.
        per_class: Or, the number of each class.
        classes: Names of all classes, also of those without an example.

    Returns:
        Positions of the labelled and of the unlabelled examples, both ascending.

    Raises:
        UserError: If not exactly one of the two is given, or a class would have no labelled example, or fewer
            examples than ``per_class``; the error names the class.
    """
    if (fraction is None) == (per_class is None):
        raise UserError(f"give either fraction or per_class, got fraction={fraction}, per_class={per_class}")
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"fraction must be in (0, 1], got {fraction}")
    if per_class is not None and per_class < 1:
        raise UserError(f"per_class must be at least 1, got {per_class}")
    names = classes or [str(k) for k in range(int(labels.max()) + 1)]
    labelled = torch.zeros(len(labels), dtype=torch.bool)
    for k, name in enumerate(names):
        members = (labels == k).nonzero().flatten()
        wanted = per_class or round((fraction or 0) * len(members))
        if not 1 <= wanted <= len(members):
            raise UserError(f"class {name!r} has {len(members)} examples, of which {wanted} would be labelled")
        labelled[members[torch.randperm(len(members), generator=generator)[:wanted]]] = True
    return labelled.nonzero().flatten(), (~labelled).nonzero().flatten()
