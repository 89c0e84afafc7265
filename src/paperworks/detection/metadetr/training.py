"""Episodes in training, the loss, and what is trained at which rate."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from paperworks.detection.core import MSDeformAttn, SetCriterion, SupportSet, Targets, unpack
from paperworks.detection.core.detr import PRIOR
from paperworks.detection.core.targets import split_padding
from paperworks.detection.metadetr.episodes import augmented, episode_targets, sample_episode
from paperworks.detection.metadetr.model import MetaDetr, MetaPrediction, MetaTask, PointDecoder, stacked
from paperworks.errors import UserError, check_counts
from paperworks.train import RandomIntervention, State

CODE_WEIGHT = 5.0
"""Of the codes' cross-entropy, in every published script."""
SLOW = 0.1
"""Of the learning rate: for the backbone, and for offsets and reference points."""


@dataclass(frozen=True)
class MetaTargets:
    """What is to be found in every picture in every episode.

    Attributes:
        objects: Row ``picture · episodes + episode``; labels are slots.
        classes: Of the supports.
    """

    objects: list[Targets]
    classes: Int64[Tensor, " supports"]

    def __len__(self) -> int:
        return len(self.objects)


class EpisodeSampler(RandomIntervention):
    """Turns every batch of pictures into episodes: which classes to look for, by which supports, and what is there.

    Put it into the trainer of a ``MetaDetr``; the data hold pictures (alone, or with their masks of padding) and
    targets, a list or packed. Supports are read and augmented as they are drawn, in the training's own process.

    Args:
        support: Instances, one of which is drawn for every slot.
        size: Classes of an episode, C: the model's slots.
        episodes: A step; all pictures are searched in each. 5 as published.
        augment: Of supports, see ``augmented``.
        seed: Of all draws.

    Raises:
        UserError: If there are fewer classes than slots.
    """

    def __init__(
        self,
        support: SupportSet,
        size: int = 5,
        episodes: int = 5,
        *,
        augment: v2.Transform | None = None,
        seed: int = 0,
    ) -> None:
        check_counts(size=size, episodes=episodes)
        super().__init__(seed)
        self.support, self.size, self.episodes, self.augment = support, size, episodes, augment
        sample_episode([], support.classes, size, torch.Generator())  # refuses too few classes

    def setup(self, state: State) -> None:
        """Refuse models that cannot be trained so; processes draw each their own episodes."""
        model = state.module
        if not isinstance(model, MetaDetr):
            raise UserError(f"EpisodeSampler trains a MetaDetr, got {type(model).__name__}")
        if self.size != model.slots:
            raise UserError(f"size must be the model's {model.slots} slots, or some are never trained, got {self.size}")
        if max(self.support.classes) >= model.classes:
            raise UserError(
                f"the model knows {model.classes} classes, from 0, and there is support for {max(self.support.classes)}"
            )
        self.seed_process(state)

    def on_batch(self, state: State) -> None:
        """Replace pictures and targets by a ``MetaTask`` and its ``MetaTargets``."""
        targets = unpack(state.targets) if isinstance(state.targets, Tensor) else list(state.targets)
        images, pad = split_padding(state.inputs)
        present = sorted(set(torch.cat([target.labels for target in targets]).tolist()))
        rows = [sample_episode(present, self.support.classes, self.size, self.generator) for _ in range(self.episodes)]
        shots = [self.support.draw(label, self.generator) for row in rows for label in row]
        supports, support_pad, boxes = (
            part.to(images.device) for part in stacked([augmented(s, self.augment, self.generator) for s in shots])
        )
        classes = torch.tensor(rows, device=images.device)
        state.inputs = MetaTask(images, pad, supports, support_pad, boxes, classes)
        objects = [episode_targets(target, row) for target in targets for row in rows]
        state.targets = MetaTargets(objects, classes.flatten())


class MetaCriterion(nn.Module):
    r"""The set loss over all pictures in all episodes, divided by all their objects, and $5$ times the cross-entropy of
    the supports' codes over all classes.

    Logits are those of slots. The released code writes them into a tensor of all classes, filled with −999999.99, and
    gathers them again for the loss: the same number.

    Args:
        detection: Of boxes and slots.
        code_weight: 5 in every published script.
    """

    def __init__(self, detection: SetCriterion | None = None, code_weight: float = CODE_WEIGHT) -> None:
        super().__init__()
        self.detection, self.code_weight = detection or SetCriterion(), code_weight

    def forward(self, found: MetaPrediction, wanted: MetaTargets) -> Float[Tensor, ""]:
        boxes = self.detection(found.layers, wanted.objects)
        return boxes + self.code_weight * F.cross_entropy(found.code_logits, wanted.classes)


def parameter_groups(
    model: nn.Module, lr: float = 2e-4, *, backbone: float = SLOW, pointing: float = SLOW
) -> list[dict[str, Any]]:
    """For AdamW: learning rates of the backbone, of what says where to look, and of everything else.

    Parameters that need no gradient are left out.

    Args:
        model: A ``MetaDetr`` or ``plain_detr``.
        lr: Of everything else; 2e-4 as published, in batches of 4 on each of 8 GPUs.
        backbone: Times ``lr``; 0.1 as published, for a pretrained one (whose projection has the full rate there).
        pointing: Times ``lr``, of sampling offsets and reference points; 0.1 as published.
    """
    pointers = {id(p) for p in where_to_look(model)}
    inner = {id(p) for p in model.get_submodule("backbone").parameters()}
    groups: dict[float, list[nn.Parameter]] = {1.0: [], backbone: [], pointing: []}
    for p in model.parameters():
        if p.requires_grad:
            groups[pointing if id(p) in pointers else backbone if id(p) in inner else 1.0].append(p)
    return [{"params": params, "lr": lr * factor} for factor, params in groups.items() if params]


def where_to_look(model: nn.Module) -> Iterable[nn.Parameter]:
    """Sampling offsets and reference points."""
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            yield from module.offsets.parameters()
        elif isinstance(module, PointDecoder):
            yield from module.reference.parameters()


def prepare_finetuning(model: nn.Module, novel: Sequence[int], generator: torch.Generator | None = None) -> None:
    """Make a model that knows the base classes ready for a few shots of all classes.

    Sampling offsets and reference points stay as they are from now on. The rows of novel classes begin anew: in a
    ``MetaDetr`` those of the classifier of codes, in a ``plain_detr`` those of the class head, which so far has learned
    that they are never there. Then train on the balanced k shots of base and novel classes, with the same criterion.

    Args:
        model: A ``MetaDetr`` or ``plain_detr``; changed in place.
        novel: Labels of the new classes.
        generator: Of their new rows.

    Raises:
        UserError: If the model has no such class.
    """
    forget: Callable[[Sequence[int], torch.Generator], None]
    if isinstance(model, MetaDetr):
        classes, forget = model.classes, model.classifier.forget
    else:
        head = model.get_submodule("decoder.class_head")
        assert isinstance(head, nn.Linear)
        classes, forget = head.out_features, partial(begin_anew, head)
    if bad := [label for label in novel if not 0 <= label < classes]:
        raise UserError(f"novel must be classes from 0 to {classes - 1}, got {', '.join(map(str, bad))}")
    for parameter in where_to_look(model):
        parameter.requires_grad_(False)
    forget(novel, generator or torch.Generator().manual_seed(0))


@torch.no_grad()
def begin_anew(head: nn.Linear, rows: Sequence[int], generator: torch.Generator) -> None:
    """Draw rows of a class head as it was made: uniform, with a prior of 1 %."""
    bound = head.in_features**-0.5
    drawn = torch.empty(len(rows), head.in_features).uniform_(-bound, bound, generator=generator)
    head.weight[list(rows)] = drawn.to(head.weight)
    head.bias[list(rows)] = PRIOR


def finetuning_factor(step: int, total: int) -> float:
    """Of the learning rate in fine-tuning: from a tenth up over a tenth of the steps, then a tenth and a hundredth.

    As published: of 500 epochs on COCO, 50 are warm-up and the rate drops after 300 and 450.
    """
    done = step / total
    return min(1.0, 0.1 + 9 * done) * (1.0 if done < 0.6 else 0.1 if done < 0.9 else 0.01)
