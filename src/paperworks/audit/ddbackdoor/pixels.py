"""How images are normalised, and the box that pixels from 0 to 1 end up in."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.errors import UserError

Images = Float[Tensor, "batch channels height width"]


class Normalization:
    r"""Per channel $(x - \mu) / \sigma$ of pixels in [0, 1].

    A distiller, an attack and a check of ranges have to agree on it.

    Args:
        mean: $\mu$ of each channel.
        std: $\sigma$ of each channel.

    Attributes:
        low, high: What black (0) and white (1) become, ``[channels, 1, 1]``.

    Raises:
        UserError: If the two differ in length, or a ``std`` is not positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std) or not mean:
            raise UserError(f"mean and std must have one number a channel each, got {len(mean)} and {len(std)}")
        if min(std) <= 0:
            raise UserError(f"std must be positive, got {min(std)}")
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self.low, self.high = -self.mean / self.std, (1 - self.mean) / self.std

    @classmethod
    def of(cls, images: Images) -> "Normalization":
        """That of a training set with pixels in [0, 1].

        Raises:
            UserError: If a pixel is not in [0, 1].
        """
        if not ((images >= 0) & (images <= 1)).all():
            raise UserError("images must hold pixels in [0, 1]: those of the normalised ones cannot be told any more")
        return cls(images.mean((0, 2, 3)).tolist(), images.std((0, 2, 3)).tolist())

    def __call__(self, images: Images) -> Images:
        """Pixels in [0, 1] to normalised ones."""
        return (images - self.mean.to(images)) / self.std.to(images)

    def restore(self, images: Images) -> Images:
        """Normalised ones to pixels, in [0, 1] only where they were."""
        return images * self.std.to(images) + self.mean.to(images)

    def clamp(self, images: Images) -> Images:
        """The nearest images that have pixels in [0, 1]."""
        return images.clamp(self.low.to(images), self.high.to(images))
