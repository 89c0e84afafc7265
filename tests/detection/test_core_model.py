"""Position codes, attention, RoI sampling, encoders and decoders."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.ops import roi_align

from paperworks.detection.core import (
    Detr,
    MSDeformAttn,
    SetCriterion,
    Targets,
    TinyBackbone,
    baseline,
    grid,
    level,
    padded,
    roi_sample,
    sine_embed,
)
from paperworks.errors import UserError

NAMES = ("detr", "conditional", "deformable")
each = pytest.mark.parametrize("name", NAMES)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def no_padding(batch, height, width):
    return torch.zeros(batch, height, width, dtype=torch.bool)


def tiny(name, **changes):
    torch.manual_seed(0)
    return baseline(
        name, 3, **{"d": 16, "heads": 2, "hidden": 32, "queries": 5, "encoders": 1, "decoders": 2} | changes
    )


def test_sine_codes_by_hand():
    code = sine_embed(torch.tensor([0.25, 0.5]), 8)
    slow = 1e4 ** (2 / 4)
    angles = [math.pi, math.pi / slow, math.pi / 2, math.pi / 2 / slow]  # y, then x
    expected = [wave(angle) for angle in angles for wave in (math.sin, math.cos)]
    torch.testing.assert_close(code, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_cells_have_their_centres():
    x = [0.125, 0.375, 0.625, 0.875]
    assert grid(2, 4).tolist() == [[a, b] for b in (0.25, 0.75) for a in x]
    found = level(torch.zeros(1, 4, 2, 4), no_padding(1, 16, 32))
    torch.testing.assert_close(found.centres[0], grid(2, 4))
    torch.testing.assert_close(found.pos[0], sine_embed(grid(2, 4), 4))


@pytest.mark.parametrize("coordinates", [2, 4])
def test_deformable_attention_equals_transformers(coordinates):
    module = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    config = module.DeformableDetrConfig(d_model=16, encoder_attention_heads=4, num_feature_levels=2)
    theirs = module.DeformableDetrMultiscaleDeformableAttention(config, num_heads=4, n_points=3)
    ours = MSDeformAttn(16, 4, levels=2, points=3)
    pairs = {"sampling_offsets": "offsets", "attention_weights": "weights", "value_proj": "value", "output_proj": "out"}
    with torch.no_grad():
        for layer in (theirs.sampling_offsets, theirs.attention_weights):
            layer.weight.normal_(0, 0.3, generator=draw())
    for a, b in pairs.items():
        getattr(ours, b).load_state_dict(getattr(theirs, a).state_dict())
    maps = [torch.randn(2, 16, 6, 8, generator=draw(1)), torch.randn(2, 16, 3, 4, generator=draw(2))]
    memory = [level(m, no_padding(2, 24, 32)) for m in maps]
    query = torch.randn(2, 5, 16, generator=draw(3))
    reference = torch.rand(2, 5, coordinates, generator=draw(4)) * 0.8 + 0.1
    expected = theirs(
        hidden_states=query,
        encoder_hidden_states=torch.cat([m.features for m in memory], 1),
        reference_points=reference[:, :, None].expand(-1, -1, 2, -1),
        spatial_shapes=torch.tensor([[6, 8], [3, 4]]),
        spatial_shapes_list=[(6, 8), (3, 4)],
        level_start_index=torch.tensor([0, 48]),
    )[0]
    torch.testing.assert_close(ours(query, reference, memory), expected, atol=1e-5, rtol=1e-4)


def test_without_offsets_attention_is_the_value_at_the_reference():
    attention = MSDeformAttn(8, 2, points=3)
    torch.nn.init.zeros_(attention.offsets.bias)
    torch.nn.init.normal_(attention.weights.weight, generator=draw())
    features = torch.randn(1, 8, 5, 5, generator=draw(1))
    reference = torch.tensor([[[0.3, 0.62]]])
    found = attention(torch.randn(1, 1, 8, generator=draw(2)), reference, [level(features, no_padding(1, 5, 5))])
    at = F.grid_sample(features, 2 * reference[:, None] - 1, align_corners=False)[0, :, 0, 0]
    torch.testing.assert_close(found[0, 0], attention.out(attention.value(at)), atol=1e-5, rtol=1e-4)


def test_heads_look_in_different_directions_at_first():
    attention = MSDeformAttn(16, 4, levels=1, points=2)
    offsets = attention.offsets.bias.view(4, 1, 2, 2)
    torch.testing.assert_close(offsets[:, 0, 0], torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(offsets[:, 0, 1], 2 * offsets[:, 0, 0])
    with pytest.raises(UserError, match="heads must divide d, got 3 and 16"):
        MSDeformAttn(16, 3)


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_roi_sampling_equals_torchvision(seed):
    """Wherever no box is larger than 7 cells a side and none reaches over the edge."""
    features = torch.randn(2, 3, 12, 16, generator=draw(seed))
    sides = torch.rand(2, 4, 2, generator=draw(seed + 1)) * torch.tensor([7 / 16, 7 / 12]) * 0.95 + 0.02
    centres = sides / 2 + torch.rand(2, 4, 2, generator=draw(seed + 2)) * (1 - sides)
    boxes = torch.cat([centres, sides], -1)
    scale = torch.tensor([16.0, 12, 16, 12])
    pixels = [torch.cat([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], 1) * scale for b in boxes]
    expected = roi_align(features, pixels, (7, 7), sampling_ratio=1, aligned=True).view(2, 4, 3, 7, 7)
    torch.testing.assert_close(roi_sample(features, boxes), expected, atol=1e-5, rtol=1e-4)


def test_roi_sampling_of_a_ramp():
    column, row = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="xy")
    found = roi_sample(torch.stack([column, row])[None], torch.tensor([[[0.5, 0.5, 0.5, 0.75]]]))[0, 0]
    torch.testing.assert_close(found[:, 3, 3], torch.tensor([3.5, 3.5]))
    torch.testing.assert_close(found[0, 0], 3.5 + 4 * (torch.arange(7) - 3) / 7)
    torch.testing.assert_close(found[1, :, 0], 3.5 + 6 * (torch.arange(7) - 3) / 7)


@each
def test_shapes_and_boxes(name):
    found = tiny(name)(torch.randn(2, 3, 32, 48, generator=draw()))
    assert len(found) == 2
    for layer in found:
        assert layer.logits.shape == (2, 5, 3)
        assert layer.boxes.shape == (2, 5, 4)
        assert ((layer.boxes >= 0) & (layer.boxes <= 1)).all()
    assert found[0].logits.sigmoid().mean() < 0.05  # few objects are expected


@each
def test_a_larger_canvas_changes_nothing(name):
    model = tiny(name).eval()
    image = torch.randn(1, 3, 32, 48, generator=draw())
    pad = torch.ones(1, 64, 64, dtype=torch.bool)
    pad[:, :32, :48] = False
    canvas = torch.full((1, 3, 64, 64), 9.0)
    canvas[..., :32, :48] = image
    with torch.no_grad():
        # The canvas is 0 around the picture, as its convolutions pad it, up to what batch norm makes of 0.
        alone, larger = model(image)[-1], model((canvas, pad))[-1]
        inner = model.memory(image)[-1], model.memory((canvas, pad))[-1]
    assert inner[0].valid.tolist() == [[1.0, 1.0]]
    assert inner[1].valid.tolist() == [[0.75, 0.5]]
    torch.testing.assert_close(
        inner[0].pos[0], inner[1].pos[0].view(8, 8, -1)[:4, :6].reshape(24, -1), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(alone.boxes, larger.boxes, atol=0.02, rtol=0)
    torch.testing.assert_close(alone.logits, larger.logits, atol=0.05, rtol=0)


@each
def test_padding_s_content_does_not_matter(name):
    model = tiny(name).eval()
    image, pad = torch.randn(2, 3, 64, 64, generator=draw()), no_padding(2, 64, 64)
    pad[0, :, 40:] = pad[1, 32:] = True
    with torch.no_grad():
        one, other = (model((image.masked_fill(pad[:, None], value), pad))[-1] for value in (0.0, 100.0))
    assert torch.equal(one.boxes, other.boxes)
    assert torch.equal(one.logits, other.logits)


@each
def test_everything_gets_a_gradient(name):
    model = tiny(name, dropout=0.1)
    targets = [Targets(torch.tensor([k]), torch.tensor([[0.4, 0.5, 0.3, 0.3]])) for k in range(2)]
    SetCriterion()(model(torch.randn(2, 3, 32, 32, generator=draw())), targets).backward()
    # Zero at first: what stands before weights that are zero.
    idle = {key for key, p in model.named_parameters() if p.grad is None}
    assert not idle


def test_references_move_and_are_detached():
    model = tiny("deformable", decoders=3)
    decoder = model.decoder
    for head in decoder.box_heads:
        torch.nn.init.normal_(head[-1].bias, generator=draw())
    first, second, _ = model(torch.randn(1, 3, 32, 32, generator=draw()))
    assert not torch.allclose(first.boxes, second.boxes)
    second.boxes.sum().backward()
    assert decoder.boxes.grad is not None  # the first reference keeps its gradient by way of the first layer's content
    assert decoder.box_heads[0][-1].bias.grad is None


def test_the_first_prediction_is_the_learned_box():
    model = tiny("deformable")
    found = model(torch.randn(1, 3, 32, 32, generator=draw()))
    torch.testing.assert_close(found[0].boxes[0], model.decoder.boxes.sigmoid())


def test_references_that_are_not_finite_are_named():
    model = tiny("deformable")
    with torch.no_grad():
        model.decoder.boxes.fill_(math.nan)
    with pytest.raises(UserError, match="the references of decoder layer 0 are not finite"):
        model(torch.randn(1, 3, 32, 32, generator=draw()))


def test_pictures_of_different_sizes():
    batch, pad = padded([torch.ones(3, 20, 30), torch.ones(3, 40, 10)], multiple=16)
    assert batch.shape == (2, 3, 48, 32)
    assert torch.equal(batch[:, 0] == 0, pad)
    assert (~pad).sum((1, 2)).tolist() == [600, 400]
    with pytest.raises(UserError, match="picture 1 of the batch is nothing but padding"):
        tiny("detr")((batch, torch.stack([pad[0], torch.ones_like(pad[1])])))


def test_models_that_cannot_be():
    for options, message in (
        ({"d": 18}, "d must be a multiple of heads and of 4, got 18 and 2"),
        ({"strides": (8, 64)}, "strides must be among 2, 4, 8, got 64"),
    ):
        with pytest.raises(UserError, match=message):
            tiny("detr", **options)


@pytest.mark.usefixtures("unchecked")
def test_a_baseline_that_is_not_there():
    with pytest.raises(UserError, match=r"unknown baseline 'dter'\. Did you mean 'detr'"):
        baseline("dter", 3)


def test_several_levels():
    model = tiny("deformable", strides=(4, 8))
    assert isinstance(model, Detr)
    assert isinstance(model.backbone, TinyBackbone)
    memory = model.memory(torch.randn(1, 3, 32, 32, generator=draw()))
    assert [(m.height, m.width) for m in memory] == [(8, 8), (4, 4)]
    assert model(torch.randn(1, 3, 32, 32, generator=draw()))[-1].boxes.shape == (1, 5, 4)
