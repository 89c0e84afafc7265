"""Where a classifier looks: gradients with respect to pixels, pooled, normalised and cut at a quantile."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from paperworks.errors import UserError
from paperworks.robust.mixing import Images, Targets

SaliencyMaps = Float[Tensor, "batch height width"]
PatchMaps = Float[Tensor, "batch patches patches"]


def input_saliency(
    model: nn.Module, x: Images, target: Targets, *, update_bn: bool = False
) -> tuple[SaliencyMaps, Float[Tensor, "batch classes"]]:
    r"""Root mean square over the channels of the loss's gradient with respect to the pixels.

    $$s_i = \sqrt{\tfrac1C \sum_c g_{ic}^2}, \qquad
      g = \frac{\partial}{\partial x} \sum_i \mathrm{CE}(f(x_i), y_i)$$

    The reference implementation scales the loss by $2 / (K B)$, which cancels once maps are normalised and is
    left out: half-precision gradients vanish less. Only the gradient with respect to the pixels is computed,
    so that the weights' half of the backward pass is saved and no parameter's ``.grad`` is touched.

    Args:
        model: Maps images to logits; called in the mode (training or evaluation) that it is in.
        x: Images.
        target: Class indices or probabilities.
        update_bn: Let this pass update the running statistics of batch norm (and any other buffer), as the
            reference implementation does, so that a training step updates them twice. By default the pass
            works on copies of the buffers.

    Returns:
        Saliency, at least in float32, and the logits; both detached.

    Raises:
        UserError: If the model's output is not logits that depend on ``x`` differentiably.
    """
    x = x.detach().requires_grad_()
    buffers = {} if update_bn else {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.enable_grad():
        logits = functional_call(model, buffers, (x,))
        if logits.ndim != 2 or (target.ndim == 2 and target.shape[1] != logits.shape[1]):
            raise UserError(f"the model must give logits for targets {list(target.shape)}, got {list(logits.shape)}")
        loss = F.cross_entropy(logits, target, reduction="sum")
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, x, allow_unused=True)
    if gradient is None:
        raise UserError("the model's output must depend on its input differentiably; is it detached or rounded?")
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.to(wide).square().mean(1).sqrt(), logits.detach()


def pool_saliency(saliency: SaliencyMaps, num_patches: int) -> PatchMaps:
    """Mean saliency of each of ``num_patches`` x ``num_patches`` square patches.

    Raises:
        UserError: If the maps are not square or their side is not a multiple of ``num_patches``.
    """
    height, width = saliency.shape[-2:]
    if height != width:
        raise UserError(f"images must be square, got {height} x {width}")
    if num_patches < 1 or height % num_patches:
        raise UserError(f"the side of the images must be a multiple of num_patches, got {height} and {num_patches}")
    return F.avg_pool2d(saliency.unsqueeze(1), height // num_patches).squeeze(1)


def normalize_saliency(saliency: SaliencyMaps) -> SaliencyMaps:
    """Scale each map to sum 1.

    A map of zeros, which a saturated loss gives, becomes uniform: the image is salient everywhere or nowhere.
    (The reference implementation divides by zero there and mixes such pairs as Mixup does.)
    """
    total = saliency.sum((-2, -1), keepdim=True)
    return torch.where(total == 0, 1 / saliency[0].numel(), saliency / total)


def row_quantile(values: Float[Tensor, "batch n"], q: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Each row's own quantile, interpolated linearly: the diagonal of ``torch.quantile(values, q, dim=1)``.

    That call computes every quantile of every row, a table of batch x batch, to use its diagonal.
    """
    if values.device.type == "cpu":  # NumPy's vectorised sort is many times as fast as PyTorch's there
        ordered = torch.from_numpy(np.sort(values.numpy(force=True), 1))
    else:
        ordered = values.sort(1).values
    rank = q.to(values) * (values.shape[1] - 1)
    below, above = rank.floor(), rank.ceil()
    low, high = (ordered.gather(1, index.long().unsqueeze(1)).squeeze(1) for index in (below, above))
    return torch.lerp(low, high, rank - below)


def saliency_mask(
    saliency: SaliencyMaps, q: Float[Tensor, " batch"], num_patches: int
) -> Bool[Tensor, "batch 1 height width"]:
    r"""The salient patches of each image: those at or above its $q_i$-quantile.

    $$M_i = \mathbb 1[s_i \ge t_i], \qquad t_i = \mathrm{quantile}_{q_i}(s_i)$$

    $q = 0$ marks every patch; $q$ near 1 the most salient one, and always at least one.

    Args:
        saliency: One map an image; its scale does not matter.
        q: Quantile of each image, in [0, 1].
        num_patches: P, patches a side.

    Returns:
        Masks of the size of the images.

    Raises:
        UserError: If ``q`` is out of range, or the maps cannot be divided into the patches.
    """
    if ((q < 0) | (q > 1)).any():
        raise UserError(f"q must be from 0 to 1, got {q[(q < 0) | (q > 1)][0].item():g}")
    pooled = normalize_saliency(pool_saliency(saliency, num_patches)).flatten(1)
    salient = (pooled >= row_quantile(pooled, q).unsqueeze(1)).view(-1, 1, num_patches, 1, num_patches, 1)
    side = saliency.shape[-1] // num_patches
    return salient.expand(-1, -1, -1, side, -1, side).reshape(-1, 1, *saliency.shape[1:])
