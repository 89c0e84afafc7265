"""Queries resampled from the image: keypoints, gates, attention over whole vectors, levels from coarse to fine."""

import json
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torchvision.ops import box_convert, roi_align

from paperworks.bench import Run, load_claim
from paperworks.claims.detection.drawing import found
from paperworks.detection import (
    AlignedCrossAttention,
    SamDecoderLayer,
    SamDetr,
    SemanticsAligner,
    level_schedule,
    smca_prior,
)
from paperworks.detection.core import (
    Decoder,
    SetCriterion,
    Targets,
    TinyBackbone,
    flat_targets,
    level,
    pack,
    roi_sample,
    sine_embed,
)
from paperworks.errors import UserError
from paperworks.worlds import flat_scenes, write_coco

KINDS = ("keypoints", "keypoint", "average", "max", "none")
each_kind = pytest.mark.parametrize("resample", KINDS)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def whole(features):
    """A level without padding."""
    return level(features, torch.zeros(len(features), *features.shape[-2:], dtype=torch.bool))


def pixels(boxes, width, height):
    return [box_convert(b, "cxcywh", "xyxy") * torch.tensor([width, height, width, height]) for b in boxes]


def some_boxes(seed, batch=2, queries=4, outside=False):
    sides = 0.05 + 0.5 * torch.rand(batch, queries, 2, generator=draw(seed))
    centres = torch.rand(batch, queries, 2, generator=draw(seed + 1))
    return torch.cat([centres * 1.4 - 0.2 if outside else sides / 2 + centres * (1 - sides), sides], -1)


def looking_at(aligner, *deltas):
    """The aligner with its keypoints nailed down."""
    last = aligner.locate[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias[: 2 * len(deltas)] = torch.tensor(deltas).atanh().clamp(-50, 50).flatten()
    return aligner


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {"d": 16, "heads": 2, "hidden": 32, "queries": 5, "encoders": 1, "decoders": 2}
    return SamDetr(3, **sizes | changes)


class Patches(nn.Module):
    """A backbone that does not look beyond its cells, so that a canvas around the picture cannot reach them."""

    def __init__(self, *sides):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 16, side, side) for side in sides)

    def forward(self, images):
        return [conv(images) for conv in self.convs]


# Regions and keypoints.


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_regions_equal_torchvision_s_wherever_boxes_lie(seed):
    features, boxes = torch.randn(2, 3, 10, 14, generator=draw(seed)), some_boxes(seed, outside=True)
    expected = roi_align(features, pixels(boxes, 14, 10), (7, 7), sampling_ratio=1, aligned=True)
    torch.testing.assert_close(roi_sample(features, boxes), expected.view(2, 4, 3, 7, 7), atol=1e-5, rtol=1e-4)


DELTAS = (0.0, 0.0), (0.5, -0.5), (6 / 7, -6 / 7), (1.0, 1.0), (-1.0, 0.0)


@pytest.mark.parametrize("edge", ["zeros", "border"])
def test_keypoints_on_a_ramp(edge):
    column, row = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="xy")
    features = torch.stack([column, row, column, row])[None]
    aligner = looking_at(SemanticsAligner(4, 5, gate=False, edge=edge), *DELTAS)
    found = aligner(torch.zeros(1, 1, 4), torch.tensor([[[0.5, 0.5, 0.5, 0.75]]]), whole(features))
    on_edge = {"zeros": [[1.3036, 1.5179], [0.8929, 1.75]], "border": [[5.2143, 6.0714], [1.7857, 3.5]]}[edge]
    expected = torch.tensor([[3.5, 3.5], [4.5, 2.0], [5.2143, 0.9286], *on_edge])
    torch.testing.assert_close(found.content[0, 0, :, :2], expected, atol=1e-4, rtol=0)
    places = torch.tensor([[0.5, 0.5], [0.625, 0.3125], [5 / 7, 0.5 - 9 / 28], [0.75, 0.875], [0.25, 0.5]])
    torch.testing.assert_close(found.points[0, 0], places)
    torch.testing.assert_close(found.pos[0, 0], sine_embed(places, 4))
    assert found.scales is None


@pytest.mark.parametrize("smca", [False, True])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_the_short_way_is_the_published_way(smca, seed):
    """RoIAlign at full width, convolution, MLP, interpolation within the 49 bins, gates."""
    torch.manual_seed(seed)
    d, heads, boxes = 8, 3, some_boxes(seed, outside=True)
    aligner = SemanticsAligner(d, heads, smca=smca)
    nn.init.normal_(aligner.locate[-1].weight)
    features, content = torch.randn(2, d, 9, 12, generator=draw(seed)), torch.randn(2, 4, d, generator=draw(seed + 1))
    found = aligner(content, boxes, whole(features))
    regions = roi_align(features, pixels(boxes, 12, 9), (7, 7), sampling_ratio=1, aligned=True)
    narrow = F.conv2d(regions, aligner.project.weight[..., None, None], aligner.project.bias).relu()
    numbers = aligner.locate(narrow.permute(0, 2, 3, 1).flatten(1))
    delta = numbers[:, : 2 * heads].view(8, 1, heads, 2).tanh()
    features = F.grid_sample(regions, delta, align_corners=False)[:, :, 0].transpose(1, 2).view(2, 4, heads, d)
    gate = aligner.content_gate(content).view(2, 4, heads, d).sigmoid()
    torch.testing.assert_close(found.content, features * gate, atol=1e-4, rtol=1e-3)
    places = boxes[:, :, None, :2] + boxes[:, :, None, 2:] / 2 * delta.view(2, 4, heads, 2)
    gate = aligner.pos_gate(content).view(2, 4, heads, d).sigmoid()
    torch.testing.assert_close(found.pos, sine_embed(places, d) * gate, atol=1e-4, rtol=1e-3)
    if smca:
        torch.testing.assert_close(found.scales, numbers[:, 2 * heads :].view(2, 4, heads, 2), atol=1e-4, rtol=1e-3)


def test_a_constant_image_and_gates_that_do_not_look():
    aligner = SemanticsAligner(8, 2)
    with torch.no_grad():
        aligner.locate[-1].bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
        aligner.locate[-1].weight.zero_()
        aligner.content_gate.weight.zero_()
        aligner.content_gate.bias.zero_()
    constant = torch.randn(8, generator=draw())
    found = aligner(
        torch.randn(1, 3, 8, generator=draw(1)),
        some_boxes(2, 1, 3),
        whole(constant.view(1, 8, 1, 1).expand(1, 8, 6, 6)),
    )
    torch.testing.assert_close(found.content, (constant / 2).expand(1, 3, 2, 8))


@pytest.mark.parametrize("resample", ["average", "max"])
def test_pooled_regions(resample):
    features, boxes = torch.randn(2, 8, 6, 6, generator=draw()), some_boxes(1)
    found = SemanticsAligner(8, 2, gate=False, resample=resample)(torch.zeros(2, 4, 8), boxes, whole(features))
    regions = roi_sample(features, boxes).flatten(3)
    expected = regions.mean(-1) if resample == "average" else regions.amax(-1)
    torch.testing.assert_close(found.content, expected[:, :, None].expand(-1, -1, 2, -1))
    torch.testing.assert_close(found.points, boxes[:, :, None, :2].expand(-1, -1, 2, -1))


def test_one_keypoint_for_all_heads_and_no_resampling():
    features, content = torch.randn(2, 8, 6, 6, generator=draw()), torch.randn(2, 4, 8, generator=draw(1))
    found = SemanticsAligner(8, 2, gate=False, resample="keypoint")(content, some_boxes(1), whole(features))
    assert torch.equal(found.content[:, :, 0], found.content[:, :, 1])
    assert torch.equal(found.points[:, :, 0], found.points[:, :, 1])
    found = SemanticsAligner(8, 2, gate=False, smca=True, resample="none")(content, some_boxes(1), whole(features))
    assert torch.equal(found.content, content[:, :, None].expand(-1, -1, 2, -1))
    assert found.scales.shape == (2, 4, 2, 2)


def test_keypoints_learn_through_what_they_sample_alone():
    aligner = SemanticsAligner(8, 2)
    inputs = torch.randn(1, 3, 8, generator=draw()), some_boxes(1, 1, 3)
    memory = whole(torch.randn(1, 8, 6, 6, generator=draw(1)))
    found = aligner(*inputs, memory)
    bias = aligner.locate[-1].bias
    codes_alone = torch.autograd.grad(found.pos.sum(), bias, retain_graph=True, allow_unused=True)[0]
    assert codes_alone is None
    assert torch.autograd.grad(found.content.sum(), bias)[0].abs().min() > 0


def test_the_gradient_of_keypoints_is_that_of_finite_differences():
    aligner = looking_at(SemanticsAligner(8, 2), (0.1, -0.2), (0.33, 0.62)).double()
    inputs = torch.randn(1, 3, 8, generator=draw()).double(), some_boxes(1, 1, 3).double()
    memory = whole(torch.randn(1, 8, 6, 6, generator=draw(1)).double())

    def content(bias):
        return torch.func.functional_call(aligner, {"locate.6.bias": bias}, (*inputs, memory)).content

    assert torch.autograd.gradcheck(content, aligner.locate[-1].bias.detach().clone().requires_grad_())


def test_moving_picture_and_box_together_changes_no_content():
    inner = torch.randn(1, 8, 5, 5, generator=draw())
    aligner, content = SemanticsAligner(8, 2), torch.randn(1, 1, 8, generator=draw(1))
    found = []
    for shift in (0, 1):
        features = F.pad(inner, (3 + shift, 4 - shift, 2 + shift, 5 - shift))
        box = torch.tensor([[[(5.3 + shift) / 12, (4.4 + shift) / 12, 3.5 / 12, 4.2 / 12]]])
        found.append(aligner(content, box, whole(features)).content)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


# Attention.


def test_the_prior_by_hand():
    memory = whole(torch.zeros(1, 4, 6, 8))
    prior = smca_prior(torch.tensor([[[[2 / 8, 3 / 6]]]]), torch.tensor([[[[1.0, 2.0]]]]), memory)
    assert prior.shape == (1, 1, 1, 48)
    assert prior[0, 0, 0, 8 + 4].item() == pytest.approx(-1.90625)


def test_heads_compare_whole_vectors():
    """As attention with keys repeated for every head."""
    attention, memory = AlignedCrossAttention(8, 2), whole(torch.randn(2, 8, 3, 4, generator=draw()))
    content, pos = (torch.randn(2, 5, 2, 8, generator=draw(k)) for k in (1, 2))
    prior = -torch.rand(2, 2, 5, 12, generator=draw(3))
    q = (attention.content_q(content) + attention.place_q(pos)).transpose(1, 2)
    k = (attention.content_k(memory.features) + attention.place_k(memory.pos))[:, None].expand(-1, 2, -1, -1)
    v = attention.value(memory.features).view(2, 12, 2, 4).transpose(1, 2)
    for given_prior in (None, prior):
        mixed = F.scaled_dot_product_attention(q, k, v, given_prior).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention(content, pos, memory, given_prior), attention.out(mixed))
    weights = attention.weights(content, pos, memory)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5))


def test_no_attention_falls_on_padding():
    pad = torch.zeros(1, 8, 8, dtype=torch.bool)
    pad[:, :, 4:] = True
    memory = level(torch.randn(1, 8, 4, 4, generator=draw()), pad)
    content = torch.randn(1, 2, 2, 8, generator=draw(1))
    weights = AlignedCrossAttention(8, 2).weights(content, content, memory).view(2, 2, 4, 4)
    assert not weights[..., 2:].any()
    torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(2, 2))


def test_scales_of_zero_are_no_prior():
    torch.manual_seed(0)
    layer = SamDecoderLayer(8, 2, 16, smca=True)
    with torch.no_grad():
        layer.align.locate[-1].weight.zero_()
    plain = SamDecoderLayer(8, 2, 16)
    same = {k: v for k, v in layer.state_dict().items() if "locate.6" not in k}
    plain.load_state_dict(same, strict=False)
    with torch.no_grad():
        plain.align.locate[-1].weight.zero_()
    inputs = torch.randn(1, 3, 8, generator=draw()), some_boxes(1, 1, 3), [whole(torch.randn(1, 8, 4, 4))]
    assert torch.equal(layer(*inputs), plain(*inputs))


def test_scales_begin_with_a_gradient():
    layer = SamDecoderLayer(8, 2, 16, smca=True)
    memory = [whole(torch.randn(1, 8, 4, 4, generator=draw()))]
    layer(torch.randn(1, 3, 8, generator=draw(1)), some_boxes(1, 1, 3), memory).square().sum().backward()
    assert layer.align.locate[-1].weight.grad[4:].abs().amax(1).min() > 0


# Levels.


def test_layers_look_from_coarse_to_fine():
    assert level_schedule(6, 3) == [2, 2, 1, 1, 0, 0]
    assert level_schedule(3, 3) == [2, 1, 0]
    assert level_schedule(6, 1) == [0] * 6
    for levels in (0, 4):
        with pytest.raises(UserError, match=f"levels must be 1 to the number of decoder layers, 3, got {levels}"):
            level_schedule(3, levels)


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_every_level_is_looked_at(sizes):
    layers, levels = sizes
    schedule = level_schedule(layers, levels)
    assert sorted(set(schedule)) == list(range(levels))
    assert all(a >= b for a, b in pairwise(schedule))


def test_three_equal_levels_are_one():
    torch.manual_seed(0)
    memory = whole(torch.randn(2, 8, 5, 5, generator=draw()))
    several = Decoder([SamDecoderLayer(8, 2, 16, level=k) for k in level_schedule(3, 3)], 8, 3, 4)
    one = Decoder([SamDecoderLayer(8, 2, 16) for _ in range(3)], 8, 3, 4)
    one.load_state_dict(several.state_dict())
    assert torch.equal(several([memory] * 3)[-1].boxes, one([memory])[-1].boxes)


# The detector.


@each_kind
@pytest.mark.parametrize("smca", [False, True])
def test_a_larger_canvas_changes_nothing(resample, smca):
    model = tiny(resample=resample, smca=smca, backbone=Patches(8)).eval()
    for head in model.decoder.box_heads:
        nn.init.normal_(head[-1].weight, std=0.3)
    image = torch.randn(1, 3, 32, 48, generator=draw())
    pad = torch.ones(1, 64, 80, dtype=torch.bool)
    pad[:, :32, :48] = False
    canvas = torch.full((1, 3, 64, 80), 9.0)
    canvas[..., :32, :48] = image
    for alone, larger in zip(model(image), model((canvas, pad)), strict=True):
        torch.testing.assert_close(alone.boxes, larger.boxes, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.logits, larger.logits, atol=1e-5, rtol=1e-5)


@each_kind
@pytest.mark.parametrize("strides", [(8,), (4, 8)])
def test_everything_gets_a_gradient(resample, strides):
    model = tiny(smca=True, resample=resample, strides=strides, dropout=0.1)
    targets = [Targets(torch.tensor([k]), torch.tensor([[0.4, 0.5, 0.3, 0.3]])) for k in range(2)]
    found = model(torch.randn(2, 3, 32, 32, generator=draw()))
    assert [layer.boxes.shape for layer in found] == [(2, 5, 4)] * 2
    SetCriterion()(found, targets).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert model.decoder.boxes.grad.abs().sum() > 0


def test_the_first_layer_sees_the_learned_boxes_alone():
    """Queries begin with nothing else: equal boxes are equal queries."""
    model = tiny().eval()
    with torch.no_grad():
        model.decoder.boxes[1] = model.decoder.boxes[0]
    logits = model(torch.randn(1, 3, 32, 32, generator=draw()))[-1].logits[0]
    torch.testing.assert_close(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_it_learns_pictures_by_heart():
    scenes = flat_scenes(4, size=32, classes=3, objects=(1, 2), radius=(5, 8), noise=0.0, seed=0)
    targets = pack(flat_targets(scenes))
    torch.manual_seed(0)
    model, criterion = tiny(d=32, hidden=64, smca=True), SetCriterion()
    optimizer, losses = AdamW(model.parameters(), lr=3e-3), []
    for _ in range(60):
        loss = criterion(model(scenes.images), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]


# Bad input.


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(SemanticsAligner, 6, 2), "d must be a multiple of 4, got 6"),
        (partial(SemanticsAligner, 8, 2, resample="mean"), r"unknown resample 'mean'"),
        (partial(SemanticsAligner, 8, 2, edge="boarder"), r"unknown edge 'boarder'\. Did you mean 'border'"),
        (partial(AlignedCrossAttention, 8, 3), "heads must divide d, got 3 and 8"),
        (partial(SamDetr, 3, d=18), "d must be a multiple of heads and of 4, got 18 and 4"),
        (partial(SamDetr, 3, strides=(2, 4, 8), decoders=2), "levels must be 1 to the number of decoder layers, 2"),
    ],
)
def test_sizes_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_levels_that_are_not_there():
    memory, images = [whole(torch.zeros(1, 8, 4, 4))], torch.zeros(1, 3, 32, 32)
    with pytest.raises(UserError, match="the decoder layer looks at level 2, but the memory has 1"):
        SamDecoderLayer(8, 2, 16, level=2)(torch.zeros(1, 3, 8), torch.full((1, 3, 4), 0.5), memory)
    with pytest.raises(UserError, match="the backbone gives 2 levels, and strides names 1"):
        tiny(backbone=Patches(4, 8))(images)
    with pytest.raises(UserError, match="picture 0 of the batch is nothing but padding"):
        tiny()((images, torch.ones(1, 32, 32, dtype=torch.bool)))


def test_references_that_are_not_finite_are_named():
    model = tiny()
    nn.init.constant_(model.decoder.box_heads[0][-1].bias, math.nan)
    with pytest.raises(UserError, match="the references of decoder layer 1 are not finite"):
        model(torch.zeros(1, 3, 32, 32))


def test_more_objects_than_queries_are_warned_of():
    found = tiny(queries=2)(torch.zeros(1, 3, 32, 32))
    target = Targets(torch.zeros(3, dtype=torch.long), torch.tensor([[0.5, 0.5, 0.2, 0.2]] * 3))
    with pytest.warns(UserWarning, match=r"more objects than there are queries \(2\)"):
        SetCriterion()(found, [target])


# The claim on pictures of one's own.


def trial(folder, arm="sam-smca", **overrides):
    pytest.importorskip("faster_coco_eval")
    claim, kept = load_claim("samdetr"), {}
    run = Run(seed=0, scale="smoke", device="cpu", data_root=None, folder=folder, keep=kept.__setitem__)
    changed = {"longest": "48", "batch_size": "4", **overrides}
    return claim.trial(run, arm, claim.settings.at("smoke", changed)), kept


@pytest.fixture
def folder(tmp_path):
    write_coco(tmp_path / "set", flat_scenes(10, classes=3, seed=0))
    return tmp_path / "set"


@pytest.mark.parametrize("arm", ["detr", "sam-smca", "sam++"])
def test_own_pictures(folder, tmp_path, arm):
    figures, kept = trial(tmp_path / "run", arm, data=str(folder))
    assert 0 <= figures["ap50"] <= 1
    assert [name for name in kept if name.endswith(".png")]


def test_own_pictures_in_two_parts(tmp_path):
    for part in ("train", "val"):
        write_coco(tmp_path / "set" / part, flat_scenes(4, seed=len(part)))
    assert math.isfinite(trial(tmp_path / "run", data=str(tmp_path / "set"))[0]["ap"])


def test_photographs(tmp_path):
    """Of unequal sizes, one grey, with category ids that are not contiguous, a crowd and a box without area."""
    china, flower = (Image.fromarray(picture) for picture in load_sample_images().images)
    pictures = {
        "china.jpg": (china, [(9, [0, 180, 640, 200], 0)]),
        "flower.jpg": (flower, [(2, [170, 60, 290, 330], 0), (2, [0, 0, 640, 427], 1)]),
        "grey.png": (flower.convert("L").crop((100, 0, 500, 427)), [(2, [70, 60, 290, 330], 0), (9, [5, 5, 0, 9], 0)]),
        "small.jpg": (china.resize((200, 133)), [(9, [0, 56, 200, 62], 0)]),
        "sky.png": (china.crop((0, 0, 640, 120)), []),
    }
    (tmp_path / "set" / "images").mkdir(parents=True)
    rows = {"images": [], "annotations": [], "categories": [{"id": 9, "name": "temple"}, {"id": 2, "name": "flower"}]}
    for id, (name, (picture, objects)) in enumerate(pictures.items(), 100):
        picture.save(tmp_path / "set" / "images" / name)
        rows["images"].append({"id": id, "file_name": name, "width": picture.width, "height": picture.height})
        for category, box, crowd in objects:
            row = {"id": len(rows["annotations"]), "image_id": id, "category_id": category}
            rows["annotations"].append({**row, "bbox": box, "iscrowd": crowd})
    (tmp_path / "set" / "annotations.json").write_text(json.dumps(rows))
    figures, kept = trial(tmp_path / "run", data=str(tmp_path / "set"))
    assert 0 <= figures["ap50"] <= 1
    assert kept["detections.png"].startswith(b"\x89PNG")


def test_few_pictures_are_seen_again_until_the_steps_are_done(folder, tmp_path):
    claim, kept = load_claim("samdetr"), {}
    run = Run(seed=0, scale="smoke", device="cpu", data_root=None, folder=tmp_path / "run", keep=kept.__setitem__)
    settings = claim.settings.at("smoke", {"data": str(folder), "longest": 32, "batch_size": 3, "steps": 4})
    claim.trial(run, "detr", settings)  # eight pictures: two passes of three batches
    assert run.curves["AP50"][-1][0] == 6
    assert [step for step, _ in run.curves["AP"]] == [1, 2, 3, 4, 5, 6]


def test_what_was_found_is_drawn_where_it_is():
    axes = Figure().subplots()
    truth = Targets(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.2, 0.4]]), size=(40, 80))
    logits = torch.tensor([[-9.0, 2.0], [-9.0, -9.0], [0.0, -9.0]])
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.1, 0.1, 0.4, 0.4]])
    found(axes, torch.rand(3, 40, 80), truth, (logits, boxes), ("cup", "spoon"))
    bounds = [patch.get_bbox().bounds for patch in axes.patches]
    assert bounds == [
        pytest.approx((0.4, 0.3, 0.2, 0.4)),
        pytest.approx((-0.1, -0.1, 0.4, 0.4)),
        pytest.approx((0.3, 0.3, 0.4, 0.4)),
    ]
    assert [text.get_text() for text in axes.texts] == ["cup 0.50", "spoon 0.88"]
    assert all(0 <= place <= 1 for text in axes.texts for place in text.get_position())
    assert (axes.get_xlim(), axes.get_ylim(), axes.get_aspect()) == ((0, 1), (1, 0), 0.5)
    axes.clear()
    found(axes, torch.rand(3, 40, 80), truth, (logits, boxes), ("cup", "spoon"), sure=0.9)
    assert len(axes.patches) == 2
    assert [text.get_text() for text in axes.texts] == ["spoon 0.88"]  # the surest, sure or not


def test_own_pictures_that_are_bad(folder, tmp_path):
    file = folder / "annotations.json"
    content = json.loads(file.read_text())
    content["annotations"][2]["category_id"] = 99
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"annotations\.json: 1 annotations of an unknown category: id 3"):
        trial(tmp_path / "run", data=str(folder))
    with pytest.raises(
        UserError, match=r"data must be 'scenes' or a folder in COCO's format, got '.*nowhere', which is not there"
    ):
        trial(tmp_path / "run", data=str(tmp_path / "nowhere"))
    write_coco(tmp_path / "one", flat_scenes(1))
    with pytest.raises(UserError, match="has 1 picture with objects: expected at least 2"):
        trial(tmp_path / "run", data=str(tmp_path / "one"))


def test_a_killed_trial_ends_with_the_same_figures(folder, tmp_path, monkeypatch):
    looks = vars(__import__(load_claim("samdetr").trial.__module__, fromlist=["Looks"]))["Looks"]
    whole_run, seen = trial(tmp_path / "a", data=str(folder), steps="4")
    begins = looks.on_epoch_start

    def killed(self, state):
        if state.epoch == 1:
            raise KeyboardInterrupt
        begins(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(looks, "on_epoch_start", killed)
        with pytest.raises(KeyboardInterrupt):
            trial(tmp_path / "b", data=str(folder), steps="4")
    resumed, seen_after = trial(tmp_path / "b", data=str(folder), steps="4")
    del whole_run["step_ms"], resumed["step_ms"]
    assert resumed == whole_run
    assert seen_after == seen  # to the pixel, of boxes and attention


def test_three_levels_of_a_deeper_backbone():
    backbone = TinyBackbone(16, channels=(8, 8, 8, 8), strides=(4, 8, 16))
    model = tiny(strides=(4, 8, 16), decoders=3, backbone=backbone)
    assert [m.height for m in model.memory(torch.zeros(1, 3, 64, 64))] == [16, 8, 4]
    assert model.encoder.layers[0].feed.net[0].out_features == 16
    assert model(torch.zeros(1, 3, 64, 64))[-1].boxes.shape == (1, 5, 4)
