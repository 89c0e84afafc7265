"""RL-Mix's agent: proximal policy optimisation on saliency maps and logits, from stable-baselines3."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from paperworks.errors import MissingExtra, UserError
from paperworks.train import History
from paperworks.train.checkpoint import seeded

from .env import RLMixEnv

try:
    from gymnasium import spaces
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
except ImportError as error:
    raise MissingExtra("stable-baselines3", "agents", "RL-Mix") from error


class SaliencyPolicyExtractor(BaseFeaturesExtractor):
    """What policy and value see of a batch: its saliency maps through two convolutions, beside its logits.

    The images of the batch are the channels of the convolutions, so that their number is fixed. Layers as in
    the reference implementation: 3x3 to 150 maps, 2x2 to 100, ReLU after each; a linear layer on each image's
    logits; all of it flattened and brought to ``features_dim`` by a linear layer and ReLU.

    Args:
        observation_space: As ``RLMixEnv`` has it; maps of at least 4 x 4.
        features_dim: Width of the result; the reference implementation's is 256.
    """

    def __init__(self, observation_space: spaces.Dict, features_dim: int = 256) -> None:
        super().__init__(observation_space, features_dim)
        saliency, logits = observation_space["saliency"].shape, observation_space["logits"].shape
        assert saliency is not None
        assert logits is not None
        images, side, _ = saliency
        if side < 4:
            raise UserError(f"observation_patches must be at least 4 for the agent's convolutions, got {side}")
        self.maps = nn.Sequential(nn.Conv2d(images, 150, 3), nn.ReLU(), nn.Conv2d(150, 100, 2), nn.ReLU(), nn.Flatten())
        self.logits = nn.Sequential(nn.Linear(logits[1], features_dim), nn.Flatten())
        width = 100 * (side - 3) ** 2 + images * features_dim
        self.joint = nn.Sequential(nn.Linear(width, features_dim), nn.ReLU())

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        both = self.maps(observations["saliency"]), self.logits(observations["logits"])
        return self.joint(torch.cat(both, dim=1))


def train_rl_mix(
    model: nn.Module,
    data: Dataset[Any],
    *,
    epochs: int,
    num_classes: int,
    optimizer: Callable[[Iterator[nn.Parameter]], Optimizer],
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    batch_size: int = 100,
    observation_patches: int = 8,
    alpha: float = 1.0,
    patches: Sequence[int] = (2, 4),
    learning_rate: float = 3e-4,
    n_steps: int = 1000,
    agent_batch_size: int = 250,
    seed: int = 0,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
) -> tuple[PPO, History]:
    r"""Train a classifier and, along with it, the agent that mixes its batches (RL-Mix).

    The agent is PPO with stable-baselines3's defaults but for what the reference implementation sets:
    rollouts of 1000 batches, minibatches of 250, and a learning rate that falls as $(1 - t)^{0.9}$ over the
    training $t \in [0, 1]$. It needs many rollouts to matter: the authors' 300 epochs on CIFAR are 150.

    Args:
        model: The classifier, trained in place.
        data: A dataset of ``(image, class index)``; the images' side is a multiple of
            ``observation_patches``.
        epochs: Passes over the data.
        num_classes: K.
        optimizer: How to make the classifier's optimizer from its parameters.
        scheduler: How to make its scheduler, which steps after every batch.
        batch_size, observation_patches, alpha, patches: See ``RLMixEnv``.
        learning_rate: Of the agent at first. The reference names none; the default is stable-baselines3's.
        n_steps: Batches between two updates of the agent.
        agent_batch_size: Of its updates; should divide ``n_steps``.
        seed: Of everything random. The caller's global random states come back afterwards.
        progress: Called after every batch with the fraction done and a text.

    Returns:
        The agent, and each epoch's mean ``reward`` and ``train/loss``.

    Raises:
        MissingExtra: Without gymnasium and stable-baselines3 (on import).
        UserError: If ``epochs`` or ``n_steps`` is out of range.
    """
    if epochs < 1 or n_steps < 2:
        raise UserError(f"epochs must be at least 1 and n_steps at least 2, got {epochs} and {n_steps}")
    made = optimizer(model.parameters())
    env = RLMixEnv(
        model,
        data,
        made,
        num_classes=num_classes,
        scheduler=scheduler(made) if scheduler else None,
        batch_size=batch_size,
        observation_patches=observation_patches,
        alpha=alpha,
        patches=patches,
        seed=seed,
    )
    epochs_seen = _Epochs(epochs, len(env.batches), progress)
    with seeded(seed):
        agent = PPO(
            "MultiInputPolicy",
            env,
            learning_rate=lambda remaining: learning_rate * remaining**0.9,
            n_steps=n_steps,
            batch_size=min(agent_batch_size, n_steps),
            policy_kwargs={"features_extractor_class": SaliencyPolicyExtractor, "normalize_images": False},
            seed=seed,
            device=env.device,
        )
        agent.learn(epochs * len(env.batches), callback=epochs_seen)
    return agent, epochs_seen.history


class _Epochs(BaseCallback):
    """Averages rewards and losses over each epoch, and stops after the last; PPO itself fills a rollout."""

    def __init__(self, epochs: int, steps: int, progress: Callable[[float, str], None]) -> None:
        super().__init__()
        self.epochs, self.steps, self.progress = epochs, steps, progress
        self.history = History()
        self._rewards: list[float] = []
        self._losses: list[float] = []

    def _on_step(self) -> bool:
        self._rewards.append(float(self.locals["rewards"][0]))
        self._losses.append(self.locals["infos"][0]["loss"])
        self.progress(self.num_timesteps / (self.epochs * self.steps), f"RL-Mix, epoch {len(self.history) + 1}")
        if self.locals["dones"][0]:
            rows = len(self._rewards)
            self.history.append({"reward": sum(self._rewards) / rows, "train/loss": sum(self._losses) / rows})
            self._rewards, self._losses = [], []
        return len(self.history) < self.epochs
