"""The convolution whose forward pass is exact and whose gradients are taken on a grid of patches."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.amp import is_autocast_available

from paperworks.errors import UserError

from .grid import PatchGrid

Pair = int | tuple[int, int]


def filtered_conv2d(
    x: Float[Tensor, "*batch in_channels height width"],
    weight: Float[Tensor, "out_channels in_per_group kh kw"],
    bias: Float[Tensor, "out_channels"] | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    patch: int = 2,
    stride_correction: bool = True,
) -> Float[Tensor, "*batch out_channels rows columns"]:
    r"""``torch.nn.functional.conv2d`` with gradients filtered by patches (paper, section 3).

    The output is that of ``conv2d``, bit for bit. For the gradients, the output map $[h, w]$ is covered by
    $P \times Q = \lceil h/r \rceil \times \lceil w/r \rceil$ patches of $r \times r$ and the input map by as many of
    $r s_h \times r s_w$, both grids centred. With $\tilde x$ the **sum** of the input over each patch, $\tilde g$ the
    **mean** of the output's gradient over the patch's pixels inside the map, and
    $\tilde\theta_{oc} = \sum_{uv} \theta_{ocuv}$,

    $$\nabla_{\theta_{ocuv}} = \frac{1}{s_h s_w} \sum_{npq} \tilde g_{nopq}\, \tilde x_{ncpq} \quad\text{for every }
    u, v, \qquad \nabla_{x_{nc\cdot\cdot}} = \frac{1}{s_h s_w}\, \mathrm{spread}
    \Big(\sum_o \tilde\theta_{oc}\, \tilde g_{no\cdot\cdot}\Big),$$

    where $\mathrm{spread}$ gives every pixel the value of its patch. The gradient of the bias is exact. Only
    $\tilde x$ and $\tilde\theta$ are kept for the backward pass, and only those that it needs.

    A depthwise convolution does the same in each channel. Along an axis whose dilation spans a patch or more,
    $\tilde\theta$ keeps its taps, and $\tilde g$ is convolved with them on the patch grid, dilated by
    $\lfloor d / (r s) \rfloor$ there.

    With a kernel larger than 1x1 the gradient differs from the exact one even for $r = 1$, as the shift of each tap
    is ignored.

    Args:
        x: Images, contiguous or channels-last; the gradient comes in the same memory format.
        weight: Kernels.
        bias: Bias.
        stride, padding, dilation: As in ``conv2d``.
        groups: 1, or the number of input and output channels (depthwise).
        patch: Side $r$ of a patch; the paper's are 2, 4 and 7.
        stride_correction: Divide by $s_h s_w$. The released code does not, so that its gradients are too large by
            that factor wherever the stride is not 1; ``False`` reproduces it.

    Raises:
        UserError: If an argument is out of range, or at ``backward(create_graph=True)``: the gradient has none.
    """
    stride, dilation = _pair(stride), _pair(dilation)
    check_convolution(patch, stride, padding, groups, in_channels=x.shape[-3], out_channels=len(weight))
    if not x.is_floating_point():
        raise UserError(f"x must be floating point, got {x.dtype}")
    if x.ndim not in (3, 4):
        raise UserError(f"x must be [batch, channels, height, width] or one image of it, got shape {tuple(x.shape)}")
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    device = x.device.type
    if is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)  # what autocast does for conv2d, done where autograd sees it
        x, weight, bias = _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
    with _no_autocast(device):
        images = x if x.ndim == 4 else x[None]
        y = _FilteredConv2d.apply(images, weight, bias, stride, padding, dilation, groups, patch, stride_correction)
    return y if x.ndim == 4 else y[0]


class _FilteredConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: Pair | str,
        dilation: tuple[int, int],
        groups: int,
        patch: int,
        stride_correction: bool,
    ) -> Tensor:
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        maps, image = (y.shape[2], y.shape[3]), (x.shape[2], x.shape[3])
        cells = (-(-maps[0] // patch), -(-maps[1] // patch))
        patches = (patch * stride[0], patch * stride[1])  # of the input
        ctx.outputs, ctx.inputs = PatchGrid(maps, cells, (patch, patch)), PatchGrid(image, cells, patches)
        ctx.taps = (dilation[0] // patches[0], dilation[1] // patches[1])  # their distance on the grid
        summed = [axis + 2 for axis in (0, 1) if dilation[axis] == 1 or not ctx.taps[axis]]
        ctx.groups, ctx.kernel_size = groups, weight.shape[2:]
        ctx.divisor = stride[0] * stride[1] if stride_correction else 1
        ctx.channels_last, ctx.weight_channels_last = _channels_last(x), _channels_last(weight)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            ctx.inputs.sum(x) if needs_weight else None,
            (weight.sum(summed, keepdim=True) if summed else weight) if needs_x else None,
        )
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UserError("create_graph=True: the filtered gradient of a convolution has no gradient itself")
        x_sum, kernel = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = None
        with _no_autocast(g.device.type):
            if needs_x or needs_weight:
                g_mean = ctx.outputs.mean(g)
                if ctx.divisor != 1:
                    g_mean /= ctx.divisor
                if needs_weight:
                    grad_weight = _weight_gradient(ctx, g_mean, x_sum)
                if needs_x:
                    cells = _input_gradient(ctx, g_mean, kernel)
                    grad_x = ctx.inputs.spread(cells, channels_last=ctx.channels_last)
            grad_bias = g.sum((0, 2, 3)) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None


def _weight_gradient(ctx: Any, g_mean: Tensor, x_sum: Tensor) -> Tensor:
    g_rows, x_rows = _rows(g_mean), _rows(x_sum)
    shared = g_rows.t() @ x_rows if ctx.groups == 1 else (g_rows * x_rows).sum(0)[:, None]
    (out_channels, per_group), (kh, kw) = shared.shape, ctx.kernel_size
    if ctx.weight_channels_last:
        return shared[:, None, None].expand(out_channels, kh, kw, per_group).contiguous().permute(0, 3, 1, 2)
    return shared[:, :, None, None].expand(out_channels, per_group, kh, kw).contiguous()


def _input_gradient(ctx: Any, g_mean: Tensor, kernel: Tensor) -> Tensor:
    if kernel.shape[2:] == (1, 1):
        if ctx.groups > 1:
            return g_mean * kernel.view(1, -1, 1, 1)
        return (g_mean.permute(0, 2, 3, 1) @ kernel[:, :, 0, 0]).permute(0, 3, 1, 2)
    reach = [distance * (taps - 1) for distance, taps in zip(ctx.taps, kernel.shape[2:], strict=True)]
    dilation = [max(1, distance) for distance in ctx.taps]
    padding = [r // 2 for r in reach]
    cells = F.conv_transpose2d(g_mean, kernel, padding=padding, dilation=dilation, groups=ctx.groups)
    return cells[:, :, : g_mean.shape[2], : g_mean.shape[3]]  # an odd reach leaves one too many


def _rows(cells: Float[Tensor, "n c p q"]) -> Float[Tensor, "npq c"]:
    return cells.permute(0, 2, 3, 1).reshape(-1, cells.shape[1])


def _channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == torch.float64 else t.to(dtype)


def _no_autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def check_convolution(
    patch: int, stride: tuple[int, int], padding: Pair | str, groups: int, in_channels: int, out_channels: int
) -> None:
    """Raise ``UserError`` unless the gradient of such a convolution can be filtered."""
    check_patch(patch)
    if groups != 1 and not groups == in_channels == out_channels:
        raise UserError(
            "grouped convolution with 1<groups<channels is not supported: groups must be 1 or equal both "
            f"channels, got groups={groups} for {in_channels} and {out_channels} channels"
        )
    if padding == "same" and stride != (1, 1):
        raise UserError(f"padding='same' needs stride 1, got stride {stride}")


def check_patch(patch: int) -> None:
    """Raise ``UserError`` unless ``patch`` is a positive integer."""
    if not isinstance(patch, int) or isinstance(patch, bool) or patch < 1:
        raise UserError(f"patch must be a positive integer, got {patch!r}")
