"""Vectors in clusters of equal signatures (locality-sensitive hashing)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from paperworks.errors import UserError

MAX_BITS = 62


class Clusters(NamedTuple):
    """Which cluster each vector belongs to, and how many clusters there are."""

    ids: Int64[Tensor, "n"]
    number: int

    def mean(self, rows: Float[Tensor, "n k"]) -> Float[Tensor, "clusters k"]:
        """The centroid of each cluster."""
        order, starts, sizes = self.members()
        return F.embedding_bag(order, rows, starts, mode="sum") / sizes[:, None]

    def members(self) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "clusters"], Float[Tensor, "clusters"]]:
        """The vectors cluster by cluster, where each cluster begins among them, and its size."""
        sizes = torch.bincount(self.ids, minlength=self.number)
        return self.ids.argsort(stable=True), sizes.cumsum(0) - sizes, sizes.float()


def projections(columns: int, bits: int, seed: int) -> Float[Tensor, "columns bits"]:
    """Random directions, orthonormal as far as there are that many."""
    draw = torch.randn(columns, bits, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draw).Q if 0 < bits <= columns else draw


@torch.no_grad()
def signatures(projected: Float[Tensor, "n bits"]) -> Int64[Tensor, "n"]:
    """Signs of the projections less their mean, packed into one integer.

    The mean matters: after a ReLU all vectors lie in one orthant, and without it nearly all would share a signature.
    """
    signs = projected > projected.mean(0)
    if not projected.shape[1]:
        return torch.zeros(len(projected), dtype=torch.int64, device=projected.device)
    half = [_pack(part) for part in torch.split(signs, 31, dim=1)]
    return half[0] if len(half) == 1 else half[0] + (half[1] << 31)


def _pack(signs: Tensor) -> Int64[Tensor, "n"]:
    powers = 2.0 ** torch.arange(signs.shape[1], dtype=torch.float64, device=signs.device)
    return (signs.double() @ powers).long()  # exact, and a product is much faster than integer arithmetic


@torch.no_grad()
def cluster(signature: Int64[Tensor, "n"]) -> Clusters:
    """Clusters of equal signatures, numbered in the order of these."""
    top = int(signature.max()) + 1
    if top <= 4 * len(signature):  # a table is faster than a sort
        taken = torch.zeros(top, dtype=torch.int64, device=signature.device)
        taken[signature] = 1
        numbers = taken.cumsum(0)
        return Clusters(numbers[signature] - 1, int(numbers[-1]))
    values, ids = torch.unique(signature, return_inverse=True)
    return Clusters(ids, len(values))


def check_bits(bits: int) -> None:
    """Raise ``UserError`` unless a signature of that many bits fits an integer."""
    if not 0 <= bits <= MAX_BITS:
        raise UserError(f"bits must be from 0 to {MAX_BITS}, got {bits}")
