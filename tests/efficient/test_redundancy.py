import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from paperworks.efficient import (
    CachedModel,
    ChannelGate,
    DeltaConv2d,
    DeltaSession,
    KeyFrameRunner,
    ResolutionCascade,
    ReuseConv2d,
    ReuseLinear,
    TileSkipConv2d,
    TokenMerger,
    TokenPruner,
    cover_radius,
    deduplicate,
    deep_reuse,
    gate_channels,
    k_center,
    measure_tradeoff,
    merge_tokens,
    replace_layers,
    significance,
)
from paperworks.efficient.redundancy.layers import BackOff
from paperworks.efficient.redundancy.reuse import predicted_cost, reuse_cost
from paperworks.efficient.redundancy.tokens import attend, feed_forward
from paperworks.errors import UserError
from paperworks.nn import ConvNet

GEOMETRIES = st.fixed_dictionaries(
    {
        "kernel_size": st.sampled_from([1, 3, (3, 1), 2]),
        "stride": st.sampled_from([1, 2, (1, 2)]),
        "padding": st.sampled_from([0, 1, (2, 0)]),
        "dilation": st.sampled_from([1, 2]),
        "bias": st.booleans(),
    }
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conv(*arguments, **options) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(*arguments, **options).eval()


def refused(message: str):
    """Expect our error, or beartype's where that is on and looks first."""
    return pytest.raises((UserError, TypeError), match=f"{message}|Type-check error")


# Layers in the place of others.


def test_replaced_layers_come_back_as_they_were():
    model = ConvNet(1, 4, (8, 8), (1, 1)).eval()
    model.twice = model.body[1][0]  # shared under two names
    before = dict(model.named_modules(remove_duplicate=False))
    with replace_layers(model, ["body.0.0", "body.1.0"], DeltaConv2d) as replaced:
        assert isinstance(model.twice, DeltaConv2d)
        assert model.twice is model.body[1][0] is replaced.layers["body.1.0"]
    assert dict(model.named_modules(remove_duplicate=False)) == before


def test_a_layer_that_does_not_suit_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 3, padding="same"))
    before = list(model)
    with refused("layer '1': DeltaConv2d takes convolutions with groups=1, got groups=2"):
        replace_layers(model, ["0", "1"], DeltaConv2d)
    with refused("layer '2': TileSkipConv2d takes zero padding by numbers, got 'same'"):
        replace_layers(model, ["2"], TileSkipConv2d)
    with refused("unknown layer '7'"):
        replace_layers(model, ["7"], DeltaConv2d)
    with refused("at least one layer"):
        replace_layers(model, [], DeltaConv2d)
    assert list(model) == before


def test_looking_in_vain_becomes_rare():
    back_off, looks = BackOff(), []
    for call in range(190):
        if not back_off.resting():
            looks.append(call)
            back_off.report(False)
    assert [b - a for a, b in pairwise(looks)] == [1, 2, 4, 8, 16, 32, 32, 32, 32]
    while back_off.resting():
        pass
    back_off.report(True)
    assert not back_off.resting()


# R2: reuse.


def test_reuse_of_distinct_tiles_is_exact():
    tile = draw(1, 4, 3, 3)
    x = torch.cat([tile, 2 * tile.flip(3)], dim=3).repeat(1, 1, 8, 4)
    layer = conv(4, 16, 3)
    reuse = ReuseConv2d.from_layer(layer, bits=40, auto=False)
    torch.testing.assert_close(reuse(x), layer(x), rtol=1e-5, atol=1e-5)
    assert reuse.cluster_ratio == 18 / (22 * 22)  # a patch at each offset in the period of 3 x 6


@given(geometry=GEOMETRIES, bits=st.sampled_from([0, 2, 30, 62]))
def test_reuse_of_a_convolution_is_reuse_of_its_patches(geometry, bits):
    layer = conv(3, 5, **geometry)
    x = draw(2, 3, 9, 8)
    reuse = ReuseConv2d.from_layer(layer, bits, auto=False)
    y = reuse(x)
    exact = layer(x)
    assert y.shape == exact.shape
    torch.testing.assert_close(y.mean((0, 2, 3)), exact.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)  # centroids keep it
    if bits == 0:
        torch.testing.assert_close(y, exact.mean((0, 2, 3))[:, None, None].expand_as(y), rtol=1e-4, atol=1e-4)


def test_without_bits_every_row_gets_the_mean():
    x, weight, bias = draw(20, 6), draw(4, 6, seed=1), draw(4, seed=2)
    torch.testing.assert_close(deep_reuse(x, weight, bias, bits=0), F.linear(x.mean(0), weight, bias).expand(20, 4))


@pytest.mark.parametrize("block", [None, 1, 2, 4])
def test_equal_rows_are_one_cluster_and_exact(block):
    x, weight = draw(1, 4).expand(30, 4), draw(3, 4, seed=1)
    layer = nn.Linear(4, 3, bias=False)
    layer.weight.data = weight
    reuse = ReuseLinear.from_layer(layer, 8, block, auto=False).eval()
    torch.testing.assert_close(reuse(x), x @ weight.T)
    assert reuse.cluster_ratio == 1 / 30
    torch.testing.assert_close(reuse(x.view(5, 6, 4)).flatten(0, 1), x @ weight.T)


def test_rows_that_differ_in_all_signs_stay_apart():
    x, weight = draw(50, 64), draw(5, 64, seed=1)
    torch.testing.assert_close(deep_reuse(x, weight, bits=62), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_gradients_of_reuse_flow_through_the_centroids():
    x, weight = draw(12, 4).double().requires_grad_(), draw(3, 4, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(partial(deep_reuse, bits=2), (x, weight), eps=1e-7, atol=1e-5)
    layer = ReuseConv2d.from_layer(conv(2, 3, 3), 4, auto=False)
    images = draw(1, 2, 6, 6).requires_grad_()
    layer(images).sum().backward()
    exact = torch.autograd.grad(layer.layer(images).sum(), images)[0]
    torch.testing.assert_close(images.grad.sum(), exact.sum(), rtol=1e-4, atol=1e-4)
    assert layer.layer.weight.grad is not None


def test_auto_is_dense_where_reuse_does_not_pay():
    layer = nn.Linear(16, 8)
    reuse = ReuseLinear.from_layer(layer).eval()
    assert torch.equal(reuse(draw(40, 16)), layer(draw(40, 16)))
    assert reuse.cluster_ratio > 0.5
    wide = ReuseLinear.from_layer(nn.Linear(16, 512), bits=4).eval()
    wide(draw(1000, 16))
    assert wide.cluster_ratio <= 0.016
    assert not torch.equal(wide(draw(1000, 16)), wide.layer(draw(1000, 16)))
    assert reuse.train()(draw(40, 16)).shape == (40, 8)


def test_costs():
    assert reuse_cost(12, 512, 0.1) == pytest.approx(12 / 512 + 0.1)
    assert predicted_cost(12, 512, 0.07) < 0.5 < predicted_cost(12, 128, 0.07)


def test_bad_arguments_of_reuse():
    with refused("bits must be from 0 to 62, got 63"):
        deep_reuse(draw(4, 4), draw(2, 4), bits=63)
    with refused("block must divide the 4 columns, got 3"):
        deep_reuse(draw(4, 4), draw(2, 4), block=3)
    with refused("ReuseConv2d takes an nn.Conv2d, got Linear"):
        ReuseConv2d.from_layer(nn.Linear(2, 2))
    with refused("ReuseLinear takes an nn.Linear, got ReLU"):
        ReuseLinear.from_layer(nn.ReLU())


# R5 and R4: video.


@given(geometry=GEOMETRIES, tau=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 99), dense=st.sampled_from([0.3, 1.0]))
def test_the_output_is_that_of_an_input_within_tau(geometry, tau, seed, dense):
    layer = conv(3, 4, **geometry)
    delta, x = DeltaConv2d(layer, tau, dense), draw(2, 3, 9, 8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    effective = x.clone()
    for _ in range(4):
        y = delta(x)
        apart = (x - effective).abs().amax(1, keepdim=True)
        if tau == 0:
            torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
        elif dense == 1:
            effective = torch.where(apart > tau, x, effective)
            torch.testing.assert_close(y, layer(effective), rtol=1e-4, atol=1e-5)
            assert (y - layer(x)).abs().max() <= tau * layer.weight.abs().sum((1, 2, 3)).max() + 1e-5
        y.zero_()  # what follows may work in place
        mask = torch.rand(2, 1, 9, 8, generator=generator) < 0.15
        x = x + mask * torch.randn(x.shape, generator=generator) * 0.5


def test_only_what_a_changed_pixel_reaches_is_recomputed():
    model = nn.Sequential(conv(1, 4, 3, padding=1), nn.ReLU(inplace=True), conv(4, 4, 3, padding=1)).eval()
    frame = draw(1, 1, 12, 12)
    with DeltaSession(model) as session:
        session(frame)
        assert [layer.recomputed for layer in session.layers.values()] == [144, 144]
        session(frame)
        assert session.recomputed == 0
        changed = frame.clone()
        changed[0, 0, 5, 6] += 1
        y = session(changed)
        assert [layer.recomputed for layer in session.layers.values()] == [9, 25]
        assert session.recomputed == 34 / 288
        session.reset()
        session(frame)
        assert session.recomputed == 1
    torch.testing.assert_close(y, model(changed))


def test_a_changed_scene_is_computed_whole_and_drifts_never():
    layer = conv(2, 3, 3, padding=1)
    delta = DeltaConv2d(layer, dense_above=0.2)
    for number in range(40):
        x = draw(1, 2, 10, 10, seed=number if number < 30 else 0)
        torch.testing.assert_close(delta(x), layer(x), rtol=1e-4, atol=1e-5)
    for _ in range(40):  # the back-off ends
        delta(x)
    assert delta.recomputed == 0


def test_sessions_restore_the_model_and_refuse_other_frames():
    model = ConvNet(1, 3, (4, 8), (1, 2)).eval()
    before = list(model.modules())
    with DeltaSession(model) as session:
        session(draw(1, 1, 64, 64))
        session(draw(1, 1, 64, 64))
        with pytest.raises(UserError, match="frame 2 is 64x48, clip is 64x64"):
            session(draw(1, 1, 48, 64))
        session.reset()
        session(draw(1, 1, 8, 8))
        with pytest.raises(UserError, match="frame 1 is a batch of 2, the session's is 1"):
            session(draw(2, 1, 8, 8))
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    with refused("tau must be at least 0, got -1"):
        DeltaSession(model, tau=-1.0)
    with refused("MaxPool2d has no nn.Conv2d"):
        DeltaSession(nn.MaxPool2d(2).eval())
    with refused("evaluation mode"):
        DeltaSession(model.train())
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


def test_other_shapes_and_bad_shares_are_refused():
    delta = DeltaConv2d(conv(1, 1, 3))
    delta(draw(1, 1, 8, 8))
    with refused("call reset"):
        delta(draw(1, 1, 9, 8))
    delta.reset()
    assert delta(draw(1, 1, 9, 8)).shape == (1, 1, 7, 6)
    with refused("dense_above must be from 0 to 1, got 2"):
        DeltaConv2d(conv(1, 1, 3), dense_above=2.0)


def moving(length: int, step: int) -> Tensor:
    """A bright column that moves on every ``step`` frames."""
    clip = torch.zeros(length, 1, 4, 8)
    for number in range(length):
        clip[number, :, :, number // step % 8] = 1
    return clip


def test_key_frames_are_those_that_differ():
    calls = []

    def model(frame: Tensor) -> Tensor:
        calls.append(frame)
        return frame.sum((1, 2))  # the column is the class

    clip = moving(24, 3)
    runner = KeyFrameRunner(model, tau=1e-6)
    outputs = torch.cat([runner(frame[None]) for frame in clip])
    assert torch.equal(outputs, clip.sum((1, 2)))
    assert (runner.computed, runner.seen, len(calls)) == (8, 24, 8)
    runner.reset()
    runner.tau = 0.0
    for frame in clip:
        runner(frame[None])
    assert runner.computed == 24
    with pytest.raises(UserError, match="frame 24 is 9x4, clip is 8x4"):
        runner(torch.zeros(1, 1, 4, 9))


def test_the_threshold_of_key_frames_keeps_to_the_disagreement():
    def model(frame: Tensor) -> Tensor:
        return frame.sum((1, 2))

    clip = moving(24, 3) + 0.01 * draw(24, 1, 4, 8)
    runner = KeyFrameRunner(model)
    tau = runner.calibrate(clip, disagreement=0.0)
    for frame in clip:
        assert int(runner(frame[None]).argmax()) == int(model(frame[None]).argmax())
    assert tau > 0
    assert runner.computed == 8
    loose = runner.calibrate(clip, disagreement=1.0)
    assert loose > tau
    with refused("at least 2 frames"):
        runner.calibrate(clip[:1])
    with refused("tau must be at least 0"):
        KeyFrameRunner(model, -0.1)


# R3: tiles.


@given(geometry=GEOMETRIES, tile=st.integers(1, 6), share=st.sampled_from([0.0, 0.05, 1.0]))
def test_skipping_tiles_is_exact(geometry, tile, share):
    layer = conv(3, 4, **geometry)
    skip = TileSkipConv2d(layer, tile, dense_above=1.0)
    mask = torch.rand(2, 1, 13, 11, generator=torch.Generator().manual_seed(tile)) < share
    x = draw(2, 3, 13, 11) * mask
    torch.testing.assert_close(skip(x), layer(x), rtol=1e-4, atol=1e-5)
    assert skip.active == 0 if share == 0 else skip.active > 0


def test_only_active_tiles_count():
    skip = TileSkipConv2d(conv(1, 2, 3, padding=1), tile=8)
    x = torch.zeros(1, 1, 32, 32)
    x[..., 12, 12] = 1
    skip(x)
    assert skip.active == 1 / 16
    x[..., 7, 12] = 1  # at the border of a tile that its neighbour's kernel reaches
    skip(x)
    assert skip.active == 2 / 16
    skip(torch.ones(1, 1, 32, 32))
    assert skip.active == 1
    with refused("tile must be at least 1"):
        TileSkipConv2d(conv(1, 2, 3), tile=0)


# R1: cascade.


class Fixed(nn.Module):
    """Logits by what stands in an image's first pixel; a table row an image."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, images: Tensor) -> Tensor:
        return self.table[images[:, 0].amax((1, 2)).round().long()]


def cascade(n: int = 40) -> tuple[ResolutionCascade, Tensor, Tensor]:
    images = torch.arange(float(n))[:, None, None, None].expand(n, 1, 4, 4)
    return ResolutionCascade(Fixed(draw(n, 3)), Fixed(3 * draw(n, 3, seed=1))), images, torch.arange(n) % 3


def test_the_ends_of_a_cascade_are_its_two_models():
    both, images, _ = cascade()
    both.threshold = 0.0
    assert torch.equal(both(images), both.low(both.reduce(images)))
    assert both.escalated == 0
    both.threshold = 1.1
    assert torch.equal(both(images), both.full(images))
    assert both.escalated == 1
    assert both.reduce(torch.rand(2, 3, 9, 6)).shape == (2, 3, 4, 3)


def test_calibration_is_the_cheapest_that_is_good_enough():
    both, images, targets = cascade()
    full = float((both.full(images).argmax(1) == targets).float().mean())

    def accuracy(threshold: float) -> float:
        both.threshold = threshold
        return float((both(images).argmax(1) == targets).float().mean())

    for tolerance in (0.0, 0.05, 1.0):
        chosen = both.calibrate(images, targets, tolerance)
        assert accuracy(chosen) >= full - tolerance - 1e-6
        share = both.escalated
        cheaper = [t for t in torch.linspace(0, chosen - 1e-6, 100).tolist() if t < chosen]
        assert all(accuracy(t) < full - tolerance or both.escalated >= share for t in cheaper)
    assert both.calibrate(images, targets, 1.0) == 0
    with refused("scale must be above 0 and below 1"):
        ResolutionCascade(both.low, both.full, scale=1.0)
    with refused("threshold must be at least 0"):
        ResolutionCascade(both.low, both.full, threshold=-1.0)


# R6: channels.


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("normed", [False, True])
def test_gated_inference_is_gated_training_without_the_skipped_work(images, normed):
    norm = nn.BatchNorm2d(8).eval() if normed else None
    if norm is not None:
        norm.running_mean.copy_(draw(8, seed=4))
    gate = ChannelGate(conv(6, 8, 3, padding=1), norm, density=0.5).eval()
    x = draw(images, 6, 5, 5) * torch.tensor([1, 0, 1, 1, 0, 1])[:, None, None]  # as behind another gate
    y = gate(x)
    dense = gate.layer(x) if norm is None else norm(gate.layer(x))
    torch.testing.assert_close(y, dense * gate.gate(x.abs().mean((2, 3)))[:, :, None, None], rtol=1e-4, atol=1e-5)
    assert (y.abs().amax((2, 3)) > 0).sum(1).max() <= 4
    gate.training = True  # the norm stays in evaluation mode
    torch.testing.assert_close(gate(x), y, rtol=1e-4, atol=1e-5)


def test_gates_learn_and_refuse():
    gate = ChannelGate(conv(3, 5, 3), density=0.3)
    assert gate.kept == 2
    gate.train()(draw(2, 3, 5, 5)).sum().backward()
    assert gate.predict.weight.grad.abs().sum() > 0
    assert torch.equal(gate.predict.weight, ChannelGate(conv(3, 5, 3), density=0.3).predict.weight)
    with refused("density must be above 0 and at most 1, got 0"):
        ChannelGate(conv(3, 5, 3), density=0.0)


def test_gates_take_the_place_of_convolutions_and_their_norms():
    model = ConvNet(1, 4, (8, 8, 8), (1, 1, 1))
    conv, norm = model.body[1][0], model.body[1][1]
    (first, second) = gate_channels(model, {"body.1.0": "body.1.1", "body.2.0": None}, density=0.25)
    assert model.body[1][0] is first
    assert (first.layer, first.norm, second.norm) == (conv, norm, None)
    assert isinstance(model.body[1][1], nn.Identity)
    assert isinstance(model.body[2][1], nn.BatchNorm2d)
    assert not torch.equal(first.predict.weight, second.predict.weight)
    x, hidden = draw(1, 1, 8, 8), []
    model.body[1].register_forward_hook(lambda module, inputs, output: hidden.append(output))
    model.eval()(x)
    assert (hidden[0].amax((2, 3)) > 0).sum() <= 2
    with refused("unknown layer 'body.1.7'"):
        gate_channels(model, {"body.1.7": None})
    with refused("layer 'classifier' must be an nn.BatchNorm2d, got Linear"):
        gate_channels(model, {"body.0.0": "classifier"})


# R7: tokens.


def encoder(layers: int = 3, **options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(16), enable_nested_tensor=False).eval()


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu", "bias": False}])
def test_keeping_everything_changes_nothing(options):
    dense, x = encoder(**options), draw(2, 9, 16)
    torch.testing.assert_close(TokenPruner(dense, (1, 1, 1))(x), dense(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(TokenMerger(dense, 0)(x), dense(x), rtol=1e-4, atol=1e-5)


def test_padding_is_ignored():
    dense, x = encoder(), draw(2, 9, 16)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    pruned = TokenPruner(dense, (1, 1, 1))(x, src_key_padding_mask=padding)
    torch.testing.assert_close(pruned[~padding], dense(x, src_key_padding_mask=padding)[~padding], rtol=1e-4, atol=1e-5)
    some = TokenPruner(dense, (1, 0.6, 0.5))(x, padding)
    short = TokenPruner(dense, (1, 1, 5 / 6))(x[1:, :6])
    torch.testing.assert_close(some[1:], short, rtol=1e-4, atol=1e-5)


def test_the_most_attended_stay_in_order_and_cls_always():
    dense, x = encoder(1), draw(4, 10, 16)
    y = TokenPruner(dense, (0.4,))(x)
    tokens, attention, _ = attend(dense.layers[0], x)
    scores = significance(attention)
    assert scores.sum(1).tolist() == pytest.approx([4 * 10] * 4)  # heads x queries
    for row in range(4):
        others = scores[row, 1:].topk(3).indices + 1
        kept = [0, *sorted(others.tolist())]
        expected = dense.norm(feed_forward(dense.layers[0], tokens[row : row + 1, kept]))
        torch.testing.assert_close(y[row : row + 1], expected, rtol=1e-4, atol=1e-5)
    assert TokenPruner(dense, (0.01,))(x).shape == (4, 1, 16)


def test_random_pruning_is_worse_where_the_signal_is_known():
    class Counts(nn.TransformerEncoderLayer):
        """Attends to the tokens whose last feature is large, and changes nothing else."""

    layer = Counts(4, 1, 4, dropout=0.0, batch_first=True, norm_first=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.self_attn.in_proj_bias[0] = 30.0  # every query asks for feature 3 …
        layer.self_attn.in_proj_weight[4, 3] = 1.0  # … which the keys hold
        layer.norm1.weight.fill_(1.0)
    dense = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = torch.zeros(20, 16, 4)
    place = torch.randint(1, 16, (20,), generator=torch.Generator().manual_seed(0))
    x[torch.arange(20), place, 3] = 1.0
    found = {
        score: float(TokenPruner(dense, (0.25,), score, seed=3)(x).detach()[..., 3].amax(1).mean())
        for score in ("attention", "random")
    }
    assert found["attention"] == 1
    assert found["random"] < 0.6


@pytest.mark.parametrize("r", [1, 3, 4])
def test_merging_equal_tokens_leaves_cls_as_it_was(r):
    dense = encoder(norm_first=True)
    x = torch.cat([draw(2, 1, 16), draw(2, 1, 16, seed=1).expand(-1, 8, -1)], dim=1)
    torch.testing.assert_close(TokenMerger(dense, r)(x)[:, 0], dense(x)[:, 0], rtol=1e-4, atol=1e-5)


@given(t=st.integers(3, 12), seed=st.integers(0, 50))
def test_sizes_and_weighted_sums_survive_merging(t, seed):
    tokens, sizes = draw(2, t, 5, seed=seed), torch.ones(2, t)
    for r in range((t - 1) // 2 + 1):
        new, new_sizes = merge_tokens(tokens, tokens, sizes, r)
        assert new.shape == (2, t - r, 5)
        assert new_sizes.sum(1).tolist() == [t, t]
        torch.testing.assert_close((new * new_sizes[..., None]).sum(1), tokens.sum(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(new[:, 0], tokens[:, 0])
    with refused("r must be from 0 to"):
        merge_tokens(tokens, tokens, sizes, t)


def test_the_most_alike_merge_first():
    tokens = torch.eye(6)[None].clone()
    tokens[0, 4] = tokens[0, 1]  # the only pair
    new, sizes = merge_tokens(tokens, tokens, torch.ones(1, 6), 1)
    assert sizes.tolist() == [[1, 1, 2, 1, 1]]
    assert torch.equal(new[0, 2], tokens[0, 1])


def test_encoders_and_shares_that_do_not_suit_are_refused():
    dense = encoder()
    with refused("keep must be shares above 0 and at most 1"):
        TokenPruner(dense, (1, 0.5, 0.0))
    with refused("do not increase"):
        TokenPruner(dense, (0.5, 0.6, 0.4))
    with refused("one share a layer, got 2 for 3 layers"):
        TokenPruner(dense, (1, 0.5))
    with refused("unknown score 'attetion'. Did you mean 'attention'"):
        TokenPruner(dense, (1, 1, 1), "attetion")
    with refused("r must be at least 0"):
        TokenMerger(dense, -1)
    with refused("encoder must be an nn.TransformerEncoder, got Linear"):
        TokenMerger(nn.Linear(2, 2), 1)
    with refused("batch_first=True"):
        TokenMerger(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1, enable_nested_tensor=False), 1)


# R8: samples.


def test_the_first_of_each_group_stays():
    x = draw(10, 2, 3)
    twice = torch.cat([x, x.flip(0)])
    assert deduplicate(twice).tolist() == list(range(10))
    near = torch.cat([x, x + 1e-3])
    assert len(deduplicate(near)) == 20
    assert deduplicate(near, 0.99).tolist() == list(range(10))
    assert deduplicate(torch.zeros(3, 2), 0.9).tolist() == [0]
    assert deduplicate(torch.tensor([[0.0], [-0.0], [1.0]])).tolist() == [0, 2]
    with refused("threshold must be above 0 and at most 1"):
        deduplicate(x, 1.5)
    with refused("must not be empty"):
        deduplicate(x[:0])


def test_chains_of_near_duplicates_are_one_group():
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 1.57, 3.14, 4.71])
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    x = torch.cat([x, -x])  # mean 0
    kept = deduplicate(x, threshold=0.99)
    assert 1 not in kept
    assert 3 not in kept
    assert 4 in kept


def test_k_centres_cover():
    x = torch.cat([draw(30, 2) * 0.01 + centre for centre in torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 9.0]])])
    chosen = k_center(x, 3)
    assert sorted(int(i) // 30 for i in chosen) == [0, 1, 2]
    assert cover_radius(x, chosen) < 0.1
    assert torch.equal(k_center(x, 2), chosen[:2])
    assert sorted(k_center(torch.zeros(4, 1), 4).tolist()) == [0, 1, 2, 3]
    radii = [cover_radius(x, k_center(x, k)) for k in (1, 2, 3, 10, 90)]
    assert radii == sorted(radii, reverse=True)
    assert radii[-1] == 0
    for k in (0, 91):
        with refused(f"k must be from 1 to the 90 samples, got {k}"):
            k_center(x, k)


def test_answers_come_from_memory():
    seen = []

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return x.flatten(1).cumsum(1)

    model = Model().eval()
    cached, x = CachedModel(model, size=3), draw(4, 2, 2)
    assert torch.equal(cached(x[[0, 1, 0]]), model(x[[0, 1, 0]]))
    assert (cached.hits, cached.misses) == (1, 2)
    cached(x[[1, 0]])
    assert seen[0] == 2
    assert len(seen) == 2  # one of them by hand
    cached(x[[2, 3]])  # two more: the one not asked for the longest goes
    assert torch.equal(cached(x[[0, 2, 3]]), model(x[[0, 2, 3]]))
    assert cached.misses == 4
    cached(x[[1]])
    assert cached.misses == 5
    cached.clear()
    cached(x[:1])
    assert cached.misses == 6
    assert torch.equal(cached(x[:, :1]), model(x[:, :1]))  # another shape
    with refused("evaluation mode"):
        cached.train()(x)
    with refused("size must be at least 1"):
        CachedModel(model, 0)


# The table.


def test_the_table_stands_beside_the_dense_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    before = copy.deepcopy(model.state_dict())
    x = draw(20, 2, 4)
    y = model(x).argmax(1)

    def technique(model: nn.Module, share: float) -> nn.Module:
        model[1].weight.data[int(8 * share) :] = 0
        model[1].bias.data[int(8 * share) :] = 0
        return model

    table = measure_tradeoff(technique, model, (x, y), (1.0, 0.0), batch_size=8, rounds=2)
    assert list(table.columns) == ["knob", "accuracy", "agreement", "wall_ms", "speedup", "flops"]
    assert table.accuracy.tolist()[:2] == [1, 1]
    assert table.agreement.tolist()[2] == pytest.approx(float((model[3].bias.argmax() == y).float().mean()))
    assert table.flops.tolist() == [2 * 20 * (64 + 24)] * 3
    assert (table.wall_ms > 0).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with refused("as many inputs as targets"):
        measure_tradeoff(technique, model, (x, y[:3]), ())
    with refused("evaluation mode"):
        measure_tradeoff(technique, model.train(), (x, y), ())


# The claim.


def test_the_claims_video_rests_and_moves(tmp_path):
    from paperworks.bench import Run
    from paperworks.claims.efficient.redundancy import SCENE, Images, RedundancySettings, on_canvas, video

    settings = RedundancySettings.at("smoke")
    run = Run(seed=0, scale="smoke", device="cpu", data_root=None, folder=tmp_path, keep=lambda name, content: None)
    data = Images(run, settings)
    clip, labels = video(run, settings, data.test, "a")
    assert clip.shape == (12, 1, 32, 32)
    assert torch.equal(clip[SCENE - 1], clip[SCENE - 2])  # rests
    changed = (clip[1:] != clip[:-1]).any(1).float().mean((1, 2))
    assert 0 < changed.max() < 0.15
    assert (labels[:SCENE] == labels[0]).all()
    assert torch.equal(clip, video(run, settings, data.test, "a")[0])
    canvases = on_canvas(run, settings, data.test)
    torch.testing.assert_close(canvases.inputs.sum((1, 2, 3)), data.test.inputs.sum((1, 2, 3)))
