"""R-Mix: pairs of images mixed along their saliency, cut at a randomly drawn quantile."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperworks.errors import UserError
from paperworks.robust.mixing import Images, Mixing, SoftTargets, Targets, blend
from paperworks.train import State

from .saliency import SaliencyMaps, input_saliency, saliency_mask

QUANTILES = tuple(0.11 * k for k in range(10))
"""The reference implementation's thresholds: ten from 0 to 0.99."""


def mix_by_saliency(
    x: Images,
    y: SoftTargets,
    mask: Bool[Tensor, "batch 1 height width"],
    perm: Int[Tensor, " batch"],
    lam: float | Float[Tensor, " batch"],
) -> tuple[Images, SoftTargets]:
    r"""Mix pairs by $\lambda$ where both images are salient or neither is; elsewhere take the salient one.

    $$\tilde x_i = [M_i = M_{\pi(i)}] \odot (\lambda x_i + (1 - \lambda) x_{\pi(i)})
      + [M_i \ne M_{\pi(i)}] \odot (M_i \odot x_i + M_{\pi(i)} \odot x_{\pi(i)})$$
    $$\tilde y_i = a (\lambda y_i + (1 - \lambda) y_{\pi(i)}) + b\, y_i + c\, y_{\pi(i)}$$

    with $a$, $b$, $c$ the fractions of pixels where the masks agree, only $i$ is salient, only its partner
    is. That is ``blend`` with the weight $\lambda$ where the masks agree and $M_i$ elsewhere.

    Args:
        x: Images.
        y: Class probabilities.
        mask: What is salient, of the images' size.
        perm: Each image's partner $\pi(i)$.
        lam: $\lambda$, one for the batch as in the reference, or one an image.
    """
    if mask.shape != (len(x), 1, *x.shape[-2:]):
        raise UserError(f"mask must have shape {[len(x), 1, *x.shape[-2:]]}, got {list(mask.shape)}")
    if isinstance(lam, Tensor):
        lam = lam.to(x).view(-1, 1, 1, 1)
    weight = torch.where(mask == mask[perm], lam, mask.to(x.dtype))
    return blend(x, y, perm, weight)


class Draw(NamedTuple):
    """What chance decides about one batch.

    Attributes:
        num_patches: P, patches a side.
        quantiles: Quantile of each image, at which its saliency is cut.
        perm: Each image's partner.
        lam: λ, one or one an image.
    """

    num_patches: int
    quantiles: Float[Tensor, " batch"]
    perm: Int[Tensor, " batch"]
    lam: float | Float[Tensor, " batch"]


class RMix(Mixing):
    r"""R-Mix (Luu et al. 2023): saliency-guided Mixup whose thresholds are drawn instead of optimised.

    Each batch costs one more forward pass and the half of a backward pass that leads to the pixels. Every
    batch is mixed, and the loss must take class probabilities, as ``nn.CrossEntropyLoss`` does.

    Args:
        num_classes: K, the width of the targets that come out.
        alpha: Of $\lambda \sim \mathrm{Beta}(\alpha, \alpha)$; the reference implementation's is 1 for CIFAR
            and 0.2 for ImageNet.
        patches: P is drawn from these for every batch; the images' side must be a multiple of each. Default:
            the reference implementation's for CIFAR (patches of 16 and 8 pixels); it draws from 2, 4, 8, 16,
            32 for ImageNet.
        quantiles: Each image's threshold is drawn from these. One value fixes it.
        per_sample: Draw one λ an image instead of one a batch.
        saliency: ``"random"`` replaces the saliency by noise, to ask what looking at the images brings.
        update_bn: See ``input_saliency``.
        seed: Of all draws.

    Example:
        >>> mix = RMix(num_classes=10, seed=0)
        >>> mixed, soft = mix(model, images, labels)
        >>> loss = nn.functional.cross_entropy(model(mixed), soft)
        >>> Trainer(epochs=40, interventions=[RMix(num_classes=10)])
    """

    def __init__(
        self,
        num_classes: int,
        alpha: float = 1.0,
        patches: Sequence[int] = (2, 4),
        quantiles: Sequence[float] = QUANTILES,
        *,
        per_sample: bool = False,
        saliency: Literal["gradient", "random"] = "gradient",
        update_bn: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(num_classes, alpha, seed)
        if not patches or min(patches) < 1:
            raise UserError(f"patches must be positive numbers of patches a side, got {tuple(patches)}")
        if not quantiles or not all(0 <= q <= 1 for q in quantiles):
            raise UserError(f"quantiles must be from 0 to 1, got {tuple(quantiles)}")
        if saliency not in ("gradient", "random"):
            raise UserError(f"saliency must be 'gradient' or 'random', got {saliency!r}")
        self.patches, self.quantiles = tuple(patches), torch.tensor(quantiles)
        self.per_sample, self.saliency, self.update_bn = per_sample, saliency, update_bn

    def __call__(self, model: nn.Module, x: Images, y: Targets) -> tuple[Images, SoftTargets]:
        """Mix a batch.

        Args:
            model: The classifier in training: images to logits.
            x: Square images.
            y: Class indices or probabilities.

        Returns:
            Mixed images and class probabilities.

        Raises:
            UserError: If the images cannot be divided into the patches, the targets are not of
                ``num_classes`` classes, or the model is not differentiable.
        """
        y = self._batch(x, y)
        if len(x) == 1:
            return x, y
        if self.saliency == "gradient":
            maps, _ = input_saliency(model, x, y, update_bn=self.update_bn)
        else:
            maps = torch.rand(len(x), *x.shape[-2:], generator=self.generator).to(x.device)
        return self.mix(x, y, maps, self.draw(len(x)))

    def draw(self, size: int) -> Draw:
        """Draw for a batch of ``size`` images."""
        num_patches = self.patches[int(torch.randint(len(self.patches), (), generator=self.generator))]
        quantiles = self.quantiles[torch.randint(len(self.quantiles), (size,), generator=self.generator)]
        lam = self._lambda(size if self.per_sample else 1)
        return Draw(num_patches, quantiles, self._permutation(size), lam if self.per_sample else float(lam))

    @staticmethod
    def mix(x: Images, y: SoftTargets, saliency: SaliencyMaps, draw: Draw) -> tuple[Images, SoftTargets]:
        """Mix as drawn, along saliency that is known already."""
        mask = saliency_mask(saliency, draw.quantiles.to(saliency), draw.num_patches)
        return mix_by_saliency(x, y, mask, draw.perm.to(x.device), draw.lam)

    def on_batch(self, state: State) -> None:
        with state.fabric.autocast():
            state.inputs, state.targets = self(state.module, state.inputs, state.targets)
