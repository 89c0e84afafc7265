"""Sets whose labels are read at once and whose inputs only when, and as far as, they are wanted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from paperworks.data.labelled import LabelledData
from paperworks.data.splits import split
from paperworks.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Indexed:
    """A set whose labels are known and whose inputs are read for the rows that are asked for.

    Attributes:
        read: Maps row numbers to ``(inputs, kept)``: float32 inputs, and the rows that could be read.
    """

    targets: Int64[Tensor, "n"]
    classes: tuple[str, ...]
    name: str
    read: Callable[[Tensor], tuple[Tensor, Tensor]]

    def take(self, limit: int | None, seed: int) -> LabelledData:
        """Read all rows in their order or, with ``limit``, that many: stratified, in random order."""
        if not len(self.targets):
            raise UserError(f"{self.name} has no examples")
        if limit is not None and limit < 1:
            raise UserError(f"limit must be at least 1, got {limit}")
        if limit is None or limit >= len(self.targets):
            rows = torch.arange(len(self.targets))
        else:
            (rows,) = split(self.targets, (limit,), seed)
        inputs, kept = self.read(rows)
        return LabelledData(inputs, self.targets[kept], self.classes, self.name)


def in_memory(data: LabelledData) -> Indexed:
    """Index a set that has been read already."""
    return Indexed(data.targets, data.classes, data.name, lambda rows: (data.inputs[rows], rows))


def choose_split(name: str, wanted: str, parts: Mapping[str, T]) -> list[T]:
    """Return the parts of a set that ``wanted`` stands for: one of them, or ``"all"``."""
    if wanted == "all":
        return list(parts.values())
    if wanted not in parts:
        hint = "; paperworks.data.split makes others" if set(parts) == {"all"} else ""
        raise UserError(f"{name} has no split {wanted!r}, only: {', '.join(parts)}{hint}")
    return [parts[wanted]]


def split_name(name: str, wanted: str) -> str:
    """Name a set and its split for reports: ``mnist/test``, or ``digits`` for all of it."""
    return name if wanted == "all" else f"{name}/{wanted}"
