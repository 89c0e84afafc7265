"""Fewer tokens (R7): elimination by the attention they receive, and merging of those that are alike."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from paperworks.errors import UserError, unknown


def select_tokens(scores: Float[Tensor, "n t"], count: int) -> Int64[Tensor, "n count"]:
    """The tokens with the largest scores, in their order; the first, CLS, is always among them."""
    scores = scores.index_fill(1, torch.zeros(1, dtype=torch.int64, device=scores.device), math.inf)
    return scores.topk(count, dim=1).indices.sort(1).values


def significance(attention: Float[Tensor, "n heads queries keys"]) -> Float[Tensor, "n keys"]:
    r"""Attention received: $\sum_h \sum_i A_{hij}$ of token $j$ (PoWER-BERT, Goyal et al. 2020, section 3.2)."""
    return attention.sum((1, 2))


def merge_tokens(
    tokens: Float[Tensor, "n t d"], keys: Float[Tensor, "n t k"], sizes: Float[Tensor, "n t"], r: int
) -> tuple[Float[Tensor, "n kept d"], Float[Tensor, "n kept"]]:
    """Merge the ``r`` most similar pairs of tokens (ToMe, Bolya et al. 2023, section 3).

    Alternate tokens are set A and B. Each of A looks for the one of B whose key has the largest cosine; the ``r``
    best matches become the mean of their two tokens, weighted by size. CLS, the first, never merges into another.

    Args:
        tokens: Tokens.
        keys: What they are compared by: keys of the attention, averaged over heads.
        sizes: How many of the original tokens each stands for.
        r: Pairs, from 0 to the tokens of A without CLS.

    Returns:
        The tokens, CLS first, and their sizes.
    """
    t, d = tokens.shape[1:]
    most = (t - 1) // 2
    if not 0 <= r <= most:
        raise UserError(f"r must be from 0 to {most} for {t} tokens, got {r}")
    unit = F.normalize(keys, dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    best, target = similarity.max(2)
    best[:, 0] = -math.inf
    order = best.argsort(stable=True, dim=1, descending=True)
    merged, rest = order[:, :r], order[:, r:].sort(1).values
    a, b = (tokens * sizes[..., None])[:, ::2], (tokens * sizes[..., None])[:, 1::2]
    into = target.gather(1, merged)
    b = b.scatter_add(1, into[..., None].expand(-1, -1, d), _rows(a, merged))
    b_sizes = sizes[:, 1::2].scatter_add(1, into, sizes[:, ::2].gather(1, merged))
    new_sizes = torch.cat([sizes[:, ::2].gather(1, rest), b_sizes], dim=1)
    return torch.cat([_rows(a, rest), b], dim=1) / new_sizes[..., None], new_sizes


class TokenPruner(nn.Module):
    """A transformer encoder that eliminates tokens layer by layer, between attention and feed-forward.

    Stands in the place of an ``nn.TransformerEncoder``: ``model.encoder = TokenPruner(model.encoder, keep)``, and
    ``model.encoder = model.encoder.encoder`` undoes it. The first token is CLS and always stays; order is kept.

    Args:
        encoder: The encoder, of ``nn.TransformerEncoderLayer`` with ``batch_first=True``; it is used, not copied.
        keep: Share of the original tokens that stay after each layer, not increasing, e.g. (1, 0.8, 0.6, 0.4).
        score: Tokens stay by ``"attention"`` received, or at ``"random"``, the twin that any selection must beat.
        seed: Draws the random scores.

    Raises:
        UserError: If an argument is out of range or the encoder of another kind.
    """

    def __init__(
        self,
        encoder: nn.TransformerEncoder,
        keep: Sequence[float],
        score: Literal["attention", "random"] = "attention",
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_encoder(encoder)
        if len(keep) != len(encoder.layers):
            raise UserError(f"keep must have one share a layer, got {len(keep)} for {len(encoder.layers)} layers")
        if not all(0 < share <= 1 for share in keep) or list(keep) != sorted(keep, reverse=True):
            raise UserError(f"keep must be shares above 0 and at most 1 that do not increase, got {tuple(keep)}")
        if score not in ("attention", "random"):
            raise unknown("score", score, ("attention", "random"))
        self.encoder, self.keep, self.score = encoder, tuple(keep), score
        self._generator = torch.Generator().manual_seed(seed)
        self.train(encoder.training)

    def forward(
        self, src: Float[Tensor, "n t d"], src_key_padding_mask: Bool[Tensor, "n t"] | None = None
    ) -> Float[Tensor, "n kept d"]:
        x, padding, length = src, src_key_padding_mask, src.shape[1]
        for layer, share in zip(self.encoder.layers, self.keep, strict=True):
            x, attention, _ = attend(layer, x, padding=padding)
            count = max(1, math.ceil(share * length))
            if count < x.shape[1]:
                kept = select_tokens(self._scores(attention, padding), count)
                x = _rows(x, kept)
                padding = None if padding is None else padding.gather(1, kept)
            x = feed_forward(layer, x)
        return x if self.encoder.norm is None else self.encoder.norm(x)

    def _scores(self, attention: Tensor, padding: Tensor | None) -> Float[Tensor, "n t"]:
        if self.score == "random":
            n, t = attention.shape[0], attention.shape[-1]
            scores = torch.rand(n, t, generator=self._generator).to(attention)
        else:
            if padding is not None:  # what padding attends to does not count
                attention = attention.masked_fill(padding[:, None, :, None], 0)
            scores = significance(attention)
        return scores if padding is None else scores.masked_fill(padding, -1)


class TokenMerger(nn.Module):
    r"""A transformer encoder that merges ``r`` pairs of tokens a layer (ToMe), between attention and feed-forward.

    Attention is proportional: $\log s$ of a token's size is added to its logits, so that a merged token counts as
    often as those it stands for. Stands in the place of an ``nn.TransformerEncoder``, like ``TokenPruner``.

    Args:
        encoder: The encoder, of ``nn.TransformerEncoderLayer`` with ``batch_first=True``; it is used, not copied.
        r: Pairs merged in each layer, as far as there are that many.

    Raises:
        UserError: If ``r`` is negative or the encoder of another kind.
    """

    def __init__(self, encoder: nn.TransformerEncoder, r: int) -> None:
        super().__init__()
        _check_encoder(encoder)
        if r < 0:
            raise UserError(f"r must be at least 0, got {r}")
        self.encoder, self.r = encoder, r
        self.train(encoder.training)

    def forward(self, src: Float[Tensor, "n t d"]) -> Float[Tensor, "n kept d"]:
        x, sizes = src, src.new_ones(src.shape[:2])
        for layer in self.encoder.layers:
            x, _, keys = attend(layer, x, sizes=sizes)
            if r := min(self.r, (x.shape[1] - 1) // 2):
                x, sizes = merge_tokens(x, keys, sizes, r)
            x = feed_forward(layer, x)
        return x if self.encoder.norm is None else self.encoder.norm(x)


def attend(
    layer: nn.TransformerEncoderLayer,
    x: Float[Tensor, "n t d"],
    *,
    padding: Bool[Tensor, "n t"] | None = None,
    sizes: Float[Tensor, "n t"] | None = None,
) -> tuple[Float[Tensor, "n t d"], Float[Tensor, "n heads t t"], Float[Tensor, "n t k"]]:
    """The attention half of an encoder layer: tokens, attention, and keys averaged over heads."""
    attention = layer.self_attn
    n, t, d = x.shape
    normed = layer.norm1(x) if layer.norm_first else x
    projected = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
    queries, keys, values = projected.view(n, t, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = (queries @ keys.transpose(-2, -1)) * keys.shape[-1] ** -0.5
    if sizes is not None:
        logits = logits + sizes.log()[:, None, None, :]
    if padding is not None:
        logits = logits.masked_fill(padding[:, None, None, :], -math.inf)
    weights = logits.softmax(-1)
    mixed = F.dropout(weights, attention.dropout, layer.training) @ values
    y = x + layer.dropout1(attention.out_proj(mixed.transpose(1, 2).reshape(n, t, d)))
    return (y if layer.norm_first else layer.norm1(y)), weights, keys.mean(1)


def feed_forward(layer: nn.TransformerEncoderLayer, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
    """The other half."""
    normed = layer.norm2(x) if layer.norm_first else x
    hidden = layer.linear2(layer.dropout(layer.activation(layer.linear1(normed))))
    y = x + layer.dropout2(hidden)
    return y if layer.norm_first else layer.norm2(y)


def _rows(tokens: Float[Tensor, "n t d"], index: Int64[Tensor, "n m"]) -> Float[Tensor, "n m d"]:
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def _check_encoder(encoder: nn.Module) -> None:
    if not isinstance(encoder, nn.TransformerEncoder):
        raise UserError(f"encoder must be an nn.TransformerEncoder, got {type(encoder).__name__}")
    for layer in encoder.layers:
        if not isinstance(layer, nn.TransformerEncoderLayer) or not layer.self_attn.batch_first:
            raise UserError("encoder must consist of nn.TransformerEncoderLayer with batch_first=True")
