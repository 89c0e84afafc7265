"""What distilling with all classes in one pass gains over the loop, and what DOORPING adds to NAIVEATTACK.

Gradients: those of every class on real images, and of the distance to them on synthetic ones, as a step of condensation
takes them. The loop is the reference implementation's: one class after the other, biases included. Bar: at least 1.5
times as fast at the claim's sizes, with gradients equal to 1e-5. Small batches of small images wait mostly for the next
operation, and gain; where a class's images fill the machine, both do the same arithmetic (no bar).

Attacks: a whole condensation with 100 trigger steps a refresh, never less (the tolerance is 0). Bar: at most 1.5 times
NAIVEATTACK at the paper's schedule for 10 images a class (10 steps a network, 50 passes between them). At the claim's
schedule, with a fifth of the passes and half of the images, there is less to share the refresh with: no bar.

CPU time of one thread (wall time on a GPU), interleaved, medians of the rounds' ratios.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from timing import DEVICE, compare, interleaved, ratio, verdict
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.audit.ddbackdoor import (
    DoorpingAttack,
    NaiveAttack,
    Normalization,
    Trigger,
    class_gradients,
    distill_dc,
    distillation_convnet,
    gradient_distance,
)
from paperworks.audit.ddbackdoor.matching import class_distance
from paperworks.data import load

ROUNDS = 9
CLASSES = 10
torch.set_num_threads(1)
torch.manual_seed(0)


def looped(net: nn.Module, real: Tensor, synthetic: Tensor) -> Tensor:
    weights = list(net.parameters())
    apart = synthetic.new_zeros(())
    for c in range(CLASSES):
        gs, gr = (
            torch.autograd.grad(
                F.cross_entropy(net(some[c]), torch.full((some.shape[1],), c, device=DEVICE)),
                weights,
                create_graph=graph,
            )
            for some, graph in ((synthetic, True), (real, False))
        )
        apart = apart + gradient_distance(gs, gr)
    return torch.autograd.grad(apart, synthetic)[0]


def batched(net: nn.Module, real: Tensor, synthetic: Tensor) -> Tensor:
    classes = torch.arange(CLASSES, device=DEVICE)
    gr = class_gradients(net, real, classes)
    gs = class_gradients(net, synthetic, classes, create_graph=True)
    return torch.autograd.grad(class_distance(gs, gr, "rows"), synthetic)[0]


def gradients() -> bool:
    met = True
    for name, side, batch, ipc, shape, bar in [
        ("the claim's: 8x8, 64 real, 5 synthetic", 8, 64, 5, {"width": 32, "depth": 2, "hidden": 32}, 1.5),
        ("8x8, 64 real, 1 synthetic", 8, 64, 1, {"width": 32, "depth": 2, "hidden": 32}, None),
        ("8x8, 128 real, 10 synthetic", 8, 128, 10, {"width": 32, "depth": 2, "hidden": 32}, None),
        ("28x28, 64 real, 10 synthetic", 28, 64, 10, {"width": 64, "depth": 3, "hidden": 192}, None),
    ]:
        net = distillation_convnet(1, CLASSES, side, **shape).to(DEVICE)
        real = torch.randn(CLASSES, batch, 1, side, side, device=DEVICE)
        synthetic = torch.randn(CLASSES, ipc, 1, side, side, device=DEVICE, requires_grad=True)
        exact, ours = looped(net, real, synthetic), batched(net, real, synthetic)
        off = float((ours - exact).abs().max() / exact.abs().max())
        functions = (partial(looped, net, real, synthetic), partial(batched, net, real, synthetic))
        gain, base = compare(*functions, ROUNDS)
        met &= verdict(f"{name}: loop / one pass ({base:.1f} ms)", gain, at_least=bar)
        met &= verdict("  largest difference, of the largest number", off, at_most=1e-5)
    return met


def condensation(images: Tensor, labels: Tensor, scale: Normalization, schedule: dict[str, int], steps: int | None):
    shape, draw = (1, *images.shape[2:]), torch.Generator().manual_seed(1)
    common = {"rate": 0.05, "generator": torch.Generator().manual_seed(2)}

    def once() -> None:
        if steps is None:
            attack = NaiveAttack(Trigger.white(shape, 2, scale).to(DEVICE), **common)
        else:
            trigger = Trigger.random(shape, 2, scale, draw).to(DEVICE)
            attack = DoorpingAttack(trigger, scale, project=False, steps=steps, tol=0.0, **common)
        net_fn = partial(distillation_convnet, 1, CLASSES, images.shape[-1], width=32, depth=2, hidden=32)
        distill_dc(images, labels, net_fn, hook=attack, generator=draw, init="real", **schedule)

    return once


def attacks() -> bool:
    data = load("digits")
    scale = Normalization.of(data.inputs)
    images, labels = scale(data.inputs).to(DEVICE), data.targets.to(DEVICE)
    met = True
    for name, schedule, bar in [
        ("10 images a class, 10 steps, 50 passes", {"ipc": 10, "outer": 10, "inner": 50, "iterations": 1}, 1.5),
        ("5 images a class, 5 steps, 10 passes", {"ipc": 5, "outer": 5, "inner": 10, "iterations": 3}, None),
    ]:
        schedule |= {"batch_real": 64}
        functions: dict[str, Callable[[], object]] = {
            "naive": condensation(images, labels, scale, schedule, None),
            "doorping": condensation(images, labels, scale, schedule, 100),
        }
        times = interleaved(functions, 5)
        met &= verdict(f"{name}: DOORPING / NAIVEATTACK", ratio(times["doorping"], times["naive"]), at_most=bar)
    return met


if __name__ == "__main__":
    print(f"{DEVICE}, PyTorch {torch.__version__}")
    sys.exit(not all([gradients(), attacks()]))
