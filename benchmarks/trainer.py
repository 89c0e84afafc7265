"""What the Trainer costs over a bare PyTorch loop on a small CNN, and what interventions add to it.

Bar: 1.05 times the bare loop without interventions, and with LogitClip 1.05 times the same loop with ``clip_logits``
written into it. CPU time of one thread, interleaved, median of the rounds' ratios. Bound by the convolutions: a step
takes tens of milliseconds, and Fabric's wrappers and the loader some tenths of one.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import TensorDataset

from paperworks.robust import LogitClip, clip_logits
from paperworks.train import Trainer

STEPS, BATCH, ROUNDS = 30, 128, 15
images, labels = torch.randn(STEPS * BATCH, 1, 28, 28), torch.randint(10, (STEPS * BATCH,))
sgd = partial(SGD, lr=0.01, momentum=0.9)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 10)),
    )


def bare(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = network()
    optimizer, total = sgd(model.parameters()), torch.zeros(())
    for indices in torch.randperm(len(images)).split(BATCH):
        value = loss(model(images[indices]), labels[indices])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += value.detach()
    total.item()


def trained(*interventions: LogitClip) -> None:
    trainer = Trainer(1, batch_size=BATCH, accelerator="cpu", interventions=interventions)
    trainer.fit(network(), TensorDataset(images, labels), loss=F.cross_entropy, optimizer=sgd)


def seconds(function: Callable[[], None]) -> float:
    begun = time.process_time()
    function()
    return time.process_time() - begun


def compare(name: str, ours: Callable[[], None], peer: Callable[[], None], bar: float) -> bool:
    seconds(ours), seconds(peer)
    pairs = [(seconds(ours), seconds(peer))[:: 1] if r % 2 else (seconds(peer), seconds(ours))[::-1] for r in range(ROUNDS)]
    ratio = statistics.median(a / b for a, b in pairs)
    step = 1000 * statistics.median(b for _, b in pairs) / STEPS
    print(f"{name:<44} {ratio:6.3f} ×   (bar {bar} ×; peer {step:.1f} ms a step)")
    return ratio <= bar


if __name__ == "__main__":
    torch.set_num_threads(1)
    clipped = partial(bare, lambda outputs, targets: F.cross_entropy(clip_logits(outputs), targets))
    met = [
        compare("Trainer / bare loop", trained, partial(bare, F.cross_entropy), 1.05),
        compare("Trainer with LogitClip / loop with clip_logits", partial(trained, LogitClip()), clipped, 1.05),
        compare("Trainer with LogitClip / Trainer", partial(trained, LogitClip()), trained, 1.05),
    ]
    sys.exit(0 if all(met) else 1)
