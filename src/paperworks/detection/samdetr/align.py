"""Queries made anew of the image's own features."""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.detection.core import Level, mlp, roi_sample, sine_embed
from paperworks.detection.core.roi import bin_centres, in_box, sample
from paperworks.errors import UserError, unknown

Resample = Literal["keypoints", "keypoint", "average", "max", "none"]
Edge = Literal["zeros", "border"]


class Aligned(NamedTuple):
    """What each head of each query brings to the cross-attention.

    Attributes:
        content: Features of the image.
        pos: Codes of the places where they are from.
        points: These places (x, y), as shares of what is no padding.
        scales: How narrow the attention is along x and y (SMCA), where the aligner gives them.
    """

    content: Float[Tensor, "batch queries heads d"]
    pos: Float[Tensor, "batch queries heads d"]
    points: Float[Tensor, "batch queries heads 2"]
    scales: Float[Tensor, "batch queries heads 2"] | None


class SemanticsAligner(nn.Module):
    r"""Replaces each query by features sampled inside its reference box (SAM-DETR, sections 3.2 and 3.3).

    With $R$ the 7×7 features of the box (RoIAlign), $t$ the query and $j$ a head,

    $$\delta = \tanh \text{MLP}(\text{ReLU}(\text{conv}(R))), \quad f_j = R[\delta_j] \odot \sigma(A_1 t)_j, \quad
    s_j = \text{sine}(\text{ref}_{xy} + \tfrac12 \text{ref}_{wh} \delta_j) \odot \sigma(A_2 t)_j,$$

    where $R[\delta_j]$ interpolates bilinearly and $\delta$ learns through it alone: codes of places give it no
    gradient. Through the gates $\sigma$ the earlier query survives.

    $R$ is never built at full width: the convolution comes before the sampling, with which it commutes, and of the
    49 bins only the four next to each keypoint are read.

    Args:
        d: Channels, a multiple of 4.
        heads: $h$, each with a keypoint of its own.
        bins: Of a side of $R$.
        smca: Also give scales for ``smca_prior``.
        resample: ``keypoints``; or the paper's ablations: one ``keypoint`` for all heads, the ``average`` or ``max`` of
            $R$, or ``none``: the query itself at the box's centre, with scales that come of it.
        gate: Whether the earlier query gates content and codes.
        edge: What lies beyond the outer bins: 0 as in the released code, where a keypoint on the very edge loses half
            of its feature an axis, or their own ``border``.

    Raises:
        UserError: If ``d`` is no multiple of 4, or ``resample`` or ``edge`` is unknown.
    """

    def __init__(
        self,
        d: int,
        heads: int,
        bins: int = 7,
        *,
        smca: bool = False,
        resample: Resample = "keypoints",
        gate: bool = True,
        edge: Edge = "zeros",
    ) -> None:
        super().__init__()
        if d % 4:
            raise UserError(f"d must be a multiple of 4, got {d}")
        if resample not in get_args(Resample):
            raise unknown("resample", resample, get_args(Resample))
        if edge not in get_args(Edge):
            raise unknown("edge", edge, get_args(Edge))
        self.d, self.heads, self.bins, self.smca, self.resample, self.edge = d, heads, bins, smca, resample, edge
        self.points = {"keypoints": heads, "keypoint": 1}.get(resample, 0)
        outputs = 2 * self.points + 2 * heads * smca
        self.project = nn.Linear(d, d // 4) if outputs and resample != "none" else None
        # 256, 512 and 512 hidden units in the paper, whose d is 256.
        seen = bins**2 * d // 4 if self.project else d
        self.locate = mlp(seen, d, 2 * d, 2 * d, outputs) if outputs else None
        self.content_gate = nn.Linear(d, heads * d) if gate else None
        self.pos_gate = nn.Linear(d, heads * d) if gate else None

    def forward(
        self, content: Float[Tensor, "batch queries d"], reference: Float[Tensor, "batch queries 4"], level: Level
    ) -> Aligned:
        """``content``: the queries after their self-attention. ``reference``: cx, cy, w, h in [0, 1]."""
        boxes = reference.detach()  # as of RoIAlign, from which boxes get no gradient
        delta, scales = self._located(content, boxes, level)
        points = in_box(reference, delta)
        with torch.no_grad():
            pos = sine_embed(points, self.d)
        features = self._resampled(content, delta, boxes, level)
        return Aligned(
            _gated(features, self.content_gate, content), _gated(pos, self.pos_gate, content), points, scales
        )

    def _located(self, content: Tensor, boxes: Tensor, level: Level) -> tuple[Tensor, Tensor | None]:
        shape = (*content.shape[:2], -1, 2)
        if self.locate is None:
            return content.new_zeros(*shape[:2], self.heads, 2), None
        found = self.locate(content if self.project is None else self._region(self.project, boxes, level))
        keypoints, scales = found.split([2 * self.points, 2 * self.heads * self.smca], -1)
        delta = keypoints.view(shape).tanh() if self.points else content.new_zeros(*shape[:2], 1, 2)
        return delta.expand(-1, -1, self.heads, -1), scales.view(shape) if self.smca else None

    def _region(self, project: nn.Linear, boxes: Tensor, level: Level) -> Tensor:
        """ReLU(conv(R)), flat; the convolution's bias also holds where R is 0, outside the map."""
        narrow = F.linear(level.features, project.weight).transpose(1, 2)
        narrow = narrow.reshape(*narrow.shape[:2], level.height, level.width)
        places = in_box(boxes, bin_centres(self.bins).to(boxes))
        sampled = sample(narrow, places, level.valid).permute(0, 2, 3, 1)
        return (sampled + project.bias).relu().flatten(2)

    def _resampled(
        self, content: Tensor, delta: Tensor, boxes: Tensor, level: Level
    ) -> Float[Tensor, "batch queries heads d"]:
        if self.points:
            return self._at(delta[:, :, : self.points], boxes, level).expand(-1, -1, self.heads, -1)
        if self.resample != "none":
            bins = roi_sample(level.as_map(), boxes, self.bins, level.valid).flatten(3)
            content = bins.mean(-1) if self.resample == "average" else bins.amax(-1)
        return content[:, :, None].expand(-1, -1, self.heads, -1)

    def _at(self, delta: Tensor, boxes: Tensor, level: Level) -> Tensor:
        """R at the keypoints, of the four bins around each."""
        at = (delta + 1) * self.bins / 2 - 0.5
        low = at.detach().floor()
        step = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], device=at.device)
        share = (at - low)[..., None, :]
        weight = torch.where(step == 1, share, 1 - share).prod(-1)  # [batch, queries, points, 4]
        bins = low[..., None, :] + step
        if self.edge == "zeros":
            weight = weight * ((bins >= 0) & (bins < self.bins)).all(-1)
        frame = (2 * bins.clamp(0, self.bins - 1) + 1) / self.bins - 1
        found = sample(level.as_map(), in_box(boxes, frame.flatten(2, 3)), level.valid)
        mixed = (found.view(*found.shape[:3], -1, 4) * weight[:, None]).sum(-1)  # [batch, d, queries, points]
        return mixed.permute(0, 2, 3, 1)


def smca_prior(
    points: Float[Tensor, "batch queries heads 2"], scales: Float[Tensor, "batch queries heads 2"], level: Level
) -> Float[Tensor, "batch heads queries tokens"]:
    r"""Spatially modulated co-attention (Gao et al. 2021): logits fall with the distance from each head's point.

    $$-\frac18 \big( (P_x - j - \tfrac12)^2 a_x^2 + (P_y - i - \tfrac12)^2 a_y^2 \big)$$

    for the cell in row $i$ and column $j$, with $P$ the point in cells and $a$ its scales.
    """
    size = points.new_tensor([level.width, level.height])
    cells = (points * level.valid[:, None, None] * size).transpose(1, 2)
    a = scales.transpose(1, 2)
    x, y = (
        ((cells[..., axis, None] - torch.arange(n, device=cells.device) - 0.5) * a[..., axis, None]).square() / -8
        for axis, n in enumerate((level.width, level.height))
    )
    return (y[..., :, None] + x[..., None, :]).flatten(-2)


def _gated(x: Tensor, gate: nn.Linear | None, content: Tensor) -> Tensor:
    return x if gate is None else x * gate(content).view_as(x).sigmoid()
