"""What a CMPL step costs: beside FixMatch, beside cross entropy, and what one forward pass and batched views save.

The auxiliary network has a quarter of the primary's channels; clips are 8 frames of 64x64, 2 labelled and 6
unlabelled ones a step. Bars, for networks of equal depth: at most 1.35 times FixMatch's step, and at most 1.1 times
what the auxiliary network's share of the arithmetic explains. A thin ResNet-50 beside a ResNet-18 is shown without a
bar: its many layers wait for memory, and cost more than their arithmetic. One concatenated forward pass at least 1.1
times as fast as three, at 2 labelled clips of 32x32. Batched views no slower than torchvision's operations clip by
clip, and twice as fast for small clips. CPU time of one thread (a GPU is used where there is one), interleaved, median
of the rounds' ratios. Bound by the 3D convolutions.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from timing import DEVICE, compare, verdict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from paperworks.nn.resnet3d import resnet3d, thin
from paperworks.robust.cmpl import ClipAugment, CMPLModule, Cutout, RandAugment, RandomResizedCrop

ROUNDS, CLASSES = 5, 10
WIDTH = 64 if DEVICE == "cuda" else 32
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)


def clips(count: int, size: int) -> Tensor:
    return torch.rand(count, 3, 8, size, size, generator=generator).to(DEVICE)


def primary(depth: int = 18) -> nn.Module:
    return resnet3d(depth, WIDTH, CLASSES).to(DEVICE)


def auxiliary(depth: int = 18) -> nn.Module:
    return thin(partial(resnet3d, depth, width=WIDTH), 0.25)(num_classes=CLASSES).to(DEVICE)


def arithmetic(model: nn.Module, size: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(clips(2, size))
    return counter.get_total_flops()


def step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def once() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def steps(depth: int, second: int, size: int = 64, labelled: int = 2, unlabelled: int = 6) -> bool:
    f, g, h, a = primary(depth), primary(depth), primary(depth), auxiliary(second)
    known, weak, strong = clips(labelled, size), clips(unlabelled, size), clips(unlabelled, size)
    targets = torch.arange(labelled, device=DEVICE) % CLASSES
    share = arithmetic(a, size) / arithmetic(f, size)
    cmpl, fixmatch = CMPLModule(f, a, threshold=0.0), CMPLModule(g, threshold=0.0)
    run_cmpl = step(cmpl, lambda: cmpl.training_step((known, targets), weak, strong)[0])
    run_fixmatch = step(fixmatch, lambda: fixmatch.training_step((known, targets), weak, strong)[0])
    run_supervised = step(h, lambda: F.cross_entropy(h(known), targets))
    value, base = compare(run_cmpl, run_fixmatch, ROUNDS)
    print(f"ResNet-{depth}, FixMatch's step {base:.0f} ms; with a thin ResNet-{second}, {share:.1%} of its arithmetic:")
    bars = (1.35, 1.1) if depth == second else (None, None)
    good = verdict("CMPL / FixMatch, a step", value, at_most=bars[0])
    good &= verdict("the same / (1 + share of the arithmetic)", value / (1 + share), at_most=bars[1])
    value, base = compare(run_cmpl, run_supervised, ROUNDS)
    explained = (1 + share) * (labelled + 2 * unlabelled) / labelled
    print(f"{'CMPL / cross entropy on the labelled clips, a step':56} {value:6.3f}  arithmetic says {explained:.2f}")
    return good


def forwards(size: int = 32, labelled: int = 2, unlabelled: int = 4) -> bool:
    """A forward and backward pass of both networks over three kinds of clips, together and apart."""
    models = [primary(), auxiliary()]
    parts = [clips(labelled, size), clips(unlabelled, size), clips(unlabelled, size)]

    def together() -> None:
        sum(model(torch.cat(parts)).square().mean() for model in models).backward()

    def apart() -> None:
        sum(model(part).square().mean() for model in models for part in parts).backward()

    return verdict("three forward passes / one", compare(apart, together, ROUNDS)[0], at_least=1.1)


def views(size: int, count: int, bar: float) -> bool:
    """Strong views: a crop, two random operations, cutout."""
    batch = clips(count, size)
    augment = ClipAugment([RandomResizedCrop()], [RandAugment(2), Cutout()])
    peer = v2.Compose([v2.RandomResizedCrop(size), v2.RandAugment(2), v2.RandomErasing(p=1.0, scale=(0.02, 0.25))])

    def clip_by_clip() -> Tensor:
        # torchvision's v2 takes the leading dimensions of [T, C, H, W] as a batch and draws once for them.
        return torch.stack([peer(clip.transpose(0, 1)).transpose(0, 1) for clip in batch])

    value, ours = compare(clip_by_clip, lambda: augment.strong(batch, generator), ROUNDS)
    print(f"{count} strong views of {size}x{size} take {ours:.1f} ms")
    return verdict("torchvision, clip by clip / ours, batched", value, at_least=bar)


if __name__ == "__main__":
    print(f"{DEVICE}, PyTorch {torch.__version__}")
    sys.exit(not all([steps(50, 50), steps(18, 18), steps(18, 50), forwards(), views(64, 16, 1.0), views(16, 48, 2.0)]))
