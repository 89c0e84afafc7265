"""A small DETR: backbone, encoder, decoder with heads."""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperworks.detection.core.embedding import Level, level
from paperworks.detection.core.layers import (
    ConditionalDecoderLayer,
    DeformableDecoderLayer,
    DeformableEncoderLayer,
    DetrDecoderLayer,
    EncoderLayer,
    check_width,
    mlp,
)
from paperworks.detection.core.targets import Prediction, split_padding
from paperworks.errors import UserError, unknown

PRIOR = -math.log(99)
"""Bias of class heads: a chance of 1 % at first."""
Inputs = Float[Tensor, "batch 3 height width"] | tuple[Tensor, Tensor]


class TinyBackbone(nn.Module):
    """Stages of (3x3 stride 2, BN, ReLU, 3x3, BN, ReLU), and a 1x1 projection of the maps that are asked for.

    For real pictures take a pretrained network instead: anything that maps pictures to a list of maps will do, e.g.
    ``timm.create_model(…, features_only=True)`` with a projection.

    Args:
        d: Channels of the maps.
        channels: Of the stages; stage k has stride $2^{k+1}$.
        strides: Which maps to give, from fine to coarse.
    """

    def __init__(self, d: int = 64, channels: Sequence[int] = (24, 48, 64), strides: Sequence[int] = (8,)) -> None:
        super().__init__()
        known = [2 ** (k + 1) for k in range(len(channels))]
        for stride in strides:
            if stride not in known:
                raise UserError(f"strides must be among {', '.join(map(str, known))}, got {stride}")
        widths = [3, *channels]
        self.stages = nn.ModuleList(
            nn.Sequential(*_conv(before, after, 2), *_conv(after, after, 1)) for before, after in pairwise(widths)
        )
        self.wanted = sorted(known.index(stride) for stride in strides)
        self.projections = nn.ModuleList(nn.Conv2d(channels[k], d, 1) for k in self.wanted)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return [project(maps[k]) for k, project in zip(self.wanted, self.projections, strict=True)]


class Encoder(nn.Module):
    """Plain layers over the coarsest level alone, or deformable layers over all levels."""

    def __init__(
        self,
        d: int,
        heads: int,
        hidden: int,
        layers: int,
        *,
        levels: int = 1,
        points: int = 4,
        deformable: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        make: Callable[[], nn.Module] = (
            (lambda: DeformableEncoderLayer(d, heads, hidden, levels, points, dropout))
            if deformable
            else (lambda: EncoderLayer(d, heads, hidden, dropout))
        )
        self.layers = nn.ModuleList(make() for _ in range(layers))
        self.deformable = deformable
        self.level_code = nn.Parameter(torch.randn(levels, d)) if deformable and levels > 1 else None

    def forward(self, memory: list[Level]) -> list[Level]:
        if not self.deformable:
            last = memory[-1]
            x = last.features
            for layer in self.layers:
                x = layer(x, last.pos, last.pad)
            return [*memory[:-1], with_features(last, x)]
        codes = [m.pos if self.level_code is None else m.pos + self.level_code[k] for k, m in enumerate(memory)]
        pos = torch.cat(codes, 1)
        for layer in self.layers:
            memory = split_levels(layer(torch.cat([m.features for m in memory], 1), pos, memory), memory)
        return memory


class Decoder(nn.Module):
    r"""Decoder layers that refine their boxes, with a class and a box head each.

    With the layers' content $h_i$, the box of layer i is $\sigma(r_i + \text{MLP}_i(h_i))$, and the next reference is
    $r_{i+1} = \text{detach}(r_i + \text{MLP}_i(h_i))$, or stays $r_0$ without refinement. The first reference keeps its
    gradient, or the learned boxes would never train.

    Args:
        layers: The layers.
        d: Channels.
        classes: Of the heads.
        queries: How many.
        content: ``zero``, or ``learned`` for each query.
        query_pos: Whether queries have learned codes.
        reference: ``boxes`` that are learned, points that a linear layer makes of the codes (``points``), or ``none``:
            boxes come of the content alone, as in DETR.
        refine: Whether references move from layer to layer.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        d: int,
        classes: int,
        queries: int,
        *,
        content: Literal["zero", "learned"] = "zero",
        query_pos: bool = False,
        reference: Literal["boxes", "points", "none"] = "boxes",
        refine: bool = True,
    ) -> None:
        super().__init__()
        if reference == "points" and not query_pos:
            raise UserError("reference='points' needs query_pos=True")
        self.layers, self.kind, self.refine, self.d, self.queries = nn.ModuleList(layers), reference, refine, d, queries
        self.content = nn.Parameter(torch.randn(queries, d)) if content == "learned" else None
        self.query_pos = nn.Parameter(torch.randn(queries, d)) if query_pos else None
        self.boxes = nn.Parameter(torch.randn(queries, 4)) if reference == "boxes" else None
        self.points = nn.Linear(d, 2) if reference == "points" else None
        class_head, box_head = nn.Linear(d, classes), mlp(d, d, d, 4)
        nn.init.constant_(class_head.bias, PRIOR)
        self.class_heads = nn.ModuleList(copy.deepcopy(class_head) for _ in layers)
        self.box_heads = nn.ModuleList(copy.deepcopy(box_head) for _ in layers)
        for head in self.box_heads:
            assert isinstance(head, nn.Sequential)
            last = head[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        if reference == "none":  # something to start from that is not the same for all
            for head in self.box_heads:
                nn.init.xavier_uniform_(head[-1].weight)  # type: ignore[index]

    def references(self, batch: int) -> Float[Tensor, "batch queries 4"]:
        """$r_0$, before the sigmoid."""
        start: Tensor
        if self.boxes is not None:
            start = self.boxes
        elif self.points is not None:
            place = self.points(self.query_pos)
            start = torch.cat([place, torch.full_like(place, -2.0)], -1)  # small boxes
        else:
            start = torch.zeros(self.queries, 4, device=next(self.class_heads.parameters()).device)
        return start.expand(batch, -1, -1)

    def forward(self, memory: list[Level]) -> list[Prediction]:
        batch = len(memory[-1].features)
        zero = memory[-1].features.new_zeros(batch, self.queries, self.d)
        content = zero if self.content is None else zero + self.content
        pos = None if self.query_pos is None else self.query_pos.expand(batch, -1, -1)
        logits, found = self.references(batch), []
        for place, layer in enumerate(self.layers):
            if not logits.isfinite().all():
                raise UserError(f"the references of decoder layer {place} are not finite")
            content = layer(content, logits.sigmoid(), memory, pos)
            moved = logits + self.box_heads[place](content)
            found.append(Prediction(self.class_heads[place](content), moved.sigmoid()))
            if self.refine:
                logits = moved.detach()
        return found


class Detr(nn.Module):
    """Pictures to predictions of every decoder layer, the last one last.

    Args:
        backbone: Pictures to maps of ``d`` channels, from fine to coarse.
        encoder: Levels to levels.
        decoder: Levels to predictions.
    """

    def __init__(self, backbone: nn.Module, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.backbone, self.encoder, self.decoder = backbone, encoder, decoder

    def memory(self, inputs: Inputs) -> list[Level]:
        """The encoded levels of pictures, or of pictures with their masks of padding (true there)."""
        images, mask = split_padding(inputs)
        maps = self.backbone(images.masked_fill(mask[:, None], 0))
        return self.encoder([level(features, mask) for features in maps])

    def forward(self, inputs: Inputs) -> list[Prediction]:
        return self.decoder(self.memory(inputs))


Baseline = Literal["detr", "conditional", "deformable"]


def baseline(
    name: Baseline,
    classes: int,
    *,
    queries: int = 12,
    d: int = 64,
    heads: int = 4,
    hidden: int = 128,
    encoders: int = 2,
    decoders: int = 3,
    strides: Sequence[int] = (8,),
    backbone: nn.Module | None = None,
    dropout: float = 0.0,
) -> Detr:
    """DETR, Conditional DETR or Deformable DETR (with box refinement) at any size.

    Args:
        name: Which.
        classes: Number of classes.
        queries, d, heads, hidden, encoders, decoders: Sizes; the defaults are for pictures of 64×64.
        strides: Levels, of which ``deformable`` uses all and the others the coarsest.
        backbone: In place of ``TinyBackbone``.
        dropout: Its rate.

    Raises:
        UserError: If there is no such baseline, or a size does not fit.
    """
    check_width(d, heads)
    kwargs: dict[str, bool | str] = {"query_pos": True}
    layers: list[nn.Module]
    if name == "detr":
        layers = [DetrDecoderLayer(d, heads, hidden, dropout) for _ in range(decoders)]
        kwargs |= {"reference": "none", "refine": False}
    elif name == "conditional":
        layers = [ConditionalDecoderLayer(d, heads, hidden, dropout, first=k == 0) for k in range(decoders)]
        kwargs |= {"reference": "points", "refine": False}
    elif name == "deformable":
        layers = [DeformableDecoderLayer(d, heads, hidden, len(strides), dropout=dropout) for _ in range(decoders)]
        kwargs |= {"reference": "boxes", "content": "learned"}
    else:
        raise unknown("baseline", name, ("detr", "conditional", "deformable"))
    encoder = Encoder(d, heads, hidden, encoders, levels=len(strides), deformable=name == "deformable", dropout=dropout)
    decoder = Decoder(layers, d, classes, queries, **kwargs)  # type: ignore[arg-type]
    return Detr(backbone or TinyBackbone(d, strides=strides), encoder, decoder)


def with_features(old: Level, features: Float[Tensor, "batch tokens d"]) -> Level:
    """A level with other features."""
    return Level(features, old.pos, old.pad, old.height, old.width, old.valid)


def split_levels(x: Float[Tensor, "batch tokens d"], memory: Sequence[Level]) -> list[Level]:
    """The tokens of all levels, dealt out to them."""
    parts = torch.split(x, [m.height * m.width for m in memory], 1)
    return [with_features(old, part) for old, part in zip(memory, parts, strict=True)]


def _conv(before: int, after: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


def padded(
    images: Sequence[Float[Tensor, "3 _ _"]], multiple: int = 32
) -> tuple[Float[Tensor, "batch 3 height width"], Bool[Tensor, "batch height width"]]:
    """Pictures of different sizes as one batch, filled up at the right and below; true where they are."""
    height, width = (-(-max(image.shape[axis] for image in images) // multiple) * multiple for axis in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    pad = torch.ones(len(images), height, width, dtype=torch.bool)
    for row, image in enumerate(images):
        batch[row, :, : image.shape[1], : image.shape[2]] = image
        pad[row, : image.shape[1], : image.shape[2]] = False
    return batch, pad
