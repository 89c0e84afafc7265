from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from paperworks.errors import UserError
from paperworks.robust.mixing import CutMix, Mixup, blend, cutmix_mask, soft_targets
from paperworks.train import Trainer
from stopping import Stop, StopAt


def batch(size: int = 6, side: int = 8, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 2, side, side, generator=generator)
    return x, torch.randint(classes, (size,), generator=generator)


@given(st.floats(0, 1))
def test_a_constant_weight_is_torchvisions_mixup(lam):
    x, y = batch()
    peer = v2.MixUp(num_classes=5)
    peer._dist.sample = lambda shape: torch.tensor(lam)
    expected_x, expected_y = peer(x, y)
    mixed, soft = blend(x, F.one_hot(y, 5).float(), torch.arange(6).roll(1), lam)
    torch.testing.assert_close(mixed, expected_x)
    torch.testing.assert_close(soft, expected_y)


@given(st.floats(0, 1), st.integers(0, 2**20))
def test_a_box_is_torchvisions_cutmix(lam, seed):
    x, y = batch()
    x = x[..., :6]
    peer = v2.CutMix(num_classes=5)
    peer._dist.sample = lambda shape: torch.tensor(lam, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        expected_x, expected_y = peer(x, y)
        torch.manual_seed(seed)
        column, row = int(torch.randint(6, (1,))), int(torch.randint(8, (1,)))
    keep = cutmix_mask(8, 6, lam, (row, column)).float()
    mixed, soft = blend(x, F.one_hot(y, 5).float(), torch.arange(6).roll(1), keep[None, None])
    assert torch.equal(mixed, expected_x)
    torch.testing.assert_close(soft, expected_y)


def test_each_image_may_have_its_own_weight():
    x, y = batch(2)
    weight = torch.tensor([1.0, 0.25]).view(2, 1, 1, 1)
    mixed, soft = blend(x, F.one_hot(y, 5).float(), torch.tensor([1, 0]), weight)
    assert torch.equal(mixed[0], x[0])
    torch.testing.assert_close(mixed[1], 0.25 * x[1] + 0.75 * x[0])
    assert soft[1, y[1]] == pytest.approx(0.25 + 0.75 * (y[0] == y[1]).item())


@pytest.mark.parametrize("make", [Mixup, partial(CutMix, p=1.0)])
def test_the_same_seed_draws_the_same_and_batches_differ(make):
    x, y = batch()
    first, again, other = make(5, seed=1), make(5, seed=1), make(5, seed=2)
    mixed, soft = first(x, y)
    assert torch.equal(mixed, again(x, y)[0])
    assert not torch.equal(mixed, other(x, y)[0])
    assert not torch.equal(mixed, first(x, y)[0])
    torch.testing.assert_close(soft.sum(1), torch.ones(6))


def test_mixing_leaves_the_global_generator_and_its_arguments_alone():
    x, y = batch()
    before, x_before, y_before = torch.get_rng_state(), x.clone(), y.clone()
    for mixing in (Mixup(5), CutMix(5, p=1.0)):
        mixing(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)


def test_cutmix_mixes_a_share_p_of_the_batches():
    x, y = batch()
    mixing = CutMix(5, p=0.25)
    untouched = sum(torch.equal(mixing(x, y)[0], x) for _ in range(400))
    assert untouched == pytest.approx(300, abs=45)  # five standard deviations, with boxes of no area
    assert torch.equal(CutMix(5, p=0.0)(x, y)[1], F.one_hot(y, 5).float())


def test_lambda_follows_the_beta_distribution():
    drawn = Mixup(5, alpha=0.5)._lambda(20_000)
    assert drawn.mean() == pytest.approx(0.5, abs=0.01)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * 0.5 + 1)), abs=0.005)


def test_soft_targets_pass_and_can_be_mixed_again():
    x, y = batch()
    mixed, soft = Mixup(5)(x, y)
    assert soft_targets(soft, 5) is soft
    _, softer = CutMix(5, p=1.0)(mixed, soft)
    torch.testing.assert_close(softer.sum(1), torch.ones(6))


@pytest.mark.parametrize("make", [Mixup, CutMix])
def test_a_killed_run_resumes_to_the_same_weights(make, tmp_path):
    x, y = batch(24)

    def train(folder, stop=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(128, 5))
        trainer = Trainer(
            2,
            interventions=[make(5, seed=3), StopAt(stop)],
            batch_size=4,
            accelerator="cpu",
            checkpoint_dir=folder,
            checkpoint_every=1,
        )
        optimizer = partial(torch.optim.SGD, lr=0.1)
        trainer.fit(model, TensorDataset(x, y), loss=nn.CrossEntropyLoss(), optimizer=optimizer)
        return model[1].weight

    undisturbed = train(tmp_path / "a")
    with pytest.raises(Stop):
        train(tmp_path / "b", stop=8)
    assert torch.equal(train(tmp_path / "b"), undisturbed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixup(1), "num_classes must be at least 2, got 1"),
        (lambda: Mixup(5, alpha=0.0), "alpha must be positive and finite, got 0.0"),
        (lambda: CutMix(5, p=1.5), "p must be from 0 to 1, got 1.5"),
        (lambda: Mixup(5)(torch.rand(2, 4), torch.tensor([0, 1])), r"inputs must be floating-point images .* \[2, 4\]"),
        (lambda: Mixup(5)(torch.ones(2, 1, 4, 4).int(), torch.tensor([0, 1])), "got torch.int32"),
        (lambda: Mixup(5)(torch.rand(2, 1, 4, 4), torch.tensor([0])), "as many, got 2 and 1"),
        (lambda: Mixup(5)(torch.rand(2, 1, 4, 4), torch.tensor([0, 5])), "indices from 0 to 4, got 5"),
        (lambda: Mixup(5)(torch.rand(2, 1, 4, 4), torch.tensor([0, -1])), "indices from 0 to 4, got -1"),
        (lambda: Mixup(5)(torch.rand(2, 1, 4, 4), torch.ones(2, 4) / 4), r"probabilities \[batch, 5\].*\[2, 4\]"),
        (lambda: Mixup(5)(torch.rand(2, 1, 4, 4), torch.ones(2, 5) / 4), "must sum to 1"),
    ],
)
def test_bad_input_is_named(make, message):
    # beartype, where it is on, refuses wrong shapes first.
    with pytest.raises((UserError, TypeError), match=f"{message}|Type-check error"):
        make()


def test_a_batch_of_one_warns_and_stays_as_it_is():
    x, y = batch(1)
    with pytest.warns(UserWarning, match="a batch of one image has no partners"):
        mixed, soft = Mixup(5)(x, y)
    torch.testing.assert_close(mixed, x)
    assert soft[0, y[0]] == 1
