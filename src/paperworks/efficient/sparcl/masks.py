"""Binary masks over a model's weights: which are live, and how many."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from paperworks.errors import UserError, unknown

Granularity = Literal["element", "filter", "column"]
Include = str | Sequence[str] | Callable[[str, nn.Module], bool]


class SparsityMask:
    r"""Keeps a share $1 - s$ of the weights of each chosen layer, and the others at zero.

    At first the largest survive: $M = \mathrm{top}_{1-s}(|W|)$, layer by layer, on the random start. In a training
    loop call ``apply_grads`` after the backward pass and ``apply_weights`` after the optimizer's step; with SGD
    without momentum and weight decay the weights that are masked stay at exactly zero.

    Args:
        model: Its parameters are masked in place, at once.
        sparsity: Share $s$ of zeros in each layer, in [0, 1). At least one unit of a layer stays live.
        include: Which layers: ``"hidden"`` (every ``Conv2d`` and ``Linear`` but the first and the last and those on
            shortcuts, as in the paper: stem, shortcuts and classifier stay dense), ``"all"``, the names of
            modules, or a predicate ``(name, module) -> bool``.
        granularity: The unit that lives or dies: one weight (``"element"``, irregular), an output ``"filter"``, or a
            ``"column"`` of the weight matrix (one tap of one input channel, over all filters).
        scores: What the first mask keeps the largest of, from ``(name, weight)``: e.g.
            ``lambda name, w: torch.rand(w.shape, generator=g)`` for a random mask, or $|w \cdot \partial L/\partial w|$
            for SNIP's. Default: magnitude.

    Attributes:
        names: The masked modules.
        parameters: Their weights.
        sparsity: The share of zeros that was asked for.
        version: Goes up whenever the mask changes.

    Raises:
        UserError: If ``sparsity`` is not in [0, 1), or ``include`` names no layer that can be masked.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        include: Include = "hidden",
        *,
        granularity: Granularity = "element",
        scores: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        check_sparsity("sparsity", sparsity)
        if granularity not in get_args(Granularity):
            raise unknown("granularity", granularity, get_args(Granularity))
        self.sparsity, self.granularity, self.version = sparsity, granularity, 0
        self.names = _layers(model, include)
        self.parameters: list[nn.Parameter] = [model.get_submodule(name).weight for name in self.names]  # type: ignore[misc]
        self._all_weights = sum(parameter.numel() for parameter in model.parameters())
        self.masks = [torch.ones_like(self._units(p.detach())) for p in self.parameters]
        self.shrink(sparsity, [scores(n, p.detach()) for n, p in self] if scores else None)

    def __iter__(self) -> Iterator[tuple[str, nn.Parameter]]:
        return zip(self.names, self.parameters, strict=True)

    @torch.no_grad()
    def apply_weights(self) -> None:
        """Set dead weights to zero."""
        self._follow()
        torch._foreach_mul_(list[Tensor](self.parameters), tuple(self.masks))

    @torch.no_grad()
    def apply_grads(self) -> None:
        """Set the gradients of dead weights to zero."""
        self._follow()
        pairs = [(p.grad, m) for p, m in zip(self.parameters, self.masks, strict=True) if p.grad is not None]
        if pairs:
            torch._foreach_mul_([grad for grad, _ in pairs], [mask for _, mask in pairs])

    @torch.no_grad()
    def shrink(self, sparsity: float, scores: Sequence[Tensor] | None = None) -> None:
        """Keep, of the live units of each layer, those with the highest scores, so that ``sparsity`` are dead.

        Args:
            sparsity: Share of zeros afterwards. Layers that have as many already do not change.
            scores: One tensor a layer, of its weight's shape; a unit's score is their sum. Default: $|W|$.
        """
        check_sparsity("sparsity", sparsity)
        self._follow()
        for i, (mask, weight) in enumerate(zip(self.masks, self.parameters, strict=True)):
            score = self._units(weight.abs() if scores is None else scores[i].to(weight.device))
            keep = live_count(mask.numel(), sparsity)
            if keep < int(mask.count_nonzero()):
                ranked = score.masked_fill(mask == 0, -math.inf).flatten()
                mask.zero_().view(-1)[ranked.topk(keep, sorted=False).indices] = 1
        self.version += 1
        self.apply_weights()

    @torch.no_grad()
    def grow(self, sparsity: float, generator: torch.Generator) -> None:
        """Free dead units of each layer, drawn at random, until ``sparsity`` are dead; they start at weight zero."""
        check_sparsity("sparsity", sparsity)
        self._follow()
        for mask in self.masks:
            dead = (mask.view(-1) == 0).nonzero()[:, 0].cpu()
            more = live_count(mask.numel(), sparsity) - (mask.numel() - len(dead))
            if more > 0:
                drawn = dead[torch.randperm(len(dead), generator=generator)[:more]]
                mask.view(-1)[drawn.to(mask.device)] = 1
        self.version += 1

    def density(self, name: str | None = None) -> float:
        """Share of live weights in one layer, or in all masked layers together."""
        if name is not None:
            mask = self.masks[self.names.index(name)]
            return float(mask.count_nonzero()) / mask.numel()
        live = sum(self.density(name) * weight.numel() for name, weight in self)
        return live / sum(weight.numel() for weight in self.parameters)

    def overall_density(self) -> float:
        """Share of live parameters in the whole model: layers that are not masked, and biases, count as live."""
        masked = sum(weight.numel() for weight in self.parameters)
        return 1 - (1 - self.density()) * masked / self._all_weights

    def state_dict(self) -> dict[str, Any]:
        """The masks, as booleans by name."""
        return {name: mask.bool() for name, mask in zip(self.names, self.masks, strict=True)}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            UserError: If the masks are those of other layers.
        """
        if list(state_dict) != self.names or any(
            state_dict[name].shape != mask.shape for name, mask in zip(self.names, self.masks, strict=True)
        ):
            raise UserError(f"these masks are of layers {list(state_dict)}, this model's are {self.names}")
        for name, mask in zip(self.names, self.masks, strict=True):
            mask.copy_(state_dict[name])
        self.version += 1
        self.apply_weights()

    def _units(self, scores: Tensor) -> Tensor:
        """Sum over what lives and dies together."""
        if self.granularity == "element":
            return scores
        return scores.sum(0 if self.granularity == "column" else tuple(range(1, scores.ndim)), keepdim=True)

    def _follow(self) -> None:
        """Go where the model has gone."""
        if self.masks[0].device != (device := self.parameters[0].device):
            self.masks = [mask.to(device) for mask in self.masks]


def live_count(total: int, sparsity: float) -> int:
    """How many of ``total`` units live at a sparsity: $n (1 - s)$ rounded, at least one."""
    return max(1, round(total * (1 - sparsity)))


def check_sparsity(name: str, value: float) -> None:
    """Raises ``UserError`` unless ``value`` is in [0, 1)."""
    if not 0 <= value < 1:
        raise UserError(f"{name} must be in [0, 1), got {value}")


def _layers(model: nn.Module, include: Include) -> list[str]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    if callable(include):
        names = [name for name, module in found.items() if include(name, module)]
    elif include == "all":
        names = list(found)
    elif include == "hidden":
        names = [name for name in list(found)[1:-1] if "shortcut" not in name and "downsample" not in name]
    else:
        names = [include] if isinstance(include, str) else list(include)
        for name in names:
            if name not in found:
                raise unknown("convolution or linear layer", name, found)
    if not names:
        raise UserError(f"include={include!r} leaves none of the {len(found)} convolutions and linear layers to mask")
    return names
