"""SAM-DETR's decoder layer beside the released way of computing it, with the same weights; a step of training beside
DETR's; and of the detection core, RoI sampling beside torchvision's and the matcher beside transformers'.

CPU time of one thread (wall time on a GPU), median of ratios over interleaved rounds.

    .venv/bin/python benchmarks/samdetr.py
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from timing import DEVICE, interleaved, ratio, verdict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torchvision.ops import box_convert, roi_align
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

from paperworks.detection import SamDecoderLayer, SamDetr
from paperworks.detection.core import (
    Detr,
    DetrDecoderLayer,
    HungarianMatcher,
    Level,
    Prediction,
    SetCriterion,
    Targets,
    baseline,
    flat_targets,
    grid,
    level,
    pack,
    roi_sample,
    sine_embed,
)
from paperworks.worlds import flat_scenes

ROUNDS = 3
torch.set_num_threads(1)
torch.manual_seed(0)


def boxes(*shape: int) -> Tensor:
    sides = 0.05 + 0.2 * torch.rand(*shape, 2, device=DEVICE)
    return torch.cat([sides / 2 + torch.rand(*shape, 2, device=DEVICE) * (1 - sides), sides], -1)


def corners(rois: Tensor, width: int, height: int) -> list[Tensor]:
    scale = rois.new_tensor([width, height, width, height])
    return [box_convert(b, "cxcywh", "xyxy") * scale for b in rois]


def released(layer: SamDecoderLayer, content: Tensor, reference: Tensor, memory: Level, samples: int = -1) -> Tensor:
    """The layer as the released code goes about it: two RoIAligns at full width, keys repeated for every head, the ways
    from every keypoint to every cell as pairs of numbers.

    By default RoIAlign takes more samples in boxes of more than 7 cells; with one sample a bin the result is ours.
    """
    align, cross = layer.align, layer.cross
    (batch, queries, d), heads = content.shape, align.heads
    content = layer.among(content, reference)
    rois = corners(reference, memory.width, memory.height)
    crop = partial(roi_align, memory.as_map(), rois, (7, 7), sampling_ratio=samples, aligned=True)
    regions, again = crop(), crop()
    narrow = F.conv2d(again, align.project.weight[..., None, None], align.project.bias).relu()
    numbers = align.locate(narrow.permute(0, 2, 3, 1).flatten(1))
    delta, scales = numbers.view(batch, queries, 2, heads, 2).unbind(2)
    delta = delta.tanh()
    features = F.grid_sample(regions, delta.reshape(batch * queries, 1, heads, 2), align_corners=False)
    features = features.view(batch, queries, d, heads).transpose(2, 3)
    features = features * align.content_gate(content).view_as(features).sigmoid()
    points = reference[..., None, :2] + reference[..., None, 2:] / 2 * delta
    with torch.no_grad():
        code = sine_embed(points, d)
    code = code * align.pos_gate(content).view_as(code).sigmoid()
    repeat = partial(torch.Tensor.expand, size=(-1, -1, heads, -1))
    q = cross.content_q(features) + cross.place_q(code)
    k = repeat(cross.content_k(memory.features)[:, :, None]) + repeat(cross.place_k(memory.pos)[:, :, None])
    q, k = (x.transpose(1, 2).reshape(batch * heads, -1, d) for x in (q * d**-0.5, k))
    v = cross.value(memory.features).view(batch, -1, heads, d // heads).transpose(1, 2).flatten(0, 1)
    cells = (points * points.new_tensor([memory.width, memory.height])).transpose(1, 2).flatten(0, 1)
    centres = grid(memory.height, memory.width).to(cells) * cells.new_tensor([memory.width, memory.height])
    scales = scales.transpose(1, 2).flatten(0, 1)[:, :, None]
    distance = ((cells[:, :, None] - centres).pow(2) * (scales * scales)).sum(-1)
    logits = torch.bmm(q, k.transpose(1, 2)) - distance.abs() / 8
    logits = logits.view(batch, heads, queries, -1).masked_fill(memory.pad[:, None, None], -torch.inf)
    attended = torch.bmm(logits.softmax(-1).flatten(0, 1), v).view(batch, heads, queries, -1)
    return layer.feed(layer.norm(content + cross.out(attended.transpose(1, 2).flatten(2))))


def decoder_layer() -> bool:
    batch, queries, d, heads, height, width = 2, 300, 256, 8, 25, 38
    layer, plain = SamDecoderLayer(d, heads, 2048, smca=True).to(DEVICE), DetrDecoderLayer(d, heads, 2048).to(DEVICE)
    features = torch.randn(batch, d, height, width, device=DEVICE).requires_grad_()
    pad = torch.zeros(batch, height, width, dtype=torch.bool, device=DEVICE)
    content = torch.randn(batch, queries, d, device=DEVICE)
    reference = torch.randn(batch, queries, 4, device=DEVICE).sigmoid()  # as they begin
    torch.testing.assert_close(
        layer(content, reference, [level(features, pad)]),
        released(layer, content, reference, level(features, pad), 1),
        atol=1e-3,
        rtol=1e-3,
    )

    def both_ways(forward: Callable[[Level], Tensor]) -> None:
        forward(level(features, pad)).sum().backward()

    query = torch.randn(batch, heads * queries, d, device=DEVICE)
    key = torch.randn(batch, height * width, d, device=DEVICE)
    times = interleaved(
        {
            "released": lambda: both_ways(lambda memory: released(layer, content, reference, memory)),
            "one sample": lambda: both_ways(lambda memory: released(layer, content, reference, memory, 1)),
            "ours": lambda: both_ways(lambda memory: layer(content, reference, [memory])),
            "detr": lambda: both_ways(lambda memory: plain(content, reference, [memory], content)),
            "logits": lambda: torch.bmm(query, key.transpose(1, 2)),
        },
        ROUNDS,
    )
    for name, seconds in times.items():
        print(f"decoder layer, forward and backward: {name:12} {1e3 * statistics.median(seconds):9.1f} ms")
    verdict("decoder layer: ours / DETR's", ratio(times["ours"], times["detr"]))
    verdict("decoder layer: ours / 3 products of logits alone", ratio(times["ours"], times["logits"]) / 3)
    verdict("decoder layer: released, with one sample a bin / ours", ratio(times["one sample"], times["ours"]))
    return verdict("decoder layer: released / ours", ratio(times["released"], times["ours"]), at_least=2.5)


def training_step() -> bool:
    scenes = flat_scenes(16, classes=3, objects=(1, 3), radius=(8.0, 14.0))
    images, targets = scenes.images.to(DEVICE), pack(flat_targets(scenes)).to(DEVICE)

    def step(model: Detr) -> Callable[[], None]:
        model.to(DEVICE)
        optimizer, criterion = AdamW(model.parameters(), lr=1e-4), SetCriterion()

        def once() -> None:
            optimizer.zero_grad()
            criterion(model(images), targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return once

    models = {"detr": baseline("detr", 3), "sam": SamDetr(3), "sam-smca": SamDetr(3, smca=True)}
    times = interleaved({name: step(model) for name, model in models.items()}, 3 * ROUNDS)
    verdict("training step, 64x64, batch of 16: SAM / DETR", ratio(times["sam"], times["detr"]), at_most=1.9)
    return verdict("training step: SAM with SMCA / DETR", ratio(times["sam-smca"], times["detr"]), at_most=1.9)


def regions() -> bool:
    met = True
    for batch, queries, d, height, width in ((16, 12, 64, 8, 8), (2, 300, 256, 25, 38)):
        features, rois = torch.randn(batch, d, height, width, device=DEVICE).requires_grad_(), boxes(batch, queries)
        pixels = corners(rois, width, height)
        theirs = partial(roi_align, features, pixels, (7, 7), sampling_ratio=1, aligned=True)
        torch.testing.assert_close(roi_sample(features, rois).flatten(0, 1), theirs(), atol=1e-4, rtol=1e-3)
        times = interleaved(
            {
                "theirs": lambda theirs=theirs: theirs().sum().backward(),
                "ours": lambda features=features, rois=rois: roi_sample(features, rois).sum().backward(),
            },
            3 * ROUNDS,
        )
        name = f"RoI sampling, {batch * queries} of {d} channels: torchvision's / ours"
        met &= verdict(name, ratio(times["theirs"], times["ours"]), at_least=1.0)
    return met


def matcher() -> bool:
    met = True
    theirs = DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    for batch, queries, classes, objects in ((16, 12, 3, 2), (16, 300, 80, 7)):
        prediction = Prediction(torch.randn(batch, queries, classes, device=DEVICE), boxes(batch, queries))
        targets = [Targets(torch.randint(classes, (objects,), device=DEVICE), boxes(objects)) for _ in range(batch)]
        outputs = {"logits": prediction.logits, "pred_boxes": prediction.boxes}
        rows = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
        pairs = zip(HungarianMatcher()(prediction, targets), theirs(outputs, rows), strict=True)
        assert all(torch.equal(a.cpu(), b.cpu()) for ours, other in pairs for a, b in zip(ours, other, strict=True))
        times = interleaved(
            {
                "theirs": partial(theirs, outputs, rows),
                "ours": partial(HungarianMatcher(), prediction, targets),
            },
            7 * ROUNDS,
        )
        name = f"matcher, {batch} pictures, {queries} queries, {objects} objects: transformers' / ours"
        met &= verdict(name, ratio(times["theirs"], times["ours"]), at_least=1.0)
    return met


if __name__ == "__main__":
    print(f"{DEVICE}, PyTorch {torch.__version__}")
    sys.exit(not all([decoder_layer(), training_step(), regions(), matcher()]))
