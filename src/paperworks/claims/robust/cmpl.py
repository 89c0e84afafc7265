"""With five labelled clips a class, FixMatch classifies motion at least 8 points better than training on the labelled
clips alone, and CMPL, whose second network is built differently, no worse than FixMatch.

Data are real handwritten digits in motion (`MovingDigits`): 8 motions, 40 labelled and 1,200 unlabelled clips, tested
on 600 clips of other digits; or a folder of your videos. Every seed draws all of it anew, and all arms of a seed share
it, the primary network's start and the settings; nothing is tuned for any arm. The speed of the digits was set before
CMPL was measured: such that the supervised arm gets two thirds right.

``pseudo-label`` is FixMatch without any augmentation, which confirms its own mistakes; ``cmpl-same`` has a second
network of the same build. ``fixmatch-longer`` is FixMatch with as many more steps as pay for the second network's
arithmetic: nearly twice as many here, where that network is deep rather than cheap. ``accuracy`` is that of the
primary network alone, ``ensemble_accuracy`` that of both.

What is known not to hold: at equal compute the gain is gone, as the longer FixMatch is more accurate than CMPL. With
two labelled clips a class instead of five (``few_accuracy``) confident labels are often wrong and two networks come to
agree on errors: seeds range from chance to useful for either method. Nor is there a gain to be expected for clips of
contradictory cues (``--set cue_error=0.25``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.classification import MulticlassAccuracy

from paperworks.bench import Gain, Run, Settings, claim, scaled
from paperworks.data import few_label, locate, split
from paperworks.data.moving_digits import MOTIONS, MovingDigits, bundled_digits
from paperworks.data.video import Sampling, VideoSet, video_folder
from paperworks.nn.resnet3d import resnet3d
from paperworks.robust.cmpl import (
    CMPL,
    ClipAugment,
    Cutout,
    RandomContrast,
    RandomFlip,
    RandomInvert,
    RandomNoise,
    RandomResizedCrop,
    RandomShift,
    cross_pseudo_label_loss,
)
from paperworks.train import Intervention, State

POINTS = 10  # of each curve
PROBED = 500  # unlabelled clips on which pseudo-labels are compared with the truth
IN_MEMORY = 4 * 2**30  # bytes of clips that are decoded once; more are decoded whenever they are used


class CMPLSettings(Settings):
    """What the arms share."""

    data: str = Field("moving-digits", description="moving-digits, or a folder of <class>/<video or frames>")
    per_class: int = Field(5, ge=1, description="labelled clips a class")
    few_per_class: int = Field(2, ge=1, description="labelled clips a class for few_accuracy")
    unlabelled: int = scaled(smoke=96, quick=1200, full=3000, ge=1, description="unlabelled moving digits")
    test: int = scaled(smoke=96, quick=600, full=1200, ge=1, description="moving digits to test on")
    motions: int = scaled(smoke=8, quick=8, full=12, ge=2, le=len(MOTIONS), description="classes of moving digits")
    cue_error: float | None = Field(None, ge=0, lt=1, description="digit and motion are cues wrong this often")
    frames: int = scaled(smoke=6, quick=6, full=8, ge=2, description="frames of a clip")
    stride: int = Field(8, ge=1, description="frames of a video from one of a clip to the next")
    size: int = scaled(smoke=12, quick=12, full=24, ge=4, description="height and width in pixels")
    flip: bool = Field(False, description="mirror your clips: only where classes do not tell left from right")
    network: Literal["plain", "resnet"] = scaled(
        smoke="plain", quick="plain", full="resnet", description="three convolutions, or ResNet-10; the other is deeper"
    )
    width: int = scaled(smoke=8, quick=8, full=16, ge=1, description="channels of the primary network")
    auxiliary_width: int = scaled(smoke=4, quick=4, full=6, ge=1, description="channels of the other network")
    steps: int = scaled(smoke=10, quick=400, full=3000, ge=1, description="steps of the optimizer")
    batch_size: int = Field(16, ge=2, description="labelled clips a step")
    ratio: int = Field(3, ge=1, description="unlabelled clips for each labelled one in a step")
    lr: float = Field(0.05, gt=0, description="largest learning rate")
    threshold: float = Field(0.8, ge=0, le=1, description="smallest confidence of a pseudo-label")
    unlabelled_weight: float = Field(1.0, ge=0, description="weight of the unlabelled loss")


ARMS = ("supervised", "pseudo-label", "fixmatch", "fixmatch-longer", "cmpl-same", "cmpl")
SMALL = ClipAugment(
    weak_transforms=[RandomShift(1)],
    strong_transforms=[RandomContrast(), RandomInvert(), RandomNoise(), Cutout()],
)
NONE = ClipAugment(weak_transforms=(), strong_transforms=())


@dataclass(frozen=True)
class Data:
    """Labelled clips, clips without labels, and those to test on; ``truth`` is for figures alone."""

    labelled: TensorDataset
    unlabelled: Tensor | Dataset[Tensor]
    truth: Tensor
    test: Dataset[Any]
    classes: tuple[str, ...]
    augment: ClipAugment

    @property
    def clip(self) -> Tensor:
        return self.labelled.tensors[0][0]

    def probe(self) -> tuple[Tensor, Tensor]:
        """Some unlabelled clips with their true labels."""
        count = min(PROBED, len(self.truth))
        return torch.stack([self.unlabelled[row] for row in range(count)]), self.truth[:count]


def read(run: Run, settings: CMPLSettings, per_class: int) -> Data:
    if settings.data == "moving-digits":
        return moving_digits(run, settings, per_class)
    return videos(run, settings, per_class)


def moving_digits(run: Run, settings: CMPLSettings, per_class: int) -> Data:
    digits = bundled_digits()
    make = partial(
        MovingDigits,
        MOTIONS[: settings.motions],
        frames=settings.frames,
        size=settings.size,
        cue_error=settings.cue_error,
    )
    seen = make(digits=digits.subset(range(1200)))
    clips = seen.sample(settings.motions * max(per_class, settings.per_class) + settings.unlabelled, 2 * run.seed)
    test = make(digits=digits.subset(range(1200, len(digits)))).sample(settings.test, 2 * run.seed + 1)
    few, rest = draw_labelled(run, clips.targets, clips.classes, per_class)
    rest = rest[: settings.unlabelled]
    return Data(
        TensorDataset(clips.inputs[few], clips.targets[few]),
        clips.inputs[rest],
        clips.targets[rest],
        test.dataset(),
        clips.classes,
        SMALL,
    )


def draw_labelled(run: Run, labels: Tensor, classes: tuple[str, ...], per_class: int) -> tuple[Tensor, Tensor]:
    return few_label(labels, run.generator("labels"), per_class=per_class, classes=classes)


def videos(run: Run, settings: CMPLSettings, per_class: int) -> Data:
    path = locate(settings.data, run.data_root, how="Give moving-digits, or a folder of <class>/<video or frames>.")
    sampling = Sampling(settings.frames, settings.stride, settings.size)
    if (path / "test").is_dir():
        train, test = video_folder(path, "train", sampling), video_folder(path, "test", sampling)
    else:
        whole = video_folder(path, "all", sampling)
        train, test = (whole.subset(rows) for rows in split(whole.labels, (0.8, 0.2), seed=run.seed))
    few, rest = draw_labelled(run, train.labels, train.classes, per_class)
    hidden = train.subset(rest)
    flip = (RandomFlip(),) if settings.flip else ()
    return Data(
        train.subset(few).load().dataset(),
        hidden.load().inputs if fits(hidden) else hidden.unlabelled(),
        hidden.targets,
        test.load().dataset() if fits(test) else test,
        train.classes,
        ClipAugment(weak_transforms=(RandomResizedCrop(), *flip)),
    )


def fits(data: VideoSet) -> bool:
    sampling = data.sampling
    return len(data) * 3 * sampling.frames * sampling.size**2 * 4 <= IN_MEMORY


def plain(width: int, classes: int, channels: int, extra: int = 0) -> nn.Module:
    """Three 3x3x3 convolutions that each halve the frame, and ``extra`` more after each that do not."""
    layers: list[nn.Module] = []
    for stage in range(3):
        for repeat in range(1 + extra):
            stride, outputs = (1, 2, 2) if repeat == 0 else 1, width * 2**stage
            layers += [nn.Conv3d(channels, outputs, 3, stride, 1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU(True)]
            channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(channels, classes))


def networks(settings: CMPLSettings, arm: str, data: Data, seed: int) -> tuple[nn.Module, nn.Module | None]:
    """The primary network, of the same start in every arm, and the arm's second one."""
    channels, classes = len(data.clip), len(data.classes)

    def build(width: int, deeper: bool) -> nn.Module:
        if settings.network == "plain":
            model = plain(width, classes, channels, extra=int(deeper))
        else:
            model = resnet3d(18 if deeper else 10, width, classes, in_channels=channels)
        return model.to(memory_format=torch.channels_last_3d)  # a tenth faster

    torch.manual_seed(seed)
    primary = build(settings.width, False)
    torch.manual_seed(seed + 1_000_000)
    if arm == "cmpl-same":
        return primary, build(settings.width, False)
    # ``fixmatch-longer`` needs it for its arithmetic.
    return primary, build(settings.auxiliary_width, True) if arm in ("cmpl", "fixmatch-longer") else None


@torch.no_grad()
def arithmetic(model: nn.Module, clip: Tensor) -> int:
    """Operations of a forward pass."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(clip[None])
    model.train()
    return counter.get_total_flops()


class WeakViews(Intervention):
    """What CMPL does to labelled clips, for the arm that has only those."""

    def __init__(self, augment: ClipAugment, generator: torch.Generator) -> None:
        self.augment, self.generator = augment, generator

    def on_batch(self, state: State) -> None:
        state.inputs = self.augment.weak(state.inputs, self.generator)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generator.set_state(state_dict["generator"])


class Precision(Intervention):
    """Records how many of the pseudo-labels that each network would give are right; training never learns it."""

    def __init__(self, models: Sequence[nn.Module], clips: Tensor, truth: Tensor, threshold: float) -> None:
        self.models, self.clips, self.truth, self.threshold = models, clips, truth, threshold

    def on_epoch_end(self, state: State) -> None:
        logits = [predict(model, self.clips) for model in self.models]
        _, stats = cross_pseudo_label_loss(logits, logits, self.threshold, truth=self.truth)
        assert stats.precision is not None
        for name, value in zip(("precision", "auxiliary_precision"), stats.precision.tolist(), strict=False):
            if value == value:  # no label, no precision
                state.logs[name] = value


@torch.no_grad()
def predict(model: nn.Module, clips: Tensor) -> Tensor:
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    logits = torch.cat([model(part.to(device)).cpu() for part in torch.split(clips, 256)])
    model.train(was_training)
    return logits


def fit(run: Run, arm: str, settings: CMPLSettings, data: Data, name: str) -> dict[str, float]:
    """Train one arm and measure it; curves are logged for ``name`` "train" alone."""
    primary, second = networks(settings, arm, data, run.seed)
    steps = settings.steps
    if arm == "fixmatch-longer" and second is not None:
        steps = round(steps * (1 + arithmetic(second, data.clip) / arithmetic(primary, data.clip)))
        second = None
    interventions: list[Intervention] = [WeakViews(data.augment, run.generator(name, "views"))]
    if arm != "supervised":
        method = CMPL(
            second,
            data.unlabelled,
            batch_size=min(settings.ratio * settings.batch_size, len(data.truth)),
            augment=NONE if arm == "pseudo-label" else data.augment,
            threshold=settings.threshold,
            unlabelled_weight=settings.unlabelled_weight,
            seed=run.seed,
        )
        interventions = [method]
    models = [primary] if second is None else [primary, second]
    # Few clips make short epochs: they are taken again and again until an epoch is a point of the curves.
    per_epoch = max(1, steps // POINTS)
    rows = torch.arange(per_epoch * settings.batch_size) % len(data.labelled)
    epochs = max(1, round(steps / per_epoch))
    curves = name == "train"
    if curves:
        interventions.append(Precision(models, *data.probe(), settings.threshold))
    test = DataLoader(data.test, batch_size=200)
    trainer = run.trainer(
        epochs,
        name,
        interventions=interventions,
        batch_size=settings.batch_size,
        eval_every=1 if curves else epochs,
        metrics={"accuracy": MulticlassAccuracy(len(data.classes), average="micro")},
    )
    history = trainer.fit(
        primary,
        TensorDataset(*(tensor[rows] for tensor in data.labelled.tensors)),
        test,
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(SGD, lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=1e-3),
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: cos(7 * pi * step / (16 * steps))),
    )
    figures = {"accuracy": history.last["eval/accuracy"]}
    if second is not None:
        figures["auxiliary_accuracy"] = trainer.evaluate(second, test)["eval/accuracy"]
        figures["ensemble_accuracy"] = trainer.evaluate(Ensemble(models), test)["eval/accuracy"]
    if arm != "supervised":
        figures["mask_rate"] = history.last["mask_rate"]
    figures["precision"] = history.last.get("precision", 0.0)
    if curves:
        for point, row in enumerate(history, 1):
            points = {"test accuracy": row["eval/accuracy"]}
            for who, prefix in (("primary", ""), ("auxiliary", "auxiliary_")):
                for what, key in (("share of clips labelled", "mask_rate"), ("precision of labels", "precision")):
                    if prefix + key in row:
                        points[f"{what} ({who})"] = row[prefix + key]
            run.log(point * per_epoch, **points)
    return figures


class Ensemble(nn.Module):
    """Mean of the networks' probabilities."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, clips: Tensor) -> Tensor:
        return torch.stack([model(clips).softmax(1) for model in self.models]).mean(0)


@claim(
    "cmpl",
    arms=ARMS,
    expects=[
        Gain("accuracy", "fixmatch", over="supervised", at_least=0.08),
        Gain("accuracy", "cmpl", over="fixmatch"),
    ],
)
def trial(run: Run, arm: str, settings: CMPLSettings) -> dict[str, float]:
    data = read(run, settings, settings.per_class)
    with_few = arm in ("fixmatch", "cmpl")
    run.trainings = 1 + with_few
    figures = fit(run, arm, settings, data, "train")
    if with_few:
        few = read(run, settings, settings.few_per_class)
        figures["few_accuracy"] = fit(run, arm, settings, few, "few")["accuracy"]
    if run.seed == 0 and arm == "cmpl":
        run.figure("clips", draw(data, run.generator("figure")))
    return figures


def draw(data: Data, generator: torch.Generator) -> Figure:
    """A clip of each class, and a weak and a strong view of it."""
    clips, targets = data.labelled.tensors
    first = [int((targets == k).nonzero()[0]) for k in range(len(data.classes))][:12]
    chosen = clips[first]
    rows = [chosen, data.augment.weak(chosen, generator), data.augment.strong(chosen, generator)]
    frames = clips.shape[2]
    figure = Figure(figsize=(0.55 * frames * 3 + 1, 0.6 * len(first)))
    axes = figure.subplots(len(first), frames * 3, squeeze=False)
    for row, k in enumerate(first):
        for view, name in enumerate(("clip", "weak view", "strong view")):
            for frame in range(frames):
                axis = axes[row][view * frames + frame]
                axis.imshow(rows[view][row, :, frame].permute(1, 2, 0).squeeze(2), cmap="gray", vmin=0, vmax=1)
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_visible(False)
            if row == 0:
                axes[0][view * frames].set_title(name, fontsize=8, loc="left")
        label = data.classes[int(targets[k])]
        axes[row][0].set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
    return figure
