"""Peers for confounded data that train a plain classifier: DANN and GroupDRO.

Both need the source of each training example: the dataset gives ``(input, target, source)``.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from paperworks.data.labels import check_labels
from paperworks.errors import UserError, nearest
from paperworks.train import Intervention, State


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * gradients[0], None


def reverse_gradient(x: Float[Tensor, "*shape"], scale: float = 1.0) -> Float[Tensor, "*shape"]:
    """The identity, whose gradient is multiplied by ``-scale`` (Ganin et al. 2016, section 4.2)."""
    return _Reverse.apply(x, scale)


class DANN(Intervention):
    r"""Domain-adversarial training (Ganin et al., JMLR 2016): features from which the source cannot be told.

    A discriminator, trained along by the same optimizer, tells the source from a layer's output (averaged
    over positions); its gradient reaches the layer reversed and scaled by $\lambda_p = 2/(1 + e^{-\gamma p})
    - 1$, where $p$ is the progress of training (section 5.2.2).

    Args:
        layer: Name of the layer in the model, as in ``named_modules()``; its output is ``[batch, features,
            ...]``.
        features: Number of features (channels) of that output.
        num_sources: Number of sources.
        weight: Weight of the discriminator's loss.
        hidden: Width of the discriminator's two hidden layers.
        gamma: $\gamma$; the paper's 10.
        seed: Draws the discriminator's weights.

    Raises:
        UserError: If an argument is out of range, the model has no such layer, or examples come without a
            source.
    """

    def __init__(
        self,
        layer: str,
        features: int,
        num_sources: int,
        *,
        weight: float = 1.0,
        hidden: int = 64,
        gamma: float = 10.0,
        seed: int = 0,
    ) -> None:
        if num_sources < 2:
            raise UserError(f"num_sources must be at least 2, got {num_sources}")
        if not weight >= 0:
            raise UserError(f"weight must not be negative, got {weight}")
        self.layer, self.num_sources, self.weight, self.gamma = layer, num_sources, weight, gamma
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = [features, hidden, hidden]
            layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
            self.discriminator = nn.Sequential(*layers, nn.Linear(hidden, num_sources))
        self._hook: RemovableHandle | None = None
        self._output: Tensor | None = None

    def setup(self, state: State) -> None:
        modules = dict(state.module.named_modules())
        if self.layer not in modules:
            hint = nearest(self.layer, filter(None, modules))
            raise UserError(f"the model has no layer {self.layer!r}.{hint}")

        def keep(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            self._output = output

        self._hook = modules[self.layer].register_forward_hook(keep)
        state.optimizer.add_param_group({"params": list(self.discriminator.parameters())})
        self._judge = state.fabric.setup_module(self.discriminator)

    def compute_loss(self, state: State, next: Callable[[State], Tensor]) -> Tensor:
        sources = sources_of(state, self.num_sources)
        assert self._output is not None
        scale = 2 / (1 + math.exp(-self.gamma * state.step / state.total_steps)) - 1
        features = self._output.flatten(2).mean(2) if self._output.ndim > 2 else self._output
        told = F.cross_entropy(self._judge(reverse_gradient(features, scale)), sources)
        self._output = None
        return next(state) + self.weight * told

    def teardown(self, state: State) -> None:
        if self._hook is not None:
            self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        return {"discriminator": self.discriminator.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.discriminator.load_state_dict(state_dict["discriminator"])


def update_group_weights(
    weights: Float[Tensor, " groups"],
    losses: Float[Tensor, " groups"],
    present: Bool[Tensor, " groups"],
    step_size: float = 0.01,
) -> Float[Tensor, " groups"]:
    r"""Exponentiated ascent on the groups' losses (Sagawa et al. 2020, algorithm 1): $q_g \propto q_g e^{\eta \ell_g}$.

    Groups without an example in the batch count with loss 0.
    """
    grown = weights * (step_size * torch.where(present, losses, 0.0)).exp()
    return grown / grown.sum()


class GroupDRO(Intervention):
    r"""Group distributionally robust optimization (Sagawa et al., ICLR 2020): $\sum_g q_g \ell_g$, bad groups most.

    Groups are the (class, source) pairs. The loss of a group is what the rest of the training (the criterion,
    and interventions after this one) makes of its examples in the batch.

    Args:
        num_classes: $K$.
        num_sources: $M$.
        step_size: $\eta$ of the weights $q$; the paper's 0.01.

    Attributes:
        weights: $q$, ``[K * M]``, the group of class k and source m at ``k * M + m``.

    Raises:
        UserError: If an argument is out of range, or examples come without a source.
    """

    def __init__(self, num_classes: int, num_sources: int, *, step_size: float = 0.01) -> None:
        for name, number in {"num_classes": num_classes, "num_sources": num_sources}.items():
            if number < 2:
                raise UserError(f"{name} must be at least 2, got {number}")
        if not step_size > 0:
            raise UserError(f"step_size must be positive, got {step_size}")
        self.num_classes, self.num_sources, self.step_size = num_classes, num_sources, step_size
        self.weights = torch.full((num_classes * num_sources,), 1 / (num_classes * num_sources))

    def setup(self, state: State) -> None:
        self.weights = self.weights.to(state.fabric.device)

    def compute_loss(self, state: State, next: Callable[[State], Tensor]) -> Tensor:
        outputs, targets = state.outputs, state.targets
        check_labels(targets, self.num_classes, "targets")
        groups = targets * self.num_sources + sources_of(state, self.num_sources)
        size = groups.bincount(minlength=len(self.weights)).to(outputs)
        losses = outputs.new_zeros(len(self.weights))
        for group in size.nonzero().flatten().tolist():
            members = groups == group
            state.outputs, state.targets = outputs[members], targets[members]
            losses = losses + (groups.new_tensor(range(len(losses))) == group) * next(state)
        state.outputs, state.targets = outputs, targets
        # Groups are those of the batches of all processes; the mean over processes of the returned loss is theirs.
        fabric = state.fabric
        total, summed = torch.stack([size, losses.detach() * size]).float()
        if fabric.world_size > 1:
            total, summed = fabric.all_reduce(torch.stack([total, summed]), reduce_op="sum")
        self.weights = update_group_weights(self.weights, summed / total.clamp(min=1), total > 0, self.step_size)
        share = fabric.world_size * size / total.clamp(min=1)
        return (self.weights * share * losses).sum()

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights = state_dict["weights"].to(self.weights)


def sources_of(state: State, num_sources: int) -> Tensor:
    """The source of each example of the batch, its third item.

    Raises:
        UserError: If there is none, or one is out of range.
    """
    if not state.extra:
        raise UserError("examples come without a source: the dataset must give (input, target, source)")
    check_labels(state.extra[0], num_sources, "sources")
    return state.extra[0]
