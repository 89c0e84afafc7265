"""On two simulated devices, HAQ's bits for each layer give a network that is more accurate at equal latency than the
same bits in all layers, by 5 points where arithmetic takes longest and 2 where memory does, and no less accurate than
the best of as many random policies.

No device is measured: latency is that of the library's simulators ``edge`` (bound by arithmetic) and ``cloud`` (batch
16, bound by memory), and everything said of it is simulated. A small network of depthwise and pointwise convolutions is
trained on digits; then bits from 2 to 8 are chosen for each layer's weights and activations but the first and last,
which keep 8. The budget is halfway between the simulated latencies of 2 and of 3 bits everywhere: at 3 bits this
network has lost two to four points only, at 2 bits about forty. Policies are scored on validation data, without
fine-tuning, after batch norm has seen 256 training images again; the winner's accuracy is measured on test data that
nothing was chosen on. Split and network are drawn anew for each seed.

``uniform`` takes one number of bits for all weights and one for all activations: the pair, of all that fit the budget,
that validates best. ``hand`` is a rule of thumb that scores nothing: take a bit from the costliest layer until it fits.
``random`` tries as many policies as HAQ, drawn evenly and cut to the budget in the same way. ``greedy`` lowers the bits
whose loss, measured alone, is least for what they save; it scores a quarter as many policies. Nothing is tuned for any
arm; HAQ runs at the released script's settings with fewer episodes (260) and updates (8 an episode).

A policy that was searched for one device should be slow on the other: ``edge_cross`` is the simulated latency on
``edge`` of ``cloud``'s policy over that of its own, and ``cloud_cross`` the reverse.

What is known: on ``cloud`` no arm is far behind another, and for eight layers random search is a strong baseline, as it
often is on small problems. At 3 bits everywhere, this network's loss leaves no room for a gain of 5 points.

``full`` takes a MobileNetV2 of a quarter of the width on CIFAR-10, scores each policy after a short fine-tuning, and
adds the device whose bits fuse and the authors' table of simulated latencies. It wants a GPU. With ``--set agent=sb3``
the arm ``haq`` measures stable-baselines3's DDPG in place of the paper's.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import update_bn

from paperworks.bench import Bound, Gain, Run, Settings, claim, scaled
from paperworks.data import LabelledData, load, locate, split
from paperworks.search.haq import (
    Found,
    Hardware,
    LookupTable,
    PolicyResult,
    QuantizationProblem,
    costliest_first,
    fixed_policy,
    greedy_sensitivity,
    load_hardware,
    policy_cost,
    random_search,
    search,
)

TABLE = "tables/haq_mobilenetv2_latency.npy"
ARMS = {"uniform": "s", "hand": "X", "random": "o", "greedy": "^", "haq": "*"}
"""And how they are drawn."""


class HAQSettings(Settings):
    """What the arms share."""

    data: str = scaled(smoke="digits", quick="digits", full="cifar10", description="images: a name or folder")
    sizes: tuple[int, int, int] = scaled(
        smoke=(300, 100, 100),
        quick=(900, 400, 497),
        full=(20_000, 2_000, 4_000),
        description="examples for training, validation and test",
    )
    network: Literal["separable", "mobilenetv2"] = scaled(
        smoke="separable", quick="separable", full="mobilenetv2", description="8 layers for digits, or 53 for 32x32"
    )
    epochs: int = scaled(smoke=2, quick=20, full=60, ge=1, description="passes over the training data")
    batch_size: int = scaled(smoke=32, quick=32, full=128, ge=2, description="examples a step")
    lr: float = Field(0.1, gt=0, description="largest learning rate of one cycle, with momentum 0.9")
    devices: tuple[str, ...] = scaled(
        smoke=("edge", "cloud"),
        quick=("edge", "cloud"),
        full=("edge", "cloud", "fusion", TABLE),
        min_length=2,
        description="simulated devices: names, TOML files or tables (.npy)",
    )
    bits: float = scaled(
        smoke=2.5, quick=2.5, full=3.5, ge=2, le=8, description="budget: simulated latency of so many bits everywhere"
    )
    agent: Literal["haq", "sb3"] = Field("haq", description="the paper's agent, or stable-baselines3's DDPG")
    episodes: int = scaled(smoke=8, quick=260, full=300, ge=1, description="policies that HAQ and random try")
    warmup: int = scaled(smoke=4, quick=20, full=20, ge=0, description="episodes at random, before learning")
    updates: int = scaled(smoke=2, quick=8, full=106, ge=1, description="updates of the agent after each episode")
    normed: int = Field(256, ge=2, description="training images that calibrate and set batch norm's statistics anew")
    tune_steps: int = scaled(smoke=0, quick=0, full=10, ge=0, description="steps of fine-tuning before scoring")
    tune_lr: float = Field(1e-3, gt=0, description="learning rate of fine-tuning, the released script's")


def separable(channels: int, classes: int) -> nn.Module:
    """Depthwise and pointwise convolutions for 8x8 digits."""

    def block(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
        conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())

    layers = {
        "conv": block(channels, 16, 3),
        "dw1": block(16, 16, 3, groups=16),
        "pw1": block(16, 32, 1),
        "dw2": block(32, 32, 3, stride=2, groups=32),
        "pw2": block(32, 64, 1),
        "dw3": block(64, 64, 3, groups=64),
        "pw3": block(64, 64, 1),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "fc": nn.Linear(64, classes),
    }
    return nn.Sequential(OrderedDict(layers))


def mobilenetv2(channels: int, classes: int) -> nn.Module:
    """A quarter of the width, with one stride less for 32x32 images."""
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2(num_classes=classes, width_mult=0.25)
    first = model.features[0][0]
    model.features[0][0] = nn.Conv2d(channels, first.out_channels, 3, padding=1, bias=False)
    return model


class Trial:
    """A trained network, and how a quantized one is prepared and measured."""

    def __init__(self, run: Run, settings: HAQSettings) -> None:
        self.settings, self.device = settings, torch.device(run.device)
        data = load(settings.data, root=run.data_root, limit=sum(settings.sizes), seed=run.seed)
        self.train, self.validation, self.test = (data.subset(part) for part in split(data, settings.sizes, run.seed))
        torch.manual_seed(run.seed)
        build = separable if settings.network == "separable" else mobilenetv2
        self.model = build(data.inputs.shape[1], data.num_classes)
        trainer = run.trainer(settings.epochs, batch_size=settings.batch_size, drop_last=True)
        trainer.fit(
            self.model,
            self.train.dataset(),
            loss=F.cross_entropy,
            optimizer=partial(SGD, lr=settings.lr, momentum=0.9, weight_decay=5e-4),
            scheduler=partial(OneCycleLR, max_lr=settings.lr, total_steps=trainer.steps(self.train.dataset())),
        )
        self.model.to(self.device).eval()
        self.inputs = self.train.inputs[: settings.normed].to(self.device)
        self.generator = partial(run.generator, "tuning")

    def prepare(self, model: nn.Module) -> None:
        """Fine-tune a quantized model for some steps, the same for all, and let batch norm see its new inputs."""
        if self.settings.tune_steps:
            model.train()
            optimizer = SGD(model.parameters(), self.settings.tune_lr, momentum=0.9, weight_decay=4e-5)
            order = torch.randperm(len(self.train), generator=self.generator())
            for rows in torch.split(order, self.settings.batch_size)[: self.settings.tune_steps]:
                x, y = self.train.inputs[rows].to(self.device), self.train.targets[rows].to(self.device)
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(model(x), y))
                optimizer.step()
        update_bn([self.inputs], model)
        model.eval()

    def score(self, model: nn.Module) -> float:
        """Accuracy on validation data."""
        self.prepare(model)
        return self.accuracy(model, self.validation)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, data: LabelledData) -> float:
        right = [
            (model(x.to(self.device)).argmax(1).cpu() == y).float()
            for x, y in zip(torch.split(data.inputs, 512), torch.split(data.targets, 512), strict=True)
        ]
        return float(torch.cat(right).mean())

    def tested(self, problem: QuantizationProblem, policy: np.ndarray | Tensor) -> float:
        """Accuracy on test data."""
        with problem.quantized(policy) as model:
            self.prepare(model)
            return self.accuracy(model, self.test)


def hardware(run: Run, source: str) -> Hardware:
    """A simulated device by name or description, or a table of latencies."""
    return LookupTable(np.load(locate(source, run.data_root))) if source.endswith(".npy") else load_hardware(source)


def place(run: Run, trained: Trial, settings: HAQSettings, source: str) -> QuantizationProblem:
    """The network on a device; a policy's score is the same on all, and kept for the next."""
    log = run.folder / "scores.jsonl"
    problem = partial(QuantizationProblem, trained.model, trained.score, trained.inputs, hardware(run, source), log=log)
    return problem(budget=between(problem(budget=1.0), settings.bits))


def between(problem: QuantizationProblem, bits: float) -> float:
    """The cost of a number of bits everywhere, by a straight line between whole numbers."""
    whole = int(bits)
    below, above = (problem.cost(fixed_policy(problem.table, min(b, 8))) for b in (whole, whole + 1))
    return below + (bits - whole) * (above - below)


def alike(problem: QuantizationProblem) -> PolicyResult:
    """One number of bits for all weights and one for all activations: the best pair of those that fit."""
    history = []
    for weights in range(2, 9):
        for activations in range(2, 9):
            policy = np.full((len(problem.layers), 2), (weights, activations))
            policy[[0, -1]] = 8
            if policy_cost(problem.table, policy) <= problem.target:
                history.append(Found(policy.tolist(), problem.score(policy), problem.cost(policy)))
    return PolicyResult(max(history, key=lambda found: found.score), history, problem.original, problem.names)


def by_hand(problem: QuantizationProblem) -> PolicyResult:
    """The rule of thumb."""
    policy = costliest_first(problem.table, problem.target)
    found = Found(policy.tolist(), problem.score(policy), problem.cost(policy))
    return PolicyResult(found, [found], problem.original, problem.names)


def solve(
    arm: str, problem: QuantizationProblem, run: Run, settings: HAQSettings, progress: Callable[[float, str], None]
) -> PolicyResult:
    if arm == "haq":
        return search(
            problem,
            settings.episodes,
            agent=settings.agent,
            warmup=settings.warmup,
            updates=settings.updates,
            seed=run.seed,
            progress=progress,
        )
    if arm == "random":
        return random_search(problem, settings.episodes, seed=run.seed, progress=progress)
    if arm == "greedy":
        return greedy_sensitivity(problem, progress=progress)
    return alike(problem) if arm == "uniform" else by_hand(problem)


@claim(
    "haq",
    arms=list(ARMS),
    seeds={"quick": 4},
    expects=[
        Gain("edge_accuracy", "haq", over="uniform", at_least=0.05),
        Gain("cloud_accuracy", "haq", over="uniform", at_least=0.02),
        Gain("edge_accuracy", "haq", over="random"),
        Gain("cloud_accuracy", "haq", over="random"),
        Bound("edge_cross", "haq", at_least=1, name="cloud's policy is slower on edge than edge's own (simulated)"),
        Bound("cloud_cross", "haq", at_least=1, name="edge's policy is slower on cloud than cloud's own (simulated)"),
    ],
)
def trial(run: Run, arm: str, settings: HAQSettings) -> dict[str, float]:
    trained = Trial(run, settings)
    figures = {"float_accuracy": trained.accuracy(trained.model, trained.test)}
    made, results = {}, {}
    for index, source in enumerate(settings.devices):
        device = Path(source).stem
        share = partial(progressing, run, device, index, len(settings.devices))
        made[device] = problem = place(run, trained, settings, source)
        results[device] = result = solve(arm, problem, run, settings, share)
        figures[f"{device}_accuracy"] = trained.tested(problem, result.policy)
        figures[f"{device}_validation"] = result.best.score
        figures[f"{device}_speedup"] = 1 / result.best.cost
        figures[f"{device}_policies"] = float(len(result.history))
        for step, score in enumerate(np.maximum.accumulate([found.score for found in result.history]), 1):
            if arm in ("haq", "random"):
                run.log(step, **{f"{device}: best validation accuracy": float(score)})
    if arm == "haq":
        crossed = cross(made, results)
        for own in list(made)[:2]:
            other = next(name for name in list(made)[:2] if name != own)
            figures[f"{own}_cross"] = crossed[other][own] / crossed[own][own]
        run.save("policies", {device: result.best.policy for device, result in results.items()})
        if run.seed == 0:
            run.figure("simulated cost and accuracy", pareto(run, settings, made, results))
            run.figure("bits by layer and simulated device", bits_figure(results))
            run.figure("policies across simulated devices", cross_figure(crossed, figures))
    return figures


def progressing(run: Run, device: str, index: int, devices: int, fraction: float, text: str) -> None:
    run.progress((index + fraction) / devices, f"{device}, {text}")


def cross(made: dict[str, QuantizationProblem], results: dict[str, PolicyResult]) -> dict[str, dict[str, float]]:
    """Simulated latency of each device's policy on each device, as a fraction of 8 bits there."""
    return {
        searched: {device: problem.cost(result.policy) for device, problem in made.items()}
        for searched, result in results.items()
    }


def pareto(
    run: Run, settings: HAQSettings, made: dict[str, QuantizationProblem], results: dict[str, PolicyResult]
) -> Figure:
    """Every policy that any arm scored, by simulated latency and validation accuracy; where each is fine-tuned, only
    those of HAQ and of fixed bits."""
    figure, axes = plt.subplots(1, len(made), figsize=(5 * len(made), 4), squeeze=False)
    for axis, (device, problem) in zip(axes[0], made.items(), strict=True):
        tried = {
            arm: results[device] if arm == "haq" else solve(arm, problem, run, settings, lambda fraction, text: None)
            for arm in ARMS
            if not (settings.tune_steps and arm in ("random", "greedy"))
        }
        for arm, result in tried.items():
            costs, scores = zip(*((found.cost, found.score) for found in result.history), strict=True)
            points = axis.scatter(costs, scores, s=8, alpha=0.35, linewidths=0)
            axis.scatter(
                result.best.cost,
                result.best.score,
                s=90,
                marker=ARMS[arm],
                color=points.get_facecolor()[:, :3],
                edgecolor="black",
                label=arm,
                zorder=3,
            )
        same = [fixed_policy(problem.table, bits) for bits in range(2, 9)]
        line = [(problem.cost(policy), problem.score(policy)) for policy in same]
        axis.plot(*zip(*line, strict=True), color="gray", lw=1, marker=".", label="2 to 8 bits everywhere", zorder=1)
        axis.axvline(problem.target / problem.full_cost, color="gray", ls="--", lw=1)
        axis.axhline(problem.original, color="gray", ls=":", lw=1)
        axis.set(title=f"{device} (simulated)", xlabel="simulated latency / that of 8 bits")
        axis.set(ylabel="validation accuracy", xlim=(None, 1.03))
        axis.legend(fontsize=8, loc="lower right", title="all policies, and the best of each arm", title_fontsize=8)
    figure.tight_layout()
    plt.close(figure)
    return figure


def bits_figure(results: dict[str, PolicyResult]) -> Figure:
    """Bits of weights (up) and activations (down) of each layer."""
    figure, axes = plt.subplots(len(results), 1, figsize=(8, 2.2 * len(results)), sharex=True, squeeze=False)
    for axis, (device, result) in zip(axes[:, 0], results.items(), strict=True):
        layers = np.arange(len(result.policy))
        axis.bar(layers, result.policy[:, 0], label="weights")
        axis.bar(layers, -result.policy[:, 1], label="activations")
        axis.axhline(0, color="black", lw=0.8)
        axis.set(title=f"{device} (simulated)", ylabel="bits", ylim=(-9, 9), yticks=range(-8, 9, 4))
        axis.set_yticklabels([str(abs(bits)) for bits in range(-8, 9, 4)])
        if len(layers) <= 16:
            axis.set_xticks(layers, result.layers)
    axes[0, 0].legend(fontsize=8, ncols=2, loc="upper center")
    axes[-1, 0].set_xlabel("layer")
    figure.tight_layout()
    plt.close(figure)
    return figure


def cross_figure(crossed: dict[str, dict[str, float]], figures: dict[str, float]) -> Figure:
    """The cross-hardware table."""
    names = list(crossed)
    table = np.array([[crossed[searched][device] for device in names] for searched in names])
    figure, axis = plt.subplots(figsize=(2.5 + 1.3 * len(names), 1.5 + 0.8 * len(names)))
    axis.imshow(table / table.diagonal(), cmap="coolwarm", vmin=0.5, vmax=1.5, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        axis.text(column, row, f"{value:.3f}", ha="center", va="center")
    axis.set_xticks(range(len(names)), [f"run on {name}" for name in names])
    labels = [f"for {name}\n(test accuracy {figures[f'{name}_accuracy']:.3f})" for name in names]
    axis.set_yticks(range(len(names)), labels)
    axis.set_title("simulated latency / that of 8 bits there", fontsize=10)
    figure.tight_layout()
    plt.close(figure)
    return figure
