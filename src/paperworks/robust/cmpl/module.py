"""CMPL as a module with a training step, for one's own loop."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.errors import UserError

from .loss import PseudoLabelStats, cross_pseudo_label_loss
from .transforms import check_clips


class CMPLModule(nn.Module):
    r"""A primary network and the auxiliary one that is trained with it, on labelled and unlabelled clips.

    $$\mathcal{L} = \mathcal{L}_s^F + \mathcal{L}_s^A + \lambda (\mathcal{L}_u^F + \mathcal{L}_u^A)$$

    with the mean cross entropy $\mathcal{L}_s$ on labelled clips and `cross_pseudo_label_loss` on the others. Train
    all of ``parameters()`` with one optimizer; predictions are those of the primary network F alone.

    Args:
        primary: Maps clips ``[B, C, T, H, W]`` to logits.
        auxiliary: Another network for the same task, best of another build: the paper's has a quarter of the
            channels. None: the primary network teaches itself (FixMatch).
        threshold: Smallest confidence δ of a pseudo-label, in [0, 1].
        unlabelled_weight: λ. The paper's experiments are on far more data; 1 is safer for small ones.
        teacher: Whose labels a network learns from; see `cross_pseudo_label_loss`.

    Raises:
        UserError: If ``threshold`` or ``unlabelled_weight`` is out of range.

    Example:
        >>> method = CMPLModule(resnet3d(18, num_classes=101), thin(partial(resnet3d, 50))(num_classes=101))
        >>> loss, stats = method.training_step((clips, labels), augment.weak(u, g), augment.strong(u, g))
    """

    def __init__(
        self,
        primary: nn.Module,
        auxiliary: nn.Module | None = None,
        *,
        threshold: float = 0.8,
        unlabelled_weight: float = 2.0,
        teacher: Literal["next", "self"] = "next",
    ) -> None:
        super().__init__()
        check_range(threshold, unlabelled_weight)
        self.primary, self.auxiliary = primary, auxiliary
        self.threshold, self.unlabelled_weight, self.teacher = threshold, unlabelled_weight, teacher

    def training_step(
        self,
        labelled: tuple[Float[Tensor, "labelled _c _t _h _w"], Int[Tensor, " labelled"]],
        weak: Float[Tensor, "_unlabelled _c _t _h _w"],
        strong: Float[Tensor, "_unlabelled _c _t _h _w"],
    ) -> tuple[Float[Tensor, ""], PseudoLabelStats]:
        """The loss of a step, and statistics of its pseudo-labels (see `PseudoLabelStats`).

        Args:
            labelled: Weak views of labelled clips, and their classes.
            weak: Weak views of unlabelled clips.
            strong: Strong views of the same clips, in the same order.

        Raises:
            UserError: If the clips are not ``[B, C, T, H, W]`` alike or the networks differ in their classes.
        """
        clips, targets = labelled
        views = join(clips, weak, strong)
        networks = [self.primary] if self.auxiliary is None else [self.primary, self.auxiliary]
        on_labelled, on_weak, on_strong = zip(*(part(network(views), len(clips)) for network in networks), strict=True)
        supervised = torch.stack([F.cross_entropy(logits.float(), targets) for logits in on_labelled]).sum()
        losses, stats = cross_pseudo_label_loss(on_weak, on_strong, self.threshold, self.teacher)
        return supervised + self.unlabelled_weight * losses.sum(), stats

    def predict(self, clips: Float[Tensor, "batch c t h w"]) -> Float[Tensor, "batch classes"]:
        """The primary network's logits."""
        return self.primary(clips)

    forward = predict


def join(labelled: Tensor, weak: Tensor, strong: Tensor) -> Tensor:
    """One batch for one forward pass, so that BatchNorm sees the three kinds of clips with the same statistics."""
    check_clips(labelled, "labelled clips")
    check_clips(weak, "weak views")
    if weak.shape != strong.shape:
        raise UserError(
            f"weak and strong views must be of the same clips, got {list(weak.shape)} and {list(strong.shape)}"
        )
    if weak.shape[1:] != labelled.shape[1:]:
        raise UserError(
            f"unlabelled clips are {list(weak.shape[1:])}, labelled ones {list(labelled.shape[1:])}: "
            "make them equal in [C, T, H, W]"
        )
    return torch.cat([labelled, weak, strong])


def part(logits: Tensor, labelled: int) -> tuple[Tensor, Tensor, Tensor]:
    """Undo `join`: the logits of the labelled clips, the weak and the strong views."""
    views = (len(logits) - labelled) // 2
    on_labelled, on_weak, on_strong = torch.split(logits, [labelled, views, views])
    return on_labelled, on_weak, on_strong


def check_range(threshold: float, unlabelled_weight: float) -> None:
    """Check what both forms of CMPL are given."""
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold must be in [0, 1], got {threshold}")
    if not 0 <= unlabelled_weight < float("inf"):
        raise UserError(f"unlabelled_weight must be at least 0 and finite, got {unlabelled_weight}")
