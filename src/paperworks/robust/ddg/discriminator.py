"""Real image or decoded one, judged patch by patch at several resolutions."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.errors import UserError, check_counts

from .blocks import ResidualBlock, convolution, no_norm

Images = Float[Tensor, "batch channels height width"]
Scalar = Float[Tensor, ""]


class MultiScaleDiscriminator(nn.Module):
    r"""Patch discriminators on an image pyramid, trained by least squares (LSGAN).

    $$\ell_D = \sum_k \mathbb E\,D_k(\hat x)^2 + \mathbb E\,(D_k(x) - 1)^2
               + \rho\,\mathbb E \lVert \nabla_x D_k(x) \rVert^2, \qquad
      \ell_G = 2 \sum_k \mathbb E\,(D_k(\hat x) - 1)^2$$

    Args:
        channels: Channels of an image.
        scales: Levels of the pyramid, each of half the side. The reference has 2 at 28x28 and 3 at 224x224.
        width: Channels of the first convolutions: 16 and 32.
        halvings: Times a discriminator halves the side: 1 and 2.
        blocks: Residual blocks: 1 and 4.
        penalty: $\rho$, the weight of the gradient penalty on real images.
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        scales: int = 2,
        width: int = 16,
        halvings: int = 1,
        blocks: int = 1,
        penalty: float = 0.01,
    ) -> None:
        super().__init__()
        check_counts(channels=channels, scales=scales, width=width, halvings=halvings)
        if not penalty >= 0:
            raise UserError(f"penalty must not be negative, got {penalty}")
        self.penalty = penalty
        self.levels = nn.ModuleList(_patches(channels, width, halvings, blocks) for _ in range(scales))
        self.smaller = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Images) -> list[Float[Tensor, "batch 1 rows columns"]]:
        """The maps of all levels; 1 means real."""
        maps = []
        for level in self.levels:
            maps.append(level(images))
            images = self.smaller(images)
        return maps

    def discriminator_loss(self, real: Images, fake: Images) -> Scalar:
        r"""$\ell_D$; gradients do not reach ``fake``."""
        real = real.detach().requires_grad_()
        loss = sum((fakes**2).mean() for fakes in self(fake.detach()))
        for reals in self(real):
            (gradient,) = torch.autograd.grad(reals.sum(), real, create_graph=True)
            loss = loss + ((reals - 1) ** 2).mean() + self.penalty * gradient.pow(2).flatten(1).sum(1).mean()
        return loss

    def generator_loss(self, fake: Images) -> Scalar:
        r"""$\ell_G$; gradients pass through the discriminator to ``fake``."""
        return torch.stack([2 * ((fakes - 1) ** 2).mean() for fakes in self(fake)]).sum()


def _patches(channels: int, width: int, halvings: int, blocks: int) -> nn.Sequential:
    widths = [min(width << level, 512) for level in range(halvings)]
    layers = [convolution(channels, width, 1, norm=no_norm)]
    for before, after in pairwise([width, *widths]):
        layers += [convolution(before, before, 3, norm=no_norm), convolution(before, after, 3, 2, norm=no_norm)]
    layers += [ResidualBlock(widths[-1], no_norm) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))
