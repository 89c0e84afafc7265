"""HAQ's agent: deep deterministic policy gradient with one reward for a whole episode."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from paperworks.errors import UserError, check_counts


class Transitions(NamedTuple):
    """A batch of steps; ``last`` is 1 for the last step of an episode."""

    states: Float[Tensor, "batch states"]
    actions: Float[Tensor, "batch 1"]
    rewards: Float[Tensor, "batch 1"]
    next_states: Float[Tensor, "batch states"]
    last: Float[Tensor, "batch 1"]


class Critic(nn.Module):
    """Value of an action in a state: both enter the first hidden layer."""

    def __init__(self, states: int, hidden: Sequence[int]) -> None:
        super().__init__()
        first, second = hidden
        self.state, self.action = nn.Linear(states, first), nn.Linear(1, first)
        self.value = nn.Sequential(nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 1))

    def forward(self, states: Float[Tensor, "batch states"], actions: Float[Tensor, "batch 1"]) -> Tensor:
        return self.value(self.state(states) + self.action(actions))


class DDPGAgent:
    r"""The paper's agent, with the settings of the released script.

    All steps of an episode are stored with its final reward $R$. A batch's targets are centred by a moving average
    $b \leftarrow b + \beta \, (\bar R - b)$ of batch means, which starts at the first of them:

    $$y = (R - b) + \gamma \, (1 - \text{last}) \, Q'(s', \mu'(s'))$$

    The critic descends $(Q(s, a) - y)^2$ and the actor $-Q(s, \mu(s))$, both by Adam, and the target networks $Q'$ and
    $\mu'$ follow by $\tau$. Exploration draws from a normal distribution around $\mu(s)$, truncated to [0, 1].

    Args:
        states: Numbers in a state.
        capacity: Steps that are kept; the script's is 128 for each layer.
        hidden: Widths of the hidden layers.
        actor_lr, critic_lr: Learning rates.
        tau: Share of the networks in their targets after each update.
        gamma: Discount.
        batch_size: Steps an update.
        baseline_rate: $\beta$.
        seed: Of networks, batches and exploration.

    Raises:
        UserError: If a number is out of range.
    """

    def __init__(
        self,
        states: int,
        capacity: int,
        *,
        hidden: tuple[int, int] = (300, 300),
        actor_lr: float = 1e-4,
        critic_lr: float = 1e-3,
        tau: float = 0.01,
        gamma: float = 1.0,
        batch_size: int = 64,
        baseline_rate: float = 0.5,
        seed: int = 0,
    ) -> None:
        check_counts(states=states, capacity=capacity, batch_size=batch_size)
        for name, share in {"tau": tau, "gamma": gamma, "baseline_rate": baseline_rate}.items():
            if not 0 <= share <= 1:
                raise UserError(f"{name} must be in [0, 1], got {share}")
        self.tau, self.gamma, self.batch_size, self.baseline_rate = tau, gamma, batch_size, baseline_rate
        self.rng = np.random.default_rng(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = nn.Sequential(
                nn.Linear(states, hidden[0]),
                nn.ReLU(),
                nn.Linear(hidden[0], hidden[1]),
                nn.ReLU(),
                nn.Linear(hidden[1], 1),
                nn.Sigmoid(),
            )
            self.critic = Critic(states, hidden)
        self.target_actor, self.target_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), actor_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), critic_lr, fused=True)
        self.baseline: float | None = None
        self.size = self._next = 0
        self._memory = Transitions(
            torch.zeros(capacity, states),
            torch.zeros(capacity, 1),
            torch.zeros(capacity, 1),
            torch.zeros(capacity, states),
            torch.zeros(capacity, 1),
        )

    @torch.no_grad()
    def act(self, state: Float32[np.ndarray, "states"], sigma: float = 0.0) -> float:
        """An action in [0, 1]: the actor's, or one drawn around it with standard deviation ``sigma``."""
        mean = float(self.actor(torch.from_numpy(state)[None]))
        if sigma == 0:
            return mean
        low, high = ndtr((0 - mean) / sigma), ndtr((1 - mean) / sigma)
        return float(np.clip(mean + sigma * ndtri(self.rng.uniform(low, high)), 0, 1))

    def random(self) -> float:
        """An action drawn evenly from [0, 1]."""
        return float(self.rng.uniform())

    def remember(
        self,
        states: Float32[np.ndarray, "steps states"],
        actions: Float[np.ndarray, "steps"],
        reward: float,
        last_state: Float32[np.ndarray, "states"],
    ) -> None:
        """Store an episode, every step with the reward of its end."""
        steps, capacity = len(states), len(self._memory.states)
        rows = (self._next + torch.arange(steps)) % capacity
        after = np.concatenate([states[1:], last_state[None]])
        columns = (states, actions[:, None], np.full((steps, 1), reward), after, np.arange(steps)[:, None] == steps - 1)
        for memory, column in zip(self._memory, columns, strict=True):
            memory[rows] = torch.from_numpy(np.ascontiguousarray(column)).to(memory)
        self._next, self.size = (self._next + steps) % capacity, min(self.size + steps, capacity)

    def update(self) -> None:
        """Learn from a batch of what is stored, drawn evenly."""
        rows = torch.from_numpy(self.rng.integers(self.size, size=self.batch_size))
        self.learn(Transitions(*(column[rows] for column in self._memory)))

    def learn(self, batch: Transitions) -> None:
        """Learn from one batch."""
        loss = F.mse_loss(self.critic(batch.states, batch.actions), self.targets(batch))
        self.critic_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.critic_optimizer.step()

        self.critic.requires_grad_(False)
        value = self.critic(batch.states, self.actor(batch.states)).mean()
        self.actor_optimizer.zero_grad()
        value.neg().backward()
        self.actor_optimizer.step()
        self.critic.requires_grad_(True)
        self.follow()

    @torch.no_grad()
    def targets(self, batch: Transitions) -> Float[Tensor, "batch 1"]:
        """What the critic should say of a batch, whose mean reward moves the baseline."""
        mean = float(batch.rewards.mean())
        self.baseline = mean if self.baseline is None else self.baseline + self.baseline_rate * (mean - self.baseline)
        following = self.target_critic(batch.next_states, self.target_actor(batch.next_states))
        return batch.rewards - self.baseline + self.gamma * (1 - batch.last) * following

    @torch.no_grad()
    def follow(self) -> None:
        """Move the target networks towards the others by ``tau``."""
        for target, network in ((self.target_actor, self.actor), (self.target_critic, self.critic)):
            for behind, ahead in zip(target.parameters(), network.parameters(), strict=True):
                behind.lerp_(ahead, self.tau)
