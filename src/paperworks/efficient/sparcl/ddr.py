"""Dynamic data removal (DDR): examples that are learnt already leave the task's training set."""

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from paperworks.errors import UserError, unknown
from paperworks.train import Intervention, State
from paperworks.train.batches import Batches

Score = Literal["misclassified", "forgetting"]


class DynamicDataRemoval(Intervention):
    r"""Drops, every ``period`` epochs, the examples that were misclassified least (paper, section 3.3).

    Counts start anew after each removal, and removals end at the ``cutoff``. Their sizes add up to
    ``remove_fraction`` of the examples, to the nearest one. Ties fall to the first in the data's own order.

    The trainer's outputs count as right if the true class leads among all classes, of other tasks too.

    In a loop of your own: ``observe`` after each batch, ``on_epoch`` before each epoch, and train on
    ``active_indices()``. In the trainer: as an intervention, on a dataset of ``(input, target, index)`` that is read
    by ``ActiveBatches``.

    Args:
        n: Examples of the task.
        remove_fraction: Share of them that is removed in all, in [0, 1). Default: the released script's, as below.
        period: Epochs between removals, $\delta_k$.
        cutoff: Last epoch, from 0, before which examples are removed.
        score: ``"misclassified"`` counts errors in the window, as the paper; ``"forgetting"`` counts transitions from
            right to wrong and takes examples never right for the hardest, as the released code.
        minimum: Never fewer examples than these, e.g. the batch size.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(
        self,
        n: int,
        remove_fraction: float = 0.3,
        period: int = 5,
        cutoff: int = 20,
        *,
        score: Score = "misclassified",
        minimum: int = 1,
    ) -> None:
        if not 0 <= remove_fraction < 1:
            raise UserError(f"remove_fraction must be in [0, 1), got {remove_fraction}")
        if n < 1 or minimum < 1:
            raise UserError(f"n and minimum must be at least 1, got {n} and {minimum}")
        if period < 1:
            raise UserError(f"period must be at least 1 epoch, got {period}")
        if cutoff < period:
            raise UserError(f"cutoff must be at least the period of {period} epochs, got {cutoff}")
        if score not in get_args(Score):
            raise unknown("score", score, get_args(Score))
        self.n, self.period, self.score, self.minimum = n, period, score, minimum
        self.rounds, self.to_remove = cutoff // period, round(remove_fraction * n)
        self.active = torch.ones(n, dtype=torch.bool)
        self._reset()

    def _reset(self) -> None:
        self.counts = torch.zeros(self.n, dtype=torch.long)
        self.was_right = torch.zeros(self.n, dtype=torch.bool)
        self.ever_right = torch.zeros(self.n, dtype=torch.bool)

    def observe(self, indices: Int[Tensor, "batch"], correct: Bool[Tensor, "batch"]) -> None:
        """Note which examples of a batch, each at most once, were classified correctly."""
        indices, correct = indices.cpu(), correct.cpu()
        wrong = ~correct if self.score == "misclassified" else self.was_right[indices] & ~correct
        self.counts[indices] += wrong.long()
        self.was_right[indices] = correct
        self.ever_right[indices] |= correct

    def on_epoch(self, epoch: int) -> Tensor:
        """Remove examples if it is time to; ``epoch`` counts from 0. Returns the indices that were removed."""
        done, over = divmod(epoch, self.period)
        if over or not 0 < done <= self.rounds:
            return torch.empty(0, dtype=torch.long)
        return self.remove(self.to_remove * done // self.rounds - self.to_remove * (done - 1) // self.rounds)

    def remove(self, number: int) -> Tensor:
        """Remove that many examples now and count anew; returns their indices."""
        counts = self.counts
        if self.score == "forgetting":
            counts = counts.masked_fill(~self.ever_right, torch.iinfo(torch.long).max)
        active = self.active_indices()
        order = counts[active].argsort(stable=True)
        removed = active[order[: max(0, min(number, len(active) - self.minimum))]]
        self.active[removed] = False
        self._reset()
        return removed

    def active_indices(self) -> Tensor:
        """The examples that are left, in the data's own order."""
        return self.active.nonzero()[:, 0]

    def on_epoch_start(self, state: State) -> None:
        self.on_epoch(state.epoch)

    def on_step_end(self, state: State) -> None:
        if len(state.extra) != 1:
            raise UserError("data removal needs examples (input, target, index): add torch.arange(n) to the dataset")
        self.observe(state.extra[0], state.outputs.detach().argmax(-1) == state.targets)

    def state_dict(self) -> dict[str, Any]:
        """Which examples are left, and the counts."""
        return {name: getattr(self, name).clone() for name in ("active", "counts", "was_right", "ever_right")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        for name, value in state_dict.items():
            getattr(self, name).copy_(value)


class ActiveBatches(Batches):
    """Shuffled batches of the examples that a removal has left; the trainer's own batches while it has removed none.

    For one process.

    Example:
        >>> removal = DynamicDataRemoval(len(data))
        >>> loader = DataLoader(TensorDataset(x, y, torch.arange(len(x))), sampler=ActiveBatches(removal, 32))
    """

    def __init__(self, removal: DynamicDataRemoval, batch_size: int, *, seed: int = 0) -> None:
        super().__init__(removal.n, batch_size, seed=seed)
        self.removal = removal

    def __len__(self) -> int:
        return math.ceil(int(self.removal.active.sum()) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        active = self.removal.active_indices()
        rows = Batches(len(active), self.batch_size, seed=self.seed)
        rows.epoch = self.epoch
        for batch in rows:
            yield active[batch].tolist()
