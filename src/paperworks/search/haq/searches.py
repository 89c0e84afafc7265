"""Searching for the policy that scores best within the budget: HAQ, and what it is to be compared with."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from paperworks.errors import MissingExtra, UserError, unknown

from .agent import DDPGAgent
from .policy import MAX_BITS, Policy, fixed_policy, policy_cost
from .problem import QuantizationProblem

if TYPE_CHECKING:
    from .env import QuantizationEnv

Agent = Literal["haq", "sb3"]
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Found:
    """A policy that was tried: its bits, score, and simulated cost as a fraction of 8 bits everywhere."""

    policy: list[list[int]]
    score: float
    cost: float


@dataclass(frozen=True)
class PolicyResult:
    """What a search found.

    Attributes:
        best: The policy with the highest score, the first of equals.
        history: Every policy that was tried, in order.
        original: The score of the unquantized model.
        layers: Their names.
    """

    best: Found
    history: list[Found]
    original: float
    layers: list[str]

    @property
    def policy(self) -> Policy:
        """The best policy as an array ``[layers, 2]`` or ``[layers, 1]``."""
        return np.array(self.best.policy, dtype=np.int64)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1), "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "PolicyResult":
        """Read what ``save`` wrote.

        Raises:
            UserError: If the file holds something else.
        """
        try:
            content = json.loads(Path(path).read_text("utf-8"))
            history = [Found(**found) for found in content["history"]]
            return cls(Found(**content["best"]), history, content["original"], content["layers"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds no result of a search") from error


def search(
    problem: QuantizationProblem,
    episodes: int = 600,
    *,
    agent: Agent = "haq",
    warmup: int = 20,
    updates: int | None = None,
    sigma: float = 0.5,
    decay: float = 0.99,
    seed: int = 0,
    progress: Progress = lambda fraction, text: None,
) -> PolicyResult:
    r"""Let an agent choose bits for a number of episodes; the best policy of all is kept (paper, section 3).

    ``warmup`` episodes take random actions. Then the actor's action is blurred by a normal distribution truncated to
    [0, 1] with $\sigma_t = \sigma \cdot \text{decay}^{t - \text{warmup}}$, and the agent learns after each episode.
    The same problem and seed give the same history, also when the problem's ``log`` remembers scores.

    Args:
        problem: Model, device and budget.
        episodes: Policies to try; the default is the released script's.
        agent: ``"haq"`` is ``DDPGAgent``. ``"sb3"`` is stable-baselines3's DDPG for comparison, which gets the reward
            at the last step only, explores by plain normal noise that does not decay, and centres no rewards.
        warmup: Episodes before learning begins.
        updates: Batches to learn from after each episode, by default as many as it has steps.
        sigma, decay: Of the exploration.
        seed: Of all that is random.
        progress: Called after each episode with the fraction done and a text.

    Raises:
        MissingExtra: Without gymnasium (or stable-baselines3, for its agent).
        UserError: If a number is out of range.
    """
    if agent not in get_args(Agent):
        raise unknown("agent", agent, get_args(Agent))
    if episodes < 1 or warmup < 0 or (updates is not None and updates < 1):
        got = f"{episodes}, {warmup} and {updates}"
        raise UserError(f"episodes and updates must be at least 1 and warmup at least 0, got {got}")
    if not (sigma > 0 and 0 < decay <= 1):
        raise UserError(f"sigma must be positive and decay in (0, 1], got {sigma} and {decay}")
    from .env import QuantizationEnv

    env = QuantizationEnv(problem)
    if agent == "sb3":
        _learn_with_sb3(env, episodes, warmup, updates, sigma, seed)
    else:
        learner = DDPGAgent(10, 128 * len(problem.layers), seed=seed)
        for episode in range(episodes):
            blur = sigma * decay ** (episode - warmup) if episode >= warmup else None
            _play(env, learner, blur)
            if episode >= warmup:
                for _ in range(updates or len(env)):
                    learner.update()
            progress((episode + 1) / episodes, f"episode {episode + 1}: score {env.history[-1]['score']:.4f}")
    return _result(problem, [Found(i["policy"], i["score"], i["cost"]) for i in env.history])


def _play(env: "QuantizationEnv", agent: DDPGAgent, sigma: float | None) -> None:
    """Play an episode and store it; without ``sigma``, at random."""
    states, actions, done, reward = [], [], False, 0.0
    state, _ = env.reset()
    while not done:
        action = agent.random() if sigma is None else agent.act(state, sigma)
        states.append(state)
        actions.append(action)
        state, reward, done, _, _ = env.step(np.array([action], dtype=np.float32))
    agent.remember(np.stack(states), np.array(actions), reward, state)


def _learn_with_sb3(
    env: "QuantizationEnv", episodes: int, warmup: int, updates: int | None, sigma: float, seed: int
) -> None:
    from paperworks.train.checkpoint import seeded

    try:
        from stable_baselines3 import DDPG
        from stable_baselines3.common.noise import NormalActionNoise
    except ImportError as error:
        raise MissingExtra("stable-baselines3", "agents", "agent='sb3'") from error
    with seeded(seed):
        agent = DDPG(
            "MlpPolicy",
            env,
            learning_rate=1e-3,
            buffer_size=128 * len(env.problem.layers),
            learning_starts=warmup * len(env),
            batch_size=64,
            tau=0.01,
            gamma=1.0,
            train_freq=(1, "episode"),
            gradient_steps=updates or -1,
            action_noise=NormalActionNoise(np.zeros(1), np.full(1, sigma)),
            policy_kwargs={"net_arch": [300, 300]},
            seed=seed,
            device="cpu",
        )
        agent.learn(episodes * len(env))


def random_search(
    problem: QuantizationProblem,
    evaluations: int,
    *,
    seed: int = 0,
    progress: Progress = lambda fraction, text: None,
) -> PolicyResult:
    """Try policies drawn evenly from all and made to fit the budget, as HAQ's are in its warm-up.

    Args:
        problem: Model, device and budget.
        evaluations: Policies to try.
        seed: Decides the draws.
        progress: Called after each with the fraction done and a text.

    Raises:
        UserError: If ``evaluations`` is less than 1.
    """
    if evaluations < 1:
        raise UserError(f"evaluations must be at least 1, got {evaluations}")
    rng = np.random.default_rng(seed)
    history = []
    for index in range(evaluations):
        shape = len(problem.layers), problem.table.ndim - 1
        history.append(_try(problem, problem.fit(rng.integers(problem.min_bits, MAX_BITS + 1, shape))))
        progress((index + 1) / evaluations, f"policy {index + 1}: score {history[-1].score:.4f}")
    return _result(problem, history)


def greedy_sensitivity(
    problem: QuantizationProblem, *, progress: Progress = lambda fraction, text: None
) -> PolicyResult:
    r"""Lower bits where the score suffers least for what they save, as if layers did not interact.

    First each number of bits is scored in each place alone, with 8 bits elsewhere. From 8 bits everywhere, those are
    then lowered whose loss of score, by that table, is least for the cost they save, until the budget is met.

    Args:
        problem: Model, device and budget.
        progress: Called after each policy with the fraction done and a text.

    Returns:
        The policy it ends with; its history also has those it was made from, which need not fit the budget.
    """
    full = fixed_policy(problem.table, MAX_BITS)
    pinned = {index % len(full) for index in problem.pinned}
    places = [(i, j) for i in range(len(full)) for j in range(full.shape[1]) if i not in pinned]
    bits = range(problem.min_bits, MAX_BITS)
    history = [_try(problem, full)]
    scores = {(*place, MAX_BITS): history[0].score for place in places}
    for place in places:
        for number in bits:
            history.append(_try(problem, _with(full, place, number)))
            scores[(*place, number)] = history[-1].score
            progress(len(history) / (1 + len(places) * len(bits)), f"sensitivity of {problem.names[place[0]]}")
    policy = full
    while policy_cost(problem.table, policy) > problem.target:
        policy = min(
            (_with(policy, place, number) for place in places for number in bits if number < policy[place]),
            key=lambda lower: _price(problem, scores, policy, lower),
        )
    history.append(_try(problem, policy))
    return PolicyResult(history[-1], history, problem.original, problem.names)


def _with(policy: Policy, place: tuple[int, int], bits: int) -> Policy:
    changed = policy.copy()
    changed[place] = bits
    return changed


def _price(
    problem: QuantizationProblem, scores: dict[tuple[int, int, int], float], policy: Policy, lower: Policy
) -> tuple[float, float]:
    """Loss of score for each unit of cost saved; of equals the least saving, so that steps are small."""
    layer, column = (int(index) for index in np.argwhere(policy != lower)[0])
    saved = policy_cost(problem.table, policy) - policy_cost(problem.table, lower)
    now, then = (scores[layer, column, int(one[layer, column])] for one in (policy, lower))
    loss = max(now - then, 0.0)
    return (loss / saved, saved) if saved > 0 else (np.inf, -float(policy.sum() - lower.sum()))


def _try(problem: QuantizationProblem, policy: Policy) -> Found:
    return Found(policy.tolist(), problem.score(policy), problem.cost(policy))


def _result(problem: QuantizationProblem, history: list[Found]) -> PolicyResult:
    return PolicyResult(max(history, key=lambda found: found.score), history, problem.original, problem.names)
