"""Layers of encoders and decoders, batch first, normed after each residual."""

import math
from itertools import pairwise
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.detection.core.attention import MSDeformAttn
from paperworks.detection.core.embedding import Level, sine_embed
from paperworks.errors import UserError


class FeedForward(nn.Module):
    """$\\text{LN}(x + W_2 \\, \\text{ReLU}(W_1 x))$."""

    def __init__(self, d: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(d, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, d), nn.Dropout(dropout)
        )
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Float[Tensor, "batch tokens d"]) -> Float[Tensor, "batch tokens d"]:
        return self.norm(x + self.net(x))


def check_width(d: int, heads: int) -> None:
    """Refuse channels that heads and position codes cannot share.

    Raises:
        UserError: If ``heads`` or 4 does not divide ``d``.
    """
    if d % heads or d % 4:
        raise UserError(f"d must be a multiple of heads and of 4, got {d} and {heads}")


def group_norm(d: int) -> nn.GroupNorm:
    """Of 32 groups, as Deformable DETR's projections have it."""
    return nn.GroupNorm(math.gcd(32, d), d)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class EncoderLayer(nn.Module):
    """DETR's: $\\text{LN}(x + \\text{MHA}(x + p, x + p, x))$, then the feed-forward block."""

    def __init__(self, d: int, heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(d, heads, dropout, batch_first=True)
        self.dropout, self.norm, self.feed = nn.Dropout(dropout), nn.LayerNorm(d), FeedForward(d, hidden, dropout)

    def forward(
        self,
        x: Float[Tensor, "batch tokens d"],
        pos: Float[Tensor, "batch tokens d"],
        pad: Bool[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch tokens d"]:
        q = x + pos
        attended, _ = self.attention(q, q, x, key_padding_mask=pad, need_weights=False)
        return self.feed(self.norm(x + self.dropout(attended)))


class DeformableEncoderLayer(nn.Module):
    """Deformable DETR's: each cell of each level looks at points around its own place on all levels."""

    def __init__(self, d: int, heads: int, hidden: int, levels: int = 1, points: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = MSDeformAttn(d, heads, levels, points)
        self.dropout, self.norm, self.feed = nn.Dropout(dropout), nn.LayerNorm(d), FeedForward(d, hidden, dropout)

    def attend(
        self, x: Float[Tensor, "batch tokens d"], pos: Float[Tensor, "batch tokens d"], memory: list[Level]
    ) -> Float[Tensor, "batch tokens d"]:
        """The first half of the layer; ``x`` holds the tokens of all levels one after the other."""
        centres = torch.cat([level.centres for level in memory], 1)
        return self.norm(x + self.dropout(self.attention(x + pos, centres, memory)))

    def forward(
        self, x: Float[Tensor, "batch tokens d"], pos: Float[Tensor, "batch tokens d"], memory: list[Level]
    ) -> Float[Tensor, "batch tokens d"]:
        return self.feed(self.attend(x, pos, memory))


class DecoderLayer(Protocol):
    """What a decoder is made of: queries with reference boxes look at the memory."""

    def __call__(self, content: Tensor, reference: Tensor, memory: list[Level], query_pos: Tensor | None) -> Tensor:
        """New content ``[batch, queries, d]`` from the old, reference boxes ``[batch, queries, 4]`` in [0, 1], the
        encoded levels from fine to coarse, and learned codes of the queries where the decoder has them."""


class _SelfAttention(nn.Module):
    """$\\text{LN}(t + \\text{MHA}(t + e, t + e, t))$ among the queries."""

    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(d, heads, dropout, batch_first=True)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(d)

    def forward(
        self, content: Float[Tensor, "batch queries d"], pos: Float[Tensor, "batch queries d"]
    ) -> Float[Tensor, "batch queries d"]:
        q = content + pos
        attended, _ = self.attention(q, q, content, need_weights=False)
        return self.norm(content + self.dropout(attended))


class DetrDecoderLayer(nn.Module):
    """DETR's: learned codes of the queries, plain cross-attention. It looks at the last (coarsest) level."""

    def __init__(self, d: int, heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.among = _SelfAttention(d, heads, dropout)
        self.cross = nn.MultiheadAttention(d, heads, dropout, batch_first=True)
        self.dropout, self.norm, self.feed = nn.Dropout(dropout), nn.LayerNorm(d), FeedForward(d, hidden, dropout)

    def forward(
        self,
        content: Float[Tensor, "batch queries d"],
        reference: Float[Tensor, "batch queries 4"],
        memory: list[Level],
        query_pos: Float[Tensor, "batch queries d"] | None,
    ) -> Float[Tensor, "batch queries d"]:
        level, pos = memory[-1], _given(query_pos)
        content = self.among(content, pos)
        attended, _ = self.cross(
            content + pos,
            level.features + level.pos,
            level.features,
            key_padding_mask=level.pad,
            need_weights=False,
        )
        return self.feed(self.norm(content + self.dropout(attended)))


class ConditionalDecoderLayer(nn.Module):
    r"""Conditional DETR's (Meng et al. 2021): content and place stay apart in the cross-attention.

    Each head's logit is $c_q^T c_k + p_q^T p_k$, where $p_q$ is the sine code of the reference point times a scale that
    an MLP makes of the content (in the first layer 1).

    Args:
        first: Whether this is the first layer.
    """

    def __init__(self, d: int, heads: int, hidden: int, dropout: float = 0.0, *, first: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.among = _SelfAttention(d, heads, dropout)
        self.content_q, self.content_k, self.value = (nn.Linear(d, d) for _ in range(3))
        self.place_q, self.place_k, self.out = (nn.Linear(d, d) for _ in range(3))
        self.scale = None if first else mlp(d, d, d)
        self.dropout, self.norm, self.feed = nn.Dropout(dropout), nn.LayerNorm(d), FeedForward(d, hidden, dropout)

    def forward(
        self,
        content: Float[Tensor, "batch queries d"],
        reference: Float[Tensor, "batch queries 4"],
        memory: list[Level],
        query_pos: Float[Tensor, "batch queries d"] | None,
    ) -> Float[Tensor, "batch queries d"]:
        level, pos = memory[-1], _given(query_pos)
        content = self.among(content, pos)
        place = sine_embed(reference[..., :2], content.shape[-1])
        place = self.place_q(place if self.scale is None else place * self.scale(content))
        query = self.content_q(content) + (self.place_q(pos) if self.scale is None else 0)
        place_key = self.place_k(level.pos)
        key = self.content_k(level.features) + (place_key if self.scale is None else 0)
        q, k = (
            torch.cat([split(a, self.heads), split(b, self.heads)], -1) for a, b in ((query, place), (key, place_key))
        )
        mask = torch.zeros_like(level.pad, dtype=q.dtype).masked_fill(level.pad, -math.inf)[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, split(self.value(level.features), self.heads), mask)
        return self.feed(self.norm(content + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))))


class DeformableDecoderLayer(nn.Module):
    """Deformable DETR's: points around the reference on every level."""

    def __init__(self, d: int, heads: int, hidden: int, levels: int = 1, points: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.among = _SelfAttention(d, heads, dropout)
        self.cross = MSDeformAttn(d, heads, levels, points)
        self.dropout, self.norm, self.feed = nn.Dropout(dropout), nn.LayerNorm(d), FeedForward(d, hidden, dropout)

    def forward(
        self,
        content: Float[Tensor, "batch queries d"],
        reference: Float[Tensor, "batch queries coordinates"],
        memory: list[Level],
        query_pos: Float[Tensor, "batch queries d"] | None,
    ) -> Float[Tensor, "batch queries d"]:
        pos = _given(query_pos)
        content = self.among(content, pos)
        attended = self.cross(content + pos, reference, memory)
        return self.feed(self.norm(content + self.dropout(attended)))


def split(x: Float[Tensor, "batch tokens d"], heads: int) -> Float[Tensor, "batch heads tokens part"]:
    """Channels dealt out to heads."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _given(query_pos: Tensor | None) -> Tensor:
    assert query_pos is not None, "this layer needs a decoder with learned codes of its queries"
    return query_pos
