"""What a stage-1 step of DDG costs: beside the reference's arrangement, and beside plain cross entropy.

The networks are the reference's sizes for 28x28 images, the same on both sides. The reference encodes its two batches
and their positives one by one, decodes six images of which it uses two, reads the variation of the positives, which it
never uses, and keeps gradients for the frozen networks that make the swaps. Here all encoder passes are one, only what
is used is decoded, and the frozen networks run without gradients. Bar: at most 0.75 times the reference's time. CPU
time of one thread (a GPU is used where there is one), interleaved, median of the rounds' ratios. Bound by convolutions.
"""

import copy
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import DEVICE, interleaved, ratio, verdict
from torch import Tensor, nn
from torch.optim import Adam

from paperworks.robust.ddg import (
    DDG,
    SemanticEncoder,
    SwapDecoder,
    VariationEncoder,
    reconstruction_violation,
)

ROUNDS, MARGIN = 7, 0.025
BATCH, REPEAT = (64, 20) if DEVICE == "cuda" else (4, 1)
torch.set_num_threads(1)
torch.manual_seed(0)

Batch = tuple[Tensor, Tensor, Tensor]


def draw() -> Batch:
    images, positives = torch.rand(2, BATCH, 1, 28, 28, device=DEVICE).unbind()
    return images, torch.randint(10, (BATCH,), device=DEVICE), positives


a, b = draw(), draw()
networks = [SemanticEncoder(), nn.Linear(128, 10), VariationEncoder(), SwapDecoder(64, 128, (1, 28, 28))]


def ours() -> Callable[[], None]:
    ddg = DDG(*copy.deepcopy(networks)).to(DEVICE)
    ddg.stage0_step(a[0], b[0])
    ddg.begin_stage1()

    def once() -> None:
        ddg.stage1_step(a, b)

    return once


def reference() -> Callable[[], None]:
    """The same mathematics, arranged as the reference implementation does."""
    s, h, v, decoder = (copy.deepcopy(network).to(DEVICE) for network in networks)
    s0, v0, decoder0 = (copy.deepcopy(network).eval() for network in (s, v, decoder))
    classifier = Adam([*s.parameters(), *h.parameters()], lr=1e-3, fused=True)
    generator = Adam(
        [*v.parameters(), *decoder.parameters()], lr=1e-4, betas=(0.0, 0.999), weight_decay=5e-4, fused=True
    )
    multiplier = 0.5

    def once() -> None:
        nonlocal multiplier
        (xa, ya, pa), (xb, yb, pb) = a, b
        x_ba, x_ab = decoder0(v0(xb), s0(xa)), decoder0(v0(xa), s0(xb))
        va, vb, _, _ = v(xa), v(xb), v(pa), v(pb)
        sa, sb, spa, spb = s(xa), s(xb), s(pa), s(pb)
        decoder(vb, sa), decoder(va, sb), decoder(va, sa), decoder(vb, sb)
        hinge_a, mean_a = reconstruction_violation(xa, decoder(va, spa), MARGIN)
        hinge_b, _ = reconstruction_violation(xb, decoder(vb, spb), MARGIN)
        multiplier = min(max(multiplier + 0.01 * (mean_a.item() - MARGIN), 0.0), 1.0)
        risk = sum(F.cross_entropy(h(z), y) for z, y in ((sa, ya), (sb, yb), (spa, ya), (spb, yb)))
        swaps = F.cross_entropy(h(s(x_ba)), ya) + F.cross_entropy(h(s(x_ab)), yb)
        classifier.zero_grad()
        generator.zero_grad()
        (risk + multiplier * (hinge_a + hinge_b) + 0.5 * swaps).backward()
        generator.step()
        classifier.step()

    return once


def plain(positives: bool) -> Callable[[], None]:
    model = nn.Sequential(*copy.deepcopy(networks[:2])).to(DEVICE)
    optimizer = Adam(model.parameters(), lr=1e-3, fused=True)
    x, y = torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])
    if positives:
        x, y = torch.cat([x, a[2], b[2]]), y.repeat(2)

    def once() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return once


def repeated(step: Callable[[], None]) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(REPEAT):
            step()

    return steps


if __name__ == "__main__":
    steps = {"ours": ours(), "reference": reference(), "erm": plain(False), "erm+positives": plain(True)}
    times = interleaved({name: repeated(step) for name, step in steps.items()}, ROUNDS)
    print(f"{DEVICE}, two batches of {BATCH} images of 28x28, {ROUNDS} rounds of {REPEAT}")
    for name in steps:
        print(f"{name:14} {1e3 * statistics.median(times[name]) / REPEAT:8.1f} ms a step")
    met = verdict("ours / reference", ratio(times["ours"], times["reference"]), at_most=0.75)
    for other in ("erm", "erm+positives"):
        verdict(f"ours / {other}", ratio(times["ours"], times[other]))
    sys.exit(not met)
