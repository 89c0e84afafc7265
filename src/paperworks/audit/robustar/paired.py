"""Training on pairs: each image, and the same with its masked pixels replaced."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from paperworks.errors import UserError, unknown
from paperworks.train import Intervention, State

from .fills import FILLS, Mask, Pixels, fill_masked
from .preprocess import Preprocess

Logits = Float[Tensor, "batch classes"]
REDUCTIONS = ("mean", "sum")


def consistency(logits: Logits, paired: Logits, reduction: str = "mean") -> Float[Tensor, ""]:
    r"""$R = \frac1n \sum_i \lVert f(x_i) - f(x_i') \rVert^2$, or the sum over the batch.

    The reference implementation takes the sum, so that its weight depends on the batch size.
    """
    if reduction not in REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)
    if logits.shape != paired.shape:
        raise UserError(f"paired logits must be {list(logits.shape)} as the others, got {list(paired.shape)}")
    total = (logits - paired).square().sum()
    return total / len(logits) if reduction == "mean" else total


def paired_loss(
    logits: Logits, paired: Logits, targets: Int[Tensor, " batch"], lam: float = 0.1, reduction: str = "mean"
) -> Float[Tensor, ""]:
    r"""Loss of images and their partners, which should be recognised alike.

    $$L = \mathrm{CE}(f(x), y) + \mathrm{CE}(f(x'), y) + \lambda R(f(x), f(x'))$$

    Args:
        logits: $f(x)$.
        paired: $f(x')$.
        targets: Class indices $y$.
        lam: $\lambda$. The reference implementation has 0.0001 to 0.001 with ``sum``; with ``mean`` it takes more to
            matter, hence 0.1.
        reduction: Of $R$, see ``consistency``.
    """
    _check_weight(lam)
    both = F.cross_entropy(logits, targets) + F.cross_entropy(paired, targets)
    return both + lam * consistency(logits, paired, reduction)


class PairedTraining(Intervention):
    r"""``paired_loss`` as an intervention, with the trainer's own loss in the place of the cross entropy.

    The training data yields ``(image, target, partner)``, as ``PairedImages`` does.

    Args:
        lam, reduction: See ``paired_loss``.
        one_batch: Run images and partners as one batch, which is faster and mixes their statistics in batch norm;
            else in two passes.

    Example:
        >>> data = PairedImages(images, targets, masks)
        >>> Trainer(epochs=20, interventions=[PairedTraining(lam=0.1)]).fit(model, data, …)
    """

    def __init__(self, lam: float = 0.1, reduction: str = "mean", *, one_batch: bool = True) -> None:
        _check_weight(lam)
        if reduction not in REDUCTIONS:
            raise unknown("reduction", reduction, REDUCTIONS)
        self.lam, self.reduction, self.one_batch = lam, reduction, one_batch

    def on_batch(self, state: State) -> None:
        if not (state.extra and isinstance(state.extra[0], Tensor) and state.extra[0].shape == state.inputs.shape):
            raise UserError("paired training needs data of (image, target, partner), as PairedImages yields")
        if self.one_batch:
            state.inputs = torch.cat([state.inputs, state.extra[0]])
            state.targets = torch.cat([state.targets, state.targets])

    def compute_loss(self, state: State, next: Callable[[State], Tensor]) -> Tensor:
        if self.one_batch:
            (logits, paired), targets = state.outputs.chunk(2), state.targets.chunk(2)
        else:
            logits, paired, targets = state.outputs, state.model(state.extra[0]), (state.targets,) * 2
        loss = self.lam * consistency(logits, paired, self.reduction)
        for state.outputs, state.targets in zip((logits, paired), targets, strict=True):
            loss = loss + next(state)
        return loss


class PairedImages(Dataset[tuple[Any, int, Any]]):
    """Images with labels and their partners: ``(image, target, partner)``, each drawn anew.

    Both go through ``transform`` in the same random state, so that crops and flips agree. Like torchvision's
    transforms, fills derive from torch's global generator, which the trainer seeds and a resumed run restores.

    Args:
        images: 8-bit pixels [height, width, channels]; a list, or anything that reads them on demand.
        targets: Class indices.
        masks: A mask for each image, or None where it is its own partner.
        transform: From pixels to what the model is given; ``Preprocess()`` if there is none.
        fill: See ``fill_masked``.
        replace: Yield ``(partner, target)`` alone: training on the replaced images instead of pairs.
    """

    def __init__(
        self,
        images: Sequence[Pixels],
        targets: Sequence[int],
        masks: Sequence[Mask | None],
        transform: Callable[[np.ndarray], Any] | None = None,
        fill: str = "random_pure",
        *,
        replace: bool = False,
    ) -> None:
        if not len(images) == len(targets) == len(masks):
            raise UserError(
                f"images, targets and masks must be equally many, got {len(images)}, {len(targets)} and {len(masks)}"
            )
        if fill not in FILLS:
            raise unknown("fill", fill, FILLS)
        self.images, self.targets, self.masks = images, targets, masks
        self.transform, self.fill, self.replace = transform or Preprocess(), fill, replace

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, mask, target = self.images[index], self.masks[index], int(self.targets[index])
        seed = int(torch.randint(2**62, ()))
        x = None if self.replace and mask is not None else self._transformed(image, seed)
        partner = x
        if mask is not None:
            filled = fill_masked(image, mask, self.fill, np.random.default_rng(seed))
            partner = self._transformed(filled, seed)
        return (partner, target) if self.replace else (x, target, partner)

    def _transformed(self, image: Pixels, seed: int) -> Any:
        if isinstance(self.transform, Preprocess):  # draws nothing
            return self.transform(image)
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # loader processes must not touch a GPU's
        try:
            return self.transform(image)
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


def _check_weight(lam: float) -> None:
    if not 0 <= lam < float("inf"):
        raise UserError(f"lam must be 0 or more and finite, got {lam}")
