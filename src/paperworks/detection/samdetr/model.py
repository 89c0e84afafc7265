"""The decoder layer, the order in which layers look at levels, and the detector."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from paperworks.detection.core import Decoder, Detr, Encoder, FeedForward, Level, TinyBackbone
from paperworks.detection.core.layers import check_width, group_norm
from paperworks.detection.samdetr.align import Edge, Resample, SemanticsAligner, smca_prior
from paperworks.detection.samdetr.attention import AlignedCrossAttention, PlacedSelfAttention
from paperworks.errors import UserError


class SamDecoderLayer(nn.Module):
    """Self-attention, queries aligned with the image, cross-attention from them, feed-forward block.

    What the cross-attention adds, it adds to the old query; the sampled features only ask.

    Args:
        d: Channels.
        heads: Of both attentions.
        hidden: Of the feed-forward block.
        dropout: Its rate.
        level: Which level of the memory it looks at, from fine to coarse.
        smca: Whether attention falls with the distance from the keypoints (``smca_prior``).
        resample, gate, edge: As of ``SemanticsAligner``.
    """

    def __init__(
        self,
        d: int,
        heads: int,
        hidden: int,
        dropout: float = 0.0,
        *,
        level: int = -1,
        smca: bool = False,
        resample: Resample = "keypoints",
        gate: bool = True,
        edge: Edge = "zeros",
    ) -> None:
        super().__init__()
        self.level = level
        self.among = PlacedSelfAttention(d, heads, dropout)
        self.align = SemanticsAligner(d, heads, smca=smca, resample=resample, gate=gate, edge=edge)
        self.cross = AlignedCrossAttention(d, heads, dropout)
        self.dropout, self.norm, self.feed = nn.Dropout(dropout), nn.LayerNorm(d), FeedForward(d, hidden, dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: every matrix Xavier's; keypoints begin without a bias.

        The released code means to zero the keypoints' last matrix, but overwrites it. Zeros would hold the scales of
        SMCA, which are squared, at 0 for ever.
        """
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        if self.align.locate is not None:
            nn.init.zeros_(self.align.locate[-1].bias)  # type: ignore[arg-type]

    def forward(
        self,
        content: Float[Tensor, "batch queries d"],
        reference: Float[Tensor, "batch queries 4"],
        memory: list[Level],
        query_pos: None = None,
    ) -> Float[Tensor, "batch queries d"]:
        if not -len(memory) <= self.level < len(memory):
            raise UserError(f"the decoder layer looks at level {self.level}, but the memory has {len(memory)}")
        level = memory[self.level]
        content = self.among(content, reference)
        aligned = self.align(content, reference, level)
        prior = None if aligned.scales is None else smca_prior(aligned.points, aligned.scales, level)
        attended = self.cross(aligned.content, aligned.pos, level, prior)
        return self.feed(self.norm(content + self.dropout(attended)))


def level_schedule(layers: int, levels: int) -> list[int]:
    r"""Which level each decoder layer looks at: from coarse to fine, $L - 1 - \lfloor i L / D \rfloor$ (SAM-DETR++).

    Raises:
        UserError: If there are more levels than layers, so that some would never be looked at.

    Example:
        >>> level_schedule(6, 3)
        [2, 2, 1, 1, 0, 0]
    """
    if not 1 <= levels <= layers:
        raise UserError(f"levels must be 1 to the number of decoder layers, {layers}, got {levels}")
    return [levels - 1 - k * levels // layers for k in range(layers)]


class SamDetr(Detr):
    """SAM-DETR, and with several levels SAM-DETR++: queries are boxes, and are aligned with the image in every layer.

    With one stride the encoder is DETR's. With several it is deformable, of half the ``hidden`` units, over levels that
    are group-normed, and decoder layers look at them from coarse to fine (``level_schedule``).

    Args:
        classes: Number of classes.
        queries, d, heads, hidden, encoders, decoders: Sizes; the defaults are for pictures of 64×64, like those of
            ``baseline``. The paper has 300, 256, 8, 2048, 6 and 6.
        strides: Levels, from fine to coarse; of a ``backbone`` of your own only their number counts.
        smca: Whether attention falls with the distance from the keypoints.
        resample, gate, edge: As of ``SemanticsAligner``.
        backbone: Pictures to maps of ``d`` channels, in place of ``TinyBackbone``.
        dropout: Its rate; 0.1 in the paper.

    Raises:
        UserError: If a size does not fit.

    Example:
        >>> model = SamDetr(classes=3, smca=True)
        >>> trainer.fit(model, data, loss=SetCriterion(), optimizer=partial(AdamW, lr=1e-3))
    """

    def __init__(
        self,
        classes: int,
        *,
        queries: int = 12,
        d: int = 64,
        heads: int = 4,
        hidden: int = 128,
        encoders: int = 2,
        decoders: int = 3,
        strides: Sequence[int] = (8,),
        smca: bool = False,
        resample: Resample = "keypoints",
        gate: bool = True,
        edge: Edge = "zeros",
        backbone: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        check_width(d, heads)
        levels = len(strides)
        layers = [
            SamDecoderLayer(d, heads, hidden, dropout, level=level, smca=smca, resample=resample, gate=gate, edge=edge)
            for level in level_schedule(decoders, levels)
        ]
        several = levels > 1
        super().__init__(
            nn.Sequential(backbone or TinyBackbone(d, strides=strides), _Levels(d, levels)),
            Encoder(
                d,
                heads,
                hidden // 2 if several else hidden,
                encoders,
                levels=levels,
                deformable=several,
                dropout=dropout,
            ),
            Decoder(layers, d, classes, queries),
        )


class _Levels(nn.Module):
    """The backbone's maps, counted, and normed where there are several."""

    def __init__(self, d: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        norms = (group_norm(d) for _ in range(levels))
        self.norms = nn.ModuleList(norms if levels > 1 else [nn.Identity()])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        if len(maps) != self.levels:
            raise UserError(f"the backbone gives {len(maps)} levels, and strides names {self.levels}")
        return [norm(m) for norm, m in zip(self.norms, maps, strict=True)]
