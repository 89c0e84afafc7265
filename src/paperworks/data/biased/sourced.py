"""Labelled examples that also know which data set they came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor
from torch.utils.data import TensorDataset

from paperworks.data.labelled import LabelledData
from paperworks.data.labels import check_labels
from paperworks.data.root import locate
from paperworks.data.sources import load
from paperworks.errors import UserError


@dataclass(frozen=True, eq=False)
class SourcedData:
    """A merged classification set: every example has a class and a source.

    Attributes:
        data: Inputs and class labels.
        sources: Index of the source of each example, 0 to ``num_sources - 1``.
        source_names: What the indices stand for.

    Raises:
        UserError: If lengths disagree, an index is out of range, or a source has no example (it is named).
    """

    data: LabelledData
    sources: Int64[Tensor, " n"]
    source_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.sources.shape != self.data.targets.shape:
            raise UserError(f"sources must have length {len(self.data)}, got {list(self.sources.shape)}")
        check_labels(self.sources, self.num_sources, "sources")
        counts = self.sources.bincount(minlength=self.num_sources).tolist()
        if 0 in counts:
            raise UserError(f"source {self.source_names[counts.index(0)]!r} has no example")

    @property
    def inputs(self) -> Float32[Tensor, "n ..."]:
        """The inputs, as in `LabelledData`."""
        return self.data.inputs

    @property
    def targets(self) -> Int64[Tensor, " n"]:
        """The class labels."""
        return self.data.targets

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return self.data.num_classes

    @property
    def num_sources(self) -> int:
        """The number of sources, M."""
        return len(self.source_names)

    def __len__(self) -> int:
        return len(self.data)

    def cells(self) -> Int64[Tensor, " n"]:
        """The (class, source) pair of each example as one index, ``class * M + source``."""
        return self.targets * self.num_sources + self.sources

    def subset(self, index: Int64[Tensor, " m"] | Bool[Tensor, " n"]) -> "SourcedData":
        """Return the examples at ``index`` (positions, or a mask); every source must still have one."""
        return SourcedData(self.data.subset(index), self.sources[index], self.source_names)

    def dataset(self) -> TensorDataset:
        """Return ``(input, target, source)`` triples for a loader or the trainer."""
        return TensorDataset(self.inputs, self.targets, self.sources)


def merge(parts: Mapping[str, LabelledData], *, classes: Sequence[str] | None = None) -> SourcedData:
    """Join labelled sets into one that remembers which example came from which.

    Args:
        parts: The sets by source name.
        classes: Names of the classes to keep, in this order; each set must have all of them. Without it the
            sets must have the same classes, and the order is the first one's.

    Raises:
        UserError: If fewer than two sets come, classes differ or are missing, or images differ in shape.
    """
    if len(parts) < 2:
        raise UserError(f"parts must hold at least 2 sources, got {list(parts)}")
    names = list(parts)
    first = parts[names[0]]
    wanted = tuple(classes) if classes is not None else first.classes
    if not wanted:
        raise UserError("classes must name at least one class")
    inputs, targets, sources = [], [], []
    for number, (name, part) in enumerate(parts.items()):
        if missing := [k for k in wanted if k not in part.classes]:
            raise UserError(f"source {name!r} has no class {missing[0]!r}: name the classes to keep with classes=")
        if classes is None and (surplus := [k for k in part.classes if k not in wanted]):
            raise UserError(f"only source {name!r} has class {surplus[0]!r}: name the classes to keep with classes=")
        if part.inputs.shape[1:] != first.inputs.shape[1:]:
            a, b = (list(p.inputs.shape[1:]) for p in (first, part))
            raise UserError(
                f"inputs of {names[0]!r} are {a}, of {name!r} {b}: load both with one image_size, grayscale"
            )
        number_of = torch.tensor([wanted.index(k) if k in wanted else -1 for k in part.classes])
        target = number_of[part.targets]
        kept = target >= 0
        inputs.append(part.inputs[kept])
        targets.append(target[kept])
        sources.append(torch.full((int(kept.sum()),), number))
    merged = LabelledData(torch.cat(inputs), torch.cat(targets), wanted, "+".join(names))
    return SourcedData(merged, torch.cat(sources), tuple(names))


def load_folders(
    path: str | Path,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    grayscale: bool = False,
    skip_broken: bool = False,
    classes: Sequence[str] | None = None,
) -> SourcedData:
    """Read and merge ``path/<source>/<class>/<image>``, one folder a source (in alphabetical order).

    Args:
        path: The folder, as given or inside the data root.
        root: The data root (see `paperworks.data.data_root`).
        image_size: Scale images to cover a square of this side and cut out its centre.
        grayscale: Read images with one channel.
        skip_broken: Leave out images that cannot be read and warn, rather than raise.
        classes: As in `merge`.

    Raises:
        UserError: As `merge` and `paperworks.data.load`.
    """
    folder = locate(path, root)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected {folder.name}/<source>/<class>/<image>")
    named = sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith("."))
    if len(named) < 2:
        found = ", ".join(sub.name for sub in named) or "none"
        raise UserError(f"{folder} must hold the folders of at least 2 sources, found {found}")
    read = partial(load, image_size=image_size, grayscale=grayscale, skip_broken=skip_broken)
    parts = {sub.name: read(sub.absolute()) for sub in named}
    return merge(parts, classes=classes)
