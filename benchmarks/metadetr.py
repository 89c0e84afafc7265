"""Meta-DETR: 20 classes five at a time beside one at a time; four episodes in one call beside four whole passes; the
codes of supports beside the released way, which sends supports through the whole encoder; and the aggregation beside a
layer of the encoder.

CPU time of one thread (wall time on a GPU), median of ratios over interleaved rounds. Bound by GEMM. What both ways
share, the backbone and the first attention, bounds the first ratio from below: in the paper's detector it takes 0.7 of
the time of four episodes, so that there is no bar there.

    .venv/bin/python benchmarks/metadetr.py
"""

import sys
from typing import Any

import torch
from timing import DEVICE, compare, verdict
from torch import Tensor, nn
from torchvision.models import resnet101
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from paperworks.detection import CodeBook, MetaDetr
from paperworks.detection.core.detr import with_features

ROUNDS, FEW = 7, 3
torch.set_num_threads(1)
torch.manual_seed(0)

SIZES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "64x64, d=64, 2+2 layers (the claim's)": ((16, 64), {"queries": 8, "encoders": 2, "decoders": 2}),
    "64x64, d=64, 2+3 layers (the tiny preset)": ((16, 64), {"queries": 12, "encoders": 2, "decoders": 3}),
    "512x512, ResNet-101, d=256, 6+6 layers, 300 queries (the paper's)": (
        (1, 512),
        {"queries": 300, "d": 256, "heads": 8, "hidden": 1024, "encoders": 6, "decoders": 6},
    ),
}


class ResNet(nn.Module):
    """Its last map, stride 32, projected."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.body = IntermediateLayerGetter(resnet101(norm_layer=FrozenBatchNorm2d), {"layer4": "last"})
        self.project = nn.Conv2d(2048, d, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.project(self.body(images)["last"])]


def detector(slots: int, sizes: dict[str, Any]) -> MetaDetr:
    backbone = ResNet(256) if sizes.get("d") == 256 else None
    return MetaDetr(20, slots, backbone=backbone, **sizes).to(DEVICE).eval()


def book(model: MetaDetr, count: int) -> CodeBook:
    codes = torch.rand(count, model.aggregate.d, device=DEVICE)
    return CodeBook(tuple(range(count)), codes, ((),) * count, model.fingerprint)


def finding(name: str, images: Tensor, sizes: dict[str, Any], rounds: int, bar: float | None) -> bool:
    five, one = detector(5, sizes), detector(1, sizes)
    many, single = book(five, 20), book(one, 20)
    value, slow = compare(lambda: five.predict(images, many), lambda: one.predict(images, single), rounds)
    print(f"{name}: 20 classes one by one take {slow / len(images):.1f} ms a picture")
    good = verdict("  20 classes: five at a time / one at a time", value, at_most=bar)
    parts = [many.of(range(start, start + 5)) for start in range(0, 20, 5)]
    value, _ = compare(
        lambda: five.predict(images, many), lambda: [five.predict(images, part) for part in parts], rounds
    )
    good &= verdict("  four episodes: together / each by itself", value, at_most=0.75)
    shared, _ = compare(lambda: five.attend(images, None), lambda: five.predict(images, many), rounds)
    verdict("  of four episodes, what is shared (backbone, attention)", shared)
    return good


def supports(images: Tensor, sizes: dict[str, Any]) -> None:
    model = detector(5, sizes)
    shown = images.repeat(-(-25 // len(images)), 1, 1, 1)[:25]
    boxes = torch.tensor([0.5, 0.5, 0.4, 0.4], device=DEVICE).expand(25, 4)

    def released() -> None:
        codes = model.encode(shown, boxes)
        seen = model.attend(shown, None)  # not twice in the released code: taken off below
        y, tau, _ = model.aggregate(seen.features, codes[None, :5].expand(25, -1, -1))
        model.encoder([with_features(seen, model.first.feed(y + tau))])

    with torch.no_grad():
        value, _ = compare(released, lambda: model.encode(shown, boxes), ROUNDS)
    verdict("  25 supports: through the whole encoder / layer 1 alone", value - 1)


def aggregation(images: Tensor, sizes: dict[str, Any]) -> None:
    model = detector(5, sizes)
    codes = book(model, 5).codes[None]
    with torch.no_grad():
        seen = model.attend(images, None)
        value, _ = compare(
            lambda: model.aggregate(seen.features, codes),
            lambda: model.first(seen.features, seen.pos, [seen]),
            ROUNDS,
        )
    verdict("  aggregation / an ordinary layer of the encoder", value)


if __name__ == "__main__":
    print(f"{DEVICE}, PyTorch {torch.__version__}")
    met = True
    for name, ((batch, side), sizes) in SIZES.items():
        images = torch.rand(batch, 3, side, side, device=DEVICE)
        large = side > 64
        met &= finding(name, images, sizes, FEW if large else ROUNDS, None if large else 0.35)
        aggregation(images, sizes)
        if not large or DEVICE == "cuda":
            supports(images, sizes)
    sys.exit(not met)
