"""What distillation leaves: a small set of images, or a course of steps; and how networks are trained on it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD

from paperworks.audit.ddbackdoor.pixels import Images

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Changes a batch of images, drawing from the generator."""


@dataclass(frozen=True, eq=False)
class DistilledSet:
    """Labelled images that a network is trained on from scratch.

    Attributes:
        images: Normalised as the real ones were; distillation keeps them in no range.
        labels: Their classes.
        epochs: Passes over them that train a network. Default: the reference implementation's, as for all of these.
        batch_size: Images a step.
        lr: Learning rate; a tenth of it in the second half.
    """

    images: Images
    labels: Int[Tensor, "batch"]
    epochs: int = 300
    batch_size: int = 256
    lr: float = 0.01

    def train(self, net: nn.Module, generator: torch.Generator, augment: Augment | None = None) -> nn.Module:
        """Train a network in place by SGD with momentum 0.9 and weight decay 5e-4; returns it in evaluation mode."""
        optimizer = SGD(net.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)
        net.train()
        for epoch in range(self.epochs):
            if epoch == self.epochs // 2:
                optimizer.param_groups[0]["lr"] = self.lr / 10
            train_epoch(net, optimizer, self.images, self.labels, self.batch_size, generator, augment)
        return net.eval()


@dataclass(frozen=True, eq=False)
class DistilledSteps:
    """A course of gradient steps, each on images and with a step size of its own.

    Attributes:
        images: Those of each step; all of them in turn, as often as there are step sizes.
        labels: Their classes, the same in each step.
        step_sizes: Of each step.
        initial: The weights that the course starts from, or nothing if it was made for any.
    """

    images: Float[Tensor, "steps batch channels height width"]
    labels: Int[Tensor, "batch"]
    step_sizes: Float[Tensor, "all_steps"]
    initial: Mapping[str, Tensor] | None = None

    def train(self, net: nn.Module, generator: torch.Generator, augment: Augment | None = None) -> nn.Module:
        """Take a network through the course in place; returns it in evaluation mode."""
        weights = {name: (self.initial or {}).get(name, p).detach() for name, p in net.named_parameters()}
        images = torch.stack([augment(step, generator) for step in self.images]) if augment else self.images
        found = unroll(net.train(), weights, images, self.labels, self.step_sizes, create_graph=False)
        net.load_state_dict(found, strict=False)
        return net.eval()


def train_epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    labels: Int[Tensor, "batch"],
    batch_size: int,
    generator: torch.Generator,
    augment: Augment | None = None,
) -> None:
    """One pass; in random order where there is more than one batch."""
    order = torch.arange(len(labels))
    if len(labels) > batch_size:
        order = torch.randperm(len(labels), generator=generator)
    for batch in torch.split(order.to(labels.device), batch_size):
        some = augment(images[batch], generator) if augment else images[batch]
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(some), labels[batch]))
        optimizer.step()


def unroll(
    net: nn.Module,
    weights: Mapping[str, Tensor],
    images: Float[Tensor, "steps batch channels height width"],
    labels: Int[Tensor, "batch"],
    step_sizes: Float[Tensor, "all_steps"],
    *,
    create_graph: bool = True,
) -> dict[str, Tensor]:
    r"""Gradient steps on synthetic images, as a function of these and of the step sizes (Wang et al. 2018).

    $$w_{k+1} = w_k - \eta_k \nabla_w \, \mathrm{CE}(S_{k \bmod K}; w_k)$$

    Args:
        net: Says how weights make logits; its own are not used.
        weights: $w_0$ by name.
        images: $S_0$ to $S_{K-1}$.
        labels: The classes of each $S_k$.
        step_sizes: $\eta_k$, as many as there are steps.
        create_graph: Whether the result can be differentiated.

    Returns:
        The last weights, by name.
    """
    now = {name: w.detach().requires_grad_() for name, w in weights.items()}
    for k, eta in enumerate(step_sizes):
        loss = F.cross_entropy(functional_call(net, now, (images[k % len(images)],)), labels)
        slopes = torch.autograd.grad(loss, list(now.values()), create_graph=create_graph)
        now = {name: w - eta * slope for (name, w), slope in zip(now.items(), slopes, strict=True)}
        if not create_graph:
            now = {name: w.detach().requires_grad_() for name, w in now.items()}
    return now
