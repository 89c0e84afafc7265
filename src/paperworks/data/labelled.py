"""Labelled examples in memory: what every loader returns and every split and noise model starts from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Int, Int64
from torch import Tensor
from torch.utils.data import TensorDataset

from paperworks.data.labels import check_labels
from paperworks.errors import UserError


@dataclass(frozen=True, eq=False)
class LabelledData:
    """A classification set held as two tensors.

    Attributes:
        inputs: Images ``[n, channels, height, width]`` in [0, 1], or table rows ``[n, columns]`` as they are.
        targets: Class indices, 0 to ``num_classes - 1``.
        classes: The name of each class, in the order of the indices.
        name: Which set this is, for reports.

    Raises:
        UserError: If lengths or types disagree, a target is no index of ``classes``, or an input not finite.
    """

    inputs: Float32[Tensor, "n ..."]
    targets: Int64[Tensor, "n"]
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        if self.inputs.dtype != torch.float32 or self.inputs.ndim < 2:
            got = f"{self.inputs.dtype} {list(self.inputs.shape)}"
            raise UserError(f"{self.name}: inputs must be float32 [n, ...], got {got}")
        if self.targets.dtype != torch.int64 or self.targets.shape != self.inputs.shape[:1]:
            got = f"{self.targets.dtype} {list(self.targets.shape)}"
            raise UserError(f"{self.name}: targets must be int64 [{len(self.inputs)}], got {got}")
        check_labels(self.targets, self.num_classes, f"{self.name}: targets")
        # A sum is finite only if every term is: one pass, and no mask in memory unless there is one to find.
        if not self.inputs.sum().isfinite() and (bad := (~self.inputs.isfinite()).nonzero()).numel():
            where = bad[0].tolist()
            raise UserError(
                f"{self.name}: inputs{where} is {self.inputs[tuple(where)].item()}, expected a finite value"
            )

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, index: Int[Tensor, "m"] | Bool[Tensor, "n"] | Sequence[int]) -> "LabelledData":
        """Return the examples at ``index`` (positions, or a mask over all examples) as a copy."""
        rows = torch.as_tensor(index)
        if rows.dtype != torch.bool:
            rows = rows.long()
        return LabelledData(self.inputs[rows], self.targets[rows], self.classes, self.name)

    def dataset(self) -> TensorDataset:
        """Return ``(input, target)`` pairs for a ``torch.utils.data.DataLoader``."""
        return TensorDataset(self.inputs, self.targets)
