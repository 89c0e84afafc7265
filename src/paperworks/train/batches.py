"""Which examples form which batch: a function of (seed, epoch) alone, the same for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from paperworks.errors import UserError


class Batches(Sampler[list[int]]):
    """Index lists of one epoch. Process ``rank`` of ``world`` takes every ``world``-th row of each global batch.

    With equal shares, the mean over processes of per-process means is the mean over the global batch, so that
    data-parallel training gives the numbers of a single process. When shuffling over several processes, the up to
    ``world - 1`` examples that cannot be shared equally are left out of that epoch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if size < 1:
            raise UserError("the dataset is empty")
        if batch_size < 1 or batch_size % world:
            raise UserError(f"batch_size must be a positive multiple of the {world} process(es), got {batch_size}")
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.rank, self.world, self.epoch = rank, world, 0
        used = size - size % world if shuffle else size
        self.used = used - used % batch_size if drop_last else used
        if self.used < 1:
            raise UserError(f"{size} examples do not fill one batch of {batch_size} with drop_last")

    def __len__(self) -> int:
        over = self.used % self.batch_size
        return self.used // self.batch_size + (over > self.rank)

    def __iter__(self) -> Iterator[list[int]]:
        if self.shuffle:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            order = torch.randperm(self.size, generator=generator).tolist()
        else:
            order = list(range(self.size))
        for start in range(0, self.used, self.batch_size):
            if share := order[start : min(start + self.batch_size, self.used)][self.rank :: self.world]:
                yield share


def loader(
    data: Dataset[Any],
    batches: Sampler[list[int]],
    num_workers: int = 0,
    generator: torch.Generator | None = None,
) -> DataLoader[Any]:
    """A DataLoader over ``batches``; tensor datasets are indexed once a batch, not once an example."""
    if isinstance(data, TensorDataset):
        return DataLoader(data, sampler=batches, batch_size=None, generator=generator)
    return DataLoader(data, batch_sampler=batches, num_workers=num_workers, generator=generator)


class Stream:
    """Endless shuffled batches of a second dataset (unlabelled clips, a replay set) that resume where they stopped.

    Example:
        >>> stream = Stream(unlabelled, batch_size=64, seed=0)
        >>> clips, *_ = next(stream)
    """

    def __init__(self, data: Dataset[Any], batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        size = len(data)  # type: ignore[arg-type]
        self.data = data
        self.batches = Batches(size, min(batch_size, size), seed=seed, drop_last=True, rank=rank, world=world)
        self.position = 0
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        if self.position == len(self.batches):
            self.batches.epoch, self.position, self._iterator = self.batches.epoch + 1, 0, None
        if self._iterator is None:
            remaining = list(self.batches)[self.position :]
            # Starting a DataLoader draws a number, which must not come from the generator that a resumed run restores.
            rest = loader(self.data, remaining, generator=torch.Generator())  # type: ignore[arg-type]
            self._iterator = iter(rest)
        self.position += 1
        return next(self._iterator)

    def state_dict(self) -> dict[str, int]:
        """Epoch and position within it."""
        return {"epoch": self.batches.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the batch at which ``state_dict`` was taken."""
        self.batches.epoch, self.position = state_dict["epoch"], state_dict["position"]
        self._iterator = None
