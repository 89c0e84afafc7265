"""Samples that repeat others (R8): finding them, choosing representatives, and answering them from memory."""

from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from paperworks.errors import UserError

_ROWS = 2048  # compared with all others at a time


def deduplicate(samples: Float[Tensor, "n *shape"], threshold: float | None = None) -> Int64[Tensor, "kept"]:
    """The samples to keep: of each group of duplicates the first, in their order.

    Args:
        samples: Samples, or features of them, in which near duplicates are found better.
        threshold: Samples are near duplicates if the cosine of the two, less the mean of all, is above it; chains of
            them are one group. Without it, only exact duplicates count.

    Returns:
        Their indices, so that labels can be taken along: ``x[kept], y[kept]``.

    Raises:
        UserError: If there are no samples, or ``threshold`` is not in (0, 1].
    """
    groups = near_duplicates(samples, threshold).cpu().numpy()
    return torch.from_numpy(np.sort(np.unique(groups, return_index=True)[1])).to(samples.device)


def near_duplicates(samples: Float[Tensor, "n *shape"], threshold: float | None = None) -> Int64[Tensor, "n"]:
    """The group of duplicates that each sample belongs to; see ``deduplicate``."""
    if not len(samples):
        raise UserError("samples must not be empty")
    rows = samples.flatten(1)
    if threshold is None:
        seen: dict[bytes, int] = {}
        keys = (row.tobytes() for row in (rows.detach().cpu().float() + 0.0).numpy())  # −0 becomes 0
        return torch.tensor([seen.setdefault(key, len(seen)) for key in keys], device=samples.device)
    if not 0 < threshold <= 1:
        raise UserError(f"threshold must be above 0 and at most 1, got {threshold}")
    unit = F.normalize(rows - rows.mean(0), dim=1)
    exact = near_duplicates(samples).cpu()
    _, first = np.unique(exact.numpy(), return_index=True)
    links = [torch.stack([torch.arange(len(rows)), torch.from_numpy(first)[exact]])]
    for start in range(0, len(rows), _ROWS):
        found = (unit[start : start + _ROWS] @ unit.T > threshold).nonzero().cpu()
        links.append(torch.stack([found[:, 0] + start, found[:, 1]]))
    i, j = torch.cat(links, dim=1).numpy()
    graph = coo_array((np.ones(len(i), dtype=bool), (i, j)), shape=(len(rows), len(rows)))
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long().to(samples.device)


def k_center(samples: Float[Tensor, "n *shape"], k: int) -> Int64[Tensor, "k"]:
    """Samples that cover all others closely: greedy k-centre (Gonzalez 1985; Sener & Savarese 2018).

    Begins with the sample farthest from the mean, and adds the one farthest from all that are chosen; the largest
    distance left is at most twice that of the best choice.

    Returns:
        Indices in the order of choice, so that the first ``m`` are the choice for ``m``.

    Raises:
        UserError: If ``k`` is not from 1 to the number of samples.
    """
    if not 1 <= k <= len(samples):
        raise UserError(f"k must be from 1 to the {len(samples)} samples, got {k}")
    rows = samples.flatten(1)
    chosen = [int((rows - rows.mean(0)).norm(dim=1).argmax())]
    distance = (rows - rows[chosen[0]]).norm(dim=1)
    for _ in range(k - 1):
        distance[chosen[-1]] = -1  # not again, even where others equal it
        chosen.append(int(distance.argmax()))
        distance = distance.minimum((rows - rows[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen, device=samples.device)


def cover_radius(samples: Float[Tensor, "n *shape"], chosen: Int64[Tensor, "k"]) -> float:
    """The largest distance of a sample to the nearest that is chosen."""
    rows = samples.flatten(1)
    return float(torch.cdist(rows, rows[chosen], compute_mode="donot_use_mm_for_euclid_dist").amin(1).max())


class CachedModel(nn.Module):
    """A model that answers inputs it has seen from memory, example by example.

    Args:
        model: Maps a batch to one tensor with a row an example that depends on that example alone; in evaluation
            mode, since in training mode batch norm and dropout make it depend on more.
        size: How many answers are kept; those not asked for the longest go first.

    Attributes:
        hits: Examples answered from memory so far.
        misses: Examples computed so far.

    Raises:
        UserError: If ``size`` is not positive; when called in training mode.
    """

    def __init__(self, model: nn.Module, size: int = 4096) -> None:
        super().__init__()
        if size < 1:
            raise UserError(f"size must be at least 1, got {size}")
        self.model, self.size, self.hits, self.misses = model, size, 0, 0
        self._answers: OrderedDict[bytes, Tensor] = OrderedDict()
        self.train(model.training)

    def clear(self) -> None:
        """Forget all answers, e.g. after the model's weights have changed."""
        self._answers.clear()

    @torch.no_grad()
    def forward(self, inputs: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *outputs"]:
        if self.training:
            raise UserError("a cached model answers in evaluation mode only: call eval() first")
        keys = [bytes(str(inputs.shape[1:]), "ascii") + row.tobytes() for row in inputs.cpu().numpy()]
        new = {key: row for row, key in reversed(list(enumerate(keys))) if key not in self._answers}
        found = {key: self._answers[key] for key in keys if key not in new}
        if new:
            outputs = self.model(inputs[list(new.values())])
            found |= {key: row.clone() for key, row in zip(new, outputs, strict=True)}
        self.hits, self.misses = self.hits + len(keys) - len(new), self.misses + len(new)
        for key in found:
            self._answers[key] = found[key]
            self._answers.move_to_end(key)
        while len(self._answers) > self.size:
            self._answers.popitem(last=False)
        return torch.stack([found[key] for key in keys])
