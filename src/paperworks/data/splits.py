"""Splits: index tensors that divide a labelled set, the same for the same seed."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from paperworks.data.labelled import LabelledData
from paperworks.errors import UserError


def split(
    data: LabelledData | Int[Tensor, "n"],
    sizes: Sequence[int] | Sequence[float],
    seed: int,
    *,
    stratify: bool = True,
) -> tuple[Int64[Tensor, "_"], ...]:
    """Divide a set into disjoint parts drawn at random: ``train, test = split(data, (0.8, 0.2), seed=0)``.

    The parts cover the set when the sizes add up to all of it; what is over is in no part. Each part is in
    random order.

    Args:
        data: The set, or its class labels.
        sizes: Numbers of examples (integers), or fractions of the set (floats).
        seed: Decides the draw: 0 to 2³² - 1.
        stratify: Keep the proportions of the classes in each part (to the nearest example).

    Raises:
        UserError: If a size is empty, they exceed the set, or (stratified) a class has fewer examples than
            there are parts, or a part fewer than there are classes.
    """
    # Imported here as it takes a second, which loaders that split nothing need not wait for.
    from sklearn.utils import resample

    labels = _labels(data)
    counts = _counts(sizes, len(labels))
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be from 0 to 2**32 - 1, got {seed}")
    if stratify:
        classes, members = np.unique(labels, return_counts=True)
        if members.size and members.min() < len(counts):
            rare = _name(data, int(classes[members.argmin()]))
            raise UserError(
                f"class {rare} has {members.min()} example(s), too few to stratify {len(counts)} parts: "
                "add examples, or pass stratify=False"
            )
        if min(counts) < len(classes):
            raise UserError(
                f"a part of {min(counts)} examples cannot hold all {len(classes)} classes: "
                "make it larger, or pass stratify=False"
            )
    rest, parts = np.arange(len(labels)), []
    for size in counts:
        drawn = resample(
            np.arange(len(rest)),
            n_samples=size,
            replace=False,
            stratify=labels[rest] if stratify else None,
            random_state=seed,
        )
        parts.append(torch.from_numpy(rest[drawn]))
        rest = np.delete(rest, drawn)
    return tuple(parts)


def few_label(
    data: LabelledData | Int[Tensor, "n"],
    generator: torch.Generator,
    *,
    per_class: int | None = None,
    fraction: float | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Int64[Tensor, "labelled"], Int64[Tensor, "unlabelled"]]:
    """Draw the labelled examples, class by class; the others are unlabelled.

    Args:
        data: The set, or its class labels.
        generator: Source of the draw.
        per_class: Labelled examples of each class.
        fraction: Or, the share of each class, e.g. 0.01; to the nearest example.
        classes: Names of all classes, also of those without an example; a set brings its own.

    Returns:
        Positions of the labelled and of the unlabelled examples, both ascending.

    Raises:
        UserError: If not exactly one of the two is given, or a class would have no labelled example, or has fewer
            examples than ``per_class``; the error names the class.
    """
    labels = torch.from_numpy(_labels(data))
    if (fraction is None) == (per_class is None):
        raise UserError(f"give either fraction or per_class, got fraction={fraction}, per_class={per_class}")
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"fraction must be in (0, 1], got {fraction}")
    if per_class is not None and per_class < 1:
        raise UserError(f"per_class must be at least 1, got {per_class}")
    if isinstance(data, LabelledData):
        classes = data.classes
    labelled = torch.zeros(len(labels), dtype=torch.bool)
    for k, name in enumerate(classes or range(int(labels.max()) + 1)):
        members = (labels == k).nonzero().flatten()
        wanted = per_class or round((fraction or 0) * len(members))
        if not 1 <= wanted <= len(members):
            raise UserError(f"class {str(name)!r} has {len(members)} examples, of which {wanted} would be labelled")
        labelled[members[torch.randperm(len(members), generator=generator)[:wanted]]] = True
    return labelled.nonzero().flatten(), (~labelled).nonzero().flatten()


def _labels(data: LabelledData | Tensor) -> np.ndarray:
    labels = data.targets if isinstance(data, LabelledData) else data
    if labels.ndim != 1 or labels.is_floating_point():
        raise UserError(f"labels must be an integer vector, got {labels.dtype} {list(labels.shape)}")
    return labels.cpu().numpy()


def _name(data: LabelledData | Tensor, label: int) -> str:
    return repr(data.classes[label]) if isinstance(data, LabelledData) else str(label)


def _counts(sizes: Sequence[int] | Sequence[float], total: int) -> list[int]:
    """The sizes as numbers of examples; fractions are rounded so that 1.0 in all is every example."""
    if not sizes or not all(size > 0 for size in sizes):
        raise UserError(f"sizes must be positive numbers, got {tuple(sizes)}")
    if all(isinstance(size, int) for size in sizes):
        counts = [int(size) for size in sizes]
        if sum(counts) > total:
            raise UserError(f"sizes {tuple(sizes)} add up to {sum(counts)}, but there are {total} examples")
        return counts
    if any(isinstance(size, int) for size in sizes):
        raise UserError(f"sizes must be all integers (examples) or all floats (fractions), got {tuple(sizes)}")
    if sum(sizes) > 1 + 1e-9:
        raise UserError(f"the fractions {tuple(sizes)} add up to {sum(sizes):g}, more than 1")
    counts = [stop - start for start, stop in pairwise(round(end * total) for end in accumulate(sizes, initial=0.0))]
    if min(counts) == 0:
        raise UserError(f"the fraction {sizes[counts.index(0)]} of {total} examples is none")
    return counts
