"""What HAQ's search costs: beside random search at equal evaluations, and beside a plain implementation of itself.

Search: the claim's network of 8 layers on digits' shapes, as many policies each. Random search pays for evaluations
alone; HAQ pays for its agent too. Bar: at most 3 times random's time at the claim's 8 updates an episode. With one
update a step, as in the paper, there is no bar.

Episode: plain means that the model is copied, calibrated and quantized anew for each policy, and that replay keeps
Python objects and builds its batches of them, as the released code does. Evaluation, networks and updates are the same
on both sides and make up half of a plain episode, so that 3 times as fast is out of reach. Bar: 1.5 times.

Forward: MobileNetV2 with 4-bit weights and activations. Bar: at most 1.6 times the plain forward. What bounds it is
one more pass over each layer's input; clamping, scaling, rounding and scaling back make four, unfused.

Costs: a policy of 53 layers, in microseconds: one gather and a sum. Bar: 20.

CPU time of one thread (wall time on a GPU, where there is one), interleaved, medians of the rounds' ratios.
"""

import copy
import random
import statistics
import sys
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from timing import DEVICE, compare, interleaved, ratio, verdict
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from paperworks.claims.search.haq import mobilenetv2, separable
from paperworks.search.haq import (
    BitSerial,
    DDPGAgent,
    LayerRange,
    QuantizationEnv,
    QuantizationProblem,
    calibrate,
    clip_threshold,
    enforce_budget,
    load_hardware,
    policy_cost,
    profile_layers,
    quantize_model,
    random_search,
    restore_model,
    search,
)
from paperworks.search.haq.agent import Transitions

ROUNDS = 5
torch.set_num_threads(1)
torch.manual_seed(0)


def evaluation(inputs: Tensor) -> Callable[[nn.Module], float]:
    """A forward pass; what it says does not matter here, only that policies differ."""

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(inputs).softmax(1).amax(1).mean())

    return evaluate


def problem(
    build: Callable[[int, int], nn.Module],
    channels: int,
    side: int,
    images: int,
    kind: type[QuantizationProblem] = QuantizationProblem,
) -> QuantizationProblem:
    torch.manual_seed(0)
    inputs = torch.rand(images, channels, side, side, device=DEVICE)
    model = build(channels, 10).eval().to(DEVICE)
    return kind(model, evaluation(inputs), inputs[:64], load_hardware("edge"), 0.4)


def searches() -> bool:
    digits, larger = (lambda: problem(separable, 1, 8, 656)), (lambda: problem(mobilenetv2, 3, 32, 256))
    met = True
    for name, make, episodes, updates, bar in [
        ("8 layers, 8 updates", digits, 60, 8, 3.0),
        ("8 layers, 16 updates", digits, 60, 16, None),
        ("MobileNetV2 x 0.25, 106 updates", larger, 5, 106, None),
    ]:
        # Problems remember scores, so each run makes its own; warm-up is as short as can be, to see the agent work.
        functions = {
            "haq": lambda: search(make(), episodes, warmup=2, updates=updates),  # noqa: B023
            "random": lambda: random_search(make(), episodes),  # noqa: B023
            "set up": make,
        }
        times = interleaved(functions, 3)
        haq, rest = ([a - b for a, b in zip(times[arm], times["set up"], strict=True)] for arm in ("haq", "random"))
        label = f"HAQ / random, {episodes} policies, {name}"
        met &= verdict(label, ratio(haq, rest), at_most=bar)
        score = 1e3 * statistics.median(rest) / episodes
        agent = 1e3 * statistics.median(haq) / episodes - score
        print(f"    an evaluation takes {score:.1f} ms, an episode of the agent {agent:.1f} ms")
    return met


class Episodes:
    """Episodes as ``search`` plays them after its warm-up, but each policy is evaluated even if it was before."""

    def __init__(self, problem: QuantizationProblem, updates: int) -> None:
        self.problem, self.updates, self.env = problem, updates, QuantizationEnv(problem)
        self.agent = DDPGAgent(10, 128 * len(problem.layers))

    def __call__(self) -> None:
        self.problem.scores.clear()
        states, actions, done, reward = [], [], False, 0.0
        state, _ = self.env.reset()
        while not done:
            states.append(state)
            actions.append(self.agent.act(state, 0.3))
            state, reward, done, _, _ = self.env.step(np.array(actions[-1:]))
        self.learn(states, actions, reward, state)

    def learn(self, states: list[np.ndarray], actions: list[float], reward: float, last: np.ndarray) -> None:
        self.agent.remember(np.stack(states), np.array(actions), reward, last)
        for _ in range(self.updates):
            self.agent.update()


class PlainEpisodes(Episodes):
    """The same with a replay of Python objects."""

    def __init__(self, problem: QuantizationProblem, updates: int) -> None:
        super().__init__(problem, updates)
        self.memory: deque[tuple[np.ndarray, float, float, np.ndarray, float]] = deque(maxlen=128 * len(problem.layers))

    def learn(self, states: list[np.ndarray], actions: list[float], reward: float, last: np.ndarray) -> None:
        for index, (state, action) in enumerate(zip(states, actions, strict=True)):
            following = [*states, last][index + 1]
            self.memory.append((state, action, reward, following, float(following is last)))
        for _ in range(self.updates):
            columns = zip(*random.choices(list(self.memory), k=64), strict=True)
            arrays = [torch.tensor(np.array(column, dtype=np.float32)).view(64, -1) for column in columns]
            self.agent.learn(Transitions(*arrays))


class PlainProblem(QuantizationProblem):
    """Copies the model for each policy, calibrates the copy for the policy's bits, and quantizes it."""

    inputs: Tensor

    def score(self, policy: ArrayLike) -> float:
        model = copy.deepcopy(self.model)
        seen: dict[str, Tensor] = {}
        for name in self.names:
            layer = model.get_submodule(name)
            layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        with torch.no_grad():
            model(self.inputs)
        ranges = {}
        for name, (w, a) in zip(self.names, np.asarray(policy).tolist(), strict=True):
            signed = bool((seen[name] < 0).any())
            weight = clip_threshold(model.get_submodule(name).weight, w)
            ranges[name] = LayerRange(signed, {w: weight}, {a: min(clip_threshold(seen[name], a, signed=signed), 6.0)})
        quantize_model(model, policy, ranges)
        return self.evaluate(model)


def episodes() -> bool:
    met = True
    for name, build, channels, side, images, updates, bar in [
        ("8 layers", separable, 1, 8, 656, 8, 1.5),
        ("MobileNetV2 x 0.25", mobilenetv2, 3, 32, 512, 106, 1.5),
    ]:
        plain = problem(build, channels, side, images, PlainProblem)
        assert isinstance(plain, PlainProblem)
        plain.inputs = torch.rand(256, channels, side, side, device=DEVICE)
        ours = problem(build, channels, side, images)
        value, base = compare(PlainEpisodes(plain, updates), Episodes(ours, updates), ROUNDS)
        met &= verdict(f"plain / ours, an episode of {name} ({base:.0f} ms)", value, at_least=bar)
    return met


@torch.no_grad()
def forward() -> bool:
    met = True
    for batch, side in ((16, 96), (4, 224)):
        model = mobilenet_v2(weights=None).eval().to(DEVICE)
        x = torch.rand(batch, 3, side, side, device=DEVICE)
        quantized = copy.deepcopy(model)
        ranges = calibrate(quantized, x)
        quantize_model(quantized, [[4, 4]] * len(ranges), ranges)
        value, base = compare(lambda: quantized(x), lambda: model(x), ROUNDS)  # noqa: B023
        name = f"quantized / plain forward, {batch} x {side}x{side} ({base:.0f} ms)"
        met &= verdict(name, value, at_most=1.6)
        restore_model(quantized)
    return met


def costs() -> bool:
    layers = profile_layers(mobilenet_v2(weights=None), torch.rand(1, 3, 64, 64))
    table = BitSerial(array=(8, 8, 8), bandwidth=64).table(layers)
    policies = list(np.random.default_rng(0).integers(2, 9, (200, len(layers), 2)))
    target = 0.5 * policy_cost(table, np.full((len(layers), 2), 8))
    times = interleaved(
        {
            "cost": lambda: [policy_cost(table, policy) for policy in policies],
            "fit": lambda: [enforce_budget(policy, table, target) for policy in policies],
        },
        ROUNDS,
    )
    cost, fit = (1e6 * statistics.median(times[name]) / len(policies) for name in ("cost", "fit"))
    verdict("µs, fitting a policy to a budget", fit)
    return verdict("µs, the cost of a policy of 53 layers", cost, at_most=20)


if __name__ == "__main__":
    print(f"{DEVICE}, PyTorch {torch.__version__}")
    sys.exit(not all([costs(), forward(), episodes(), searches()]))
