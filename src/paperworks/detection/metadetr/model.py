"""The detector: pictures and codes of classes to boxes, several classes at a time."""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import box_convert, roi_align
from torchvision.transforms import v2

from paperworks.detection.core import (
    DeformableDecoderLayer,
    DeformableEncoderLayer,
    Detections,
    Detr,
    Encoder,
    Level,
    Prediction,
    Shot,
    SupportSet,
    TinyBackbone,
    level,
    mlp,
    padded,
    post_process,
)
from paperworks.detection.core.detr import PRIOR, with_features
from paperworks.detection.core.layers import check_width, group_norm
from paperworks.detection.core.targets import clear_padding, extents, first_outside, split_padding
from paperworks.detection.metadetr.aggregation import CorrelationalAggregation, index_codes, xavier
from paperworks.detection.metadetr.codes import CodeBook, fingerprint
from paperworks.detection.metadetr.episodes import augmented, inference_episodes
from paperworks.errors import UserError, check_counts
from paperworks.nn import keeping_modes

BINS = 7
"""Of RoIAlign, a side."""


class MetaTask(NamedTuple):
    """A batch of pictures, and episodes in which all of them are searched.

    Attributes:
        images: To be searched.
        pad: True where they are padding.
        supports: Pictures with an instance each, slot after slot, episode after episode.
        support_pad: True where they are padding.
        boxes: Of the instances: centre x, centre y, width and height, as shares of the picture without its padding.
        classes: The class of every slot of every episode.
    """

    images: Float[Tensor, "batch 3 height width"]
    pad: Bool[Tensor, "batch height width"]
    supports: Float[Tensor, "supports 3 high wide"]
    support_pad: Bool[Tensor, "supports high wide"]
    boxes: Float[Tensor, "supports 4"]
    classes: Int64[Tensor, "episodes slots"]


class MetaPrediction(NamedTuple):
    """What was found in every picture in every episode.

    Attributes:
        layers: Of each decoder layer; row ``picture · episodes + episode``, a logit for each slot.
        code_logits: Of the supports' codes, over all classes of training.
    """

    layers: list[Prediction]
    code_logits: Float[Tensor, "supports classes"]


class CosineClassifier(nn.Module):
    r"""$10 \, g_c \cos(S, v_c)$ with a learned norm $g_c$ a class, which keeps codes of classes apart."""

    SCALE = 10.0

    def __init__(self, d: int, classes: int) -> None:
        super().__init__()
        self.rows = weight_norm(nn.Linear(d, classes, bias=False))

    def forward(self, codes: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        logits: Tensor = self.rows(codes / (codes.norm(dim=1, keepdim=True) + 1e-5))
        return self.SCALE * logits

    @torch.no_grad()
    def forget(self, classes: Sequence[int], generator: torch.Generator) -> None:
        """Begin anew with some classes: directions are drawn from N(0, 1), norms are the mean of the others'.

        The released code means to draw the rows anew, but its weight normalisation overwrites them at once.
        """
        norms, directions = self.rows.parametrizations["weight"].parameters()
        kept = torch.ones(len(norms), dtype=torch.bool)
        kept[list(classes)] = False
        norms[list(classes)] = norms[kept].mean() if kept.any() else 1.0
        drawn = torch.randn(len(classes), directions.shape[1], generator=generator)
        directions[list(classes)] = drawn.to(directions)


class PointDecoder(nn.Module):
    r"""Deformable layers whose queries are fixed sine codes of their own number: nothing of a class is in them.

    Query q starts with its code, which is its position, too, and looks around the point
    $p_q = \sigma(\text{linear}(q))$. Of the content h of any layer the box is
    $\sigma(\text{MLP}(h) + [\text{logit}\, p_q; 0; 0])$. All layers share their heads, and no layer refines boxes, as
    in the published runs.

    Args:
        d, heads, hidden, layers, points, dropout: As of ``MetaDetr``.
        queries: How many.
        slots: Logits of a query, each with a bias of its own; in the released code they share one.
    """

    def __init__(
        self,
        d: int,
        heads: int,
        hidden: int,
        layers: int,
        queries: int,
        slots: int,
        points: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(d, heads, hidden, points=points, dropout=dropout) for _ in range(layers)
        )
        self.register_buffer("queries", index_codes(queries, d), persistent=False)
        self.reference, self.class_head, self.box_head = nn.Linear(d, 2), nn.Linear(d, slots), mlp(d, d, d, 4)
        nn.init.xavier_uniform_(self.reference.weight)
        nn.init.zeros_(self.reference.bias)
        nn.init.constant_(self.class_head.bias, PRIOR)
        last = self.box_head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        last.bias = nn.Parameter(torch.tensor([0.0, 0.0, -2.0, -2.0]))

    def forward(self, memory: list[Level]) -> list[Prediction]:
        queries = self.get_buffer("queries").expand(len(memory[-1].features), -1, -1)
        place, content, found = self.reference(queries), queries, []
        for layer in self.layers:
            content = layer(content, place.sigmoid(), memory, queries)
            boxes = (self.box_head(content) + F.pad(place, (0, 2))).sigmoid()
            found.append(Prediction(self.class_head(content), boxes))
        return found


class MetaDetr(nn.Module):
    """Few-shot detection on the level of the picture: no region proposals, and several classes in one pass.

    In the field's words, pictures that are searched are query images, and a class's code is the prototype that its
    support images form; queries are those of the decoder.

    The same backbone and first encoder layer see pictures that are searched and pictures that support classes. Between
    attention and feed-forward block of that layer, ``CorrelationalAggregation`` brings in the codes of an episode's
    classes; all that follows knows slots only.

    Args:
        classes: All classes that are ever trained, base and novel; of the classifier of codes.
        slots: Classes of an episode, C. 1 is meta-learning that asks for one class at a time.
        queries, d, heads, hidden, encoders, decoders, points: Sizes; the defaults are for pictures of 64×64. The paper
            has 300, 256, 8, 1024, 6, 6 and 4.
        backbone: Pictures to a list of maps of ``d`` channels, of which the last is used; by default ``TinyBackbone``,
            stride 8. The paper has ResNet-101 with frozen batch norms, stride 32, and a 1x1 projection. The sides of
            pictures should be multiples of the stride; ``padded`` sees to it.
        dropout: Its rate; 0.1 in the paper.
        background, task_codes: Of ``CorrelationalAggregation``.

    Raises:
        UserError: If a size does not fit.

    Example:
        >>> model = MetaDetr(classes=9)
        >>> sampler = EpisodeSampler(SupportSet(examples))
        >>> trainer = Trainer(10, interventions=[sampler], batch_size=4, clip_norm=0.1)
        >>> optimizer = AdamW(parameter_groups(model), weight_decay=1e-4)
        >>> trainer.fit(model, data, loss=MetaCriterion(), optimizer=optimizer)  # no eval_data: it has no episodes
        >>> book = model.encode_classes(SupportSet(k_shot_examples))
        >>> found = model.detect(images, book, sizes)
    """

    def __init__(
        self,
        classes: int,
        slots: int = 5,
        *,
        queries: int = 12,
        d: int = 64,
        heads: int = 4,
        hidden: int = 128,
        encoders: int = 2,
        decoders: int = 3,
        points: int = 4,
        backbone: nn.Module | None = None,
        dropout: float = 0.0,
        background: bool = True,
        task_codes: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(
            d, heads, hidden, classes=classes, queries=queries, encoders=encoders, decoders=decoders, points=points
        )
        self.slots, self.classes = slots, classes
        self.backbone, self.group_norm = backbone or TinyBackbone(d), group_norm(d)
        self.first = DeformableEncoderLayer(d, heads, hidden, points=points, dropout=dropout)
        self.aggregate = CorrelationalAggregation(d, slots, background=background, task_codes=task_codes)
        self.encoder = Encoder(d, heads, hidden, encoders - 1, points=points, deformable=True, dropout=dropout)
        self.decoder = PointDecoder(d, heads, hidden, decoders, queries, slots, points, dropout)
        self.classifier = CosineClassifier(d, classes)
        xavier(self.first.feed, *feeds(self.encoder))
        self._hashed: tuple[list[tuple[int, int]], str] | None = None

    def attend(self, images: Float[Tensor, "n 3 height width"], pad: Bool[Tensor, "n height width"] | None) -> Level:
        """What depends on no class: backbone, projection and the attention of the first encoder layer."""
        mask = clear_padding(pad, images)
        last = level(self.group_norm(self.backbone(images.masked_fill(mask[:, None], 0))[-1]), mask)
        return with_features(last, self.first.attend(last.features, last.pos, [last]))

    def encode(
        self,
        images: Float[Tensor, "n 3 height width"],
        boxes: Float[Tensor, "n 4"],
        pad: Bool[Tensor, "n height width"] | None = None,
    ) -> Float[Tensor, "n d"]:
        r"""Category codes $S = \sigma(\text{mean of RoIAlign}_{7 \times 7}(x))$ of one instance a picture.

        Raises:
            UserError: If a box has no extent, or lies outside its picture.
        """
        if outside := first_outside(boxes):
            row, shown = outside
            raise UserError(f"support {row}: box ({shown}) is not within its picture")
        mask = clear_padding(pad, images)
        seen = self.attend(images, mask)
        cells = box_convert(boxes, "cxcywh", "xyxy") * cells_shown(seen, mask).repeat(1, 2)
        regions = roi_align(seen.as_map(), list(cells[:, None]), BINS, aligned=True)
        return regions.mean((2, 3)).sigmoid()

    def search(self, seen: Level, codes: Float[Tensor, "#batch classes d"]) -> list[Prediction]:
        """Find the classes of one episode in pictures that have been attended to; logit k is that of the k-th code."""
        y, tau, _ = self.aggregate(seen.features, codes)
        found: list[Prediction] = self.decoder(self.encoder([with_features(seen, self.first.feed(y + tau))]))
        return [Prediction(layer.logits[..., : codes.shape[1]], layer.boxes) for layer in found]

    def forward(self, task: MetaTask) -> MetaPrediction:
        if not isinstance(task, MetaTask):
            raise UserError(f"MetaDetr takes a MetaTask, which EpisodeSampler makes, got {type(task).__name__}")
        episodes, slots = task.classes.shape
        codes = self.encode(task.supports, task.boxes, task.support_pad)
        seen = self.attend(task.images, task.pad)
        every = codes.view(episodes, slots, -1).repeat(len(task.images), 1, 1)
        return MetaPrediction(self.search(repeated(seen, episodes), every), self.classifier(codes))

    # After training.

    def train(self, mode: bool = True) -> "MetaDetr":
        """As of every module; weights may change from now on."""
        self._hashed = None if mode else self._hashed
        return super().train(mode)

    @property
    def fingerprint(self) -> str:
        """Of all weights that make codes; computed anew after training, or when one of them has changed in place."""
        parts = (self.backbone, self.group_norm, self.first.attention, self.first.norm)
        now = [(value.data_ptr(), value._version) for part in parts for value in part.state_dict().values()]
        if self._hashed is None or self._hashed[0] != now:
            self._hashed = now, fingerprint(*parts)
        return self._hashed[1]

    @torch.no_grad()
    def encode_classes(
        self,
        support: SupportSet,
        classes: Sequence[int] | None = None,
        *,
        draws: int = 100,
        augment: v2.Transform | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 32,
    ) -> CodeBook:
        """The mean code of each class.

        Pictures of one size have the same codes in any company; those of different sizes pad each other in a batch, and
        the group norm sees that.

        Args:
            support: Instances.
            classes: Labels; by default all that have instances.
            draws: Codes that are averaged, at most: of instances in any order, each once; with ``augment``, exactly as
                many, instances in turn. 100 as published.
            augment: Of pictures and boxes, see ``augmented``.
            generator: Of the order, and for ``augment``.
            batch_size: Supports at a time.

        Raises:
            UserError: If a class has no instance or is named twice, or a number is not positive.
        """
        check_counts(draws=draws, batch_size=batch_size)
        generator = generator or torch.Generator().manual_seed(0)
        labels = tuple(support.classes if classes is None else classes)
        if not labels or len(set(labels)) < len(labels):
            raise UserError(f"classes must be some, each once, got {', '.join(map(str, labels)) or 'none'}")
        counts = [support.count(label) for label in labels]
        each = [min(draws, count) if augment is None else draws for count in counts]
        orders = [torch.randperm(count, generator=generator).tolist() for count in counts]
        turns = [(row, orders[row][turn % counts[row]]) for row, times in enumerate(each) for turn in range(times)]
        device = next(self.parameters()).device
        sums = torch.zeros(len(labels), self.aggregate.d, device=device)
        instances: list[dict[tuple[int, int], None]] = [{} for _ in labels]  # in order, each once
        with keeping_modes(self):
            self.eval()
            for start in range(0, len(turns), batch_size):
                part = turns[start : start + batch_size]
                shots = [support.shot(labels[row], place) for row, place in part]
                images, pad, boxes = stacked([augmented(shot, augment, generator) for shot in shots])
                rows = torch.tensor([row for row, _ in part], device=device)
                sums.index_add_(0, rows, self.encode(images.to(device), boxes.to(device), pad.to(device)))
                for (row, _), shot in zip(part, shots, strict=True):
                    instances[row][shot.key] = None
        codes = sums / sums.new_tensor(each)[:, None]
        return CodeBook(labels, codes, tuple(tuple(keys) for keys in instances), self.fingerprint)

    @torch.no_grad()
    def predict(
        self,
        inputs: Float[Tensor, "batch 3 height width"] | tuple[Tensor, Tensor] | list[Tensor],
        book: CodeBook,
        episode_size: int | None = None,
    ) -> Prediction:
        r"""What is found of all classes of the book, which are its columns, by ``episodes`` times as many queries.

        Classes are searched for in $\lceil n / C \rceil$ episodes, of which the last has the last C classes; what the
        queries of an episode say of a class that an earlier one had does not count. A logit of another episode's class
        is $-\infty$.

        Args:
            inputs: Pictures, or pictures with their masks of padding.
            book: Codes that this very model made.
            episode_size: C; by default the number of slots. With fewer classes there are slots left over.

        Raises:
            UserError: If there are no such slots, or other weights made the codes.
        """
        size = self.slots if episode_size is None else episode_size
        if not 1 <= size <= self.slots:
            raise UserError(f"episode_size must be 1 to {self.slots}, the slots of the model, got {size}")
        if book.fingerprint != self.fingerprint:
            raise UserError("the codes were made with other weights: make them anew with encode_classes")
        if not len(book):
            raise UserError("the book has no class")
        if len(book) < size:  # under no_grad's wrapper, hence 3
            warnings.warn(f"{len(book)} classes leave {size - len(book)} of {size} slots empty", stacklevel=3)
        images, pad = split_padding(inputs)
        logits, boxes = [], []
        with keeping_modes(self):
            self.eval()
            seen, codes = self.attend(images, pad), book.codes.to(images)
            for episode, new in inference_episodes(len(book), size):
                last = self.search(seen, codes[None, episode])[-1]
                column = last.logits.new_full((*last.logits.shape[:2], len(book)), -math.inf)
                column[..., new] = last.logits[..., len(episode) - len(new) :]
                logits.append(column)
                boxes.append(last.boxes)
        return Prediction(torch.cat(logits, 1), torch.cat(boxes, 1))

    def detect(
        self,
        inputs: Float[Tensor, "batch 3 height width"] | tuple[Tensor, Tensor] | list[Tensor],
        book: CodeBook,
        sizes: Sequence[tuple[int, int]] | None = None,
        *,
        episode_size: int | None = None,
        top: int = 100,
    ) -> list[Detections]:
        """The ``top`` surest detections of each picture, labelled by the book's classes; no suppression of overlaps.

        Args:
            inputs, book, episode_size: As of ``predict``.
            sizes: Height and width of each original picture; by default those of ``inputs`` without padding.
            top: How many, at most.
        """
        images, pad = split_padding(inputs)
        if sizes is None:
            sizes = [(rows, columns) for rows, columns in extents(pad).tolist()]
        found = post_process(self.predict((images, pad), book, episode_size), sizes, top)
        classes = torch.tensor(book.classes, device=images.device)
        return [Detections(each.scores, classes[each.labels], each.boxes) for each in found]


def plain_detr(
    classes: int,
    *,
    queries: int = 12,
    d: int = 64,
    heads: int = 4,
    hidden: int = 128,
    encoders: int = 2,
    decoders: int = 3,
    points: int = 4,
    backbone: nn.Module | None = None,
    dropout: float = 0.0,
) -> Detr:
    """The same detector without aggregation, a logit a class: what plain fine-tuning starts from. As ``MetaDetr``."""
    check_sizes(d, heads, hidden, classes=classes, queries=queries, encoders=encoders, decoders=decoders, points=points)
    maps = nn.Sequential(backbone or TinyBackbone(d), LastNormed(d))
    encoder = Encoder(d, heads, hidden, encoders, points=points, deformable=True, dropout=dropout)
    xavier(*feeds(encoder))
    return Detr(maps, encoder, PointDecoder(d, heads, hidden, decoders, queries, classes, points, dropout))


class LastNormed(nn.Module):
    """Of maps, the last, after its group norm."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = group_norm(d)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.norm(maps[-1])]


def feeds(encoder: Encoder) -> list[nn.Module]:
    """The feed-forward blocks of its layers."""
    return [layer.get_submodule("feed") for layer in encoder.layers]


def check_sizes(d: int, heads: int, hidden: int, **counts: int) -> None:
    """Refuse sizes that do not fit."""
    check_counts(d=d, heads=heads, hidden=hidden, **counts)
    check_width(d, heads)


def cells_shown(seen: Level, pad: Bool[Tensor, "n height width"]) -> Float[Tensor, "n 2"]:
    """Width and height of each picture without its padding, in cells of the map and parts of them."""
    return extents(pad).flip(1) * seen.valid.new_tensor([seen.width / pad.shape[2], seen.height / pad.shape[1]])


def repeated(seen: Level, times: int) -> Level:
    """Each picture so many times, one after the other."""
    x, pos, pad, valid = (part.repeat_interleave(times, 0) for part in (seen.features, seen.pos, seen.pad, seen.valid))
    return Level(x, pos, pad, seen.height, seen.width, valid)


def stacked(shots: Sequence[Shot]) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures as one batch, where they are padding, and boxes."""
    images, pad = padded([shot.image for shot in shots])
    return images, pad, torch.stack([shot.box for shot in shots])
