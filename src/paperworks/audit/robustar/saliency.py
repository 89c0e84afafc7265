"""Where a classifier looks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperworks.errors import UserError, unknown
from paperworks.nn import keeping_modes

Images = Float[Tensor, "batch channels height width"]
Maps = Float[Tensor, "batch height width"]

KINDS = ("gradient", "smooth", "guided")


def saliency(
    model: nn.Module,
    images: Images,
    targets: Int[Tensor, " batch"] | None = None,
    kind: str = "gradient",
    *,
    samples: int = 16,
    noise: float = 0.15,
    generator: torch.Generator | None = None,
) -> Maps:
    r"""How much each pixel moves the logit of a class: $\max_c |\partial f_y(x) / \partial x_c|$.

    Args:
        model: Images to logits; used in evaluation mode. No parameter's ``.grad`` is touched.
        images: What the model is given.
        targets: The class $y$ of each; the predicted one if not given.
        kind: ``gradient``; ``smooth``, the gradient averaged over noisy copies (SmoothGrad, Smilkov et al. 2017); or
            ``guided``, where ``nn.ReLU`` passes back positive gradients only (Springenberg et al. 2015), which gives
            sharper maps that depend less on the model.
        samples, noise: SmoothGrad's copies, and the noise's deviation as a share of the image's range.
        generator: Draws that noise; needed for ``smooth``.

    Raises:
        UserError: If the kind is unknown, ``smooth`` has no generator, or the output is not logits that depend on the
            images.
    """
    if kind not in KINDS:
        raise unknown("saliency", kind, KINDS)
    with keeping_modes(model):
        model.eval()
        if targets is None:
            with torch.no_grad():
                targets = model(images).argmax(1)
        if kind == "guided":
            with _guided(model):
                gradient = _gradient(model, images, targets)
        elif kind == "smooth":
            if generator is None:
                raise UserError("saliency of kind 'smooth' needs a generator")
            spread = noise * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
            gradient = torch.zeros_like(images)
            for _ in range(samples):
                drawn = torch.randn(images.shape, generator=generator).to(images)
                gradient += _gradient(model, images + spread * drawn, targets) / samples
        else:
            gradient = _gradient(model, images, targets)
    return gradient.abs().amax(1)


def saliency_share(maps: Maps, masks: Bool[Tensor, "batch height width"]) -> Float[Tensor, " batch"]:
    """Share of each map's sum that lies in its mask; 0 for a map of zeros."""
    total = maps.sum((1, 2))
    return torch.where(total > 0, (maps * masks).sum((1, 2)) / total.clamp(min=torch.finfo(maps.dtype).tiny), 0.0)


def _gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(images)
        if logits.ndim != 2 or not logits.requires_grad:
            raise UserError(
                f"the model must give logits [batch, classes] that depend on the images, got {logits.shape}"
            )
        chosen = logits.gather(1, targets[:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, images)
    return gradient


@contextmanager
def _guided(model: nn.Module) -> Iterator[None]:
    def positive(module: nn.Module, gradient: tuple[Tensor, ...], _: Any) -> tuple[Tensor, ...]:
        return tuple(F.relu(part) for part in gradient)

    rectifiers = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    in_place = [module.inplace for module in rectifiers]
    hooks = [module.register_full_backward_hook(positive) for module in rectifiers]
    try:
        for module in rectifiers:
            module.inplace = False  # which backward hooks do not work with
        yield
    finally:
        for module, was, hook in zip(rectifiers, in_place, hooks, strict=True):
            module.inplace = was
            hook.remove()
