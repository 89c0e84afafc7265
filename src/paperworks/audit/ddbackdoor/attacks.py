"""NAIVEATTACK and DOORPING: backdoors that come into a distilled set through the real images it is made of."""

from dataclasses import astuple, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import Adam

from paperworks.audit.ddbackdoor.pixels import Images, Normalization
from paperworks.audit.ddbackdoor.trigger import Trigger, check_attack, poison
from paperworks.errors import UserError
from paperworks.nn import keeping_modes

Outcome = Literal["reached", "out of steps", "stuck", "dead"]


@dataclass(frozen=True)
class TriggerUpdate:
    """What one refresh of a trigger came to.

    Attributes:
        before, after: Activation of the neuron (mean of several).
        steps: Steps of Adam that were taken.
        outcome: ``reached`` the goal within the tolerance, ran ``out of steps``, ``stuck`` at the edge of the pixel
            range, or left as it was because the neuron is ``dead``.
    """

    before: float
    after: float
    steps: int
    outcome: Outcome


def update_trigger(
    net: nn.Module,
    trigger: Trigger,
    *,
    layer: int = -2,
    topk: int = 1,
    alpha: float = 10.0,
    steps: int = 1000,
    lr: float = 0.08,
    tol: float = 0.5,
    within: Normalization | None = None,
) -> tuple[Trigger, TriggerUpdate]:
    r"""Let a trigger excite the neurons of a hidden layer with the largest incoming weights.

    With $k$ the rows of the layer's weights that have the largest $\sum_j |W_{kj}|$ and $a_k(T)$ what these neurons
    give, after ReLU, for the picture of the trigger on black, Adam takes

    $$\min_T \; \mathrm{mean}_k \, \big(a_k(T) - \alpha \, a_k(T_0)\big)^2$$

    down to ``tol``. Only the patch changes. The released code never projects $T$ onto pixels, so that
    patches end up hundreds of standard deviations away from any image; ``within`` does. A neuron that $T_0$ leaves
    dead has the goal 0 and no gradient, so that the trigger stays.

    Args:
        net: The network as trained so far. Its weights and mode stay.
        trigger: $T_0$.
        layer: Position among the layers with weight matrices, from the end: the last hidden one, which must be linear.
        topk: Number of neurons. Defaults are the reference implementation's.
        alpha: $\alpha$.
        steps: At most this many; each is a pass of one image.
        lr: Adam's learning rate; its betas are 0.9 and 0.99.
        tol: Squared error that is good enough.
        within: Project onto pixels from 0 to 1 of this normalization after each step; nothing for none.

    Returns:
        The new trigger, without a graph, and what happened.

    Raises:
        UserError: If the layer is not linear or has fewer than ``topk`` neurons.
    """
    module = _linear_layer(net, layer)
    if not 1 <= topk <= module.out_features:
        raise UserError(f"topk must be from 1 to the layer's {module.out_features} neurons, got {topk}")
    neurons = module.weight.detach().abs().sum(1).topk(topk).indices
    weight, bias = module.weight[neurons].detach(), None if module.bias is None else module.bias[neurons].detach()
    seen: list[Tensor] = []
    value = trigger.value.detach().clone().requires_grad_()
    optimizer = Adam([value], lr, betas=(0.9, 0.99), fused=True)
    goal, before = torch.zeros(()), 0.0
    outcome: Outcome = "out of steps"
    watch = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with watch, keeping_modes(net):
        net.eval()
        for step in range(steps + 1):
            seen.clear()
            net(torch.where(trigger.mask, value, trigger.value))
            active = F.relu(F.linear(seen[0], weight, bias))
            if step == 0:
                goal, before = alpha * active.detach(), active.mean().item()
                if not goal.any():
                    outcome = "dead"
                    break
            error = F.mse_loss(active, goal)
            if error.item() < tol:
                outcome = "reached"
            if outcome == "reached" or step == steps:
                break
            (value.grad,) = torch.autograd.grad(error, value)
            here = value.detach().clone()
            optimizer.step()
            if within is not None:
                with torch.no_grad():
                    value.copy_(within.clamp(value))
                    # Neither Adam nor the bare gradient moves it any more: the same would happen for ever.
                    if torch.equal(value, here) and torch.equal(within.clamp(here - value.grad), here):
                        outcome = "stuck"
                        break
    found = torch.where(trigger.mask, value.detach(), trigger.value)
    return Trigger(found, trigger.mask), TriggerUpdate(before, active.mean().item(), step, outcome)


class NaiveAttack:
    """NAIVEATTACK: poison real images with a fixed trigger, once, before distillation.

    For testing one's own distillation pipeline and detectors; ``defences`` stand beside it.

    Args:
        trigger: What is pasted, for the paper's attack ``Trigger.white``.
        rate: Share of all images that are poisoned; the paper's is 0.01.
        target: The class that they are labelled as.
        generator: Draws them.

    Attributes:
        trigger: As it is now.
        indices: Positions of the poisoned images, once distillation has started.

    Raises:
        UserError: If ``rate`` or ``target`` is out of range; when distillation starts also if it is no class.
    """

    indices: Int[Tensor, "poisoned"]

    def __init__(self, trigger: Trigger, *, generator: torch.Generator, rate: float = 0.01, target: int = 0) -> None:
        check_attack(rate, target)
        self.trigger, self.rate, self.target, self.generator = trigger, rate, target, generator

    def start(self, images: Images, labels: Int[Tensor, "batch"]) -> tuple[Images, Int[Tensor, "batch"]]:
        """Return poisoned copies of images and labels."""
        self._images, labels, self.indices = poison(
            images, labels, self.trigger, self.rate, self.target, self.generator
        )
        return self._images, labels

    def on_network_updated(self, net: nn.Module) -> None:
        """Nothing: the trigger is fixed."""

    def state_dict(self) -> dict[str, Any]:
        return {"trigger": self.trigger.value, "indices": self.indices}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not torch.equal(state["indices"].to(self.indices), self.indices):
            raise UserError("the checkpoint's attack poisoned other images: give it the same seed, rate and data")
        self._paste(Trigger(state["trigger"].to(self.trigger.value), self.trigger.mask))

    def _paste(self, trigger: Trigger) -> None:
        self.trigger = trigger
        self._images[self.indices] = trigger.apply(self._images[self.indices])


class DoorpingAttack(NaiveAttack):
    """DOORPING: refresh the trigger for each network, and paste it anew, while distillation goes on.

    For testing one's own distillation pipeline and detectors; ``defences`` stand beside it.

    Example:
        >>> attack = DoorpingAttack(Trigger.random((3, 32, 32), 2, scale, draws), scale, generator=draws)
        >>> distilled = distill_dc(images, labels, net_fn, ipc=10, hook=attack, generator=others)
        >>> found = evaluate_distilled(distilled, net_fn, *test, attack.trigger, target=0, generator=others)
        >>> range_check(attack.trigger.apply(test[0]), scale)

    Args:
        trigger: What it starts from, for the paper's attack ``Trigger.random``.
        normalization: That of the images.
        project: Keep the trigger's pixels between 0 and 1. The released code does not: then triggers leave every
            picture format behind, ``range_check`` sees them at once, and it is their size that makes the attack work
            (see the method's claim). ``False`` repeats that, an *out-of-range trigger*.
        layer, topk, alpha, steps, lr, tol: See ``update_trigger``.
        generator, rate, target: See ``NaiveAttack``.

    Attributes:
        trigger, indices: See ``NaiveAttack``.
        history: What each refresh came to, e.g. how often the neuron was dead.

    Raises:
        UserError: As ``NaiveAttack``; and when distillation starts, with ``project``, if images have other ranges than
            ``normalization`` gives.
    """

    def __init__(
        self,
        trigger: Trigger,
        normalization: Normalization,
        *,
        generator: torch.Generator,
        rate: float = 0.01,
        target: int = 0,
        project: bool = True,
        layer: int = -2,
        topk: int = 1,
        alpha: float = 10.0,
        steps: int = 1000,
        lr: float = 0.08,
        tol: float = 0.5,
    ) -> None:
        super().__init__(trigger, generator=generator, rate=rate, target=target)
        if steps < 0:
            raise UserError(f"steps must not be negative, got {steps}")
        self.within = normalization if project else None
        self.options = {"layer": layer, "topk": topk, "alpha": alpha, "steps": steps, "lr": lr, "tol": tol}
        self.history: list[TriggerUpdate] = []

    def start(self, images: Images, labels: Int[Tensor, "batch"]) -> tuple[Images, Int[Tensor, "batch"]]:
        """Return poisoned copies of images and labels."""
        if self.within is not None and (self.within.clamp(images) - images).abs().max() > 1e-3:
            raise UserError("images have pixels outside [0, 1] of the normalization: project needs the one they have")
        return super().start(images, labels)

    def on_network_updated(self, net: nn.Module) -> None:
        """Refresh the trigger and paste it anew."""
        trigger, update = update_trigger(net, self.trigger, within=self.within, **self.options)  # type: ignore[arg-type]
        self.history.append(update)
        self._paste(trigger)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"history": [list(astuple(update)) for update in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.history = [TriggerUpdate(*update) for update in state["history"]]


def _linear_layer(net: nn.Module, layer: int) -> nn.Linear:
    layers = [m for m in net.modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))]
    if not -len(layers) <= layer < len(layers):
        raise UserError(f"layer must be from {-len(layers)} to {len(layers) - 1}, got {layer}")
    module = layers[layer]
    if not isinstance(module, nn.Linear):
        raise UserError(f"layer {layer} must be nn.Linear, got {type(module).__name__}: give the place of another")
    return module
