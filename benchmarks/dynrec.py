"""What early exit of the reasoner saves, beside the same network that takes all of its steps.

Infer: the policy's stops are dealt so that they are 2.5 of 5 steps on average; fixed takes 5. Bars: at most 0.65 times
the time at batch 64, at most 0.6 times one example at a time (the mean over examples that take 1, 2, 3 and 4 steps).
What bounds it: half of the steps, and all of the encoders of picture and words, whose share is printed; examples that
are done leave the batch: if they were only masked, the time would be that of all steps.

Size: 256 channels (TransVG's), 256 places (128 pixels, stride 8), 12 words, the transformer block. Smaller networks
gain less, for their encoders and policy weigh more: with 128 channels a single example took 0.62 times the time.

Loss: the exact expectation beside a self-critical draw, for 64 examples, in shares of one forward pass; no bar.

CPU time of one thread (wall time on a GPU, where there is one), interleaved, medians of the rounds' ratios.
"""

import statistics
import sys
from functools import partial

import torch
from timing import DEVICE, interleaved, ratio, verdict
from torch import Tensor, nn

from paperworks.detection.dynrec import DynamicReasoner, GridTokens, TextEncoder, episode_reward, reinforce_loss

ROUNDS, STEPS, D = {64: 3, 1: 15}, 5, 256
torch.set_num_threads(1)
torch.manual_seed(0)


def reasoner() -> DynamicReasoner:
    stem = nn.Sequential(nn.Conv2d(3, D, 8, 8), nn.ReLU())
    return DynamicReasoner(GridTokens(stem, D, D), TextEncoder(50, D), STEPS, d=D).to(DEVICE).eval()


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(2, 50, (batch, 12), device=DEVICE)
    return torch.rand(batch, 3, 128, 128, device=DEVICE), tokens, torch.ones_like(tokens, dtype=torch.bool)


def infer() -> bool:
    model, good = reasoner(), True
    # the policy is asked at each step, as in use; its answer is then overruled, so that the mean is 2.5
    for batch, bar in ((64, 0.65), (1, 0.6)):
        some = inputs(batch)
        stops = torch.tensor([1, 2, 3, 4], device=DEVICE).repeat(max(1, batch // 4))
        functions = {"fixed": partial(model.infer, some, STEPS)}
        if batch > 1:
            functions["dynamic"] = partial(asked, model, some, stops)
        else:
            functions |= {f"stop {stop}": partial(asked, model, some, torch.tensor([stop])) for stop in (1, 2, 3, 4)}
        functions["encoders"] = partial(encoders, model, some)
        times = interleaved(functions, ROUNDS[batch])
        if batch == 1:
            parts = [times[f"stop {stop}"] for stop in (1, 2, 3, 4)]
            times["dynamic"] = [statistics.mean(part) for part in zip(*parts, strict=True)]
        print(f"batch {batch}: all 5 steps {1e3 * statistics.median(times['fixed']):.2f} ms")
        print(f"  encoders, of that {ratio(times['encoders'], times['fixed']):.3f}")
        good &= verdict(
            f"2.5 of 5 steps on average, batch {batch}", ratio(times["dynamic"], times["fixed"]), at_most=bar
        )
    return good


class Dealt(nn.Module):
    """A policy that is asked and overruled: it stops each example at the step dealt to it."""

    def __init__(self, policy: nn.Module, stops: Tensor) -> None:
        super().__init__()
        self.policy, self.stops = policy, stops

    def forward(self, reason: Tensor, sentence: Tensor, step: int) -> tuple[Tensor, Tensor]:
        logit, value = self.policy(reason, sentence, step)
        rest = self.stops[self.stops > step]  # those that have left do not come back
        return torch.where(rest == step + 1, logit.abs() + 1, -logit.abs() - 1), value


def asked(model: DynamicReasoner, some: tuple[Tensor, Tensor, Tensor], stops: Tensor) -> object:
    policy = model.policy
    model.policy = Dealt(policy, stops)  # type: ignore[assignment]
    try:
        return model.infer(some)
    finally:
        model.policy = policy


@torch.no_grad()
def encoders(model: DynamicReasoner, some: tuple[Tensor, Tensor, Tensor]) -> object:
    return model._begin(some)


def losses() -> None:
    model, some = reasoner(), inputs(64)
    rewards = episode_reward(torch.rand(64, STEPS, device=DEVICE))
    logits = torch.randn(64, STEPS, device=DEVICE, requires_grad=True)
    generator = torch.Generator().manual_seed(0)

    def backward(baseline: str) -> None:
        reinforce_loss(logits, rewards, baseline, generator).backward()  # type: ignore[arg-type]

    times = interleaved(
        {
            "forward": torch.no_grad()(partial(model, some)),
            "exact": partial(backward, "exact"),
            "self-critical": partial(backward, "self_critical"),
        },
        ROUNDS[64],
    )
    for name in ("exact", "self-critical"):
        verdict(f"{name} policy loss and gradient / forward pass", ratio(times[name], times["forward"]))


if __name__ == "__main__":
    print(f"{DEVICE}, PyTorch {torch.__version__}")
    met = infer()
    losses()
    sys.exit(not met)
