"""One technique for each class of data redundancy is faster than the dense model at the accuracy stated, and none loses
more than its random twin: pruning half of a vision transformer's tokens (3 points ahead of random ones), a resolution
cascade, deep reuse in a wide layer, skipping empty tiles, key frames, delta inference, a k-centre subset and a cache;
token merging and channel gating are measured too, but not worth it at this size.

Networks of seconds are trained on digits: a small convolutional one, a vision transformer on patches of 2x2, one with a
wide layer, a bias-free one that sees digits on empty canvases, and one that classifies the frames of a video, in which
digits move and rest before a textured wall and a static camera. Each technique works on the dense network that it is
compared with; reuse and gates are learned in a few more passes, of which the dense network gets as many. Thresholds are
chosen on validation data or another clip, never on test data.

``lost`` is the dense model's accuracy on test data less the technique's, ``over_twin`` the technique's less that of its
random twin: as many tokens, channels or examples drawn at random, random images escalated, random key frames. Exact
techniques (tiles, delta, cache) have no twin; their ``agreement`` with the dense model's decisions is 1. ``flops`` are
counted while the technique runs, over the dense model's. ``speedup`` is the median ratio of times in interleaved
rounds, CPU time of one thread on a CPU, of the whole network; ``layer_speedup`` is that of its widest convolution.
For the subset it is that of training. The arm ``small`` is the honest competitor: networks of about half the FLOPs.

What is known not to hold: on maps of 8x8 and in layers of a few dozen channels, gathering and scattering cost more than
gates and merged tokens save on a CPU, so that they are arms without a bar on speed. And a transformer as small as this
gathers what it needs in its first layer: whichever half of the tokens is dropped after it, hardly a point is lost, and
selection cannot be 3 points ahead of chance.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset

from paperworks.bench import Bound, Run, Task, claim, scaled
from paperworks.claims.images import ImageSettings
from paperworks.data import LabelledData, split
from paperworks.efficient import (
    CachedModel,
    ChannelGate,
    DeltaConv2d,
    DeltaSession,
    KeyFrameRunner,
    ResolutionCascade,
    ReuseConv2d,
    TileSkipConv2d,
    TokenMerger,
    TokenPruner,
    gate_channels,
    k_center,
    measure_tradeoff,
    replace_layers,
)
from paperworks.efficient.redundancy.keyframes import key_frames
from paperworks.nn.backbones import ConvNet
from paperworks.train import Intervention

Predict = Callable[[Tensor], Tensor]
SCENE = 6
"""Frames in which one image is shown."""
Figures = dict[str, float]


class RedundancySettings(ImageSettings):
    """What the arms share."""

    data: str = scaled(smoke="digits", quick="digits", full="cifar10", description="images: a name or folder")
    sizes: tuple[int, int, int] = scaled(
        smoke=(200, 100, 100),
        quick=(997, 300, 500),
        full=(2_000, 500, 1_000),
        description="examples for training, validation and test",
    )
    widths: tuple[int, int, int] = scaled(
        smoke=(8, 16, 16), quick=(32, 64, 64), full=(32, 64, 128), description="channels of the convolutional network"
    )
    wide: int = scaled(smoke=128, quick=512, full=512, ge=1, description="channels of the layer with reuse")
    bits: int = Field(12, ge=0, le=62, description="bits of a signature")
    patch: int = scaled(smoke=2, quick=2, full=4, ge=1, description="side of the transformer's patches")
    dim: int = scaled(smoke=32, quick=64, full=96, ge=4, description="width of the transformer")
    keep: tuple[float, ...] = Field((0.7, 0.45, 0.3, 0.2), description="share of tokens after each layer, as pruned")
    merged: int = scaled(smoke=3, quick=3, full=10, ge=0, description="pairs of tokens merged a layer")
    density: float = Field(0.5, gt=0, le=1, description="share of channels that gates keep")
    part: float = Field(0.3, gt=0, lt=1, description="share of the examples in a subset")
    frame: int = scaled(smoke=32, quick=96, full=128, ge=24, description="side of a video frame, and of a canvas")
    frames: int = scaled(smoke=12, quick=60, full=200, ge=4, description="frames of a video")
    epochs: int = scaled(
        smoke=2,
        quick=10,
        full=10,
        ge=2,
        description="passes over the training data; half for all but the first network",
    )
    transformer_epochs: int = scaled(smoke=1, quick=15, full=20, ge=1, description="passes of the transformer")
    fine_tuning: int = scaled(smoke=1, quick=3, full=3, ge=1, description="passes with reuse or gates")
    batch_size: int = scaled(smoke=32, quick=32, full=64, ge=2, description="examples a step")
    lr: float = Field(3e-3, gt=0, description="largest learning rate of AdamW, in one cycle")
    rounds: int = scaled(smoke=2, quick=3, full=9, ge=1, description="times everything is timed")


class Images:
    """The three parts of the data."""

    def __init__(self, run: Run, settings: RedundancySettings) -> None:
        data = settings.images(run, limit=sum(settings.sizes), seed=run.seed)
        self.train, self.valid, self.test = (data.subset(part) for part in split(data, settings.sizes, run.seed))
        self.channels, self.side = data.inputs.shape[1:3]
        self.classes = data.num_classes


class VisionTransformer(nn.Module):
    """Patches, a CLS token and an encoder."""

    def __init__(self, images: Images, patch: int, dim: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(images.channels, dim, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.places = nn.Parameter(0.02 * torch.randn(1, (images.side // patch) ** 2 + 1, dim))
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder: nn.Module = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, images.classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], dim=1) + self.places
        return self.head(self.encoder(tokens)[:, 0])


class Brightest(nn.Module):
    """Convolutions, the largest value of each feature on the map, and a linear layer: sees one thing anywhere."""

    def __init__(self, images: Images, widths: Sequence[int], bias: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = images.channels
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=bias), nn.ReLU()]
            before = width
        self.body, self.head = nn.Sequential(*layers), nn.Linear(before, images.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).amax((2, 3)))


# Training.


def fit(
    run: Run,
    settings: RedundancySettings,
    name: str,
    make: Callable[[], nn.Module] | nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    epochs: int | None = None,
    interventions: Sequence[Intervention] = (),
) -> nn.Module:
    """Train a network, the same start for all arms, or a copy of one for a few more passes."""
    torch.manual_seed(run.seed)
    model = copy.deepcopy(make) if isinstance(make, nn.Module) else make()
    lr = settings.lr / 3 if isinstance(make, nn.Module) else settings.lr
    epochs = epochs or (settings.fine_tuning if isinstance(make, nn.Module) else settings.epochs)
    size = min(settings.batch_size, len(inputs))
    trainer = run.trainer(epochs, name, batch_size=size, drop_last=True, interventions=interventions)
    trainer.fit(
        model,
        TensorDataset(inputs, targets),
        loss=F.cross_entropy,
        optimizer=partial(AdamW, lr=lr, weight_decay=0.01),
        scheduler=lambda optimizer: OneCycleLR(optimizer, lr, total_steps=epochs * (len(inputs) // size) + 1),
    )
    return model.eval()


def convnet(images: Images, widths: Sequence[int]) -> nn.Module:
    return ConvNet(images.channels, images.classes, widths, (1, 1, 2)[: len(widths)])


def dense_convnet(run: Run, settings: RedundancySettings, images: Images) -> nn.Module:
    make = partial(convnet, images, settings.widths)
    return fit(run, settings, "convnet", make, images.train.inputs, images.train.targets)


def dense_transformer(run: Run, settings: RedundancySettings, images: Images, layers: int = 4) -> nn.Module:
    make = partial(VisionTransformer, images, settings.patch, settings.dim, layers)
    train, epochs = images.train, settings.transformer_epochs
    return fit(run, settings, "transformer", make, train.inputs, train.targets, epochs=epochs)


# Measuring.


@torch.no_grad()
def answers(predict: Predict, inputs: Tensor, batch_size: int = 128) -> Tensor:
    return torch.cat([predict(batch).argmax(1) for batch in torch.split(inputs, batch_size)])


def accuracy(found: Tensor, targets: Tensor) -> float:
    return float((found == targets.to(found.device)).float().mean())


def seconds(run: Run, function: Callable[[], object]) -> float:
    if run.device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if run.device == "cuda" else time.process_time
    begun = clock()
    with torch.no_grad():
        function()
    if run.device == "cuda":
        torch.cuda.synchronize()
    return clock() - begun


def speedup(run: Run, settings: RedundancySettings, dense: Callable[[], object], ours: Callable[[], object]) -> float:
    """The median over rounds of the ratio within a round, after one call to warm up."""
    seconds(run, dense), seconds(run, ours)
    return statistics.median(seconds(run, dense) / seconds(run, ours) for _ in range(settings.rounds))


def beside(
    run: Run,
    settings: RedundancySettings,
    dense: nn.Module,
    technique: Callable[[nn.Module, Any], Predict],
    test: LabelledData,
    knob: Any,
    more: Sequence[Any] = (),
    batch_size: int = 128,
) -> Figures:
    """A technique at one setting beside the dense model; the curve over more settings goes into the report."""
    inputs, targets = test.inputs.to(run.device), test.targets.to(run.device)
    knobs = [*more, knob] if run.seed == 0 else [knob]
    table = measure_tradeoff(technique, dense, (inputs, targets), knobs, batch_size=batch_size, rounds=1)
    if len(knobs) > 1:
        run.figure("accuracy and cost", curve(table))
    full, ours = table.iloc[0], table.iloc[-1]
    predict, batches = technique(copy.deepcopy(dense), knob), torch.split(inputs, batch_size)
    gain = speedup(run, settings, lambda: [dense(b) for b in batches], lambda: [predict(b) for b in batches])
    return {
        "accuracy": float(ours.accuracy),
        "lost": float(full.accuracy - ours.accuracy),
        "agreement": float(ours.agreement),
        "flops": float(ours.flops / full.flops),
        "speedup": gain,
    }


def curve(table: Any) -> Figure:
    """Accuracy against cost, knob by knob."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes, cost = figure.subplots(), table.flops / table.flops.iloc[0]
    order = cost.sort_values().index
    axes.plot(cost[order], table.accuracy[order], "o-", color="#3465c0", linewidth=1)
    for share, right, knob in zip(cost, table.accuracy, table.knob, strict=True):
        label = "dense" if knob is None or knob != knob else f"{knob:.3g}" if isinstance(knob, float) else str(knob)
        axes.annotate(label, (share, right), fontsize=7, xytext=(3, 4), textcoords="offset points")
    axes.set_xlabel("FLOPs over those of the dense model")
    axes.set_ylabel("test accuracy")
    best = table.accuracy.max()
    axes.set_ylim(min(table.accuracy.min(), best - 0.1) - 0.01, best + 0.01)  # a tenth at least: no drama of noise
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# The techniques, class by class.


def dense(run: Run, settings: RedundancySettings, images: Images) -> Figures:
    """The network that most techniques work on, beside itself."""
    model = dense_convnet(run, settings, images)
    return beside(run, settings, model, lambda model, _: model, images.test, None)


def small(run: Run, settings: RedundancySettings, images: Images) -> Figures:
    """Networks of about half the FLOPs, which any technique has to beat."""
    run.trainings = 2
    widths = [round(width * 0.7) for width in settings.widths]
    model = fit(run, settings, "small", partial(convnet, images, widths), images.train.inputs, images.train.targets)
    transformer = dense_transformer(run, settings, images, layers=2)
    test = images.test.inputs.to(run.device)
    whole = convnet(images, settings.widths).to(run.device).eval()
    return {
        "accuracy": accuracy(answers(model, test), images.test.targets),
        "transformer_accuracy": accuracy(answers(transformer, test), images.test.targets),
        "speedup": speedup(run, settings, lambda: answers(whole, test), lambda: answers(model, test)),
    }


def cascade(run: Run, settings: RedundancySettings, images: Images) -> Figures:
    run.trainings = 2
    full, train = dense_convnet(run, settings, images), images.train
    reduce = ResolutionCascade(full, full).reduce
    make = partial(convnet, images, [width // 2 for width in settings.widths[:2]])
    low = fit(run, settings, "low", make, reduce(train.inputs), train.targets)
    both = ResolutionCascade(low, full).eval()
    valid = images.valid.inputs.to(run.device)
    threshold = both.calibrate(valid, images.valid.targets.to(run.device))

    def technique(model: nn.Module, threshold: float) -> Predict:
        return ResolutionCascade(low, model, threshold=threshold).eval()

    figures = beside(run, settings, full, technique, images.test, threshold, (0.5, 0.7, 0.9, 0.99, 0.999))
    test = images.test.inputs.to(run.device)
    both(test)
    ends = [accuracy(answers(model, x), images.test.targets) for model, x in ((low, reduce(test)), (full, test))]
    twin = (1 - both.escalated) * ends[0] + both.escalated * ends[1]  # of as many images drawn at random, on average
    return figures | {"over_twin": figures["accuracy"] - twin, "escalated": both.escalated}


def reuse(run: Run, settings: RedundancySettings, images: Images) -> Figures:
    run.trainings = 3
    train = images.train
    make = partial(ConvNet, images.channels, images.classes, (settings.widths[0], settings.wide), (1, 1))
    first = fit(run, settings, "wide", make, train.inputs, train.targets, epochs=settings.epochs // 2)
    model = fit(run, settings, "dense", first, train.inputs, train.targets)
    replace_layers(first, ["body.1.0"], partial(ReuseConv2d.from_layer, bits=settings.bits, auto=False))
    ours = fit(run, settings, "reuse", first, train.inputs, train.targets)
    figures = beside(run, settings, model, lambda *_: ours, images.test, settings.bits)
    layer = ours.get_submodule("body.1.0")
    assert isinstance(layer, ReuseConv2d)
    with torch.no_grad():
        maps = ours.get_submodule("body.0")(images.test.inputs[:128].to(run.device))
    figures["layer_speedup"] = speedup(run, settings, lambda: layer.layer(maps), lambda: layer(maps))
    return figures | {"cluster_ratio": layer.cluster_ratio}


def tiles(run: Run, settings: RedundancySettings, images: Images) -> Figures:
    # What three convolutions see of a digit on an empty canvas is what they see of it with three pixels around.
    make = partial(Brightest, images, settings.widths, bias=False)
    padded = F.pad(images.train.inputs, (3, 3, 3, 3))
    model = fit(run, settings, "canvas", make, padded, images.train.targets, epochs=settings.epochs // 2)
    canvases = on_canvas(run, settings, images.test.subset(range(min(32, len(images.test)))))

    def technique(model: nn.Module, tile: int) -> Predict:
        replace_layers(model, ["body.0", "body.2", "body.4"], partial(TileSkipConv2d, tile=tile))
        return model

    return beside(run, settings, model, technique, canvases, 8, (4, 16), batch_size=4)


def on_canvas(run: Run, settings: RedundancySettings, data: LabelledData) -> LabelledData:
    """Images at random places of large empty ones."""
    n, channels, height, width = data.inputs.shape
    side = max(settings.frame, 2 * height)
    canvas = torch.zeros(n, channels, side, side)
    places = torch.randint(3, side - max(height, width) - 2, (n, 2), generator=run.generator("places"))
    for row, (y, x) in enumerate(places.tolist()):
        canvas[row, :, y : y + height, x : x + width] = data.inputs[row]
    return LabelledData(canvas, data.targets, data.classes, data.name)


def wall(run: Run, channels: int, side: int) -> Tensor:
    """A texture of three wavelengths, from 0 to 0.4."""
    generator, texture = run.generator("wall"), torch.zeros(1, channels, side, side)
    for scale in (2, 4, 8):
        noise = torch.rand(1, channels, side // scale + 1, side // scale + 1, generator=generator)
        texture += F.interpolate(noise, (side, side), mode="bilinear") / 3
    return 0.4 * texture


def video(run: Run, settings: RedundancySettings, data: LabelledData, name: str) -> tuple[Tensor, Tensor]:
    """A clip in which one image after another moves for half a scene, then rests; a static camera without noise."""
    generator, (channels, height, width) = run.generator("video", name), data.inputs.shape[1:]
    side = max(settings.frame, 2 * height)
    background = wall(run, channels, side)[0]
    frames, labels, shown, y, x = [], [], 0, 0, 0
    for number in range(settings.frames):
        if number % SCENE == 0:
            shown = int(torch.randint(len(data), (), generator=generator))
            y, x = torch.randint(4, side - max(height, width) - 4, (2,), generator=generator).tolist()
        elif number % SCENE < SCENE // 2:
            step = torch.randint(-2, 3, (2,), generator=generator).tolist()
            y, x = min(max(y + step[0], 0), side - height), min(max(x + step[1], 0), side - width)
        frame = background.clone()
        area = frame[:, y : y + height, x : x + width]
        torch.maximum(area, data.inputs[shown], out=area)
        frames.append(frame)
        labels.append(int(data.targets[shown]))
    return torch.stack(frames).to(run.device), torch.tensor(labels)


def video_network(run: Run, settings: RedundancySettings, images: Images) -> nn.Module:
    """Trained on images before pieces of the wall."""
    inputs, generator = images.train.inputs, run.generator("pieces")
    n, channels, height, width = inputs.shape
    side = max(settings.frame, 2 * height)
    background = wall(run, channels, side)[0]
    corners = torch.randint(side - max(height, width) - 8, (n, 2), generator=generator).tolist()
    shifts = torch.randint(9, (n, 2), generator=generator).tolist()
    pieces = torch.stack([background[:, y : y + height + 8, x : x + width + 8] for y, x in corners])
    for piece, image, (y, x) in zip(pieces, inputs, shifts, strict=True):
        area = piece[:, y : y + height, x : x + width]
        torch.maximum(area, image, out=area)
    widths = (settings.widths[0], settings.widths[1], 2 * settings.widths[1])
    make = partial(Brightest, images, widths, bias=True)
    return fit(run, settings, "video", make, pieces, images.train.targets, epochs=settings.epochs // 2)


def keyframes(run: Run, settings: RedundancySettings, images: Images) -> Figures:
    model = video_network(run, settings, images)
    runner = KeyFrameRunner(model)
    tau = runner.calibrate(video(run, settings, images.valid, "calibration")[0])
    clip, labels = video(run, settings, images.test, "test")
    found = answers(model, clip, 1)
    keys = torch.tensor(key_frames(clip, tau))
    ours = found[keys]

    def watch() -> None:
        runner.reset()
        for frame in clip:
            runner(frame[None])

    gain = speedup(run, settings, lambda: [model(frame[None]) for frame in clip], watch)
    number = len(set(keys.tolist()))
    drawn = torch.randperm(len(clip) - 1, generator=run.generator("twin"))[: number - 1] + 1
    random_keys = torch.zeros(len(clip), dtype=torch.int64)
    random_keys[drawn] = drawn
    twin = accuracy(found[random_keys.cummax(0).values], labels)
    return {
        "accuracy": accuracy(ours, labels),
        "lost": accuracy(found, labels) - accuracy(ours, labels),
        "agreement": accuracy(ours, found),
        "flops": number / len(clip),
        "speedup": gain,
        "over_twin": accuracy(ours, labels) - twin,
    }


def delta(run: Run, settings: RedundancySettings, images: Images) -> Figures:
    model = video_network(run, settings, images)
    clip, labels = video(run, settings, images.test, "test")
    with torch.no_grad():
        outputs = torch.cat([model(frame[None]) for frame in clip])
    ours, shares = [], []
    second = copy.deepcopy(model)
    with DeltaSession(second, tau=0.0) as session:
        for frame in clip:
            ours.append(session(frame[None]))
            shares.append(session.recomputed)

        def watch() -> None:
            session.reset()
            for frame in clip:
                session(frame[None])

        gain = speedup(run, settings, lambda: [model(frame[None]) for frame in clip], watch)
    changed = (clip[1:] != clip[:-1]).any(1).float().mean()
    body, layer = model.get_submodule("body"), DeltaConv2d(model.get_submodule("body.4"))  # type: ignore[arg-type]
    assert isinstance(body, nn.Sequential)
    with torch.no_grad():
        maps = [body[:4](frame[None]) for frame in clip[: 3 * SCENE]]
    layer_gain = speedup(run, settings, lambda: [layer.layer(x) for x in maps], lambda: [layer(x) for x in maps])
    dense, found = outputs.argmax(1), torch.cat(ours).argmax(1)
    return {
        "accuracy": accuracy(found, labels),
        "lost": accuracy(dense, labels) - accuracy(found, labels),
        "agreement": accuracy(found, dense),
        "error": float((torch.cat(ours) - outputs).abs().max() / outputs.abs().max()),
        "flops": statistics.mean(shares),
        "speedup": gain,
        "layer_speedup": layer_gain,
        "changed": float(changed),
    }


class RandomGate(ChannelGate):
    """The twin: as many channels, drawn at random for each image."""

    def gate(self, means: Tensor) -> Tensor:
        kept = torch.rand(len(means), self.layer.out_channels, device=means.device).topk(self.kept, dim=1).indices
        self.saliency = means.new_zeros(())
        return means.new_zeros(len(means), self.layer.out_channels).scatter(1, kept, 1.0)


class Sparse(Intervention):
    """Keeps saliencies small, as in the paper."""

    def compute_loss(self, state: Any, next: Callable[[Any], Tensor]) -> Tensor:
        gates = [module for module in state.module.modules() if isinstance(module, ChannelGate)]
        return next(state) + 1e-8 * torch.stack([gate.saliency for gate in gates]).sum()


def gating(run: Run, settings: RedundancySettings, images: Images) -> Figures:
    run.trainings = 4
    first, train = dense_convnet(run, settings, images), images.train
    model = fit(run, settings, "dense", first, train.inputs, train.targets)
    gated = {}
    for name in ("gates", "twin"):
        ours = copy.deepcopy(first)
        pairs = {f"body.{block}.0": f"body.{block}.1" for block in (1, 2)}
        for gate in gate_channels(ours, pairs, settings.density, seed=run.seed):
            gate.__class__ = RandomGate if name == "twin" else ChannelGate
        gated[name] = fit(run, settings, name, ours, train.inputs, train.targets, interventions=[Sparse()])
    test = images.test.subset(range(min(200, len(images.test))))
    single = torch.split(test.inputs.to(run.device), 1)
    table = measure_tradeoff(
        lambda *_: gated["gates"],
        model,
        (test.inputs.to(run.device), test.targets.to(run.device)),
        [settings.density],
        batch_size=1,
        rounds=1,
    )
    found = {
        name: accuracy(answers(net, images.test.inputs.to(run.device)), images.test.targets)
        for name, net in {"dense": model, **gated}.items()
    }
    ours = gated["gates"]
    return {
        "accuracy": found["gates"],
        "lost": found["dense"] - found["gates"],
        "agreement": float(table.agreement[1]),
        "flops": float(table.flops[1] / table.flops[0]),
        "speedup": speedup(run, settings, lambda: [model(x) for x in single], lambda: [ours(x) for x in single]),
        "over_twin": found["gates"] - found["twin"],
    }


def pruning(run: Run, settings: RedundancySettings, images: Images) -> Figures:
    model = dense_transformer(run, settings, images)

    def technique(model: nn.Module, power: float, score: Any = "attention") -> Predict:
        keep = [share**power for share in settings.keep]
        model.encoder = TokenPruner(model.encoder, keep, score, seed=run.seed)  # type: ignore[arg-type]
        return model.eval()

    figures = beside(run, settings, model, technique, images.test, 1.0, (0.25, 0.5, 0.75, 1.5))
    twin = technique(copy.deepcopy(model), 1.0, "random")
    found = answers(twin, images.test.inputs.to(run.device))
    return figures | {"over_twin": figures["accuracy"] - accuracy(found, images.test.targets)}


def merging(run: Run, settings: RedundancySettings, images: Images) -> Figures:
    model = dense_transformer(run, settings, images)

    def technique(model: nn.Module, r: int) -> Predict:
        model.encoder = TokenMerger(model.encoder, r)  # type: ignore[arg-type]
        return model.eval()

    figures = beside(run, settings, model, technique, images.test, settings.merged, (1, 2, 4))
    length, dropped = (images.side // settings.patch) ** 2 + 1, 0
    keep = []
    for _ in settings.keep:
        dropped += min(settings.merged, (length - dropped - 1) // 2)
        keep.append((length - dropped) / length)
    twin = copy.deepcopy(model)
    twin.encoder = TokenPruner(twin.encoder, keep, "random", seed=run.seed)  # type: ignore[arg-type]
    found = answers(twin.eval(), images.test.inputs.to(run.device))
    return figures | {"over_twin": figures["accuracy"] - accuracy(found, images.test.targets)}


def subset(run: Run, settings: RedundancySettings, images: Images) -> Figures:
    run.trainings = 3
    train, number = images.train, round(settings.part * len(images.train))
    begun = time.process_time()
    dense_convnet(run, settings, images)
    whole = time.process_time() - begun
    parts = {
        "centres": k_center(train.inputs, number),
        "twin": torch.randperm(len(train), generator=run.generator("twin"))[:number],
    }
    found, times = {}, {}
    test = images.test.inputs.to(run.device)
    for name, part in parts.items():
        some, make = train.subset(part), partial(convnet, images, settings.widths)
        begun = time.process_time()
        model = fit(run, settings, name, make, some.inputs, some.targets)
        times[name] = time.process_time() - begun
        found[name] = accuracy(answers(model, test), images.test.targets)
    return {
        "accuracy": found["centres"],
        "over_twin": found["centres"] - found["twin"],
        "flops": number / len(train),
        "speedup": whole / times["centres"],
    }


def cache(run: Run, settings: RedundancySettings, images: Images) -> Figures:
    """Requests in which a few images are asked for often: the k-th most with a frequency of 1/k."""
    model, test = dense_convnet(run, settings, images), images.test
    asked = torch.multinomial(
        1 / torch.arange(1.0, len(test) + 1), 4 * len(test), replacement=True, generator=run.generator("requests")
    )
    requests, targets = test.inputs[asked].to(run.device), test.targets[asked]
    cached = CachedModel(model)
    ours, dense = answers(cached, requests, 16), answers(model, requests, 16)
    misses = cached.misses / len(requests)

    def ask() -> None:
        cached.clear()
        answers(cached, requests, 16)

    return {
        "accuracy": accuracy(ours, targets),
        "lost": accuracy(dense, targets) - accuracy(ours, targets),
        "agreement": accuracy(ours, dense),
        "flops": misses,
        "speedup": speedup(run, settings, lambda: answers(model, requests, 16), ask),
    }


ARMS: dict[str, Callable[[Run, RedundancySettings, Images], Figures]] = {
    "dense": dense,
    "small": small,
    "cascade": cascade,
    "reuse": reuse,
    "tiles": tiles,
    "keyframes": keyframes,
    "delta": delta,
    "gating": gating,
    "pruning": pruning,
    "merging": merging,
    "subset": subset,
    "cache": cache,
}


@claim(
    "redundancy",
    arms=list(ARMS),
    expects=[
        Bound("lost", "pruning", at_most=0.02),
        Bound("over_twin", "pruning", at_least=0.03),
        Bound("speedup", "pruning", at_least=1.2),
        Bound("lost", "cascade", at_most=0.005),
        Bound("flops", "cascade", at_most=0.7),
        Bound("speedup", "cascade", at_least=1.2),
        Bound("lost", "reuse", at_most=0.01),
        Bound("layer_speedup", "reuse", at_least=1.5),
        Bound("agreement", "tiles", at_least=1.0),
        Bound("speedup", "tiles", at_least=1.5),
        Bound("lost", "keyframes", at_most=0.02),
        Bound("over_twin", "keyframes", at_least=0.0),
        Bound("speedup", "keyframes", at_least=1.5),
        Bound("agreement", "delta", at_least=1.0),
        Bound("speedup", "delta", at_least=1.5),
        Bound("layer_speedup", "delta", at_least=2.0),
        Bound("over_twin", "subset", at_least=0.0),
        Bound("speedup", "subset", at_least=2.0),
        Bound("agreement", "cache", at_least=1.0),
        Bound("speedup", "cache", at_least=1.2),
        Bound("over_twin", "merging", at_least=0.0),
        Bound("over_twin", "gating", at_least=0.0),
    ],
    seeds={"smoke": 1, "quick": 3, "full": 3},
)
def trial(run: Run, arm: str, settings: RedundancySettings) -> Figures:
    return ARMS[arm](run, settings, Images(run, settings))


@trial.host
def train(run: Run, settings: RedundancySettings, interventions: Callable[[Task], list[Intervention]]) -> Figures:
    images = Images(run, settings)
    shape = (images.channels, images.side, images.side)
    task = Task(images.classes, shape, len(images.train), settings.epochs, run.seed)
    make = partial(convnet, images, settings.widths)
    joined = interventions(task)
    model = fit(run, settings, "train", make, images.train.inputs, images.train.targets, interventions=joined)
    return {"accuracy": accuracy(answers(model, images.test.inputs.to(run.device)), images.test.targets)}
