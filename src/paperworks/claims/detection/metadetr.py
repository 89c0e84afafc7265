"""With 5 shots of new classes, a detector that asks for several classes at once finds the new ones better than the same
detector fine-tuned without meta-learning and than one that asks for one class at a time, and searches a picture for 20
classes in at most 0.35 times the latter's time.

Pictures of 64x64 with one or two shapes (radius 12 to 20 pixels) on a plain gradient. Six shapes are base classes, with
as many pictures as training takes, and three are novel. Base training has 300 steps, fine-tuning on 5 shots of all nine
classes 100. All arms share backbone, encoder, decoder, queries, losses, AdamW at 1e-3 (half of it in fine-tuning),
weight decay 1e-4 and gradients of norm 1 at most; that novel classes were never there is forgotten before fine-tuning.
A step has 16 pictures, or as many pairs of picture and episode, so that ``finetuned`` sees the most pictures. Nothing
is tuned for an arm. The task was made as easy as it takes for the detector without meta-learning to reach 40 points of
AP50 on base classes (51 with seed 0), before any other arm was trained.

``novel_ap50`` is over 200 pictures that show all classes, with the truth of the novel ones alone, so that false alarms
count; ``base_ap50`` likewise. ``novel_ap50_unadapted`` is that before fine-tuning, when the shots are all that the
detector knows of a novel class. ``detect_ms`` is time a picture for all classes, given their codes; ``detect_20_ms``
for 20, as VOC has them (the codes of these in turn: their values do not matter to the time); on a CPU that of the
process.

``full`` has nine base classes, 900 and 150 steps, 1, 3, 5 and 10 shots (``novel_ap50_1_shots`` …), and controls: one
class at a time with five times the episodes, hence as many pairs of picture and class (``one-by-one-pairs``), or
without task codes; Meta-DETR without the key of the background; and a detector of any object whose finds get the class
of the nearest code.

``--set data=DIR --set novel='["dog", "cat"]'`` trains on pictures of your own in COCO's format (see samdetr for
folders), of which ``--set shots_file=FILE`` names the shots, e.g. one of the public k-shot files; otherwise they are
drawn.

What is known not to hold: that asking for several classes at once is better in itself. After ``full`` (means of five
seeds, 5 shots) Meta-DETR finds novel classes with an AP50 of 0.22, the plain detector with 0.19, and one class at a
time with 0.09 at equal steps, but with 0.39 if it gets as many pairs of picture and class, in 1.7 times the training
time: to tell slots apart takes longer to learn than to answer for one class. With 10 shots the plain detector is ahead
(0.24 and 0.19), and meta-learning knows novel classes nearly as well before fine-tuning as after (0.21). Nor do these
figures say anything about COCO's: the paper's are of pretrained backbones, 60 base classes, and fine-tuning for
hundreds of epochs. For all nine classes of ``quick`` the time is 0.34 times that of one by one: the backbone, which
both run once, takes half of it in so small a detector.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torchvision.ops import box_convert, roi_align
from torchvision.transforms import v2

from paperworks.bench import Gain, Ratio, Run, Settings, claim, scaled
from paperworks.claims.detection.drawing import found
from paperworks.detection import MetaDetr
from paperworks.detection.core import (
    CocoData,
    Detections,
    Detr,
    FewShotSplit,
    Prediction,
    SetCriterion,
    SupportSet,
    Targets,
    check_shots,
    coco_evaluate,
    coco_rows,
    coco_splits,
    coco_targets,
    collated,
    flat_targets,
    keep_categories,
    post_process,
    sample_k_shot,
    to_coco,
)
from paperworks.detection.metadetr import (
    CodeBook,
    EpisodeSampler,
    MetaCriterion,
    finetuning_factor,
    parameter_groups,
    plain_detr,
    prepare_finetuning,
)
from paperworks.detection.metadetr.model import cells_shown
from paperworks.errors import UserError, unknown
from paperworks.nn import keeping_modes
from paperworks.train import Intervention, State
from paperworks.worlds import FLAT_SHAPES, flat_scenes

MAIN = 5
"""Shots of the figures without a number of shots in their name."""
NOVEL = 3
"""Novel classes of the scenes, the last ones."""
PAIRS = 16
"""Pictures of a step, or pairs of picture and episode."""
MOST = 14_400
"""Scenes of base classes; longer trainings see them again."""
MANY = 20
"""Classes of VOC."""
ROUNDS = 5
"""Of which times are medians."""


class MetaDetrSettings(Settings):
    """What the arms share."""

    data: str = Field("scenes", description="scenes that are drawn, or a folder or file in COCO's format")
    novel: tuple[str, ...] = Field((), description="own pictures: names of the novel categories")
    shots_file: str = Field("", description="own pictures: the shots, an annotation file; by default they are drawn")
    longest: int = Field(128, ge=32, description="own pictures: pixels of the longer side")
    base_classes: int = scaled(smoke=5, quick=6, full=9, ge=5, le=9, description="shapes to learn from")
    shots: tuple[int, ...] = scaled(
        smoke=(MAIN,), quick=(MAIN,), full=(1, 3, MAIN, 10), description="instances of each class to learn from"
    )
    test_size: int = scaled(smoke=12, quick=200, full=300, ge=1, description="scenes to measure on")
    base_steps: int = scaled(smoke=4, quick=300, full=900, ge=1, description="steps of training on base classes")
    shot_steps: int = scaled(smoke=2, quick=100, full=150, ge=1, description="steps of fine-tuning on shots")
    slots: int = Field(5, ge=2, description="classes of an episode")
    episodes: int = Field(2, ge=1, le=PAIRS, description="episodes a step")
    lr: float = Field(1e-3, gt=0, description="learning rate; half of it in fine-tuning")
    draws: int = scaled(smoke=2, quick=10, full=20, ge=1, description="shots, some flipped, that make a class's code")
    queries: int = Field(8, ge=1, description="objects that can be found in a picture, or in an episode")
    encoders: int = Field(2, ge=1, description="layers of the encoder")
    decoders: int = Field(2, ge=1, description="layers of the decoder")


Pictures = Sequence[tuple[Tensor, Targets]] | CocoData


@dataclass(frozen=True)
class FewShots:
    """A few-shot task.

    Attributes:
        split: Labels of base and novel classes.
        classes: Names.
        base: Pictures with the objects of base classes.
        shots: Pictures with k objects of each class, by k.
        test: Pictures to measure on.
        truth: Of those, as content of an annotation file.
        category_ids: Of the truth, by class.
    """

    split: FewShotSplit
    classes: tuple[str, ...]
    base: Pictures
    shots: Mapping[int, Pictures]
    test: Pictures
    truth: dict[str, Any]
    category_ids: list[int]

    def measure(self, detections: Sequence[Detections]) -> dict[str, float]:
        """AP and AP50 of novel classes, and AP50 of base classes, on all pictures."""
        rows = coco_rows(detections, [row["id"] for row in self.truth["images"]], self.category_ids)
        novel, base = (
            coco_evaluate(self.truth, rows, category_ids=[self.category_ids[label] for label in labels])
            for labels in (self.split.novel, self.split.base)
        )
        return {"novel_ap50": novel["AP50"], "novel_ap": novel["AP"], "base_ap50": base["AP50"]}

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Sizes of the pictures to measure on."""
        return [(row["height"], row["width"]) for row in self.truth["images"]]


def task(run: Run, settings: MetaDetrSettings) -> FewShots:
    return scenes(run, settings) if settings.data == "scenes" else folder(run, settings)


def scenes(run: Run, settings: MetaDetrSettings) -> FewShots:
    base, every = settings.base_classes, settings.base_classes + NOVEL
    names = tuple(FLAT_SHAPES)[:every]

    def drawn(name: str, count: int, classes: int) -> list[tuple[Tensor, Targets]]:
        seed = int(torch.randint(2**31, (), generator=run.generator(name)))
        made = flat_scenes(count, classes=classes, objects=(1, 2), radius=(12.0, 20.0), noise=0.0, seed=seed)
        return list(zip(made.images, flat_targets(made), strict=True))

    pool, test = drawn("shots", 40 * every, every), drawn("test", settings.test_size, every)
    content = to_coco([target for _, target in pool], names)

    def few(k: int) -> Pictures:
        return [(pool[t.image_id][0], t) for t in coco_targets(sample_k_shot(content, k, run.seed))]

    return FewShots(
        FewShotSplit(tuple(range(base)), tuple(range(base, every))),
        names,
        drawn("base", min(settings.base_steps * PAIRS, MOST), base),
        {k: few(k) for k in settings.shots},
        test,
        to_coco([target for _, target in test], names),
        list(range(1, every + 1)),
    )


def folder(run: Run, settings: MetaDetrSettings) -> FewShots:
    train, test = coco_splits(Path(settings.data).expanduser(), settings.longest, run.seed)
    if not settings.novel:
        raise UserError(f"novel must name categories of {train.name}, e.g. --set 'novel=[\"{train.classes[-1]}\"]'")
    for name in settings.novel:
        if name not in train.classes:
            raise unknown("category", name, train.classes)
    novel = tuple(label for label, name in enumerate(train.classes) if name in settings.novel)
    split = FewShotSplit(tuple(sorted(set(range(len(train.classes))) - set(novel))), novel)
    if len(split.base) < settings.slots:
        raise UserError(f"slots must be at most the {len(split.base)} base classes, got {settings.slots}")
    base_ids, novel_ids = ([train.category_ids[label] for label in labels] for labels in (split.base, split.novel))
    there = {label for target in test.targets for label in target.labels.tolist()}
    for kind, labels in {"base": split.base, "novel": split.novel}.items():
        if not there & set(labels):
            raise UserError(
                f"the pictures of {test.name} to measure on show no {kind} class: give DIR/train and DIR/val"
            )

    def part(content: dict[str, Any]) -> CocoData:
        return CocoData(content, train.folder, settings.longest)

    def few(k: int) -> CocoData:
        if not settings.shots_file:
            return part(sample_k_shot(train.content, k, run.seed))
        chosen = CocoData(settings.shots_file, train.folder, settings.longest)
        if chosen.category_ids != train.category_ids:
            raise UserError(f"{settings.shots_file} and {train.name} differ in their categories")
        check_shots(chosen.content, k, novel_ids)
        measured_on = {row["file_name"] for row in test.rows.values()} if test.folder == train.folder else set[str]()
        if both := sorted(measured_on & {row["file_name"] for row in chosen.rows.values()}):
            what = f"{len(both)} pictures that are measured on, e.g. {both[0]}"
            raise UserError(f"{settings.shots_file} has {what}: give DIR/train and DIR/val")
        return chosen

    base = part(keep_categories(train.content, base_ids))
    shots = {k: few(k) for k in settings.shots}
    return FewShots(split, train.classes, base, shots, test, test.content, test.category_ids)


def batches(pictures: Pictures, size: int, steps: int, generator: torch.Generator) -> DataLoader[Any]:
    """So many batches, of all pictures in turn."""
    rounds = math.ceil(size * steps / len(pictures))
    order = torch.cat([torch.randperm(len(pictures), generator=generator) for _ in range(rounds)])
    return DataLoader(
        pictures,  # type: ignore[arg-type]
        size,
        sampler=order[: size * steps].tolist(),
        collate_fn=collated,
    )


def measured(pictures: Pictures, size: int = 32) -> DataLoader[Any]:
    return DataLoader(pictures, size, collate_fn=collated)  # type: ignore[arg-type]


class Arm:
    """A way to learn: base classes first, then a few shots of all.

    Args:
        run, settings, data: Of the trial.
    """

    episodes = 1

    def __init__(self, run: Run, settings: MetaDetrSettings, data: FewShots) -> None:
        self.run, self.settings, self.data = run, settings, data
        torch.manual_seed(run.seed)
        self.model = self.make({name: getattr(settings, name) for name in ("queries", "encoders", "decoders")})

    @property
    def novel(self) -> Sequence[int]:
        """Classes that begin anew when they are learned."""
        return self.data.split.novel

    def make(self, sizes: dict[str, Any]) -> nn.Module:
        return plain_detr(len(self.data.classes), **sizes)

    def criterion(self) -> nn.Module:
        return SetCriterion()

    def interventions(self, support: Pictures, name: str) -> list[Intervention]:
        return []

    def train(self, name: str, pictures: Pictures, steps: int, lr: float, *eyes: Intervention) -> None:
        size = PAIRS // self.episodes
        loader = batches(pictures, size, steps, self.run.generator(name, "order"))
        factor = finetuning_factor if name.startswith("shots") else step_factor
        trainer = self.run.trainer(
            1, name, interventions=[*self.interventions(pictures, name), *eyes], batch_size=size, clip_norm=1.0
        )
        groups = parameter_groups(self.model, lr, backbone=1.0, pointing=1.0)
        trainer.fit(
            self.model,
            loader,
            loss=self.criterion(),
            optimizer=AdamW(groups, weight_decay=1e-4),
            scheduler=partial(LambdaLR, lr_lambda=partial(factor, total=steps)),
        )

    def adapt(self, k: int, *eyes: Intervention) -> None:
        """Fine-tune on k shots."""
        prepare_finetuning(self.model, self.novel, self.run.generator("novel rows"))
        self.train(f"shots {k}", self.data.shots[k], self.settings.shot_steps, self.settings.lr / 2, *eyes)

    def ready(self, k: int) -> Callable[[Any], Prediction]:
        """What finds all classes in pictures, given k shots of them."""
        return lambda inputs: self.model(inputs)[-1]

    def measure(self, k: int) -> dict[str, float]:
        predict, finds = self.ready(k), list[Detections]()
        device, sizes = next(self.model.parameters()).device, self.data.sizes
        with keeping_modes(self.model), torch.no_grad():
            self.model.eval()
            for (images, pad), targets in measured(self.data.test):
                prediction = predict((images.to(device), pad.to(device)))
                finds += post_process(prediction, sizes[len(finds) : len(finds) + len(targets)])
        return self.data.measure([Detections(each.scores.cpu(), each.labels.cpu(), each.boxes.cpu()) for each in finds])

    def times(self) -> dict[str, float]:
        """Milliseconds a picture."""
        return {"detect_ms": self.milliseconds(self.ready(MAIN))}

    @torch.no_grad()
    def milliseconds(self, predict: Callable[[Any], Prediction]) -> float:
        device = next(self.model.parameters()).device
        (images, pad), _ = next(iter(measured(self.data.test)))
        inputs, times = (images.to(device), pad.to(device)), []
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        with keeping_modes(self.model):
            self.model.eval()
            for _ in range(1 + ROUNDS):
                start = clock()
                predict(inputs)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(clock() - start)
        return 1e3 * statistics.median(times[1:]) / len(images)


class Meta(Arm):
    """Meta-DETR; with one slot, one class at a time.

    Args:
        slots: Classes of an episode; by default those of the settings.
        equal_pairs: Whether there are as many times the episodes as there would be slots.
        background, task_codes: Of ``MetaDetr``.
    """

    def __init__(
        self,
        run: Run,
        settings: MetaDetrSettings,
        data: FewShots,
        *,
        slots: int | None = None,
        equal_pairs: bool = False,
        background: bool = True,
        task_codes: bool = True,
    ) -> None:
        self.slots = slots or settings.slots
        self.variant: dict[str, Any] = {"background": background, "task_codes": task_codes}
        self.more, self.episodes = settings.slots if equal_pairs else 1, settings.episodes
        super().__init__(run, settings, data)

    def make(self, sizes: dict[str, Any]) -> nn.Module:
        return MetaDetr(len(self.data.classes), self.slots, **sizes, **self.variant)

    def criterion(self) -> nn.Module:
        return MetaCriterion()

    def interventions(self, support: Pictures, name: str) -> list[Intervention]:
        seed = int(torch.randint(2**31, (), generator=self.run.generator(name, "episodes")))
        episodes = self.episodes * self.more
        return [EpisodeSampler(SupportSet(support), self.slots, episodes, augment=FLIP, seed=seed)]

    def book(self, k: int) -> CodeBook:
        """Codes of all classes, by k shots."""
        assert isinstance(self.model, MetaDetr)
        generator = self.run.generator("supports", k)
        shots, draws = SupportSet(self.data.shots[k]), self.settings.draws
        return self.model.encode_classes(
            shots, range(len(self.data.classes)), draws=draws, augment=FLIP, generator=generator
        )

    def ready(self, k: int) -> Callable[[Any], Prediction]:
        assert isinstance(self.model, MetaDetr)
        return partial(self.model.predict, book=self.book(k))

    def times(self) -> dict[str, float]:
        assert isinstance(self.model, MetaDetr)
        book = self.book(MAIN)
        rows = [place % len(book) for place in range(MANY)]
        many = CodeBook(tuple(range(MANY)), book.codes[rows], ((),) * MANY, book.fingerprint)
        return super().times() | {"detect_20_ms": self.milliseconds(partial(self.model.predict, book=many))}


class NearestCode(Arm):
    """A detector of any object; what it finds gets the class whose mean shot looks most like it (cosine)."""

    novel = ()

    def make(self, sizes: dict[str, Any]) -> nn.Module:
        return plain_detr(1, **sizes)

    def criterion(self) -> nn.Module:
        return AnyObject()

    def ready(self, k: int) -> Callable[[Any], Prediction]:
        assert isinstance(self.model, Detr)
        model, device, shots = self.model, next(self.model.parameters()).device, self.data.shots[k]
        codes, labels = list[Tensor](), list[int]()
        with keeping_modes(model), torch.no_grad():
            model.eval()
            for (images, pad), targets in measured(shots):
                labels += [label for target in targets for label in target.labels.tolist()]
                boxes = [target.boxes.to(device) for target in targets]
                codes.append(pooled(model, (images.to(device), pad.to(device)), boxes))
        every = F.normalize(torch.cat(codes), dim=1)
        rows = torch.tensor(labels, device=device)
        means = torch.stack([every[rows == label].mean(0) for label in range(len(self.data.classes))])

        def predict(inputs: Any) -> Prediction:
            last = model(inputs)[-1]
            seen = pooled(model, inputs, list(last.boxes)).view(*last.boxes.shape[:2], -1)
            nearest = F.cosine_similarity(seen[:, :, None], means, dim=-1).argmax(-1, keepdim=True)
            logits = torch.full((*last.boxes.shape[:2], len(means)), -math.inf, device=device)
            return Prediction(logits.scatter(2, nearest, last.logits), last.boxes)

        return predict


class AnyObject(SetCriterion):
    """The set loss, for which all objects are of class 0."""

    def forward(self, predictions: Sequence[Prediction], targets: Any) -> Tensor:
        return super().forward(predictions, [replace(t, labels=torch.zeros_like(t.labels)) for t in targets])


def pooled(model: Detr, inputs: Any, boxes: Sequence[Tensor]) -> Tensor:
    """The mean of the encoded features in each box, picture after picture."""
    last = model.memory(inputs)[-1]
    shown = cells_shown(last, inputs[1]).repeat(1, 2)
    corners = [box_convert(some, "cxcywh", "xyxy") * size for some, size in zip(boxes, shown, strict=True)]
    return roi_align(last.as_map(), corners, 7, aligned=True).mean((2, 3))


FLIP = v2.RandomHorizontalFlip()
ARMS: dict[str, Callable[..., Arm]] = {
    "finetuned": Arm,
    "one-by-one": partial(Meta, slots=1),
    "meta-detr": Meta,
    "one-by-one-pairs": partial(Meta, slots=1, equal_pairs=True),
    "no-task-codes": partial(Meta, slots=1, task_codes=False),
    "no-background": partial(Meta, background=False),
    "nearest-code": NearestCode,
}
QUICK = list(ARMS)[:3]


def step_factor(step: int, total: int) -> float:
    """Of the learning rate on base classes: a warm-up of 50 steps, and a tenth after 80 % of them."""
    return min(1.0, (step + 1) / 50) * (0.1 if step >= 0.8 * total else 1.0)


class MeasureAlong(Intervention):
    """Measures along fine-tuning, after each quarter but the last."""

    def __init__(self, arm: Arm) -> None:
        self.arm, self.points = arm, list[list[float]]()

    def on_step_end(self, state: State) -> None:
        if state.step % max(state.total_steps // 4, 1) == 0 and state.step < state.total_steps:
            figures = self.arm.measure(MAIN)
            self.points.append([state.step, figures["novel_ap50"], figures["base_ap50"]])

    def state_dict(self) -> dict[str, Any]:
        return {"points": copy.deepcopy(self.points)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = state_dict["points"]


@claim(
    "metadetr",
    arms={"smoke": list(ARMS), "quick": QUICK, "full": list(ARMS)},
    expects=[
        Gain("novel_ap50", "meta-detr", over="finetuned"),
        Gain("novel_ap50", "meta-detr", over="one-by-one"),
        Ratio("detect_20_ms", "meta-detr", over="one-by-one", at_most=0.35),
    ],
    seeds={"quick": 3, "full": 5},
)
def trial(run: Run, arm: str, settings: MetaDetrSettings) -> dict[str, float]:
    if MAIN not in settings.shots:
        raise UserError(f"shots must have {MAIN} among them, got {', '.join(map(str, settings.shots))}")
    data = task(run, settings)
    run.trainings = 1 + len(settings.shots)
    chosen = ARMS[arm](run, settings, data)
    chosen.train("base", data.base, settings.base_steps, settings.lr)
    base = copy.deepcopy(chosen.model.state_dict())
    figures: dict[str, float] = {}
    if arm != "finetuned":  # which knows nothing of novel classes yet
        before = chosen.measure(MAIN)
        figures |= {"novel_ap50_unadapted": before["novel_ap50"], "base_ap50_unadapted": before["base_ap50"]}
        start = {"novel AP50 in fine-tuning": before["novel_ap50"], "base AP50 in fine-tuning": before["base_ap50"]}
        run.log(0, **start)
    for k in settings.shots:
        chosen.model.load_state_dict(base)
        eyes = MeasureAlong(chosen)
        chosen.adapt(k, *([eyes] if k == MAIN else []))
        after = chosen.measure(k)
        if k == MAIN:
            figures |= after | chosen.times()
            last = [settings.shot_steps, after["novel_ap50"], after["base_ap50"]]
            for step, new, old in [*eyes.points, last]:
                run.log(step, **{"novel AP50 in fine-tuning": new, "base AP50 in fine-tuning": old})
            report(run, chosen)
        if len(settings.shots) > 1:
            run.log(k, **{"novel AP50 by shots": after["novel_ap50"]})
            figures[f"novel_ap50_{k}_shots"] = after["novel_ap50"]
    return figures


def report(run: Run, arm: Arm) -> None:
    """Which instances were the shots; and with seed 0, what is found, and where the classes of an episode are seen."""
    support = SupportSet(arm.data.shots[MAIN])
    keys = {
        arm.data.classes[label]: [support.shot(label, place).key for place in range(support.count(label))]
        for label in support.classes
    }
    run.save("shots", {"picture and annotation of each shot": keys})
    if run.seed == 0:
        run.figure("detections", figure(arm))


@torch.no_grad()
def figure(arm: Arm) -> Figure:
    """Pictures with novel classes, what is there and what was found; of Meta-DETR also its attention to classes."""
    data, novel = arm.data, arm.data.split.novel
    shown = [k for k, target in enumerate(coco_targets(data.truth)) if set(target.labels.tolist()) & set(novel)][:3]
    device, model = next(arm.model.parameters()).device, arm.model
    (images, pad), targets = collated([data.test[k] for k in shown])
    inputs = images.to(device), pad.to(device)
    with keeping_modes(model):
        model.eval()
        prediction = Prediction(*(part.cpu() for part in arm.ready(MAIN)(inputs)))
        attention, valid, episode = attended(arm, inputs) if isinstance(arm, Meta) else (None, [], [])
    columns = 1 + (0 if attention is None else attention.shape[1])
    sheet = Figure(figsize=(1.9 * columns, 2.1 * len(shown)), layout="constrained")
    panels = sheet.subplots(len(shown), columns, squeeze=False)
    for k, target in enumerate(targets):
        rows, cells = (int(n) for n in ((~pad[k]).any(1).sum(), (~pad[k]).any(0).sum()))
        picture = images[k, :, :rows, :cells]
        found(panels[k, 0], picture, target, (prediction.logits[k], prediction.boxes[k]), data.classes)
        if attention is None:
            continue
        labels = [data.classes[label] + (" (new)" if label in novel else "") for label in episode]
        for slot, title in enumerate([*labels, "background"][: attention.shape[1]]):
            axes, (width, height) = panels[k, 1 + slot], valid[k]
            axes.imshow(attention[k, slot, :height, :width], cmap="magma", vmin=0, vmax=1, extent=(0, 1, 1, 0))
            axes.set(xticks=[], yticks=[], aspect=rows / cells)
            axes.set_title(title, fontsize=8)
    panels[0, 0].set_title("found (there: dashed)", fontsize=8)
    return sheet


def attended(arm: Meta, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, list[list[int]], list[int]]:
    """How much each place looks at each class of the last episode, which has the novel ones, and at the background; the
    width and height of each map without padding; and the episode."""
    model, book = arm.model, arm.book(MAIN)
    assert isinstance(model, MetaDetr)
    episode = list(range(len(book)))[-model.slots :]
    seen = model.attend(*inputs)
    _, _, attention = model.aggregate(seen.features, book.codes[None, episode])
    valid = (seen.valid * seen.valid.new_tensor([seen.width, seen.height])).round().int().tolist()
    return attention.mT.unflatten(2, (seen.height, seen.width)).cpu(), valid, episode
