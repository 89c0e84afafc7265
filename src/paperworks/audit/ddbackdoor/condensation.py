"""DC: synthetic images whose gradients match those of real ones (Zhao et al., ICLR 2021)."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import SGD

from paperworks.audit.ddbackdoor.distilled import DistilledSet, train_epoch
from paperworks.audit.ddbackdoor.hooks import DistillationHook
from paperworks.audit.ddbackdoor.matching import (
    Distance,
    check_distance,
    check_network,
    class_distance,
    class_gradients,
)
from paperworks.audit.ddbackdoor.pixels import Images
from paperworks.audit.ddbackdoor.session import OnIteration, Session, count_classes, fresh
from paperworks.errors import UserError, check_counts, unknown

SCHEDULES = {1: (1, 1), 10: (10, 50), 20: (20, 25), 50: (50, 10)}
"""Outer steps and inner passes by images a class, from the paper's code."""

Start = Literal["noise", "real"]


def distill_dc(
    images: Images,
    labels: Int[Tensor, "batch"],
    net_fn: Callable[[], nn.Module],
    ipc: int,
    *,
    generator: torch.Generator,
    iterations: int = 1000,
    outer: int | None = None,
    inner: int | None = None,
    batch_real: int = 256,
    lr_images: float = 0.1,
    lr_net: float = 0.01,
    init: Start = "noise",
    distance: Distance = "rows",
    hook: DistillationHook | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 10,
    on_iteration: OnIteration | None = None,
) -> DistilledSet:
    r"""Distil a training set into ``ipc`` images a class by matching gradients.

    An iteration draws a fresh network $\theta$ and takes ``outer`` steps on the synthetic images $S$ by SGD with
    momentum 0.5 down

    $$\sum_c D\big(\nabla_\theta \mathrm{CE}(S_c), \nabla_\theta \mathrm{CE}(X_c)\big)$$

    where $X_c$ is a batch of class $c$ as it is labelled, poisoned images included. Between two steps the network is
    trained on $S$ for ``inner`` passes, then the hook is called. With one outer step there is no between, and the
    reference implementation never calls its attack; here both follow that step.

    Args:
        images: Real images, normalised.
        labels: Their classes, 0 to C - 1, none of them empty.
        net_fn: Makes a network, drawing its weights from PyTorch's global generator; see ``class_gradients`` for what
            it may consist of.
        ipc: Images a class.
        generator: Source of every draw; the global ones are given back as they were.
        iterations: Fresh networks. Defaults without a word are the reference implementation's.
        outer, inner: Steps on S for each network, and passes over S between them; by default those of the paper's
            code for 1, 10, 20 and 50 images a class.
        batch_real: Real images of a class in a step; all of them where there are fewer.
        lr_images, lr_net: Learning rates of images and networks.
        init: ``noise``: from a standard normal; ``real``: from real images.
        distance: D, a kind of ``gradient_distance``; biases and norms do not count in any.
        hook: An attack, or anything else that changes real images meanwhile.
        checkpoint: A file to resume from and to keep, or nothing.
        checkpoint_every: Iterations between checkpoints.
        on_iteration: Called with an iteration and the mean distance of a class and step in it.

    Raises:
        UserError: If an argument is out of range, a class has no image, ``ipc`` has no schedule and none is given, or
            the checkpoint is of another distillation.
        NonFiniteLoss: If the distance becomes NaN or infinite.
    """
    if hook:
        images, labels = hook.start(images, labels)
    C = count_classes(images, labels)
    if (outer is None or inner is None) and ipc not in SCHEDULES:
        raise UserError(f"ipc={ipc} has no schedule ({', '.join(map(str, SCHEDULES))} have): give outer and inner")
    scheduled = SCHEDULES.get(ipc, (0, 0))
    outer, inner = scheduled[0] if outer is None else outer, scheduled[1] if inner is None else inner
    check_counts(ipc=ipc, iterations=iterations, outer=outer, inner=inner, batch_real=batch_real)
    check_distance(distance)
    if init not in get_args(Start):
        raise unknown("init", init, get_args(Start))
    pools = _Pools(labels, C, batch_real, generator)
    classes = torch.arange(C, device=images.device)
    synthetic = torch.randn(C * ipc, *images.shape[1:], generator=generator).to(images)
    if init == "real":
        synthetic = images[torch.cat([pools.some(c, ipc) for c in range(C)])]
    synthetic.requires_grad_()
    targets = classes.repeat_interleave(ipc)
    optimizer = SGD([synthetic], lr_images, momentum=0.5)
    identity = {"method": "DC", "images": len(images), "synthetic": list(synthetic.shape), "hook": hook is not None}
    session = Session(
        identity, {"images": synthetic}, optimizer, generator, hook, checkpoint, checkpoint_every, on_iteration
    )
    for iteration in range(session.resume(), iterations):
        net = fresh(net_fn, generator, images.device)
        check_network(net)
        net_optimizer = SGD(net.parameters(), lr_net)
        total = images.new_zeros(())
        for step in range(outer):
            batch, weights = pools.draw()
            real = class_gradients(net, images[batch], classes, weights=weights)
            mine = class_gradients(net, synthetic.view(C, ipc, *images.shape[1:]), classes, create_graph=True)
            apart = class_distance(mine, real, distance)
            (synthetic.grad,) = torch.autograd.grad(apart, synthetic)
            optimizer.step()
            total += apart.detach()
            if step < outer - 1 or outer == 1:
                for _ in range(inner):
                    train_epoch(net, net_optimizer, synthetic.detach(), targets, 256, generator)
                if hook:
                    hook.on_network_updated(net)
        session.iterated(iteration, iteration + 1 == iterations, total / (C * outer))
    return DistilledSet(synthetic.detach(), targets)


class _Pools:
    """The images of each class, as labelled."""

    def __init__(self, labels: Int[Tensor, "batch"], num_classes: int, batch: int, generator: torch.Generator) -> None:
        self.members = [(labels == c).nonzero().flatten().cpu() for c in range(num_classes)]
        self.sizes = [min(batch, len(pool)) for pool in self.members]
        self.generator, self.device = generator, labels.device
        # Smaller pools are filled up with images that weigh nothing.
        self.weights = torch.zeros(num_classes, max(self.sizes))
        for c, size in enumerate(self.sizes):
            self.weights[c, :size] = 1 / size
        self.weights = self.weights.to(self.device)

    def draw(self) -> tuple[Int[Tensor, "classes batch"], Float[Tensor, "classes batch"]]:
        """Positions of a batch of each class, and what each image weighs in it."""
        drawn = torch.zeros(self.weights.shape, dtype=torch.long)
        for c, size in enumerate(self.sizes):
            drawn[c, :size] = self._draw(c, size)
        return drawn.to(self.device), self.weights

    def some(self, c: int, number: int) -> Int[Tensor, "number"]:
        """Positions of that many images of a class; images repeat only if there are too few."""
        rounds = -(-number // len(self.members[c]))
        return torch.cat([self._draw(c, len(self.members[c])) for _ in range(rounds)])[:number].to(self.device)

    def _draw(self, c: int, size: int) -> Tensor:
        pool = self.members[c]
        return pool[torch.randperm(len(pool), generator=self.generator)[:size]]
