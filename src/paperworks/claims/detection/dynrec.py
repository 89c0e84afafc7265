"""A policy that decides by reinforcement how many steps of reasoning an expression gets comes within one point of the
accuracy of the best fixed number of steps, in at most 0.7 times as many steps, and takes more for expressions that go
by more other things.

Pictures of 64 pixels with six things (three shapes in three colours) in a grid of 3x3, and expressions that go by no,
one or two other things: "the red disc", "the disc left of the blue thing", "the disc left of the square above the
cross". A box is right if its IoU with the true one is at least 0.5. One network of less than 0.1 million parameters,
trained from nothing; five steps at most. The task was made as easy as it takes for a network with a fixed number of
steps to learn it in the time of ``quick``, before policies were compared; size, learning rate and number of epochs are
the same for all arms, and nothing else is tuned.

The policy reads the state without gradient, so that it changes nothing of the network: stopping the arm ``dynamic``
after its fifth step gives exactly the boxes of a network trained for five steps with the same losses. The fixed numbers
1 to 5 (``fixed_1`` … ``fixed_5``) are therefore forced stops of that one network, supervised at every step; the best of
them, chosen on the test data in its favour, is what ``gap`` and ``step_share`` compare with. Networks trained apart for
one and for three steps alone are the arms ``fixed-1`` and ``fixed-3``. The controls: ``random`` deals the numbers of
steps that the policy chose out to other examples; ``oracle`` stops at the first step that is right.

The policy learns in the second half of training, from the exact expectation of the reward by default (``--set
baseline=self_critical`` samples it). ``full`` has ten times the data, and decisive phrases.

What is known not to hold: the phrases of ``quick`` do not need more than one step of this block. Left is a whole
half-plane in them, so that the leftmost disc is mostly the one "left of the blue thing", and a step finds it: forced
stops after one and five steps differ by less than a point (0.991 and 0.989 with seed 0), the policy rightly stops at
once, and its steps do not grow with the hops. Decisive phrases, which rule that out (``--set decisive=true --set
things=8``), were beyond a fixed reasoner of this size: after 1200 steps of training it knew every thing by its colour
and shape, and was right in 0.4 of the expressions that go by others, whatever its number of steps.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pydantic import Field
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from paperworks.bench import Bound, Close, Run, Settings, claim, scaled
from paperworks.detection.dynrec import (
    DynamicReasoner,
    FixedReasoner,
    GridTokens,
    GroundingLoss,
    ReferringData,
    ReinforcedHalting,
    TextEncoder,
    Vocabulary,
    flat_expressions,
    greedy_steps,
    labelled_scenes,
    paired_iou,
    rec_accuracy,
)
from paperworks.detection.dynrec.halting import Reinforce
from paperworks.train import Intervention

SIDE = 16  # of the map after the first convolution


class DynRecSettings(Settings):
    """What the arms share."""

    train: tuple[int, int, int] = scaled(
        smoke=(40, 40, 40),
        quick=(2500, 3500, 3500),
        full=(25_000, 35_000, 35_000),
        description="expressions to learn from that go by no, one and two other things",
    )
    test: int = scaled(smoke=20, quick=300, full=1000, ge=1, description="expressions of each kind to measure with")
    cells: int = scaled(smoke=3, quick=3, full=4, ge=2, le=8, description="cells of the grid, a side")
    things: int = scaled(smoke=6, quick=6, full=10, ge=2, description="things a picture")
    decisive: bool = scaled(
        smoke=False, quick=False, full=True, description="phrases of which every hop decides; much harder"
    )
    epochs: int = scaled(smoke=1, quick=3, full=12, ge=1, description="passes over the expressions")
    batch_size: int = scaled(smoke=48, quick=48, full=64, ge=1, description="expressions a step of training")
    lr: float = scaled(smoke=3e-3, quick=3e-3, full=1e-3, gt=0, description="largest learning rate")
    text_layers: int = scaled(
        smoke=0, quick=0, full=1, ge=0, description="transformer layers over the words before reasoning starts"
    )
    d: int = scaled(smoke=48, quick=48, full=64, ge=8, multiple_of=8, description="channels")
    max_steps: int = scaled(smoke=3, quick=5, full=5, ge=3, description="most steps of reasoning")
    lam: float = Field(0.05, ge=0, description="price of each step after the first")
    immediate: float = Field(0.5, ge=0, description="what a step earns that brings the box nearer")
    baseline: Reinforce = Field("exact", description="how the policy's gradient is got")


class World:
    """What an arm learns from and is measured on."""

    def __init__(self, run: Run, settings: DynRecSettings) -> None:
        def make(name: str, counts: tuple[int, ...], words: Vocabulary | None) -> tuple[ReferringData, Vocabulary]:
            seed = int(torch.randint(2**31, (), generator=run.generator(name)))
            scenes = labelled_scenes(
                max(100, 2 * max(counts)), cells=settings.cells, things=(settings.things, settings.things), seed=seed
            )
            wanted = dict(enumerate(counts))
            return flat_expressions(
                scenes, wanted, per_scene=2, decisive=settings.decisive, vocabulary=words, seed=seed
            )

        self.train, self.words = make("train", settings.train, None)
        self.test, _ = make("test", (settings.test,) * len(settings.train), self.words)


def network(run: Run, settings: DynRecSettings, words: Vocabulary, steps: int, dynamic: bool) -> DynamicReasoner:
    torch.manual_seed(run.seed)  # the same start for every arm
    d, stride = settings.d, SIDE // settings.cells
    stem = nn.Sequential(
        nn.Conv2d(3, 48, 4, 4),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.Conv2d(48, d, SIDE - (settings.cells - 1) * stride, stride),
        nn.BatchNorm2d(d),
        nn.ReLU(),
    )
    kind = DynamicReasoner if dynamic else FixedReasoner
    return kind(GridTokens(stem, d, d), TextEncoder(len(words), d, layers=settings.text_layers), steps, d=d)


def learn(run: Run, settings: DynRecSettings, model: DynamicReasoner, data: ReferringData, dynamic: bool) -> None:
    policy: list[Intervention] = []
    if dynamic:
        options: dict[str, Any] = {"lam": settings.lam, "immediate": settings.immediate, "seed": run.seed}
        policy = [ReinforcedHalting(baseline=settings.baseline, **options)]
    trainer = run.trainer(settings.epochs, interventions=policy)
    loader = data.loader(settings.batch_size, shuffle=True, generator=run.generator("order"))

    def cycle(optimizer: Optimizer) -> OneCycleLR:
        return OneCycleLR(optimizer, settings.lr, total_steps=trainer.steps(loader), pct_start=0.1)

    optimizer = AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01)
    history = trainer.fit(model, loader, loss=GroundingLoss(), optimizer=optimizer, scheduler=cycle)
    for epoch, row in enumerate(history, 1):
        run.log(epoch, **{name: value for name, value in row.items() if name.startswith(("train/", "policy/"))})


def batches(rows: Sequence[int], size: int = 256) -> Iterator[Sequence[int]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


@torch.no_grad()
def every_step(model: DynamicReasoner, data: ReferringData, rows: Sequence[int] | None = None) -> dict[str, Tensor]:
    """IoUs and boxes ``[n, steps]`` of all steps, logits of stopping, scores of the places."""
    device, parts = next(model.parameters()).device, []
    model.eval()
    for chunk in batches(range(len(data)) if rows is None else rows):
        (pictures, tokens, mask), gt = data.batch(chunk)
        out = model((pictures.to(device), tokens.to(device), mask.to(device)))
        ious = paired_iou(out.boxes, gt.to(device)[:, None].expand_as(out.boxes))
        parts.append({"iou": ious, "boxes": out.boxes, "stop": out.stop_logits, "scores": out.scores})
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


@torch.no_grad()
def inferred(model: DynamicReasoner, data: ReferringData) -> tuple[Tensor, Tensor]:
    """Boxes and numbers of steps as a user gets them, with early exit."""
    device, boxes, steps = next(model.parameters()).device, [], []
    for chunk in batches(range(len(data))):
        (pictures, tokens, mask), _ = data.batch(chunk)
        answer = model.infer((pictures.to(device), tokens.to(device), mask.to(device)))
        boxes.append(answer.boxes.cpu())
        steps.append(answer.steps.cpu())
    return torch.cat(boxes), torch.cat(steps)


@claim(
    "dynrec",
    arms=["fixed-1", "fixed-3", "dynamic"],
    expects=[
        Bound("gap", "dynamic", at_least=-0.01, name="dynamic − best fixed number, accuracy"),
        Bound("step_share", "dynamic", at_most=0.7, name="dynamic / best fixed number, steps"),
        Bound("growth", "dynamic", at_least=0.1, name="more steps with each thing gone by"),
        Close("accuracy", "dynamic", to="fixed-1", within=0.01),
        Close("accuracy", "dynamic", to="fixed-3", within=0.01),
    ],
    seeds={"smoke": 1, "quick": 3, "full": 3},
)
def trial(run: Run, arm: str, settings: DynRecSettings) -> dict[str, float]:
    world, dynamic = World(run, settings), arm == "dynamic"
    number = settings.max_steps if dynamic else int(arm.removeprefix("fixed-"))
    model = network(run, settings, world.words, number, dynamic)
    learn(run, settings, model, world.train, dynamic)
    boxes, steps = inferred(model, world.test)
    figures = {"accuracy": rec_accuracy(boxes, world.test.boxes), "steps": float(steps.float().mean())}
    hops = range(len(settings.train))
    for hop in hops:
        mine = world.test.hops == hop
        figures[f"accuracy_{hop}_hops"] = rec_accuracy(boxes[mine], world.test.boxes[mine])
        figures[f"steps_{hop}_hops"] = float(steps[mine].float().mean())
    if dynamic:
        hits = every_step(model, world.test)["iou"] >= 0.5
        figures |= compared(run, figures, hits, steps)
        figures["growth"] = min(figures[f"steps_{hop + 1}_hops"] - figures[f"steps_{hop}_hops"] for hop in hops[:-1])
        chart(run, world.test, hits, steps, figures)
        if run.seed == 0:
            run.figure("steps of reasoning", reasoning(model, world.test, steps))
    return figures


def compared(run: Run, figures: dict[str, float], hits: Tensor, steps: Tensor) -> dict[str, float]:
    """Forced stops of the same network, and stopping at random and by oracle."""
    fixed = hits.double().mean(0)
    dealt = steps[torch.randperm(len(steps), generator=run.generator("random"))]
    best = int(fixed.argmax())  # the fewest of equally good ones
    return {
        **{f"fixed_{step}": float(share) for step, share in enumerate(fixed, 1)},
        "best_fixed_steps": best + 1.0,
        "gap": figures["accuracy"] - float(fixed[best]),
        "step_share": figures["steps"] / (best + 1),
        "random": float(hits.gather(1, dealt[:, None] - 1).double().mean()),
        "oracle": float(hits.any(1).double().mean()),
    }


def chart(run: Run, data: ReferringData, hits: Tensor, steps: Tensor, figures: dict[str, float]) -> None:
    """Accuracy by number of steps, for each number of hops; and how often the policy stops where."""
    shares = {}
    for hop in sorted(set(data.hops.tolist())):
        mine = data.hops == hop
        shares[f"{hop} hops"] = torch.bincount(steps[mine] - 1, minlength=hits.shape[1]) / mine.sum()
        for step, share in enumerate(hits[mine].double().mean(0).tolist(), 1):
            run.log(step, **{f"accuracy after so many steps, {hop} hops": share})
    run.save("steps by hops", {name: share.tolist() for name, share in shares.items()})
    if run.seed:
        return
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = range(1, hits.shape[1] + 1)
    left.plot(places, [figures[f"fixed_{step}"] for step in places], "o-", color="#8a8f98", label="fixed number")
    left.plot(figures["steps"], figures["random"], "s", color="#c46a3b", label="random, equal mean")
    left.plot(figures["steps"], figures["accuracy"], "D", color="#1f5fa8", label="policy")
    left.set(xlabel="mean steps", ylabel="accuracy", xticks=list(places))
    left.legend(frameon=False)
    for k, (name, share) in enumerate(shares.items()):
        right.bar([step + 0.27 * (k - 1) for step in places], share.tolist(), 0.25, label=name)
    right.set(xlabel="step at which the policy stops", ylabel="share", xticks=list(places))
    right.legend(frameon=False)
    run.figure("when it stops", figure)


def reasoning(model: DynamicReasoner, data: ReferringData, steps: Tensor) -> Figure:
    """For an expression of each number of hops: where each step points, its box, and how sure it is to stop."""
    rows = []
    for hop in sorted(
        set(data.hops.tolist())
    ):  # an example that takes as many steps as the policy mostly takes for its like
        mine = (data.hops == hop).nonzero()[:, 0]
        rows.append(int(mine[(steps[mine] - steps[mine].mode().values).abs().argmin()]))
    out, count = every_step(model, data, rows), model.max_steps
    stops = greedy_steps(out["stop"])
    figure = Figure(figsize=(2.1 * count, 2.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row, place in enumerate(rows):
        picture, size = data.images[data.picture[place]].permute(1, 2, 0).numpy(), data.images.shape[-1]
        side = round(out["scores"].shape[-1] ** 0.5)
        for step, ax in enumerate(axes[row]):
            ax.imshow(picture, extent=(0, size, size, 0), alpha=1.0 if step < stops[row] else 0.35)
            heat = out["scores"][row, step].softmax(0).view(side, side)
            ax.imshow(heat, extent=(0, size, size, 0), cmap="Greys", alpha=0.35, vmin=0, vmax=1)
            outline(ax, data.boxes[place] * size, "white", "--")
            outline(ax, out["boxes"][row, step] * size, "#111111", "-")
            sure = float(out["stop"][row, step].sigmoid()) if step + 1 < count else 1.0
            said = "stops" if step + 1 == stops[row] else "goes on" if step + 1 < stops[row] else "not reached"
            ax.set_title(f"step {step + 1}: {said} ({sure:.2f})", fontsize=8)
            ax.set(xticks=[], yticks=[])
        axes[row, 0].set_xlabel(f"“{data.texts[place]}”", fontsize=9, loc="left")
    return figure


def outline(ax: Any, box: Tensor, colour: str, style: str) -> None:
    x, y, width, height = box.tolist()
    corner = (x - width / 2, y - height / 2)
    ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linestyle=style, linewidth=1.6))
