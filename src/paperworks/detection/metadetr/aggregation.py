"""Where query features meet the codes of several classes at once: the correlational aggregation module (CAM)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.errors import UserError, check_counts

CLAMP = 1e-5
"""Codes are kept so far from 0 and 1 when the sigmoid is undone; the released code now has 1e-6."""


def index_codes(count: int, d: int) -> Float[Tensor, "count d"]:
    r"""Sine codes of 0, 1, …: channels $2i$ and $2i + 1$ are $\sin$ and $\cos$ of $n / 10000^{2i / d}$."""
    angles = torch.arange(count)[:, None] * 10000 ** (-torch.arange(0, d, 2) / d)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def xavier(*parts: nn.Module) -> None:
    """Initialise all matrices as the released encoder does; z, of one row, is among them."""
    for part in parts:
        for parameter in part.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


def slot_codes(count: int, d: int) -> Float[Tensor, "count d"]:
    """The task codes T: those of the slots' numbers, last channel first."""
    return index_codes(count, d).flip(1)


class CorrelationalAggregation(nn.Module):
    r"""Matches every place of the picture with all classes of an episode, so that classes compete for it.

    With places x, codes S of the classes, $\hat S = \text{logit}(S)$ and fixed codes T of their slots

    $$a = \text{softmax}\big(Wx \, [W \hat S; z]^T / \sqrt d\big), \quad g = a [S; 0], \quad \tau = a [T; 0]$$
    $$y = W_3 [\text{ReLU}(W_1 (g \odot x)); \text{ReLU}(W_2 (x - g)); x]$$

    where z is a learned key of the background, with value 0. One head; W, without bias, serves queries and keys. That a
    class is known by its slot, not by itself, is what makes the decoder agnostic of classes.

    Args:
        d: Channels.
        slots: Most classes of an episode.
        background: Whether there is the key z.
        task_codes: Whether there is $\tau$; without, one slot is all that can be told apart.

    Raises:
        UserError: If d is odd, or several slots have no codes.
    """

    def __init__(self, d: int, slots: int, *, background: bool = True, task_codes: bool = True) -> None:
        super().__init__()
        if d < 2 or d % 2:
            raise UserError(f"d must be even, got {d}")
        check_counts(slots=slots)
        if slots > 1 and not task_codes:
            raise UserError(f"task_codes=False tells no slots apart: it needs slots=1, got {slots}")
        self.d, self.slots = d, slots
        self.project = nn.Linear(d, d, bias=False)
        self.background = nn.Parameter(torch.empty(1, d)) if background else None
        self.agree, self.differ = (nn.Sequential(nn.Linear(d, d // 2), nn.ReLU()) for _ in range(2))
        self.merge = nn.Linear(2 * (d // 2) + d, d)
        codes = slot_codes(slots, d) if task_codes else torch.zeros(slots, d)
        self.register_buffer("task_codes", codes, persistent=False)
        xavier(self)  # the released code draws W and z from N(0, 1/d) and N(0, 1) first, to no effect

    def forward(
        self, x: Float[Tensor, "batch places d"], codes: Float[Tensor, "#batch classes d"]
    ) -> tuple[Float[Tensor, "batch places d"], Float[Tensor, "batch places d"], Float[Tensor, "batch places keys"]]:
        r"""``y``, $\tau$ and the attention a, its last column that of the background if there is one.

        Args:
            x: Places of the pictures.
            codes: S, one for all pictures or one each; slots go by their order.

        Raises:
            UserError: If there are more classes than slots.
        """
        count = codes.shape[1]
        if count > self.slots:
            raise UserError(f"an episode has at most {self.slots} classes, got {count}")
        exact = codes.to(torch.promote_types(codes.dtype, torch.float32))  # in half precision 1 − CLAMP is 1
        keys = self.project(exact.logit(CLAMP).to(codes))
        values = torch.cat([codes, self.get_buffer("task_codes")[:count].expand_as(codes)], -1)
        if self.background is not None:
            keys = torch.cat([keys, self.background.expand(len(codes), 1, -1)], 1)
            values = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
        attention = (self.project(x) @ keys.mT / math.sqrt(self.d)).softmax(-1)
        g, tau = (attention @ values).chunk(2, -1)
        y = self.merge(torch.cat([self.agree(g * x), self.differ(x - g), x], -1))
        return y, tau, attention
