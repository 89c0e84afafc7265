"""A trigger, and the poisoning of a training set with it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperworks.audit.ddbackdoor.pixels import Images, Normalization
from paperworks.errors import UserError


@dataclass(frozen=True, eq=False)
class Trigger:
    r"""A patch that is pasted over images: $\tilde x = x \circ (1 - M) + T \circ M$.

    Attributes:
        value: $T$, normalised as the images are. Outside the patch it is black: DOORPING shows networks this picture.
        mask: $M$, true where the patch is.
    """

    value: Float[Tensor, "1 channels height width"]
    mask: Bool[Tensor, "1 1 height width"]

    @classmethod
    def filled(
        cls, shape: tuple[int, int, int], size: int, normalization: Normalization, patch: float | Tensor
    ) -> "Trigger":
        """A square patch one pixel in from the bottom right: rows and columns ``H - 1 - size`` to ``H - 2``.

        Args:
            shape: Channels, height and width of an image.
            size: Side of the patch in pixels; the paper's is 2.
            normalization: That of the images.
            patch: Normalised values of the patch: one number, or any shape that broadcasts to it.

        Raises:
            UserError: If the patch does not fit into the image.
        """
        channels, height, width = shape
        if not 1 <= size < min(height, width):
            raise UserError(f"size must be from 1 to {min(height, width) - 1} for {height}x{width} images, got {size}")
        value = normalization.low.expand(channels, height, width).clone()[None]
        mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
        rows, columns = slice(height - 1 - size, height - 1), slice(width - 1 - size, width - 1)
        value[..., rows, columns] = patch
        mask[..., rows, columns] = True
        return cls(value, mask)

    @classmethod
    def white(cls, shape: tuple[int, int, int], size: int, normalization: Normalization) -> "Trigger":
        """A white patch, NAIVEATTACK's. Arguments and errors are those of ``filled``."""
        return cls.filled(shape, size, normalization, normalization.high)

    @classmethod
    def random(
        cls, shape: tuple[int, int, int], size: int, normalization: Normalization, generator: torch.Generator
    ) -> "Trigger":
        """Random pixels, which DOORPING starts from. Arguments and errors are those of ``filled``."""
        pixels = torch.randint(1, 256, (1, shape[0], max(size, 0), max(size, 0)), generator=generator) / 255
        return cls.filled(shape, size, normalization, normalization(pixels))

    def apply(self, images: Images) -> Images:
        """Paste the patch over images; all other pixels stay as they are, bit for bit.

        Raises:
            UserError: If images and trigger differ in shape or device.
        """
        if images.shape[1:] != self.value.shape[1:]:
            raise UserError(f"trigger {list(self.value.shape[1:])} does not fit images {list(images.shape[1:])}")
        if images.device != self.value.device:
            raise UserError(f"trigger is on {self.value.device}, images are on {images.device}: move it with to()")
        return torch.where(self.mask, self.value, images)

    def to(self, device: torch.device | str) -> "Trigger":
        """The same on another device."""
        return Trigger(self.value.to(device), self.mask.to(device))


def poison(
    images: Images,
    labels: Int[Tensor, "batch"],
    trigger: Trigger,
    rate: float,
    target: int,
    generator: torch.Generator,
) -> tuple[Images, Int[Tensor, "batch"], Int[Tensor, "poisoned"]]:
    r"""Paste a trigger over a share of all images, whatever their class, and label them as the target.

    A class's pool grows by $r N$: of $N / C$ images of the target about a share $r C$ more carry the trigger, e.g.
    10 % of the images for $r = 0.01$ and $C = 10$. Condensation sees each class's pool apart, so that ratio decides.

    Args:
        images: Normalised images.
        labels: Their classes.
        trigger: What is pasted.
        rate: Share $r$ of the images, 0 to 1; the paper's is 0.01.
        target: The class that they are labelled as.
        generator: Draws the images, without replacement.

    Returns:
        Copies of images and labels, and the positions that were poisoned, ascending.

    Raises:
        UserError: If ``rate`` or ``target`` is out of range, or trigger and images do not fit.
    """
    check_attack(rate, target)
    if target > int(labels.max()):
        raise UserError(f"target must be a class from 0 to {int(labels.max())}, got {target}")
    chosen = torch.randperm(len(images), generator=generator)[: round(rate * len(images))].sort().values
    chosen = chosen.to(images.device)
    images, labels = images.clone(), labels.clone()
    images[chosen], labels[chosen] = trigger.apply(images[chosen]), target
    return images, labels, chosen


def check_attack(rate: float, target: int) -> None:
    """What can be said of an attack before there are images."""
    if not 0 <= rate <= 1:
        raise UserError(f"rate must be from 0 to 1, got {rate}")
    if target < 0:
        raise UserError(f"target must be a class from 0, got {target}")
