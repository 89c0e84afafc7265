"""The weak and the strong view of a clip."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .randaugment import RandAugment
from .transforms import ClipTransform, Cutout, RandomResizedCrop, check_clips


@dataclass(frozen=True)
class ClipAugment:
    """Makes weak and strong views of clips; whatever is drawn for a clip holds for all of its frames.

    Frames that are changed one by one lose their motion, and no view may play backwards: both would change the class.
    So does mirroring where classes tell left from right, which is why ``RandomFlip`` is not among the defaults.

    Args:
        weak_transforms: What makes a weak view. Default: a random resized crop.
        strong_transforms: What is done to a weak view, drawn anew, to make a strong one. Default: RandAugment and
            cutout, as in FixMatch and CMPL.

    Example:
        >>> augment = ClipAugment(weak_transforms=[RandomResizedCrop(), RandomFlip()])
        >>> strong = augment.strong(clips, torch.Generator().manual_seed(0))
    """

    weak_transforms: Sequence[ClipTransform] = (RandomResizedCrop(),)
    strong_transforms: Sequence[ClipTransform] = (RandAugment(), Cutout())

    def weak(
        self, clips: Float[Tensor, "*batch channels frames height width"], generator: torch.Generator
    ) -> Float[Tensor, "*batch channels frames height width"]:
        """Weak views of a batch of clips, or of one clip ``[C, T, H, W]``, with values in [0, 1].

        Raises:
            UserError: If the clips are not of these shapes.
        """
        return _apply(self.weak_transforms, clips, generator)

    def strong(
        self, clips: Float[Tensor, "*batch channels frames height width"], generator: torch.Generator
    ) -> Float[Tensor, "*batch channels frames height width"]:
        """Strong views; see ``weak``."""
        return _apply([*self.weak_transforms, *self.strong_transforms], clips, generator)


def _apply(transforms: Sequence[ClipTransform], clips: Tensor, generator: torch.Generator) -> Tensor:
    batch = clips[None] if clips.ndim == 4 else clips
    check_clips(batch)
    for transform in transforms:
        batch = transform(batch, generator)
    return batch[0] if clips.ndim == 4 else batch
