"""The reasoner: pictures and words to a box, in as many steps as it takes."""

import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from paperworks.detection.core import level, mlp, sine_embed
from paperworks.detection.core.targets import split_padding
from paperworks.detection.dynrec.blocks import ReasoningBlock, ReasoningState, SubQueryBlock
from paperworks.detection.dynrec.halting import greedy_steps
from paperworks.errors import UserError, unknown
from paperworks.nn import keeping_modes

Inputs = tuple[Any, Tensor, Tensor]
"""What the visual encoder takes (pictures, or pictures with their padding), numbers of words, and where words are."""


class VisualTokens(NamedTuple):
    """What there is to point at.

    Attributes:
        features: One vector a place, of what there is and where.
        codes: Of where alone.
        boxes: Of the thing that would be at the place: centre x, centre y, width and height in [0, 1].
        points: The place itself; that nearest to the middle of the true box is the right one.
        pad: True where there is no place.
    """

    features: Float[Tensor, "batch places d"]
    codes: Float[Tensor, "batch places d"]
    boxes: Float[Tensor, "batch places 4"]
    points: Float[Tensor, "batch places 2"]
    pad: Bool[Tensor, "batch places"]

    def rows(self, index: Int64[Tensor, " kept"]) -> "VisualTokens":
        """Those of some examples alone."""
        return VisualTokens(*(part[index] for part in self))


class GridTokens(nn.Module):
    r"""The cells of a backbone's coarsest map, each with its code of position and a box.

    To the sine code comes a linear map of the cell's eight coordinates (corners, centre, size), as in ReSC, with which
    places compare in a straight line. A cell's box has its centre at most one cell from the cell's own:
    $(c + \tanh(o_{xy}) / \text{grid}, \sigma(o_{wh}))$.

    Args:
        backbone: Pictures to a list of maps, or to one map.
        channels: Of its coarsest map.
        d: Channels of the tokens.
        temperature: Of the sine code. With DETR's 10000 most of its channels are all but equal for all cells of a small
            map; 3 is about right for one of 3x3.
        scale: Times which the sine code is added; contents have variance one.
    """

    def __init__(
        self, backbone: nn.Module, channels: int, d: int = 64, temperature: float = 1e4, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.temperature, self.scale = temperature, scale
        self.backbone, self.project = backbone, nn.Linear(channels, d)
        self.coordinates, self.norm, self.box = nn.Linear(8, d), nn.LayerNorm(d), mlp(channels, d, 4)

    def forward(self, inputs: Float[Tensor, "batch 3 height width"] | tuple[Tensor, Tensor]) -> VisualTokens:
        images, mask = split_padding(inputs)
        maps = self.backbone(images.masked_fill(mask[:, None], 0))
        grid = level(maps if isinstance(maps, Tensor) else maps[-1], mask)
        half = 0.5 / (grid.valid * grid.valid.new_tensor([grid.width, grid.height]))[:, None].expand_as(grid.centres)
        place = torch.cat([grid.centres - half, grid.centres + half, grid.centres, 2 * half], -1)
        offset = self.box(grid.features)
        boxes = torch.cat([grid.centres + 2 * half * offset[..., :2].tanh(), offset[..., 2:].sigmoid()], -1)
        sine = sine_embed(grid.centres, self.project.out_features, self.temperature)
        code = self.scale * sine + self.coordinates(place)
        features = self.norm(self.project(grid.features)) + code
        return VisualTokens(features, code, boxes, grid.centres, grid.pad)


class StopPolicy(nn.Module):
    r"""$\sigma(\text{MLP}([\text{LN}\, r_t; \text{mean of the words}; e_t]))$, one half at first; beside it the value
    that the policy expects, for a baseline.

    Args:
        d: Channels.
        steps: How many there are at most.
    """

    def __init__(self, d: int, steps: int) -> None:
        super().__init__()
        self.norm, self.step = nn.LayerNorm(d), nn.Embedding(steps, d)
        self.net = mlp(3 * d, d, 2)
        nn.init.zeros_(self.net[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.net[-1].bias)  # type: ignore[arg-type]

    def forward(
        self, reason: Float[Tensor, "batch d"], sentence: Float[Tensor, "batch d"], step: int
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Logit of stopping after ``step`` (from 0), and value."""
        which = self.step.weight[step].expand_as(sentence)
        logit, value = self.net(torch.cat([self.norm(reason), sentence, which], -1)).unbind(-1)
        return logit, value


class Reasoning(NamedTuple):
    """All steps of a batch.

    Attributes:
        boxes: Of each step: centre x, centre y, width and height in [0, 1].
        stop_logits: Of stopping after each step.
        values: What the policy expects to earn.
        scores: Logits of the places, if the head points; else nothing.
        places: What can be pointed at.
    """

    boxes: Float[Tensor, "batch steps 4"]
    stop_logits: Float[Tensor, "batch steps"]
    values: Float[Tensor, "batch steps"]
    scores: Float[Tensor, "batch steps places"] | None
    places: VisualTokens


class Answer(NamedTuple):
    """What inference found.

    Attributes:
        boxes: Centre x, centre y, width and height in [0, 1].
        steps: How many were taken for each example.
    """

    boxes: Float[Tensor, "batch 4"]
    steps: Int64[Tensor, " batch"]


class DynamicReasoner(nn.Module):
    r"""One-stage referring-expression comprehension in a variable number of steps of one block (Zhang et al. 2023).

    The state $S_0 = [r_0; W; V]$ holds a learned token, the words and the places of the picture. Each step
    $S_t = \text{Block}(S_{t-1})$, always of the same weights, gives a box and a probability of stopping. Blocks,
    heads and policy are reconstructed: the paper's abstract and the models that it extends were all there was to read.

    Args:
        visual: What comes first of the inputs to ``VisualTokens`` of d channels, e.g. ``GridTokens``.
        text: Numbers of words and their mask to ``[batch, words, d]``, e.g. ``TextEncoder``.
        max_steps: T, at which it stops whatever the policy says.
        d: Channels.
        heads: Of the transformer block.
        block: ``transformer``: a pre-norm layer over the whole state; ``sub-query``: ReSC's, which filters the picture.
        head: ``pointer``: the place with the largest $\langle A r_t, v_i \rangle / \sqrt d$, where v is as the
            picture's encoder gave it, and its box; ``place``: the same with the code of the place alone for v: r must
            have found the place, and cannot leave it to the pointer to compare words with contents; ``box``:
            $\sigma(\text{MLP}_3(\text{LN}\, r_t))$.
        gain: Of the transformer block; see ``ReasoningBlock``.
        detach_state: The policy reads the state without gradient, so that its noise cannot disturb the boxes.

    Example:
        >>> model = DynamicReasoner(GridTokens(backbone, 64), TextEncoder(len(vocabulary)), max_steps=5)
        >>> boxes, steps = model.infer((images, *vocabulary.encode(["the ring above the star"], max_words=20)))
    """

    def __init__(
        self,
        visual: nn.Module,
        text: nn.Module,
        max_steps: int = 5,
        *,
        d: int = 64,
        heads: int = 4,
        block: Literal["transformer", "sub-query"] = "transformer",
        head: Literal["pointer", "place", "box"] = "pointer",
        gain: float = 1.0,
        detach_state: bool = True,
    ) -> None:
        super().__init__()
        if max_steps < 1:
            raise UserError(f"max_steps must be at least 1, got {max_steps}")
        if block not in ("transformer", "sub-query"):
            raise unknown("block", block, ("transformer", "sub-query"))
        if head not in ("pointer", "place", "box"):
            raise unknown("head", head, ("pointer", "place", "box"))
        self.visual, self.text, self.max_steps, self.detach_state = visual, text, max_steps, detach_state
        self.head = head
        self.start, self.kinds = nn.Parameter(0.1 * torch.randn(d)), nn.Parameter(0.1 * torch.randn(3, d))
        self.block = ReasoningBlock(d, heads, gain=gain) if block == "transformer" else SubQueryBlock(d)
        self.norm = nn.LayerNorm(d)
        self.pointer = nn.Linear(d, d) if head != "box" else None
        self.place_norm = nn.LayerNorm(d) if head != "box" else None
        self.box = mlp(d, d, d, 4) if head == "box" else None
        self.policy = StopPolicy(d, max_steps)

    def forward(self, inputs: Inputs) -> Reasoning:
        """Every step up to the last, for training."""
        places, state, sentence = self._begin(inputs)
        boxes, scores, stops = [], [], []
        for step in range(self.max_steps):
            state = self.block.step(state)
            box, score = self._look(state, places)
            boxes.append(box)
            scores.append(score)
            stops.append(self._stop(state, sentence, step))
        logits, values = (torch.stack(part, 1) for part in zip(*stops, strict=True))
        pointed = torch.stack([score for score in scores if score is not None], 1) if self.pointer else None
        return Reasoning(torch.stack(boxes, 1), logits, values, pointed, places)

    @torch.no_grad()
    def infer(self, inputs: Inputs, stop: int | Int64[Tensor, " batch"] | None = None) -> Answer:
        """The box of each example at the step where the policy stops; those that are done leave the batch.

        Args:
            inputs: As in training.
            stop: Stop there instead, from 1: one step for all, or one an example.
        """
        forced = None if stop is None else torch.as_tensor(stop)
        if forced is not None and not ((forced >= 1) & (forced <= self.max_steps)).all():
            raise UserError(f"stop must be 1 to max_steps={self.max_steps}, got {stop}")
        with keeping_modes(self):
            self.eval()
            places, state, sentence = self._begin(inputs)
            live = torch.arange(len(sentence), device=sentence.device)
            boxes, steps = sentence.new_empty(len(live), 4), torch.empty_like(live)
            for step in range(self.max_steps):
                state = self.block.step(state)
                if step + 1 == self.max_steps:
                    done = torch.ones_like(live, dtype=torch.bool)
                elif forced is None:
                    done = self._stop(state, sentence, step)[0] > 0
                else:
                    done = (forced.to(live.device) == step + 1).expand(len(steps))[live]
                if not done.any():
                    continue
                if done.all():
                    boxes[live], steps[live] = self._look(state, places)[0], step + 1
                    break
                out, keep = done.nonzero()[:, 0], (~done).nonzero()[:, 0]
                boxes[live[out]], steps[live[out]] = self._look(state.rows(out), places.rows(out))[0], step + 1
                live, state, places, sentence = live[keep], state.rows(keep), places.rows(keep), sentence[keep]
        return Answer(boxes, steps)

    def _begin(self, inputs: Inputs) -> tuple[VisualTokens, ReasoningState, Tensor]:
        pictures, tokens, mask = inputs
        if not mask.any(1).all():
            raise UserError(f"expression {int((~mask.any(1)).int().argmax())} of the batch has no word")
        places, words = self.visual(pictures), self.text(tokens, mask)
        start = self.start.expand(len(words), 1, -1)
        parts = (start + self.kinds[0], words + self.kinds[1], places.features + self.kinds[2])
        pad = torch.cat([torch.zeros_like(mask[:, :1]), ~mask, places.pad], 1)
        state = ReasoningState(torch.cat(parts, 1), pad, torch.zeros_like(words[..., 0]))
        sentence = (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return places, state, sentence

    def _look(self, state: ReasoningState, places: VisualTokens) -> tuple[Tensor, Tensor | None]:
        """The step's box, and the logits of the places."""
        reason = self.norm(state.reason)
        if self.pointer is None or self.place_norm is None:
            assert self.box is not None
            return self.box(reason).sigmoid(), None
        # as they came: what was found out must be in the reasoning token
        keys = self.place_norm(places.codes if self.head == "place" else places.features)
        scores = (keys @ self.pointer(reason)[..., None])[..., 0] / math.sqrt(keys.shape[-1])
        scores = scores.masked_fill(places.pad, -math.inf)
        best = scores.argmax(1)[:, None, None].expand(-1, -1, 4)
        return places.boxes.gather(1, best)[:, 0], scores

    def _stop(self, state: ReasoningState, sentence: Tensor, step: int) -> tuple[Tensor, Tensor]:
        reason = state.reason
        if self.detach_state:
            reason, sentence = reason.detach(), sentence.detach()
        logit, value = self.policy(reason, sentence, step)
        return logit, value


class FixedReasoner(DynamicReasoner):
    """The same network with a forced stop after the last of its ``steps``; the baseline. It has the same weights."""

    def __init__(self, visual: nn.Module, text: nn.Module, steps: int, **options: Any) -> None:
        super().__init__(visual, text, steps, **options)

    def infer(self, inputs: Inputs, stop: int | Int64[Tensor, " batch"] | None = None) -> Answer:
        """The box of the last step, unless ``stop`` comes before it."""
        return super().infer(inputs, self.max_steps if stop is None else stop)


def pick(reasoning: Reasoning, steps: Int64[Tensor, " batch"] | None = None) -> Answer:
    """The boxes of chosen steps (from 1) of a whole reasoning; of the policy's greedy ones by default."""
    steps = greedy_steps(reasoning.stop_logits) if steps is None else steps
    return Answer(reasoning.boxes[torch.arange(len(steps), device=steps.device), steps - 1], steps)
