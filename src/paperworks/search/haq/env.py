"""Choosing a model's bits layer by layer, as a Gymnasium environment."""

from typing import Any

import numpy as np
from jaxtyping import Float32

from paperworks.errors import MissingExtra

from .policy import MAX_BITS, bits_of_action
from .problem import QuantizationProblem

try:
    import gymnasium as gym
    from gymnasium import spaces
except ImportError as error:
    raise MissingExtra("gymnasium", "agents", "HAQ's search") from error

Observation = Float32[np.ndarray, "10"]


class QuantizationEnv(gym.Env):
    r"""HAQ's environment: an episode passes over the layers and ends with the score of the policy it chose.

    Each layer takes two steps, for the bits of its weights and then of its activations (one step where the device's
    cost depends on weights alone). The action in [0, 1] is mapped to bits by ``bits_of_action``; after the last step
    the policy is made to fit the budget (``enforce_budget``), so that the reward need not know of cost:

    $$R = 0.1 \, (\text{acc} - \text{acc}_\text{orig})$$

    in percent at the last step, 0 before. The ten observed numbers are: depthwise or not, input
    channels, output channels, stride, kernel, weights, input pixels, position of the layer, the last action's bits
    over 8 (1 at first), and whether the coming action is for weights. The first eight are brought to [0, 1] over the
    layers; where all layers agree they are left as they are.

    Args:
        problem: Model, device and budget.

    Attributes:
        history: Of each finished episode the ``policy``, ``score``, ``cost`` (a fraction of 8 bits everywhere) and
            ``reward``, which ``info`` has too at its last step.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, problem: QuantizationProblem) -> None:
        self.problem = problem
        self.steps = problem.table.ndim - 1
        self._features = _features(problem)
        top = max(float(self._features.max()), 1.0)
        self.observation_space = spaces.Box(0.0, top, (10,), np.float32)
        self.action_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.history: list[dict[str, Any]] = []
        self._bits: list[int] = []

    def __len__(self) -> int:
        """Steps of an episode."""
        return len(self.problem.layers) * self.steps

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self._bits = []
        return self._observe(0), {}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        taken = len(self._bits)
        self._bits.append(bits_of_action(float(action[0]), self.problem.min_bits))
        if taken + 1 < len(self):
            return self._observe(taken + 1), 0.0, False, False, {}
        policy = self.problem.fit(np.array(self._bits).reshape(-1, self.steps))
        score = self.problem.score(policy)
        reward = self.problem.reward(score)
        info = {"policy": policy.tolist(), "score": score, "cost": self.problem.cost(policy), "reward": reward}
        self.history.append(info)
        # The state after the end belongs to no layer; it stays the last one.
        return self._observe(taken), reward, True, False, info

    def _observe(self, step: int) -> Observation:
        previous = self._bits[step - 1] / MAX_BITS if step else 1.0
        return np.append(self._features[step // self.steps], (previous, step % self.steps == 0)).astype(np.float32)


def _features(problem: QuantizationProblem) -> Float32[np.ndarray, "layers 8"]:
    rows = [
        (
            layer.depthwise,
            layer.in_channels,
            layer.out_channels,
            layer.stride,
            layer.kernel,
            layer.weights,
            layer.positions,
            index,
        )
        for index, layer in enumerate(problem.layers)
    ]
    raw = np.array(rows, dtype=np.float64)
    low, spread = raw.min(0), np.ptp(raw, 0)
    return np.where(spread > 0, (raw - low) / np.where(spread > 0, spread, 1), raw).astype(np.float32)
