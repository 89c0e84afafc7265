"""What the Trainer costs over a bare PyTorch loop on a small CNN, and what the interventions LogitClip and RMix add.

Bars: 1.05 times the bare loop; with an intervention, 1.05 times the bare loop that calls its method by hand. CPU time
of one thread, interleaved, medians. Bound by the convolutions: a step takes tens of milliseconds, of which the wrappers
of Fabric, the loader and the hooks take less than a tenth of one.
"""

import random
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

from paperworks.robust import LogitClip, RMix, clip_logits
from paperworks.train import Intervention, Trainer

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


def bare(loss: Callable[[Tensor, Tensor], Tensor], mix: RMix | None = None) -> None:
    model = network()
    optimizer, total = sgd(model.parameters()), torch.zeros(())
    for indices in torch.randperm(len(images)).split(BATCH):
        inputs, targets = images[indices], labels[indices]
        if mix is not None:
            inputs, targets = mix(model, inputs, targets)
        value = loss(model(inputs), targets)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += value.detach()
    total.item()


def trained(*interventions: Intervention) -> None:
    trainer = Trainer(1, batch_size=BATCH, accelerator="cpu", interventions=interventions)
    trainer.fit(network(), TensorDataset(images, labels), loss=F.cross_entropy, optimizer=sgd)


def clipped(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(clip_logits(outputs), targets)


RUNS: dict[str, Callable[[], None]] = {
    "bare": partial(bare, F.cross_entropy),
    "bare, clip_logits": partial(bare, clipped),
    "bare, RMix": partial(bare, F.cross_entropy, RMix(10)),
    "Trainer": trained,
    "Trainer, LogitClip": partial(trained, LogitClip()),
    "Trainer, RMix": partial(trained, RMix(10)),
}


def seconds(function: Callable[[], None]) -> float:
    begun = time.process_time()
    function()
    return time.process_time() - begun


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in RUNS.values():
        run()
    rounds = [{name: seconds(RUNS[name]) for name in random.sample(list(RUNS), len(RUNS))} for _ in range(ROUNDS)]
    met = True
    pairs = {"Trainer": "bare", "Trainer, LogitClip": "bare, clip_logits", "Trainer, RMix": "bare, RMix"}
    for ours, peer in pairs.items():
        ratio = statistics.median(r[ours] / r[peer] for r in rounds)
        step = 1000 * statistics.median(r[peer] for r in rounds) / STEPS
        met &= ratio <= 1.05
        print(f"{ours + ' / ' + peer:<40} {ratio:.3f} ×  (bar 1.05 ×; {peer}: {step:.1f} ms a step)")
    sys.exit(not met)
