"""Cross-attention whose heads compare whole vectors, and self-attention with places of its own."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.detection.core import Level, mlp, sine_embed
from paperworks.detection.core.layers import split
from paperworks.errors import UserError


class AlignedCrossAttention(nn.Module):
    r"""Each head asks with a query of its own of all ``d`` channels (SAM-DETR, section 3.3).

    $$\text{logit}_{jn} = \langle W_q f_j + \text{MLP}_q(s_j), \; W_k m_n + \text{MLP}_k(p_n) \rangle / \sqrt d$$

    Heads share $W_q$, $\text{MLP}_q$ and the keys; values are split among them as usual. All heads' logits are one
    matrix product a picture.

    Args:
        d: Channels.
        heads: Divides ``d``.
        dropout: Of the attention.

    Raises:
        UserError: If ``heads`` does not divide ``d``.
    """

    def __init__(self, d: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if d % heads:
            raise UserError(f"heads must divide d, got {heads} and {d}")
        self.d, self.heads = d, heads
        self.content_q, self.content_k, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.place_q, self.place_k = mlp(d, d, d), mlp(d, d, d)
        self.dropout = nn.Dropout(dropout)

    def weights(
        self,
        content: Float[Tensor, "batch queries heads d"],
        pos: Float[Tensor, "batch queries heads d"],
        level: Level,
        log_prior: Float[Tensor, "batch heads queries tokens"] | None = None,
    ) -> Float[Tensor, "batch heads queries tokens"]:
        """The attention: over tokens it sums to 1, and is 0 on padding."""
        query = (self.content_q(content) + self.place_q(pos)) / math.sqrt(self.d)
        key = self.content_k(level.features) + self.place_k(level.pos)
        bias = torch.zeros_like(level.pad, dtype=key.dtype).masked_fill(level.pad, -math.inf)[:, None]
        if log_prior is not None:
            bias = log_prior.flatten(1, 2) + bias
        logits = torch.baddbmm(bias, query.transpose(1, 2).flatten(1, 2), key.transpose(1, 2))
        return logits.view(len(logits), self.heads, -1, logits.shape[-1]).softmax(-1)

    def forward(
        self,
        content: Float[Tensor, "batch queries heads d"],
        pos: Float[Tensor, "batch queries heads d"],
        level: Level,
        log_prior: Float[Tensor, "batch heads queries tokens"] | None = None,
    ) -> Float[Tensor, "batch queries d"]:
        """``content``, ``pos``: of ``SemanticsAligner``. ``log_prior``: added to the logits (``smca_prior``)."""
        weights = self.dropout(self.weights(content, pos, level, log_prior))
        attended = weights @ split(self.value(level.features), self.heads)
        return self.out(attended.transpose(1, 2).flatten(2))


class PlacedSelfAttention(nn.Module):
    r"""$\text{LN}(t + \text{MHA}(W_1 t + W_2 e, W_3 t + W_4 e, W_5 t))$, with $e$ the codes of the boxes' centres.

    As in the released code, the codes give the boxes no gradient.

    Args:
        d: Channels.
        heads: Divides ``d``.
        dropout: Of the attention and of what it adds.
    """

    def __init__(self, d: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.content_q, self.place_q, self.content_k, self.place_k = (nn.Linear(d, d) for _ in range(4))
        self.value, self.out = nn.Linear(d, d), nn.Linear(d, d)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(d)

    def forward(
        self, content: Float[Tensor, "batch queries d"], reference: Float[Tensor, "batch queries 4"]
    ) -> Float[Tensor, "batch queries d"]:
        place = sine_embed(reference[..., :2].detach(), content.shape[-1])
        query = self.content_q(content) + self.place_q(place)
        key = self.content_k(content) + self.place_k(place)
        q, k, v = (split(x, self.heads) for x in (query, key, self.value(content)))
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate if self.training else 0.0)
        return self.norm(content + self.dropout(self.out(attended.transpose(1, 2).flatten(2))))
