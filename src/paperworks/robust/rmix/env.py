"""RL-Mix's environment: an agent chooses the saliency thresholds while a classifier trains."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from paperworks.errors import MissingExtra, UserError
from paperworks.train import Batches
from paperworks.train.batches import loader

from .mix import QUANTILES, RMix
from .saliency import input_saliency, normalize_saliency, pool_saliency

try:
    import gymnasium as gym
    from gymnasium import spaces
except ImportError as error:
    raise MissingExtra("gymnasium", "agents", "RL-Mix") from error

Observation = dict[str, np.ndarray]


class RLMixEnv(gym.Env):
    r"""Training a classifier on mixed batches, as a Markov decision process (RL-Mix).

    An episode is an epoch and a step is a batch. The agent sees the coming batch's saliency maps and logits
    and chooses every image's threshold; the environment mixes the batch (``mix_by_saliency``), trains the
    classifier on it, and rewards by the cosine similarity of the pooled saliency of the whole batch before
    mixing and after,

    $$r = \frac{\langle s, \tilde s \rangle}{\lVert s \rVert \lVert \tilde s \rVert} \in [0, 1],$$

    where $\tilde s$ comes with the gradient of the training loss, at no cost. ``reset()`` starts the next
    epoch; ``reset(seed=…)`` puts model, optimizer and scheduler back to where they were when the environment
    was made, and starts anew from that seed. The observation after the last batch is zeros and belongs to no
    state.

    Args:
        model: The classifier, trained in place on the device that it is on.
        data: A dataset of ``(image, class index)``.
        optimizer: Of the model's parameters.
        num_classes: K.
        scheduler: Stepped after every batch.
        batch_size: Images a batch. It shapes the spaces: images that do not fill a batch are left out of the
            epoch.
        observation_patches: Side of the maps that the agent sees; the reference implementation's is 8.
        alpha, patches, quantiles: As in ``RMix``; action k is the k-th quantile.
        seed: Of batch order and mixing, until ``reset`` is given another.

    Example:
        >>> env = RLMixEnv(model, data, optimizer, num_classes=10)
        >>> observation, _ = env.reset(seed=0)
        >>> observation, reward, last_batch, _, info = env.step(env.action_space.sample())
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        model: nn.Module,
        data: Dataset[Any],
        optimizer: Optimizer,
        *,
        num_classes: int,
        scheduler: LRScheduler | None = None,
        batch_size: int = 100,
        observation_patches: int = 8,
        alpha: float = 1.0,
        patches: Sequence[int] = (2, 4),
        quantiles: Sequence[float] = QUANTILES,
        seed: int = 0,
    ) -> None:
        if batch_size < 2:
            raise UserError(f"batch_size must be at least 2 to mix, got {batch_size}")
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.rmix = RMix(num_classes, alpha, patches, quantiles, seed=seed)
        self.batches = Batches(len(data), batch_size, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.observation_patches = observation_patches
        side = observation_patches
        self._boxes = {
            "saliency": spaces.Box(0.0, 1.0, (batch_size, side, side)),
            "logits": spaces.Box(-np.inf, np.inf, (batch_size, num_classes)),
        }
        self.observation_space = spaces.Dict({**self._boxes})
        self.action_space = spaces.MultiDiscrete([len(quantiles)] * batch_size)
        self.device = next(model.parameters()).device
        self._data = data
        self._trained: list[Any] = [model, optimizer, *([scheduler] if scheduler else [])]
        self._initial = deepcopy([part.state_dict() for part in self._trained])
        self._rest: Iterator[Any] = iter(())
        self._batch: tuple[Tensor, Tensor] | None = None
        self._saliency = torch.empty(0)
        self._started = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            for part, state in zip(self._trained, deepcopy(self._initial), strict=True):
                part.load_state_dict(state)
            self.rmix.generator.manual_seed(seed)
            self.batches.seed, self.batches.epoch = seed, 0
        elif self._started:
            self.batches.epoch += 1
        self._started = True
        self._rest = iter(loader(self._data, self.batches))
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if self._batch is None:
            raise UserError("the epoch is over or has not begun: call reset() before step()")
        x, y = self._batch
        quantiles = self.rmix.quantiles[torch.as_tensor(action).long()]
        mixed, soft = self.rmix.mix(x, y, self._saliency, self.rmix.draw(len(x))._replace(quantiles=quantiles))

        mixed.requires_grad_()
        loss = F.cross_entropy(self.model(mixed), soft)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()

        assert mixed.grad is not None
        before, after = (
            pool_saliency(maps, self.observation_patches).flatten()
            for maps in (self._saliency, mixed.grad.square().mean(1).sqrt())
        )
        # Near the end of training gradients are small: the default eps would call such batches dissimilar.
        reward = float(F.cosine_similarity(before, after, dim=0, eps=1e-12).clamp(-1, 1))
        observation = self._observe()
        return observation, reward, self._batch is None, False, {"loss": loss.item()}

    def _observe(self) -> Observation:
        """Take the next batch, if there is one, and look at it."""
        try:
            x, y, *_ = next(self._rest)
        except StopIteration:
            self._batch = None
            return {name: np.zeros_like(box.low) for name, box in self._boxes.items()}
        x = x.to(self.device)
        y = self.rmix._batch(x, y.to(self.device))
        self._batch = x, y
        self.model.train()
        self._saliency, logits = input_saliency(self.model, x, y)
        seen = normalize_saliency(pool_saliency(self._saliency, self.observation_patches))
        return {"saliency": seen.clamp(0, 1).cpu().numpy(), "logits": logits.float().cpu().numpy()}
