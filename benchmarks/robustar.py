"""What Robustar's parts cost.

Influence on 100 test losses of 10,000 training examples, 512 features, 10 classes: at least 100 times as fast as
LiSSA on the same layer, with ranks that agree (Spearman at least 0.95) with a solution to 1e-5, and within 2 s on two
threads. LiSSA's time is that of 40 of its steps, times the 9,000 of the reference's example (batches of 1; a series a
loss, as usual, and without a bar all losses at once, as ours can). A paired step of one concatenated batch: at least
1.3 times as fast as two passes at 64 images (ConvNet on 8x8; no bar for ResNet-18 on 32x32, which fills the core
anyway). Fills: 128 images of 224x224 within 50 ms each mode. A page of 60 thumbnails of 224x224 JPEGs, made and then
read again: within 300 ms; saving a mask: within 100 ms.

CPU time of one thread where there is no GPU, interleaved, medians of rounds; pages and saves are wall time.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr
from timing import DEVICE, compare, interleaved, seconds, verdict
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from paperworks.audit import RobustarProject, fill_masked, last_layer_influence, lissa_influence, paired_loss
from paperworks.audit.robustar import FILLS
from paperworks.nn import ConvNet

torch.set_num_threads(1)
torch.manual_seed(0)


def influence(n: int = 10_000, tests: int = 100, width: int = 512, classes: int = 10) -> list[bool]:
    means = 0.1 * torch.randn(classes, width)
    y = torch.randint(classes, (n + tests,))
    phi = torch.relu(means[y] + torch.randn(n + tests, width) * torch.linspace(0.05, 1, width)).to(DEVICE)
    y = y.to(DEVICE)
    head = nn.Linear(width, classes).to(DEVICE)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(phi[:n]), y[:n]) + 5e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    probs = head(phi).softmax(1).detach()
    ours = partial(last_layer_influence, phi[:n], probs[:n], y[:n], phi[n:], probs[n:], y[n:])
    found, exact = ours().cpu(), ours(tolerance=1e-5).cpu()
    agreement = min(spearmanr(a, b)[0] for a, b in zip(found, exact, strict=True))
    mine = statistics.median(seconds(ours) for _ in range(3))
    theirs = tests * lissa(head, (phi[:n], y[:n]), (phi[n : n + 1], y[n : n + 1]))
    at_once = lissa(head, (phi[:n], y[:n]), (phi[n:], y[n:]))
    print(f"ours {mine:.2f} s, LiSSA {theirs:.0f} s, LiSSA with all losses at once {at_once:.0f} s")
    torch.set_num_threads(2)
    begun = time.perf_counter()
    ours()
    two = time.perf_counter() - begun
    torch.set_num_threads(1)
    return [
        verdict("influence: LiSSA's time over ours", theirs / mine, at_least=100),
        verdict("influence: LiSSA's with all losses at once over ours", at_once / mine),
        verdict("influence: smallest Spearman with the exact one", agreement, at_least=0.95),
        verdict("influence: seconds on two threads", two, at_most=2.0),
    ]


def lissa(head: nn.Module, train: tuple[torch.Tensor, ...], test: tuple[torch.Tensor, ...], depth: int = 9000) -> float:
    """Seconds of a series of this depth, from a shorter one."""
    few, many = ([seconds(partial(lissa_influence, head, train, test, depth=d)) for _ in range(4)] for d in (1, 41))
    return (statistics.median(many[1:]) - statistics.median(few[1:])) / 40 * depth


def paired(name: str, model: nn.Module, side: int, images: int, bar: float | None) -> bool:
    model = model.to(DEVICE)
    x, x2 = (torch.rand(images, 3, side, side, device=DEVICE) for _ in range(2))
    y = torch.randint(10, (images,), device=DEVICE)

    def one() -> None:
        paired_loss(*model(torch.cat([x, x2])).chunk(2), y).backward()

    def two() -> None:
        paired_loss(model(x), model(x2), y).backward()

    ratio, _ = compare(two, one, 15)
    return verdict(f"two passes over one batch: {name}", ratio, at_least=bar)


def fills() -> list[bool]:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(128, 224, 224, 3), dtype=np.uint8)
    mask = np.zeros((224, 224), bool)
    mask[60:160, 60:160] = True

    def all_images(mode: str) -> None:
        for image in images:
            fill_masked(image, mask, mode, rng)

    times = interleaved({mode: partial(all_images, mode) for mode in FILLS}, 5)
    return [
        verdict(f"fill 128 images of 224x224, ms: {mode}", 1e3 * statistics.median(row), at_most=50)
        for mode, row in times.items()
    ]


def pages() -> list[bool]:
    rng, met = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        for label in ("a", "b"):
            path = Path(folder) / "train" / label
            path.mkdir(parents=True)
            for index in range(30):
                smooth = Image.fromarray(rng.integers(256, size=(14, 14, 3), dtype=np.uint8)).resize((224, 224))
                smooth.save(path / f"{index}.jpg", quality=90)
        project = RobustarProject(folder, ConvNet(3, 2))

        def page() -> None:
            for entry in project.images(per_page=60).entries:
                project.thumbnail(entry.name)

        def wall(function: Callable[[], object]) -> float:
            begun = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - begun)

        met.append(verdict("a page of 60 thumbnails, first time, ms", wall(page), at_most=300))
        met.append(verdict("a page of 60 thumbnails, again, ms", wall(page), at_most=300))
        mask = np.zeros((224, 224), bool)
        save = statistics.median(wall(lambda: project.save_mask("train/a/0.jpg", mask)) for _ in range(9))
        met.append(verdict("saving a mask, ms", save, at_most=100))
    return met


if __name__ == "__main__":
    print(f"{DEVICE}, PyTorch {torch.__version__}")
    small = resnet18(num_classes=10)
    small.conv1, small.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    results = [
        *influence(),
        paired("ConvNet, 64 images of 8x8", ConvNet(3, 10), 8, 64, 1.3),
        paired("ResNet-18, 16 images of 32x32", small, 32, 16, None),
        *fills(),
        *pages(),
    ]
    sys.exit(not all(results))
