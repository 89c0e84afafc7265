"""What an R-Mix step costs: beside a plain step, and beside the formulation of the reference implementation.

The network is a CIFAR ResNet-18 (3x3 stem) on 32x32 images. With F one forward pass and B = 2F one backward pass, half
of it for the weights, a plain step is F + B = 3F and R-Mix adds F + B/2 = 2F; the reference takes the weights'
gradients twice, 6F. Bars: at most 1.75 times a plain step; the reference at least 1.15 times ours; drawing, masking and
mixing at most 3 % of a plain step; the quantiles at least 5 times as fast as the diagonal of the batch x batch table,
at a batch of 1000 and 64 patches. CPU time of one thread (a GPU is used where there is one), interleaved, median of the
rounds' ratios. Bound by the convolutions; the quantiles by sorting.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from timing import DEVICE, compare, verdict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torchvision.models import resnet18

from paperworks.robust.rmix import RMix, row_quantile

ROUNDS, REPEAT, CLASSES = 7, 20, 10
BATCH = 256 if DEVICE == "cuda" else 16
torch.set_num_threads(1)
torch.manual_seed(0)


def network() -> nn.Module:
    model = resnet18(num_classes=CLASSES)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model.to(DEVICE).train()


x, y = torch.rand(BATCH, 3, 32, 32, device=DEVICE), torch.randint(CLASSES, (BATCH,), device=DEVICE)


def reference_mix(model: nn.Module, alpha: float = 1.0, num_patches: int = 4) -> tuple[Tensor, Tensor]:
    """The same mathematics by a full backward pass, a table of quantiles, and one term a case."""
    size, quantiles = x.shape[-1], torch.linspace(0, 0.99, 10, device=DEVICE)
    pixels = x.clone().requires_grad_()
    model.zero_grad()
    (2 * F.cross_entropy(model(pixels), y, reduction="none") / CLASSES).mean().backward()
    saliency = F.avg_pool2d(pixels.grad.square().mean(1).sqrt(), size // num_patches)
    saliency = saliency / saliency.sum((1, 2), keepdim=True)
    q = quantiles[torch.randint(10, (BATCH,), device=DEVICE)]
    cut = torch.quantile(saliency.flatten(1), q, dim=1).diagonal()
    mask = F.interpolate((saliency >= cut[:, None, None]).double()[:, None], size=size)
    perm, lam = torch.randperm(BATCH, device=DEVICE), torch.distributions.Beta(alpha, alpha).sample().item()
    theirs, labels = mask[perm], F.one_hot(y, CLASSES)
    equal, differ = (mask == theirs).double(), (mask != theirs).double()
    mixed = equal * (lam * x + (1 - lam) * x[perm]) + differ * (mask * x + theirs * x[perm])
    a, b, c = (share.flatten(1).mean(1, keepdim=True) for share in (equal, differ * mask, differ * theirs))
    soft = a * (lam * labels + (1 - lam) * labels[perm]) + b * labels + c * labels[perm]
    return mixed.float(), soft.float()


def step(mix: Callable[[nn.Module], tuple[Tensor, Tensor]]) -> Callable[[], None]:
    model = network()
    optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def once() -> None:
        inputs, targets = mix(model)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return once


def repeat(function: Callable[[], object]) -> Callable[[], None]:
    """For what takes less time than clocks and caches need to settle."""

    def often() -> None:
        for _ in range(REPEAT):
            function()

    return often


def steps() -> bool:
    mix = RMix(CLASSES)
    plain, ours, reference = step(lambda model: (x, y)), step(lambda model: mix(model, x, y)), step(reference_mix)
    value, base = compare(ours, plain, ROUNDS)
    print(f"a plain step on {BATCH} images takes {base:.1f} ms")
    good = verdict("R-Mix / plain, a step (arithmetic says 1.67)", value, at_most=1.75)
    good &= verdict(
        "reference / R-Mix, a step (arithmetic says 1.20)", compare(reference, ours, ROUNDS)[0], at_least=1.15
    )
    soft, saliency = F.one_hot(y, CLASSES).float(), torch.rand(BATCH, 32, 32, device=DEVICE)
    mixing = compare(lambda: mix.mix(x, soft, saliency, mix.draw(BATCH)), plain, ROUNDS)[0]
    return good & verdict("drawing, masking and mixing / a plain step", mixing, at_most=0.03)


def quantiles() -> bool:
    good = True
    for batch, bar in ((100, 1.0), (1000, 5.0)):
        values, q = torch.rand(batch, 64, device=DEVICE), torch.rand(batch, device=DEVICE)
        value, ours = compare(
            repeat(partial(torch.quantile, values, q, dim=1)),  # its diagonal is a view, at no cost
            repeat(partial(row_quantile, values, q)),
            ROUNDS,
        )
        print(f"quantiles of a batch of {batch} take {ours / REPEAT:.2f} ms")
        good &= verdict(f"table of quantiles / ours, batch {batch}", value, at_least=bar)
    return good


if __name__ == "__main__":
    print(f"{DEVICE}, PyTorch {torch.__version__}")
    sys.exit(not all([steps(), quantiles()]))
