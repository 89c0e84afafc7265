from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from paperworks.errors import UserError
from paperworks.nn.backbones import ConvNet

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("stable_baselines3")

from gymnasium.utils.env_checker import check_env  # noqa: E402
from stable_baselines3 import PPO  # noqa: E402

from paperworks.robust.rmix import RLMixEnv, SaliencyPolicyExtractor, train_rl_mix  # noqa: E402
from paperworks.train.checkpoint import seeded  # noqa: E402


def data(size: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (size,), generator=generator)
    x = torch.rand(size, 1, 8, 8, generator=generator) / 4
    for k in range(3):  # class k is bright in a corner of its own
        x[y == k, :, 4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] += 0.5
    return TensorDataset(x, y)


def small_model() -> ConvNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvNet(1, 3, (4, 4), (1, 2))


def make(lr: float = 0.1, **options) -> RLMixEnv:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return RLMixEnv(model, data(), optimizer, **{"num_classes": 3, "batch_size": 6} | options)


def run_epoch(env: RLMixEnv, seed: int | None = None) -> list[float]:
    """Rewards of an epoch under the middle threshold."""
    env.reset(seed=seed)
    rewards, done = [], False
    while not done:
        _, reward, done, truncated, info = env.step(np.full(6, 5))
        assert not truncated
        assert np.isfinite(info["loss"])
        rewards.append(reward)
    return rewards


@pytest.mark.filterwarnings("ignore:.*infinity:UserWarning", "ignore:.*spec:UserWarning")
def test_the_environment_passes_gymnasiums_checks():
    check_env(make())


def test_an_epoch_is_an_episode_and_drops_the_incomplete_batch():
    env = make()
    rewards = run_epoch(env)
    assert len(rewards) == 20 // 6
    assert all(-1 <= reward <= 1 for reward in rewards)


def test_the_agent_sees_the_coming_batch():
    env = make(lr=0.0)
    observation, _ = env.reset(seed=0)
    saliency, logits = observation["saliency"], observation["logits"]
    np.testing.assert_allclose(saliency.sum((1, 2)), np.ones(6), rtol=1e-5)
    x, _ = env._batch
    env.model.train()
    np.testing.assert_allclose(logits, env.model(x).detach(), atol=1e-5)


def test_after_the_last_batch_come_zeros_and_then_only_a_reset():
    env = make()
    with pytest.raises(UserError, match="call reset"):
        env.step(np.zeros(6, int))
    env.reset()
    for _ in range(3):
        observation, _, done, _, _ = env.step(np.zeros(6, int))
    assert done
    assert all((value == 0).all() for value in observation.values())
    assert observation in env.observation_space
    with pytest.raises(UserError, match="call reset"):
        env.step(np.zeros(6, int))


def test_steps_train_and_epochs_differ_in_order():
    env = make()
    env.reset(seed=0)
    first = env._batch[0]
    before = [p.clone() for p in env.model.parameters()]
    env.step(env.action_space.sample())
    assert not any(torch.equal(p, q) for p, q in zip(env.model.parameters(), before, strict=True))
    env.reset()
    assert not torch.equal(env._batch[0], first)


def test_a_seeded_reset_starts_anew():
    env = make()
    first = run_epoch(env, seed=4)
    second = run_epoch(env)
    assert run_epoch(env, seed=4) == first
    assert run_epoch(env) == second
    assert run_epoch(env, seed=5) != first
    assert run_epoch(make(seed=4)) == first


def test_the_running_statistics_are_those_of_the_mixed_batches_alone():
    env = make()
    run_epoch(env)
    assert env.model.body[0][1].num_batches_tracked == 3


def test_unmixed_batches_are_rewarded_highly_and_the_thresholds_matter(monkeypatch):
    env = make(lr=0.0)
    draw = env.rmix.draw
    monkeypatch.setattr(env.rmix, "draw", lambda size: draw(size)._replace(perm=torch.arange(size)))
    assert min(run_epoch(env, seed=0)) > 0.9
    mixed = make(lr=0.0)
    assert max(run_epoch(mixed, seed=0)) < 0.99


def test_the_action_chooses_each_images_quantile(monkeypatch):
    env, seen = make(), []
    monkeypatch.setattr(env.rmix, "mix", lambda x, y, s, draw: (seen.append(draw.quantiles), (x.clone(), y))[1])
    env.reset()
    env.step(np.array([0, 1, 2, 3, 4, 9]))
    torch.testing.assert_close(seen[0], torch.tensor([0, 0.11, 0.22, 0.33, 0.44, 0.99]))


def test_the_extractor_takes_images_as_channels_and_sees_maps_and_logits():
    env = make()
    extractor = SaliencyPolicyExtractor(env.observation_space, 16)
    convolutions = 9 * 6 * 150 + 150 + 4 * 150 * 100 + 100
    linear = 4 * 16 + (100 * 25 + 6 * 16 + 1) * 16
    assert sum(p.numel() for p in extractor.parameters()) == convolutions + linear
    seen = {"saliency": torch.rand(2, 6, 8, 8), "logits": torch.randn(2, 6, 3)}
    features = extractor(seen)
    assert features.shape == (2, 16)
    for name, value in seen.items():
        assert not torch.equal(extractor(seen | {name: value.flip(1)}), features), name


def train(**options) -> tuple[ConvNet, object, list]:
    model = small_model()
    options = {"epochs": 4, "n_steps": 6, "agent_batch_size": 3, "learning_rate": 0.01, "seed": 1} | options
    agent, history = train_rl_mix(
        model, data(), num_classes=3, batch_size=6, optimizer=partial(torch.optim.SGD, lr=0.05), **options
    )
    return model, agent, history


def test_classifier_and_agent_train_for_the_epochs_asked_for_and_repeatably():
    before, seen = torch.get_rng_state(), []
    model, agent, history = train(progress=lambda fraction, text: seen.append(fraction))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.body[0][1].num_batches_tracked == 4 * 3
    assert [sorted(row) for row in history] == [["reward", "train/loss"]] * 4
    assert all(0 <= reward <= 1 for reward in history.column("reward"))
    assert seen == [pytest.approx(k / 12) for k in range(1, 13)]
    untrained = train(epochs=1, n_steps=6)[1]
    assert any(
        not torch.equal(p, q) for p, q in zip(agent.policy.parameters(), untrained.policy.parameters(), strict=True)
    )
    assert train()[2] == history


def test_the_scheduler_steps_with_every_batch():
    rates = []

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates.append(step) or 1.0)

    train(epochs=2, scheduler=scheduler)
    assert rates == list(range(2 * 3 + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1 and n_steps at least 2, got 0 and 6"),
        ({"n_steps": 1}, "epochs must be at least 1 and n_steps at least 2, got 4 and 1"),
        ({"observation_patches": 2}, "observation_patches must be at least 4"),
        ({"observation_patches": 5}, "must be a multiple of num_patches, got 8 and 5"),
        ({"patches": (3,)}, "must be a multiple of num_patches, got 8 and 3"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        train(**options)


def test_a_batch_that_cannot_be_mixed_or_filled_is_named():
    with pytest.raises(UserError, match="batch_size must be at least 2 to mix, got 1"):
        make(batch_size=1)
    with pytest.raises(UserError, match="20 examples do not fill one batch of 21"):
        make(batch_size=21)


class WhichHalf(gymnasium.Env):
    """Rewards the share of images whose action says in which half their saliency lies."""

    def __init__(self) -> None:
        self.observation_space = make(batch_size=2).observation_space
        self.action_space = gymnasium.spaces.MultiDiscrete([2, 2])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.lower = self.np_random.integers(2, size=2)
        maps = np.zeros((2, 8, 8), np.float32)
        for i, half in enumerate(self.lower):
            maps[i, 4 * half : 4 * half + 4] = 1 / 32
        return {"saliency": maps, "logits": np.zeros((2, 3), np.float32)}, {}

    def step(self, action):
        reward = float((action == self.lower).mean())
        return self.reset()[0], reward, True, False, {}


@pytest.mark.slow
def test_a_policy_on_the_extractor_learns_from_each_images_map():
    env = WhichHalf()
    options = {"features_extractor_class": SaliencyPolicyExtractor, "normalize_images": False}
    with seeded(0):
        agent = PPO("MultiInputPolicy", env, n_steps=128, policy_kwargs=options, device="cpu", seed=0)
        agent.learn(1500)
    rewards = []
    for _ in range(100):
        observation, _ = env.reset()
        action, _ = agent.predict(observation, deterministic=True)
        rewards.append(env.step(action)[1])
    assert np.mean(rewards) > 0.9  # chance is 0.5
