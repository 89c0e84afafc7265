"""How a merged set is divided to train and test: confounded, mixed, or source against source."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from paperworks.data.biased.sourced import SourcedData
from paperworks.data.labels import check_labels
from paperworks.data.splits import split
from paperworks.errors import UserError


class ConfoundedSplit(NamedTuple):
    """Positions of examples, each in random order.

    Attributes:
        train: Classes in equal numbers; of each class a share ``bias`` from its home source.
        in_style: Held-out examples from the home source of their class.
        out_of_style: Held-out examples from the other sources.
        home: The home source of each class.
    """

    train: Int64[Tensor, " train"]
    in_style: Int64[Tensor, " in_style"]
    out_of_style: Int64[Tensor, " out_of_style"]
    home: Int64[Tensor, " classes"]


def confounded_split(
    labels: Int[Tensor, " n"],
    sources: Int[Tensor, " n"],
    bias: float,
    generator: torch.Generator,
    *,
    home: Sequence[int] | None = None,
    test_fraction: float = 0.25,
) -> ConfoundedSplit:
    r"""Draw a training set in which the class tells the source, and held-out sets where it does and does not.

    Of each class, $\lfloor b N \rceil$ training examples come from its home source and the rest in equal
    shares from the others; $N$ is the largest number that all classes can give. $b = 1$ is the
    out-of-distribution setting of the IERN paper (section 4.1), where a class is never seen elsewhere; $b =
    1/M$ has no bias.

    Args:
        labels: Class of each example.
        sources: Source of each example.
        bias: Share $b$ of a class's training examples from its home source, 0 to 1.
        generator: Source of randomness.
        home: Home source of each class. By default the classes are dealt out in order: with 6 classes and 3
            sources, classes 0 and 1 are at home in source 0, 2 and 3 in 1, 4 and 5 in 2.
        test_fraction: Share of every (class, source) pair that is held out.

    Raises:
        UserError: If an argument is out of range, a class lacks the examples it needs, or a source is left
            without a training example (it is named).
    """
    if not 0 <= bias <= 1:
        raise UserError(f"bias must be from 0 to 1, got {bias}")
    if not 0 < test_fraction < 1:
        raise UserError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    if labels.shape != sources.shape or not len(labels):
        raise UserError(f"labels and sources must be of one length, got {len(labels)} and {len(sources)}")
    num_classes, num_sources = int(labels.max()) + 1, int(sources.max()) + 1
    check_labels(labels, num_classes, "labels")
    check_labels(sources, num_sources, "sources")
    if num_sources < 2:
        raise UserError("sources must hold at least 2 sources, got 1")
    homes = torch.arange(num_classes) * num_sources // num_classes if home is None else torch.tensor(home)
    if len(homes) != num_classes:
        raise UserError(f"home must name a source for each of the {num_classes} classes, got {len(homes)}")
    check_labels(homes, num_sources, "home")

    held, kept = [], {}
    for k in range(num_classes):
        for m in range(num_sources):
            members = ((labels == k) & (sources == m)).nonzero().squeeze(1)
            members = members[torch.randperm(len(members), generator=generator)]
            out = round(test_fraction * len(members))
            held.append(members[:out])
            kept[k, m] = members[out:]
    quota = _quota({cell: len(members) for cell, members in kept.items()}, homes.tolist(), num_sources, bias)
    train = torch.cat([kept[cell][:count] for cell, count in quota.items()])
    if len(absent := (sources[train].bincount(minlength=num_sources) == 0).nonzero()):
        raise UserError(f"source {int(absent[0])} has no training example: with bias={bias} it must be home to a class")
    test = torch.cat(held)
    train, test = (part[torch.randperm(len(part), generator=generator)] for part in (train, test))
    at_home = homes[labels[test]] == sources[test]
    return ConfoundedSplit(train, test[at_home], test[~at_home], homes)


def mixed_folds(
    data: SourcedData, folds: int, seed: int
) -> list[tuple[Int64[Tensor, " train"], Int64[Tensor, " test"]]]:
    """Cross-validation folds ``(train, test)``, all sources on both sides, stratified by class and source.

    Raises:
        UserError: If ``folds`` is below 2, or a (class, source) pair has fewer examples than folds.
    """
    if folds < 2:
        raise UserError(f"folds must be at least 2, got {folds}")
    parts = split(data.cells(), (1 / folds,) * folds, seed)
    return [(torch.cat([*parts[:i], *parts[i + 1 :]]), parts[i]) for i in range(folds)]


def leave_one_source_out(
    data: SourcedData,
) -> Iterator[tuple[str, Int64[Tensor, " train"], Int64[Tensor, " test"]]]:
    """The cross-dataset protocol: for each source ``(its name, all examples of the others, its own)``."""
    for number, name in enumerate(data.source_names):
        own = data.sources == number
        yield name, (~own).nonzero().squeeze(1), own.nonzero().squeeze(1)


def _quota(
    available: dict[tuple[int, int], int], homes: list[int], num_sources: int, bias: float
) -> dict[tuple[int, int], int]:
    """How many examples each (class, source) pair gives, the same number in all for every class."""

    def wanted(total: int) -> dict[tuple[int, int], int]:
        at_home = round(bias * total)
        counts: dict[tuple[int, int], int] = {}
        for k, home in enumerate(homes):
            others = [m for m in range(num_sources) if m != home]
            share, over = divmod(total - at_home, len(others))
            # Starting at another source for each class keeps the sources' totals level.
            extra = {others[(k + i) % len(others)] for i in range(over)}
            counts |= {(k, m): share + (m in extra) for m in others} | {(k, home): at_home}
        return counts

    for total in range(max(available.values()) * num_sources, 0, -1):
        counts = wanted(total)
        if all(count <= available[cell] for cell, count in counts.items()):
            return counts
    k, m = min(available, key=lambda cell: available[cell])
    raise UserError(f"class {k} has {available[k, m]} examples of source {m} left to train on, too few for bias={bias}")
