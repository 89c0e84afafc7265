"""How well networks trained on a distilled set do, and how often a trigger takes them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.audit.ddbackdoor.distilled import Augment, DistilledSet, DistilledSteps
from paperworks.audit.ddbackdoor.pixels import Images
from paperworks.audit.ddbackdoor.session import fresh
from paperworks.audit.ddbackdoor.trigger import Trigger
from paperworks.errors import UserError, check_counts


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Networks trained on a distilled set, and three shares of test images of each.

    Attributes:
        nets: The networks, in evaluation mode.
        clean_accuracy: CTA: recognised as they are.
        attack_success: ASR: of those from other classes than the target, classified as the target with the trigger.
        attack_success_all: The same of all, target included, as the reference implementation counts.
    """

    nets: tuple[nn.Module, ...]
    clean_accuracy: Float[Tensor, "nets"]
    attack_success: Float[Tensor, "nets"]
    attack_success_all: Float[Tensor, "nets"]


def evaluate_distilled(
    distilled: DistilledSet | DistilledSteps,
    net_fn: Callable[[], nn.Module],
    images: Images,
    labels: Int[Tensor, "batch"],
    trigger: Trigger,
    target: int,
    *,
    generator: torch.Generator,
    n_nets: int = 5,
    augment: Augment | None = None,
) -> Evaluation:
    """Train fresh networks on a distilled set and measure them on test images. They differ much: take five or more.

    Args:
        distilled: What a distiller returned.
        net_fn: Makes a network, drawing its weights from PyTorch's global generator.
        images: Test images, normalised as the real ones were.
        labels: Their classes.
        trigger: What is pasted over them.
        target: The class that the attack aims at.
        generator: Source of every draw.
        n_nets: Networks.
        augment: Changes each batch that they are trained on, e.g. ``crop_and_cutout``.

    Raises:
        UserError: If there is no test image of another class than ``target``, or ``n_nets`` is not positive.
    """
    check_counts(n_nets=n_nets)
    nets = []
    for _ in range(n_nets):
        net = fresh(net_fn, generator, images.device)
        nets.append(distilled.train(net, generator, augment))
    success = torch.tensor([attack_success(net, images, labels, trigger, target) for net in nets])
    return Evaluation(
        tuple(nets),
        torch.tensor([clean_accuracy(net, images, labels) for net in nets]),
        success[:, 0],
        success[:, 1],
    )


def clean_accuracy(net: nn.Module, images: Images, labels: Int[Tensor, "batch"]) -> float:
    """Share of images that are recognised."""
    return float((logits(net, images).argmax(1) == labels).float().mean())


def attack_success(
    net: nn.Module, images: Images, labels: Int[Tensor, "batch"], trigger: Trigger, target: int
) -> tuple[float, float]:
    """Share of triggered images that are classified as the target: of other classes' images, and of all.

    Raises:
        UserError: If no image is of another class.
    """
    others = labels != target
    if not others.any():
        raise UserError(f"labels must hold another class than the target {target}")
    taken = (logits(net, trigger.apply(images)).argmax(1) == target).float()
    return float(taken[others].mean()), float(taken.mean())


@torch.no_grad()
def logits(net: nn.Module, images: Images) -> Float[Tensor, "batch classes"]:
    """In parts, so that memory stays bounded."""
    return torch.cat([net(part) for part in torch.split(images, 1024)])
