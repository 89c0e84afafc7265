import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from paperworks.efficient import (
    FilteredConv2d,
    GradientFilter,
    apply_gradient_filter,
    backward_cost,
    filtered_conv2d,
    freeze_except,
    gradient_agreement,
    remove_gradient_filter,
)
from paperworks.efficient.gradfilter.grid import PatchGrid
from paperworks.errors import UserError
from paperworks.nn.backbones import CifarResNet, ConvNet, mlp
from paperworks.train import Trainer
from stopping import Stop, StopAt

CHANNELS_LAST = torch.channels_last


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(function, g: Tensor, *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    return list(torch.autograd.grad(function(*leaves), leaves, g))


def refused(message: str):
    """Expect our error, or beartype's where that is on and looks first."""
    return pytest.raises((UserError, TypeError), match=f"{message}|Type-check error")


# The gradients.


def test_the_worked_example():
    x, kernel, g = torch.arange(16.0).view(1, 1, 4, 4), torch.ones(1, 1, 3, 3), torch.ones(1, 1, 4, 4)
    sums = PatchGrid((4, 4), (2, 2), (2, 2)).sum(x)
    assert torch.equal(sums, torch.tensor([[[[10.0, 18.0], [42.0, 50.0]]]]))
    gx, gw = gradients(partial(filtered_conv2d, padding=1), g, x, kernel)
    assert torch.equal(gw, torch.full((1, 1, 3, 3), 120.0))
    assert torch.equal(gx, torch.full((1, 1, 4, 4), 9.0))
    exact_x, exact_w = gradients(partial(F.conv2d, padding=1), g, x, kernel)
    assert exact_w[0, 0, 1, 1] == 120
    corner, edge, inside = exact_x[0, 0, 0, 0], exact_x[0, 0, 0, 1], exact_x[0, 0, 1, 1]
    assert (corner, edge, inside) == (4, 6, 9)


def by_the_formula(x, weight, g, stride, patch, depthwise, correct):
    """The specification's steps, one number at a time."""
    n, ci, height, width = x.shape
    co, h, w = g.shape[1:]
    p, q, rh, rw = math.ceil(h / patch), math.ceil(w / patch), patch * stride[0], patch * stride[1]
    top_x, left_x = math.ceil((p * rh - height) / 2), math.ceil((q * rw - width) / 2)
    top_y, left_y = math.ceil((p * patch - h) / 2), math.ceil((q * patch - w) / 2)
    x_sum, g_sum, count = torch.zeros(n, ci, p, q), torch.zeros(n, co, p, q), torch.zeros(p, q)
    cells_x = {(i, j): ((i + top_x) // rh, (j + left_x) // rw) for i in range(height) for j in range(width)}
    for (i, j), (a, b) in cells_x.items():
        if 0 <= a < p and 0 <= b < q:
            x_sum[:, :, a, b] += x[:, :, i, j]
    for i in range(h):
        for j in range(w):
            a, b = (i + top_y) // patch, (j + left_y) // patch
            g_sum[:, :, a, b] += g[:, :, i, j]
            count[a, b] += 1
    g_mean = g_sum / count / (stride[0] * stride[1] if correct else 1)
    kernel = weight.sum((2, 3))
    if depthwise:
        shared = torch.einsum("ncpq,ncpq->c", g_mean, x_sum)[:, None]
        cells = g_mean * kernel[None, :, :, None]
    else:
        shared = torch.einsum("nopq,ncpq->oc", g_mean, x_sum)
        cells = torch.einsum("oc,nopq->ncpq", kernel, g_mean)
    gx = torch.zeros_like(x)
    for (i, j), (a, b) in cells_x.items():
        if 0 <= a < p and 0 <= b < q:
            gx[:, :, i, j] = cells[:, :, a, b]
    return gx, shared[:, :, None, None].expand_as(weight)


@given(
    size=st.tuples(st.integers(3, 11), st.integers(3, 11)),
    kernel=st.sampled_from([(1, 1), (3, 3), (3, 1), (2, 2)]),
    stride=st.sampled_from([(1, 1), (2, 2), (1, 2)]),
    padding=st.sampled_from([(0, 0), (1, 1), (2, 0), (3, 3)]),
    patch=st.integers(1, 7),
    depthwise=st.booleans(),
    correct=st.booleans(),
    channels_last=st.booleans(),
)
def test_gradients_follow_the_formula(size, kernel, stride, padding, patch, depthwise, correct, channels_last):
    co = 2 if depthwise else 3
    x, weight, bias = draw(2, 2, *size), draw(co, 1 if depthwise else 2, *kernel, seed=1), draw(co, seed=2)
    if channels_last:
        x, weight = x.contiguous(memory_format=CHANNELS_LAST), weight.contiguous(memory_format=CHANNELS_LAST)
    geometry = {"stride": stride, "padding": padding, "groups": 2 if depthwise else 1}
    y = F.conv2d(x, weight, bias, **geometry)
    g = draw(*y.shape, seed=3)
    filtered = partial(filtered_conv2d, **geometry, patch=patch, stride_correction=correct)
    gx, gw, gb = gradients(filtered, g, x, weight, bias)
    expected_x, expected_w = by_the_formula(x, weight, g, stride, patch, depthwise, correct)
    torch.testing.assert_close(gx, expected_x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gw, expected_w, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gb, g.sum((0, 2, 3)))
    assert torch.equal(filtered(x.requires_grad_(), weight, bias), y)  # bit for bit


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_1x1_kernel_is_exact_where_the_gradient_is_constant_on_patches(patch, groups):
    x, weight = draw(2, 3, 8, 8), draw(3, 3 // groups, 1, 1, seed=1)
    g = draw(2, 3, 8 // patch, 8 // patch, seed=2).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    filtered = gradients(partial(filtered_conv2d, patch=patch, groups=groups), g, x, weight)
    exact = gradients(partial(F.conv2d, groups=groups), g, x, weight)
    torch.testing.assert_close(filtered, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("groups", "dilation"), [(1, (4, 4)), (4, (2, 2)), (1, (4, 1)), (1, (2, 4))])
def test_wide_dilation_keeps_the_taps(groups, dilation):
    # Taps a whole number of patches apart: exact where the gradient is constant on patches.
    kernel = tuple(3 if d > 1 else 1 for d in dilation)
    x, weight = draw(2, 4, 16, 16), draw(4, 4 // groups, *kernel, seed=1)
    g = draw(2, 4, 8, 8, seed=2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    geometry = {"dilation": dilation, "padding": "same", "groups": groups}
    gx, gw = gradients(partial(filtered_conv2d, **geometry, patch=2), g, x, weight)
    exact_x, _ = gradients(partial(F.conv2d, **geometry), g, x, weight)
    torch.testing.assert_close(gx, exact_x, rtol=1e-5, atol=1e-5)
    assert torch.equal(gw, gw[:, :, :1, :1].expand_as(gw))


def test_dilation_within_a_patch_is_ignored():
    x, weight, g = draw(1, 2, 9, 9), draw(2, 2, 3, 3, seed=1), draw(1, 2, 9, 9, seed=2)
    wide = gradients(partial(filtered_conv2d, dilation=3, padding=3, patch=4), g, x, weight)
    torch.testing.assert_close(wide, gradients(partial(filtered_conv2d, padding=1, patch=4), g, x, weight))


def test_even_dilated_kernels_keep_the_shape():
    x, weight = draw(1, 2, 9, 9), draw(2, 2, 2, 2, seed=1)
    y = F.conv2d(x, weight, dilation=3, padding=1)
    gx, gw = gradients(partial(filtered_conv2d, dilation=3, padding=1, patch=2), torch.ones_like(y), x, weight)
    assert (gx.shape, gw.shape) == (x.shape, weight.shape)


def test_gradients_are_linear_in_the_outputs_gradient():
    x, weight, bias = draw(2, 3, 7, 9), draw(4, 3, 3, 3, seed=1), draw(4, seed=2)
    one, two = draw(2, 4, 7, 9, seed=3), draw(2, 4, 7, 9, seed=4)
    filtered = partial(filtered_conv2d, padding=1, patch=4)
    parts = zip(gradients(filtered, one, x, weight, bias), gradients(filtered, two, x, weight, bias), strict=True)
    whole = gradients(filtered, 2 * one - 3 * two, x, weight, bias)
    torch.testing.assert_close(whole, [2 * a - 3 * b for a, b in parts], rtol=1e-4, atol=1e-4)


def test_taps_and_patches_share_one_value():
    gx, gw = gradients(partial(filtered_conv2d, padding=1), draw(2, 4, 8, 8), draw(2, 3, 8, 8), draw(4, 3, 3, 3))
    assert torch.equal(gw, gw[:, :, :1, :1].expand_as(gw))
    corners = gx[:, :, ::2, ::2]
    assert torch.equal(gx, corners.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize(("correct", "factor"), [(True, 1), (False, 4)])
def test_stride_correction_divides_by_the_stride(correct, factor):
    x, weight, g = torch.ones(3, 1, 8, 8), torch.ones(1, 1, 3, 3), torch.ones(3, 1, 4, 4)
    filtered = partial(filtered_conv2d, stride=2, padding=1, stride_correction=correct)
    gx, gw = gradients(filtered, g, x, weight)
    assert torch.equal(gw, torch.full_like(gw, factor * 3 * 4 * 4))
    assert gx.sum() == factor * 9 * 3 * 4 * 4  # what 9 taps of 1 hand back for every output


@pytest.mark.parametrize(("size", "patch"), [(7, 2), (7, 4), (5, 7), (1, 3)])
def test_patches_at_the_border_average_what_is_inside(size, patch):
    cells = math.ceil(size / patch)
    grid = PatchGrid((size, size), (cells, cells), (patch, patch))
    assert torch.equal(grid.mean(torch.ones(1, 2, size, size)), torch.ones(1, 2, cells, cells))
    assert grid.sum(torch.ones(1, 2, size, size)).sum() == 2 * size * size
    assert torch.equal(grid.spread(torch.ones(1, 2, cells, cells), channels_last=False), torch.ones(1, 2, size, size))


def test_patches_are_centred():
    # 7 pixels, 4 cells of 2: one pixel sticks out, before the first.
    grid = PatchGrid((7, 7), (4, 4), (2, 2))
    assert grid.sum(torch.arange(7.0).expand(1, 1, 7, 7))[0, 0, 1].tolist() == [0, 6, 14, 22]
    cells = torch.arange(4.0).expand(1, 1, 4, 4)
    assert grid.spread(cells, channels_last=False)[0, 0, 0].tolist() == [0, 1, 1, 2, 2, 3, 3]


def smooth(*shape: int, seed: int) -> Tensor:
    """Random fields of the eight lowest cosines each way."""
    positions = (torch.arange(shape[-1]) + 0.5) * math.pi / shape[-1]
    basis = torch.cos(torch.arange(8)[:, None] * positions)
    return torch.einsum("ncab,ah,bw->nchw", draw(*shape[:2], 8, 8, seed=seed), basis, basis)


@pytest.mark.parametrize(("patch", "weight_at_least", "input_at_least"), [(2, 0.85, 0.8), (4, 0.8, 0.7)])
def test_smooth_gradients_are_kept(patch, weight_at_least, input_at_least):
    x, weight, g = smooth(4, 8, 32, 32, seed=0), draw(8, 8, 3, 3, seed=1), smooth(4, 8, 32, 32, seed=2)
    filtered = gradients(partial(filtered_conv2d, padding=1, patch=patch), g, x, weight)
    exact = gradients(partial(F.conv2d, padding=1), g, x, weight)
    of_input, of_weight = (
        F.cosine_similarity(a.flatten(), b.flatten(), 0) for a, b in zip(filtered, exact, strict=True)
    )
    assert of_weight > weight_at_least
    assert of_input > input_at_least


def test_non_finite_gradients_propagate():
    g = torch.zeros(1, 2, 4, 4)
    g[0, 0, 0, 0] = math.nan
    gx, gw, gb = gradients(partial(filtered_conv2d, padding=1), g, draw(1, 3, 4, 4), draw(2, 3, 3, 3), draw(2))
    assert gx[0, :, :2, :2].isnan().all()
    assert gx[0, :, 2:, :].isfinite().all()
    assert gw[0].isnan().all()
    assert gb.isnan().tolist() == [True, False]


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_are_dense_in_the_memory_format_of_their_tensor(channels_last):
    kind = CHANNELS_LAST if channels_last else torch.contiguous_format
    x, weight = (t.contiguous(memory_format=kind) for t in (draw(2, 3, 6, 6), draw(4, 3, 3, 3)))
    for gradient in gradients(partial(filtered_conv2d, padding=1), draw(2, 4, 6, 6), x, weight):
        assert gradient.is_contiguous(memory_format=kind)
        gradient.mul_(2)  # an expanded tensor refuses this


@pytest.mark.parametrize(("pixels", "images"), [(2, 8), (256, 9)])
def test_large_batches_are_pooled_piece_by_piece(pixels, images):
    maps = draw(images, 3, pixels, pixels)
    pooled = PatchGrid((pixels, pixels), (pixels // 2, pixels // 2), (2, 2)).mean(maps)
    assert pooled.is_contiguous(memory_format=CHANNELS_LAST)
    torch.testing.assert_close(pooled, F.avg_pool2d(maps, 2))


def test_one_image_without_a_batch_and_an_empty_batch():
    weight = draw(4, 3, 3, 3)
    single, batch = draw(3, 6, 6), draw(4, 6, 6, seed=1)
    alone = gradients(partial(filtered_conv2d, padding=1), batch, single, weight)
    together = gradients(partial(filtered_conv2d, padding=1), batch[None], single[None], weight)
    torch.testing.assert_close(alone[0], together[0][0])
    torch.testing.assert_close(alone[1], together[1])
    nothing = gradients(partial(filtered_conv2d, padding=1), torch.zeros(0, 4, 6, 6), torch.zeros(0, 3, 6, 6), weight)
    assert nothing[0].shape == (0, 3, 6, 6)
    assert not nothing[1].any()


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_as_conv2d(inside):
    x, weight, bias, g = draw(2, 8, 8, 8), draw(8, 8, 3, 3, seed=1), draw(8, seed=2), draw(2, 8, 8, 8, seed=3)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        y = filtered_conv2d(*leaves, padding=1)
        assert torch.equal(y, F.conv2d(*leaves, padding=1))
        if inside:
            found = torch.autograd.grad(y, leaves, g.bfloat16())
    if not inside:
        found = torch.autograd.grad(y, leaves, g.bfloat16())
    assert all(gradient.dtype == torch.float32 for gradient in found)
    exact = gradients(partial(filtered_conv2d, padding=1), g, *leaves)
    torch.testing.assert_close(list(found), exact, rtol=0.05, atol=0.3)


# What is kept for the backward pass.


def saved(function) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return kept


@pytest.mark.parametrize("patch", [2, 4])
def test_only_patch_sums_and_summed_kernels_are_kept(patch):
    x, weight = draw(8, 16, 8, 8).requires_grad_(), draw(32, 16, 3, 3).requires_grad_()
    kept = saved(lambda: filtered_conv2d(x, weight, padding=1, patch=patch))
    assert sum(t.numel() for t in kept) == 8 * 16 * (8 // patch) ** 2 + 16 * 32
    exact = saved(lambda: F.conv2d(x, weight, padding=1))
    assert sum(t.numel() for t in exact) == x.numel() + weight.numel()


def test_nothing_is_kept_or_computed_that_is_not_needed():
    x, weight = draw(8, 16, 8, 8), draw(32, 16, 3, 3)
    first = saved(lambda: filtered_conv2d(x, weight.requires_grad_(), padding=1))
    assert [t.shape for t in first] == [(8, 16, 4, 4)]
    frozen = saved(lambda: filtered_conv2d(x.requires_grad_(), weight.detach(), padding=1))
    assert [t.shape for t in frozen] == [(32, 16, 1, 1)]
    with torch.no_grad():
        assert not filtered_conv2d(x, weight, padding=1).requires_grad


def test_gradients_of_gradients_are_refused():
    x, weight = draw(1, 2, 4, 4).requires_grad_(), draw(2, 2, 3, 3).requires_grad_()
    with pytest.raises(UserError, match="create_graph=True"):
        torch.autograd.grad(filtered_conv2d(x, weight, padding=1).sum(), x, create_graph=True)


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 0}, "patch must be a positive integer, got 0"),
        ({"patch": 2.0}, "patch must be a positive integer, got 2.0"),
        ({"patch": True}, "patch must be a positive integer, got True"),
        ({"groups": 2}, "grouped convolution with 1<groups<channels is not supported.* got groups=2 for 4 and 4"),
        ({"padding": "same", "stride": 2}, "padding='same' needs stride 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    weight = draw(4, 4 // options.get("groups", 1), 3, 3)
    with refused(message):
        filtered_conv2d(draw(1, 4, 6, 6), weight, **options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_only_real_numbers_are_convolved(dtype):
    with refused("x must be floating point"):
        filtered_conv2d(torch.zeros(1, 2, 4, 4, dtype=dtype), torch.zeros(2, 2, 3, 3, dtype=dtype))


def test_only_images_are_convolved():
    with refused("x must be \\[batch, channels, height, width\\] or one image of it"):
        filtered_conv2d(draw(1, 1, 2, 4, 4), draw(2, 2, 3, 3))


def test_other_paddings_than_zeros_are_refused():
    with refused("padding_mode must be 'zeros', got 'circular'"):
        FilteredConv2d(2, 2, 3, padding=1, padding_mode="circular")


# Layers and models.


def small_model() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(1, 4, widths=(4, 6, 8), strides=(1, 2, 1))


NAMES = ["body.0.0", "body.1.0", "body.2.0"]


def test_a_filtered_layer_shares_the_parameters_of_its_origin():
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=True).eval()
    layer = FilteredConv2d.from_conv(conv, patch=4)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert not layer.training
    assert layer.state_dict().keys() == conv.state_dict().keys()
    x = draw(2, 3, 8, 8)
    assert torch.equal(layer(x), conv(x))
    assert FilteredConv2d.from_conv(nn.Conv2d(3, 4, 3, bias=False)).bias is None


def test_a_filter_can_be_switched_off():
    layer = FilteredConv2d(3, 4, 3, padding=1, patch=2)
    x, g = draw(2, 3, 8, 8), draw(2, 4, 8, 8)
    (filtered,) = torch.autograd.grad(layer(x), [layer.weight], g)
    layer.enabled = False
    (exact,) = torch.autograd.grad(layer(x), [layer.weight], g)
    (expected,) = gradients(lambda weight: F.conv2d(x, weight, layer.bias, padding=1), g, layer.weight)
    assert torch.equal(exact, expected)
    assert not torch.allclose(filtered, exact)
    assert "patch=2, enabled=False" in repr(layer)


def test_apply_and_remove_leave_all_but_the_gradients():
    model = small_model()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    calls = []
    modules["body.2.0"].register_forward_hook(lambda *_: calls.append("forward"))
    modules["body.2.0"].weight.register_hook(lambda g: calls.append("backward"))
    x = draw(4, 1, 8, 8)
    before = model.eval()(x)
    model.train()
    kinds = [type(module) for module in modules.values()]
    statistics = copy.deepcopy(dict(model.named_buffers()))

    assert apply_gradient_filter(model, "last:2", patch=2) == NAMES[1:]
    assert [isinstance(modules[name], FilteredConv2d) for name in NAMES] == [False, True, True]
    assert all(a is b for a, b in zip(model.parameters(), parameters.values(), strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules.values(), strict=True))
    assert model.state_dict().keys() == small_model().state_dict().keys()
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())
    assert torch.equal(model.eval()(x), before)
    model(x).sum().backward()
    assert calls == ["forward", "forward", "forward", "backward"]

    assert remove_gradient_filter(model) == NAMES[1:]
    assert [type(module) for module in modules.values()] == kinds
    assert not {"patch", "enabled", "stride_correction"} & vars(modules["body.2.0"]).keys()
    assert remove_gradient_filter(model) == []


def test_an_optimizer_goes_on_with_its_momentum():
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        model(draw(4, 1, 8, 8)).square().sum().backward()
        optimizer.step()

    step()
    state = dict(optimizer.state)
    apply_gradient_filter(model, "all")
    step()
    remove_gradient_filter(model)
    step()
    assert all(optimizer.state[parameter] is state[parameter] for parameter in model.parameters())


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("all", NAMES),
        ("last:1", NAMES[2:]),
        ("last:3", NAMES),
        ("body.1.0", NAMES[1:2]),
        (["body.2.0", "body.0.0"], ["body.2.0", "body.0.0"]),
        (lambda name, conv: conv.stride == (2, 2), NAMES[1:2]),
    ],
)
def test_layers_can_be_chosen_by_name_number_or_predicate(layers, names):
    model = small_model()
    assert apply_gradient_filter(model, layers, 4) == names
    found = {name: module.patch for name, module in model.named_modules() if isinstance(module, FilteredConv2d)}
    assert found == dict.fromkeys(names, 4)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("last:4", "layers must be 'last:k' with k from 1 to the 3 convolutions, got 'last:4'"),
        ("last:0", "got 'last:0'"),
        ("last:two", "got 'last:two'"),
        ("body.9.0", "unknown layer 'body.9.0'. Did you mean 'body.2.0'?"),
        (["body.0.0", "body.0.1"], "layer 'body.0.1' is a BatchNorm2d: only plain nn.Conv2d layers"),
        ([], "layers must name at least one layer"),
        (lambda name, conv: False, "the predicate chose none of the 3 convolutions"),
    ],
)
def test_a_choice_that_matches_nothing_changes_nothing(layers, message):
    model = small_model()
    with pytest.raises(UserError) as error:
        apply_gradient_filter(model, layers)
    assert message in str(error.value)
    assert not any(isinstance(module, FilteredConv2d) for module in model.modules())


def test_layers_that_cannot_be_filtered_are_refused():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3))
    with pytest.raises(UserError, match="layer '1': grouped convolution"):
        apply_gradient_filter(model, "all")
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(UserError, match="layer '2' is a ConvTranspose2d"):
        apply_gradient_filter(model, ["2"])
    apply_gradient_filter(model, ["0"])
    with pytest.raises(UserError, match="layer '0' is filtered already"):
        apply_gradient_filter(model, ["0"])
    with pytest.raises(UserError, match="unknown filtered layer '1'"):
        remove_gradient_filter(model, ["1"])
    with refused("patch must be a positive integer"):
        apply_gradient_filter(model, ["1"], patch=-1)
    with pytest.raises(UserError, match=r"Sequential has no plain nn.Conv2d"):
        apply_gradient_filter(mlp(4, (), 2))


def test_a_filtered_model_can_be_copied():
    model = small_model()
    apply_gradient_filter(model, "last:1", patch=4)
    other = copy.deepcopy(model)
    assert remove_gradient_filter(model) == remove_gradient_filter(other)


def test_auto_leaves_out_layers_that_would_not_become_faster():
    model = nn.Sequential(nn.Conv2d(1, 64, 1), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1))
    assert apply_gradient_filter(model, "all", auto=True, input_shape=(8, 1, 32, 32)) == ["1"]
    with pytest.raises(UserError, match="auto=True needs input_shape"):
        apply_gradient_filter(small_model(), auto=True)


# Fine-tuning.


def test_only_what_is_named_learns_and_batch_norms_stay_as_they_are():
    model = small_model()
    undo = freeze_except(model, ["body.2.0", "classifier"])
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning == ["body.2.0.weight", "classifier.weight", "classifier.bias"]
    statistics = copy.deepcopy(dict(model.named_buffers()))
    model.train()
    model(draw(4, 1, 8, 8)).sum().backward()
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())
    undo()
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.train()
    model(draw(4, 1, 8, 8))
    assert all(not torch.equal(value, statistics[name]) for name, value in model.named_buffers())


def test_batch_norms_may_go_on_with_the_statistics_of_batches():
    model = small_model()
    freeze_except(model, ["classifier"], norm_statistics=True)
    statistics = copy.deepcopy(dict(model.named_buffers()))
    model.train()
    model(draw(4, 1, 8, 8)).sum().backward()
    assert all(not torch.equal(value, statistics[name]) for name, value in model.named_buffers())
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("classifier"))


def test_freezing_needs_names_of_modules_that_can_learn():
    with pytest.raises(UserError, match=r"unknown module 'clasifier'. Did you mean 'classifier'\?"):
        freeze_except(small_model(), ["clasifier"])
    with pytest.raises(UserError, match=r"module 'body.0.2' has no parameters"):
        freeze_except(small_model(), "body.0.2")


# Cost and agreement.


def test_cost_counts_what_is_done_and_what_is_kept():
    model = small_model()
    freeze_except(model, ["body.1.0", "body.2.0", "classifier"])
    table = backward_cost(model, (16, 1, 8, 8), patch=2)
    assert list(table.index) == NAMES
    assert table.exact_macs.tolist() == [0, 9 * 4 * 6 * 16 * 16, 2 * 9 * 6 * 8 * 16 * 16]
    assert table.filtered_macs.tolist() == [0, 4 * 6 * 4 * 16, 2 * 6 * 8 * 4 * 16]
    assert table.exact_bytes.tolist() == [0, 4 * 16 * 4 * 64, 4 * 16 * 6 * 16]
    assert table.filtered_bytes.tolist() == [0, 4 * 16 * 4 * 4, 4 * (16 * 6 * 4 + 6 * 8)]
    assert table.gain.iloc[0] == 1
    apply_gradient_filter(model, "last:1", patch=4)
    assert backward_cost(model, (16, 1, 8, 8), ["body.1.0", "body.2.0"]).patch.tolist() == [2, 4]


def test_cost_counts_the_bytes_that_autograd_keeps():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4))
    apply_gradient_filter(model, "all", patch=4)
    kept = saved(lambda: model(draw(3, 2, 10, 10)))
    assert sum(t.numel() * 4 for t in kept) == backward_cost(model, (3, 2, 10, 10)).filtered_bytes.sum()


def test_cost_leaves_the_model_alone_and_refuses_what_it_cannot_measure():
    model = small_model().train()
    model.body[0].eval()
    statistics = copy.deepcopy(model.state_dict())
    backward_cost(model, (2, 1, 8, 8))
    assert all(torch.equal(value, statistics[name]) for name, value in model.state_dict().items())
    assert (model.training, model.body[0].training) == (True, False)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(UserError, match="takes no batch of shape \\(2, 5, 8, 8\\)"):
        backward_cost(model, (2, 5, 8, 8))
    with pytest.raises(UserError, match="unknown layer 'body'"):
        backward_cost(model, (2, 1, 8, 8), ["body"])
    with pytest.raises(UserError, match="no convolution"):
        backward_cost(mlp(4, (), 2), (2, 4))


def test_agreement_is_full_above_the_filter_and_partial_below():
    model, batch = small_model().train(), (draw(16, 1, 8, 8), torch.arange(16) % 4)
    with pytest.raises(UserError, match="no filtered convolution"):
        gradient_agreement(model, batch)
    apply_gradient_filter(model, ["body.1.0"])
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    table = gradient_agreement(model, batch)
    assert list(table.index) == [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(table.loc["body.2.0.weight"].tolist(), [1.0, 1.0])
    assert all(0 < table.cosine[f"{name}.weight"] < 0.999 for name in NAMES[:2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.body[1][0].enabled
    freeze_except(model, ["classifier"])
    assert list(gradient_agreement(model, batch).index) == ["classifier.weight", "classifier.bias"]
    model.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter of the model learns"):
        gradient_agreement(model, batch)


def test_agreement_of_1x1_kernels_and_single_pixels_is_full():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, 3, 1), nn.Flatten())
    apply_gradient_filter(model, "all", patch=1)
    table = gradient_agreement(model, (draw(8, 2, 4, 4), draw(8, 48)), F.mse_loss)
    assert table.to_numpy() == pytest.approx(1, rel=1e-5)


# Training.


def train(folder=None, stop=None, model=None, **options) -> dict[str, Tensor]:
    model = model or small_model()
    data = TensorDataset(draw(24, 1, 8, 8), torch.arange(24) % 4)
    trainer = Trainer(
        2,
        interventions=[GradientFilter(**options), StopAt(stop)],
        batch_size=8,
        accelerator="cpu",
        checkpoint_dir=folder,
        checkpoint_every=1,
    )
    trainer.fit(model, data, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1, momentum=0.9))
    return model.state_dict()


def test_training_with_the_filter_leaves_plain_convolutions():
    model = small_model()
    exact = train(model=model, layers=["body.0.0"], patch=1)
    assert not any(isinstance(module, FilteredConv2d) for module in model.modules())
    filtered = train(layers="last:2", patch=4)
    assert all(value.isfinite().all() for value in filtered.values())
    assert not torch.allclose(exact["body.0.0.weight"], filtered["body.0.0.weight"])


def test_a_stopped_training_restores_the_model_but_not_what_was_filtered_before():
    model = small_model()
    apply_gradient_filter(model, ["body.0.0"])
    with pytest.raises(Stop):
        train(stop=1, model=model, layers="last:2")
    assert [isinstance(dict(model.named_modules())[name], FilteredConv2d) for name in NAMES] == [True, False, False]


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    undisturbed = train(tmp_path / "a", patch=2)
    with pytest.raises(Stop):
        train(tmp_path / "b", stop=4, patch=2)
    resumed = train(tmp_path / "b", patch=2)
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())


def test_the_filter_works_in_mixed_precision_and_in_residual_networks():
    model = CifarResNet(8, 4, 1, 4)
    data = TensorDataset(draw(8, 1, 8, 8), torch.arange(8) % 4)
    trainer = Trainer(1, interventions=[GradientFilter("all")], batch_size=4, accelerator="cpu", precision="bf16-mixed")
    before = copy.deepcopy(model.state_dict())
    history = trainer.fit(model, data, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1))
    assert math.isfinite(history.last["train/loss"])
    assert not torch.equal(model.body[0].weight, before["body.0.weight"])


def test_a_model_without_convolutions_gets_a_clear_error():
    model = mlp(64, (8,), 4)
    with pytest.raises(UserError, match=r"Sequential has no plain nn.Conv2d whose gradient could be filtered"):
        train(model=model)
    with refused("patch must be a positive integer, got 0"):
        GradientFilter(patch=0)


# The claim.


def test_users_share_the_classes_unequally():
    from paperworks.claims.efficient.gradfilter import by_class

    labels = torch.arange(4).repeat(50)
    first, second = by_class(labels, 4, 0.9)
    assert torch.bincount(labels[first]).tolist() == [45, 45, 5, 5]
    assert torch.bincount(labels[second]).tolist() == [5, 5, 45, 45]
    assert sorted(torch.cat([first, second]).tolist()) == list(range(200))
