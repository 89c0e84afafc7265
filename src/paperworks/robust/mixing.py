"""Training batches blended in pairs: Mixup and CutMix, and what every method of this kind shares.

Their mathematics is that of ``torchvision.transforms.v2``, whose transforms draw from the global generator
only; these draw from one of their own, so that they can be seeded, checkpointed and resumed.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperworks.errors import UserError
from paperworks.train import RandomIntervention, State

Images = Float[Tensor, "batch channels height width"]
Targets = Int[Tensor, " batch"] | Float[Tensor, "batch classes"]
SoftTargets = Float[Tensor, "batch classes"]


def blend(
    x: Images,
    y: SoftTargets,
    perm: Int[Tensor, " batch"],
    weight: float | Float[Tensor, "#batch 1 #height #width"],
) -> tuple[Images, SoftTargets]:
    r"""Blend every image with a partner, and the labels in the same proportion.

    $$\tilde x_i = w_i \odot x_i + (1 - w_i) \odot x_{\pi(i)}, \qquad
      \tilde y_i = \bar w_i\, y_i + (1 - \bar w_i)\, y_{\pi(i)}$$

    with $\bar w_i$ the mean of $w_i$ over the pixels. A constant weight is Mixup (Zhang et al. 2018),
    a weight of 0 inside a box and 1 outside CutMix (Yun et al. 2019).

    Args:
        x: Images.
        y: Class probabilities.
        perm: Each image's partner $\pi(i)$.
        weight: Share of image $i$: one number, one an image, or a map.

    Returns:
        New images and class probabilities; nothing is modified in place.
    """
    share: float | Tensor = weight
    if isinstance(weight, Tensor):
        share, weight = weight.mean((-2, -1)).to(y.dtype), weight.to(x.dtype)
    return torch.lerp(x[perm], x, weight), torch.lerp(y[perm], y, share)


def cutmix_mask(height: int, width: int, lam: float, centre: Sequence[int]) -> Bool[Tensor, "height width"]:
    r"""What CutMix keeps of an image: all but a box around ``centre``, cut at the edges.

    The box takes $\sqrt{1 - \lambda}$ of each side, so that about $\lambda$ of the image is kept, or more
    where the box is cut; labels go by the area that is kept.

    Args:
        height, width: Size of the image in pixels.
        lam: $\lambda$ in [0, 1].
        centre: Row and column of the middle of the box.
    """
    keep = torch.ones(height, width, dtype=torch.bool)
    half = math.sqrt(1 - lam) / 2
    top, bottom = max(centre[0] - int(half * height), 0), centre[0] + int(half * height)
    left, right = max(centre[1] - int(half * width), 0), centre[1] + int(half * width)
    keep[top:bottom, left:right] = False
    return keep


def soft_targets(y: Targets, num_classes: int) -> SoftTargets:
    """Class probabilities from class indices; probabilities are checked and returned as they are.

    Raises:
        UserError: If an index is out of range, or probabilities are of other classes or do not sum to 1.
    """
    if y.ndim == 1 and not y.is_floating_point():
        if (wrong := (y < 0) | (y >= num_classes)).any():
            raise UserError(f"targets must be indices from 0 to {num_classes - 1}, got {int(y[wrong][0])}")
        return F.one_hot(y.long(), num_classes).to(torch.get_default_dtype())
    if y.ndim != 2 or y.shape[1] != num_classes or not y.is_floating_point():
        expected = f"class indices [batch] or probabilities [batch, {num_classes}]"
        raise UserError(f"targets must be {expected}, got {y.dtype} {list(y.shape)}")
    if ((y.sum(1) - 1).abs() > 1e-3).any() or (y < 0).any():
        raise UserError("targets given as probabilities must not be negative and must sum to 1 in every row")
    return y


class Mixing(RandomIntervention):
    """What Mixup, CutMix and R-Mix share: a random generator of their own, and the batch they are handed.

    Training starts from ``seed`` whenever it is set up, each process of a group from its own, and a resumed
    run continues with the draws of the killed one.

    Args:
        num_classes: K, the width of the targets that come out.
        alpha: Both parameters of the Beta distribution of λ.
        seed: Of all draws.
    """

    def __init__(self, num_classes: int, alpha: float, seed: int) -> None:
        if num_classes < 2:
            raise UserError(f"num_classes must be at least 2, got {num_classes}")
        if not (alpha > 0 and math.isfinite(alpha)):
            raise UserError(f"alpha must be positive and finite, got {alpha}")
        super().__init__(seed)
        self.num_classes, self.alpha = num_classes, alpha

    def setup(self, state: State) -> None:
        self.seed_process(state)

    def _batch(self, x: Tensor, y: Tensor) -> SoftTargets:
        """The targets as probabilities, once the batch has been looked at."""
        if x.ndim != 4 or not x.is_floating_point():
            expected = "floating-point images [batch, channels, height, width]"
            raise UserError(f"inputs must be {expected}, got {x.dtype} {list(x.shape)}")
        if len(x) != len(y):
            raise UserError(f"inputs and targets must be as many, got {len(x)} and {len(y)}")
        if len(x) == 1:
            warnings.warn("a batch of one image has no partners to mix with: it is left as it is", stacklevel=3)
        return soft_targets(y, self.num_classes)

    def _permutation(self, size: int) -> Int[Tensor, " size"]:
        return torch.randperm(size, generator=self.generator)

    def _lambda(self, size: int) -> Float[Tensor, " size"]:
        # torch draws from the Beta distribution with its global generator only.
        seed = int(torch.randint(2**62, (), generator=self.generator))
        return torch.from_numpy(np.random.default_rng(seed).beta(self.alpha, self.alpha, size))


class Mixup(Mixing):
    r"""Mixup (Zhang et al. 2018): images and labels of a batch averaged in pairs.

    One $\lambda \sim \mathrm{Beta}(\alpha, \alpha)$ and one permutation a batch. The loss must take class
    probabilities, as ``nn.CrossEntropyLoss`` does.

    Args:
        num_classes: K, the width of the targets that come out.
        alpha: 1 is usual for CIFAR, 0.2 for ImageNet.
        seed: Of all draws.

    Example:
        >>> Trainer(epochs=40, interventions=[Mixup(num_classes=10)])
    """

    def __init__(self, num_classes: int, alpha: float = 1.0, *, seed: int = 0) -> None:
        super().__init__(num_classes, alpha, seed)

    def __call__(self, x: Images, y: Targets) -> tuple[Images, SoftTargets]:
        y = self._batch(x, y)
        lam = float(self._lambda(1))
        return blend(x, y, self._permutation(len(x)).to(x.device), lam)

    def on_batch(self, state: State) -> None:
        state.inputs, state.targets = self(state.inputs, state.targets)


class CutMix(Mixing):
    r"""CutMix (Yun et al. 2019): a box of every image is replaced by what its partner has there.

    One box and one permutation a batch; see ``cutmix_mask``.

    Args:
        num_classes: K, the width of the targets that come out.
        alpha: Of $\lambda \sim \mathrm{Beta}(\alpha, \alpha)$, about the area that is kept; the paper's is 1.
        p: Probability that a batch is mixed; the paper's for CIFAR is 0.5.
        seed: Of all draws.
    """

    def __init__(self, num_classes: int, alpha: float = 1.0, *, p: float = 0.5, seed: int = 0) -> None:
        super().__init__(num_classes, alpha, seed)
        if not 0 <= p <= 1:
            raise UserError(f"p must be from 0 to 1, got {p}")
        self.p = p

    def __call__(self, x: Images, y: Targets) -> tuple[Images, SoftTargets]:
        y = self._batch(x, y)
        if torch.rand((), generator=self.generator) >= self.p:
            return x, y
        height, width = x.shape[-2:]
        centre = [int(torch.randint(side, (), generator=self.generator)) for side in (height, width)]
        keep = cutmix_mask(height, width, float(self._lambda(1)), centre).to(x.device, x.dtype)
        return blend(x, y, self._permutation(len(x)).to(x.device), keep[None, None])

    def on_batch(self, state: State) -> None:
        state.inputs, state.targets = self(state.inputs, state.targets)
