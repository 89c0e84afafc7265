"""What one step of reasoning does to its state: a transformer layer, or a sub-query that filters the picture."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.detection.core import mlp
from paperworks.detection.core.layers import split
from paperworks.errors import UserError


@dataclass(frozen=True)
class ReasoningState:
    r"""$S_t = [r_t; W_t; V_t]$, padded.

    Attributes:
        tokens: The reasoning token, the words, the visual tokens.
        pad: True where a token is padding.
        used: How far each word has been attended to so far, for blocks that keep account; in [0, 1].
    """

    tokens: Float[Tensor, "batch all d"]
    pad: Bool[Tensor, "batch all"]
    used: Float[Tensor, "batch words"]

    @property
    def reason(self) -> Float[Tensor, "batch d"]:
        """$r_t$."""
        return self.tokens[:, 0]

    @property
    def words(self) -> Float[Tensor, "batch words d"]:
        """$W_t$."""
        return self.tokens[:, 1 : 1 + self.used.shape[1]]

    @property
    def visual(self) -> Float[Tensor, "batch places d"]:
        """$V_t$."""
        return self.tokens[:, 1 + self.used.shape[1] :]

    def rows(self, index: Int64[Tensor, " kept"]) -> "ReasoningState":
        """The state of some examples alone."""
        return ReasoningState(self.tokens[index], self.pad[index], self.used[index])


class ReasoningBlock(nn.Module):
    r"""A pre-norm transformer layer over all tokens: $x \mathrel{+}= \text{MHA}(\text{LN}(x))$, then
    $x \mathrel{+}= \text{FFN}(\text{LN}(x))$. Words can be ticked off, and places marked as found.

    Args:
        d: Channels.
        heads: Of attention.
        hidden: Of the feed-forward block; twice d by default.
        gain: Times which queries and keys start with ``nn.Linear``'s weights. With 1 attention is almost even at first.
    """

    def __init__(self, d: int = 64, heads: int = 4, hidden: int = 0, gain: float = 1.0) -> None:
        super().__init__()
        if d % heads:
            raise UserError(f"d must be a multiple of heads, got {d} and {heads}")
        self.heads, self.norm = heads, nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        with torch.no_grad():
            self.qkv.weight[: 2 * d] *= gain
        self.feed = nn.Sequential(nn.LayerNorm(d), *mlp(d, hidden or 2 * d, d))

    def forward(
        self, x: Float[Tensor, "batch tokens d"], pad: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens d"]:
        q, k, v = (split(part, self.heads) for part in self.qkv(self.norm(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, ~pad[:, None, None])
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.feed(x)

    def step(self, state: ReasoningState) -> ReasoningState:
        """$S_t$ from $S_{t-1}$."""
        return replace(state, tokens=self(state.tokens, state.pad))


class SubQueryBlock(nn.Module):
    r"""The recursive sub-query of ReSC (Yang et al. 2020), in its own words.

    Attention $\alpha$ over the words, each discounted by $1 - u$ where u is the largest attention that it had in
    earlier steps, makes a query q; places become $V + \text{ReLU}(\text{LN}(WV) (1 + \tanh \gamma(q)) + \tanh
    \beta(q))$; r collects from them by attention of [q; r].

    Args:
        d: Channels.
    """

    def __init__(self, d: int = 64) -> None:
        super().__init__()
        self.score, self.film = mlp(2 * d, d, 1), nn.Linear(d, 2 * d)
        self.project, self.norm = nn.Linear(d, d), nn.LayerNorm(d, elementwise_affine=False)
        self.look, self.collect = mlp(2 * d, d, d), mlp(3 * d, d, d)

    def step(self, state: ReasoningState) -> ReasoningState:
        """$S_t$ from $S_{t-1}$; words stay as they are."""
        words, visual, reason = state.words, state.visual, state.reason
        length = words.shape[1]
        word_pad, place_pad = state.pad[:, 1 : 1 + length], state.pad[:, 1 + length :]
        context = torch.cat([words, reason[:, None].expand_as(words)], -1)
        logits = self.score(context)[..., 0] + (1 - state.used).clamp(min=1e-6).log()
        attention = logits.masked_fill(word_pad, -math.inf).softmax(1)
        query = (attention[..., None] * words).sum(1)
        gamma, beta = self.film(query)[:, None].tanh().chunk(2, -1)
        visual = visual + F.relu(self.norm(self.project(visual)) * (1 + gamma) + beta)
        look = self.look(torch.cat([query, reason], -1))
        found = (visual @ look[..., None])[..., 0] / math.sqrt(look.shape[-1])
        pooled = (found.masked_fill(place_pad, -math.inf).softmax(1)[..., None] * visual).sum(1)
        reason = reason + self.collect(torch.cat([query, pooled, reason], -1))
        tokens = torch.cat([reason[:, None], words, visual], 1)
        return ReasoningState(tokens, state.pad, state.used.maximum(attention))
