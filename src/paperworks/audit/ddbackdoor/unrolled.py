"""DD: synthetic images and step sizes that take a network from its first weights to good ones (Wang et al. 2018)."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Adam

from paperworks.audit.ddbackdoor.distilled import DistilledSteps, unroll
from paperworks.audit.ddbackdoor.hooks import DistillationHook
from paperworks.audit.ddbackdoor.pixels import Images
from paperworks.audit.ddbackdoor.session import OnIteration, Session, count_classes, fresh
from paperworks.errors import UserError, check_counts


def distill_dd(
    images: Images,
    labels: Int[Tensor, "batch"],
    net_fn: Callable[[], nn.Module],
    ipc: int = 10,
    *,
    generator: torch.Generator,
    steps: int = 10,
    passes: int = 3,
    epochs: int = 400,
    batch_real: int = 1024,
    lr: float = 0.01,
    decay_epochs: int = 40,
    step_size: float = 0.02,
    fixed_init: bool = True,
    hook: DistillationHook | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 10,
    on_iteration: OnIteration | None = None,
) -> DistilledSteps:
    r"""Distil a training set into a course of gradient steps, by differentiating through it.

    Synthetic images $S_0, \dots, S_{K-1}$ and step sizes $\eta_k = \mathrm{softplus}(r_k)$ take the weights $w_0$
    through ``unroll`` to $w_T$, ``passes`` times over all $S_k$. Adam with $\beta = (0.5, 0.999)$ then steps down

    $$\nabla_{S, r} \, \mathrm{CE}(X; w_T(S, \eta))$$

    for a batch $X$ of real images. The hook is called in between, with the network as the course left it.

    Args:
        images: Real images, normalised.
        labels: Their classes, 0 to C - 1, none of them empty.
        net_fn: Makes a network, drawing its weights from PyTorch's global generator.
        ipc: Images of each class and step.
        generator: Source of every draw; the global ones are given back as they were.
        steps: $K$. Defaults without a word are the reference implementation's.
        passes: Passes over them.
        epochs: Passes over the real images.
        batch_real: Real images a step.
        lr: Adam's learning rate, halved every ``decay_epochs``.
        decay_epochs: Epochs until the learning rate is halved.
        step_size: First $\eta$; the paper's runs have 0.001 to 0.02.
        fixed_init: Distil for one draw of $w_0$, which the result brings along; else for a new one at each step.
        hook: An attack, or anything else that changes real images meanwhile.
        checkpoint: A file to resume from and to keep, or nothing.
        checkpoint_every: Epochs between checkpoints.
        on_iteration: Called with an epoch and the mean loss of real images in it.

    Raises:
        UserError: If an argument is out of range, a class has no image, or the checkpoint is of another distillation.
        NonFiniteLoss: If the loss becomes NaN or infinite.
    """
    if hook:
        images, labels = hook.start(images, labels)
    C, device = count_classes(images, labels), images.device
    counts = {"ipc": ipc, "steps": steps, "passes": passes, "epochs": epochs, "decay_epochs": decay_epochs}
    check_counts(**counts, batch_real=batch_real)
    if step_size <= 0:
        raise UserError(f"step_size must be positive, got {step_size}")
    targets = torch.arange(C, device=device).repeat_interleave(ipc)
    synthetic = torch.randn(steps, C * ipc, *images.shape[1:], generator=generator).to(images).requires_grad_()
    raw = torch.full((steps * passes,), step_size, device=device).expm1().log().requires_grad_()
    net = fresh(net_fn, generator, device)
    initial = _copied(net)
    optimizer = Adam([synthetic, raw], lr, betas=(0.5, 0.999))
    identity = {"method": "DD", "images": len(images), "synthetic": list(synthetic.shape), "hook": hook is not None}
    session = Session(
        identity | {"passes": passes, "fixed_init": fixed_init},
        {"images": synthetic, "raw": raw},
        optimizer,
        generator,
        hook,
        checkpoint,
        checkpoint_every,
        on_iteration,
    )
    for epoch in range(session.resume(), epochs):
        optimizer.param_groups[0]["lr"] = lr * 0.5 ** (epoch // decay_epochs)
        total = images.new_zeros(())
        order = torch.randperm(len(images), generator=generator).to(device)
        for batch in torch.split(order, batch_real):
            start = initial if fixed_init else _copied(fresh(net_fn, generator, device))
            weights = unroll(net, start, synthetic, targets, F.softplus(raw))
            if hook:
                net.load_state_dict({name: w.detach() for name, w in weights.items()}, strict=False)
                hook.on_network_updated(net)
            loss = F.cross_entropy(functional_call(net, weights, (images[batch],)), labels[batch])
            synthetic.grad, raw.grad = torch.autograd.grad(loss, [synthetic, raw])
            optimizer.step()
            total += loss.detach() * len(batch)
        session.iterated(epoch, epoch + 1 == epochs, total / len(images))
    sizes = F.softplus(raw).detach()
    return DistilledSteps(synthetic.detach(), targets, sizes, initial if fixed_init else None)


def _copied(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}
