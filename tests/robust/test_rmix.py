import sys
from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import paperworks
from paperworks.errors import MissingExtra, UserError
from paperworks.nn.backbones import ConvNet
from paperworks.robust.mixing import blend
from paperworks.robust.rmix import (
    Draw,
    RMix,
    expected_calibration_error,
    fgsm,
    input_saliency,
    mix_by_saliency,
    normalize_saliency,
    pool_saliency,
    row_quantile,
    saliency_mask,
)
from paperworks.train import Trainer
from stopping import Stop, StopAt

# The worked example: two 4x4 images, four patches each, and how salient these are.
PAIR = torch.arange(32.0).view(2, 1, 4, 4)
PARTNERS = torch.tensor([1, 0])
FALLING, RISING = torch.tensor([[0.4, 0.3], [0.2, 0.1]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]])


def mix_pair(other: Tensor, q: tuple[float, float]) -> tuple[Tensor, Tensor]:
    maps = torch.stack([FALLING, other]).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return RMix.mix(PAIR, torch.eye(2), maps, Draw(2, torch.tensor(q), PARTNERS, 0.3))


def test_each_image_gives_the_half_in_which_it_is_salient():
    mixed, soft = mix_pair(RISING, (0.5, 0.5))
    expected = torch.cat([PAIR[0, 0, :2], PAIR[1, 0, 2:]])
    assert torch.equal(mixed, expected.expand(2, 1, 4, 4))
    torch.testing.assert_close(soft, torch.full((2, 2), 0.5))


def test_equal_masks_are_mixup():
    mixed, soft = mix_pair(FALLING, (0.5, 0.5))
    torch.testing.assert_close(mixed, 0.3 * PAIR + 0.7 * PAIR[PARTNERS])
    torch.testing.assert_close(soft, torch.tensor([[0.3, 0.7], [0.7, 0.3]]))


def test_an_image_salient_everywhere_is_mixed_where_its_partner_is():
    mixed, soft = mix_pair(RISING, (0.0, 0.5))
    torch.testing.assert_close(mixed[0, 0, 2], torch.tensor([19.2, 20.2, 21.2, 22.2]))
    torch.testing.assert_close(soft, torch.tensor([[0.65, 0.35], [0.85, 0.15]]))


def test_the_highest_threshold_keeps_one_patch_of_each():
    mixed, soft = mix_pair(RISING, (0.99, 0.99))
    torch.testing.assert_close(mixed[0, 0, 0], torch.tensor([0, 1, 13.2, 14.2]))
    torch.testing.assert_close(mixed[0, 0, 3], torch.tensor([23.2, 24.2, 30, 31]))
    torch.testing.assert_close(soft, torch.tensor([[0.4, 0.6], [0.6, 0.4]]))


def test_thresholds_of_their_own():
    _, soft = mix_pair(RISING, (0.33, 0.66))
    torch.testing.assert_close(soft, torch.tensor([[0.575, 0.425], [0.675, 0.325]]))


@st.composite
def batches(draw, side: int = 8):
    size, seed = draw(st.integers(2, 6)), draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, side, side, generator=generator, dtype=torch.float64)
    y = torch.rand(size, 4, generator=generator, dtype=torch.float64).softmax(1)
    saliency = torch.rand(size, side, side, generator=generator, dtype=torch.float64)
    q = torch.rand(size, generator=generator, dtype=torch.float64)
    drawn = Draw(
        draw(st.sampled_from([1, 2, 4, 8])), q, torch.randperm(size, generator=generator), draw(st.floats(0, 1))
    )
    return x, y, saliency, drawn


@given(batches())
def test_labels_sum_to_one_and_pixels_lie_between_their_sources(example):
    x, y, saliency, drawn = example
    mixed, soft = RMix.mix(x, y, saliency, drawn)
    torch.testing.assert_close(soft.sum(1), torch.ones(len(x), dtype=x.dtype))
    partner = x[drawn.perm]
    assert (mixed >= torch.minimum(x, partner) - 1e-12).all()
    assert (mixed <= torch.maximum(x, partner) + 1e-12).all()


@given(batches())
def test_the_label_is_the_share_of_each_image_as_the_paper_counts_it(example):
    x, y, saliency, drawn = example
    mask = saliency_mask(saliency, drawn.quantiles, drawn.num_patches)
    _, soft = mix_by_saliency(x, y, mask, drawn.perm, drawn.lam)
    mine, theirs = mask.flatten(1), mask[drawn.perm].flatten(1)
    a, b, c = ((mine == theirs), (mine & ~theirs), (~mine & theirs))
    a, b, c = (share.double().mean(1, keepdim=True) for share in (a, b, c))
    partner = y[drawn.perm]
    torch.testing.assert_close(soft, a * (drawn.lam * y + (1 - drawn.lam) * partner) + b * y + c * partner)


@given(batches())
def test_it_is_mixup_where_nothing_or_everything_is_cut(example):
    x, y, saliency, drawn = example
    expected = blend(x, y, drawn.perm, drawn.lam)
    everything = drawn._replace(quantiles=torch.zeros_like(drawn.quantiles))
    torch.testing.assert_close(RMix.mix(x, y, saliency, everything), expected)
    alike = saliency[:1].expand_as(saliency), drawn._replace(quantiles=drawn.quantiles[:1].expand(len(x)))
    torch.testing.assert_close(RMix.mix(x, y, *alike), expected)
    torch.testing.assert_close(RMix.mix(x, y, saliency, everything._replace(lam=1.0)), (x, y))


@given(batches())
def test_an_image_mixed_with_itself_is_itself(example):
    x, y, saliency, drawn = example
    mixed, soft = RMix.mix(x, y, saliency, drawn._replace(perm=torch.arange(len(x))))
    assert torch.equal(mixed, x)
    torch.testing.assert_close(soft, y)


@given(batches(), st.integers(-20, 20))
def test_the_scale_of_the_saliency_does_not_matter(example, exponent):
    _, _, saliency, drawn = example
    mask = saliency_mask(saliency, drawn.quantiles, drawn.num_patches)
    scales = torch.tensor(2.0).double() ** (exponent - torch.arange(len(saliency)).view(-1, 1, 1))
    assert torch.equal(saliency_mask(scales * saliency, drawn.quantiles, drawn.num_patches), mask)
    assert torch.equal(saliency_mask(3.7 * saliency, drawn.quantiles, drawn.num_patches), mask)


@given(st.integers(0, 2**20), st.integers(1, 70), st.sampled_from([torch.float32, torch.float64]))
def test_row_quantile_is_the_diagonal_of_torchs(seed, n, dtype):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(7, n, generator=generator, dtype=dtype)
    values[0] = values[0, 0]  # ties
    q = torch.rand(7, generator=generator, dtype=dtype)
    q[1:3] = torch.tensor([0.0, 1.0])
    expected = torch.quantile(values, q, dim=1).diagonal()
    tolerance = 2 * torch.finfo(dtype).eps  # vectorised and scalar interpolation differ in the last bit
    torch.testing.assert_close(row_quantile(values, q), expected, rtol=0, atol=tolerance)
    assert torch.equal(values >= row_quantile(values, q)[:, None], values >= expected[:, None])


@given(batches())
def test_every_mask_has_a_patch_and_patches_are_whole(example):
    _, _, saliency, drawn = example
    mask = saliency_mask(saliency, drawn.quantiles, drawn.num_patches)
    share = F.avg_pool2d(mask.double(), 8 // drawn.num_patches)
    assert set(share.unique().tolist()) <= {0.0, 1.0}
    assert (mask.flatten(1).any(1)).all()


def test_a_map_of_zeros_counts_as_uniform():
    zeros = torch.zeros(2, 4, 4)
    assert torch.equal(normalize_saliency(zeros), torch.full((2, 4, 4), 1 / 16))
    assert saliency_mask(zeros, torch.tensor([0.0, 0.99]), 2).all()


def test_pooled_maps_are_means_and_sum_to_one_normalised():
    maps = torch.rand(3, 8, 8)
    pooled = pool_saliency(maps, 2)
    torch.testing.assert_close(pooled[1, 0, 1], maps[1, :4, 4:].mean())
    torch.testing.assert_close(normalize_saliency(pooled).sum((1, 2)), torch.ones(3))


def small_model(seed: int = 0, channels: int = 2) -> ConvNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ConvNet(channels, 4, (4, 4), (1, 2))


def small_batch(size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, 2, 8, 8, generator=generator), torch.randint(4, (size,), generator=generator)


def test_saliency_of_a_linear_model_is_known():
    x, y = small_batch()
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 4))
    saliency, logits = input_saliency(model, x, y)
    error = logits.softmax(1) - F.one_hot(y, 4)
    gradient = (error @ model[1].weight).view_as(x)
    torch.testing.assert_close(saliency, gradient.square().mean(1).sqrt())
    torch.testing.assert_close(logits, model(x))


def test_saliency_leaves_the_model_and_the_batch_alone():
    x, y = small_batch()
    model = small_model().train()
    x_before, state = x.clone(), {name: value.clone() for name, value in model.state_dict().items()}
    next(model.parameters()).grad = mark = torch.ones_like(next(model.parameters()))
    saliency, logits = input_saliency(model, x, y)
    assert torch.equal(x, x_before)
    assert not x.requires_grad
    assert not saliency.requires_grad
    assert not logits.requires_grad
    assert next(model.parameters()).grad is mark
    assert all(p.grad is None for p in list(model.parameters())[1:])
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_update_bn_moves_the_running_statistics_as_a_forward_pass_does():
    x, y = small_batch()
    model, plain = small_model().train(), small_model().train()
    plain(x)
    updated, _ = input_saliency(model, x, y, update_bn=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(updated, input_saliency(small_model().train(), x, y)[0])


def test_saliency_works_under_no_grad_for_soft_labels_and_frozen_weights():
    x, y = small_batch()
    model = small_model().eval().requires_grad_(False)
    with torch.no_grad():
        saliency, _ = input_saliency(model, x, F.one_hot(y, 4).float())
    torch.testing.assert_close(saliency, input_saliency(model, x, y)[0])
    assert saliency.min() >= 0
    assert saliency.max() > 0


def test_saliency_of_a_half_precision_model_is_single_precision():
    x, y = small_batch()
    with torch.autocast("cpu", torch.bfloat16):
        saliency, _ = input_saliency(small_model().train(), x, y)
    assert saliency.dtype == torch.float32
    full, _ = input_saliency(small_model().train(), x, y)
    assert F.cosine_similarity(saliency.flatten(), full.flatten(), dim=0) > 0.99


def test_rmix_is_its_parts_in_order():
    x, y = small_batch()
    model = small_model()
    mixed, soft = RMix(4, seed=5)(model, x, y)
    saliency, _ = input_saliency(model, x, y)
    expected = RMix.mix(x, F.one_hot(y, 4).float(), saliency, RMix(4, seed=5).draw(6))
    assert torch.equal(mixed, expected[0])
    assert torch.equal(soft, expected[1])


def test_draws_come_from_the_choices_given():
    mix = RMix(4, patches=(2, 8), quantiles=(0.25, 0.75), seed=1)
    drawn = [mix.draw(5) for _ in range(50)]
    assert {d.num_patches for d in drawn} == {2, 8}
    assert set(torch.cat([d.quantiles for d in drawn]).tolist()) == {0.25, 0.75}
    assert all(torch.equal(d.perm.sort().values, torch.arange(5)) for d in drawn)
    assert all(isinstance(d.lam, float) and 0 <= d.lam <= 1 for d in drawn)
    lam = RMix(4, per_sample=True).draw(5).lam
    assert isinstance(lam, Tensor)
    assert len(lam.unique()) == 5


def test_a_lambda_for_each_image():
    x, y = small_batch()
    mask, perm = torch.ones(6, 1, 8, 8, dtype=torch.bool), torch.arange(6).roll(1)
    lam = torch.linspace(0, 1, 6)
    mixed, soft = mix_by_saliency(x, F.one_hot(y, 4).float(), mask, perm, lam)
    for i in range(6):
        torch.testing.assert_close(mixed[i], lam[i] * x[i] + (1 - lam[i]) * x[perm[i]])
    torch.testing.assert_close(soft.sum(1), torch.ones(6))


def test_random_saliency_does_not_ask_the_model():
    x, y = small_batch()

    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    mixed, _ = RMix(4, saliency="random", quantiles=(0.5,), seed=1)(Silent(), x, y)
    assert not torch.equal(mixed, x)


def train(folder, *, stop: int | None = None, **options) -> dict[str, Tensor]:
    model, (x, y) = small_model(), small_batch(24)
    trainer = Trainer(
        2,
        interventions=[RMix(4, seed=3, **options), StopAt(stop)],
        batch_size=5,  # the last batch of an epoch has 4
        accelerator="cpu",
        checkpoint_dir=folder,
        checkpoint_every=1,
    )
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    trainer.fit(model, TensorDataset(x, y), loss=nn.CrossEntropyLoss(), optimizer=optimizer)
    return model.state_dict()


@pytest.mark.parametrize("options", [{}, {"saliency": "random"}, {"per_sample": True, "update_bn": True}])
def test_a_killed_run_resumes_to_the_same_weights(options, tmp_path):
    undisturbed = train(tmp_path / "a", **options)
    with pytest.raises(Stop):
        train(tmp_path / "b", stop=7, **options)
    resumed = train(tmp_path / "b", **options)
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())
    assert any(not torch.equal(value, small_model().state_dict()[name]) for name, value in resumed.items())


def test_the_trainers_model_is_updated_once_a_step(tmp_path):
    steps = train(tmp_path)["body.0.1.num_batches_tracked"]
    assert steps == 10
    assert train(tmp_path / "twice", update_bn=True)["body.0.1.num_batches_tracked"] == 20


def test_a_batch_of_one_warns_and_stays_as_it_is():
    x, y = small_batch(1)
    with pytest.warns(UserWarning, match="a batch of one image has no partners"):
        mixed, soft = RMix(4)(small_model(), x, y)
    assert torch.equal(mixed, x)
    assert torch.equal(soft, F.one_hot(y, 4).float())


def refused(message: str):
    """Expect our error, or beartype's where that is on and looks first."""
    return pytest.raises((UserError, TypeError), match=f"{message}|Type-check error")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"patches": ()}, "patches must be positive"),
        ({"patches": (0, 2)}, r"patches must be positive numbers of patches a side, got \(0, 2\)"),
        ({"quantiles": (0.5, 1.1)}, "quantiles must be from 0 to 1"),
        ({"quantiles": ()}, "quantiles must be from 0 to 1"),
        ({"saliency": "gradients"}, "saliency must be 'gradient' or 'random', got 'gradients'"),
    ],
)
def test_bad_options_are_named(options, message):
    with refused(message):
        RMix(4, **options)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.rand(2, 2, 8, 6), torch.tensor([0, 1]), "images must be square, got 8 x 6"),
        (torch.rand(2, 2, 9, 9), torch.tensor([0, 1]), "must be a multiple of num_patches, got 9 and 2"),
        (torch.rand(2, 8, 8), torch.tensor([0, 1]), "inputs must be floating-point images"),
        (torch.rand(2, 2, 8, 8), torch.tensor([0, 4]), "targets must be indices from 0 to 3, got 4"),
        (torch.rand(2, 2, 8, 8), torch.ones(2, 5) / 5, r"probabilities \[batch, 4\]"),
        (torch.rand(2, 2, 8, 8), torch.ones(2, 4) / 5, "sum to 1"),
        (torch.rand(2, 2, 8, 8), torch.tensor([0, 1, 2]), "as many, got 2 and 3"),
    ],
)
def test_bad_batches_are_named(x, y, message):
    with refused(message):
        RMix(4, patches=(2,))(small_model(), x, y)


def test_bad_models_are_named():
    x, y = small_batch()

    class Through(nn.Module):
        def __init__(self, change):
            super().__init__()
            self.inner, self.change = small_model(), change

        def forward(self, x: Tensor) -> Tensor:
            return self.change(self.inner(x))

    with refused("must depend on its input differentiably"):
        RMix(4)(Through(lambda logits: logits.detach()), x, y)
    constant = nn.Parameter(torch.zeros(4))
    with refused("must depend on its input differentiably"):
        RMix(4)(Through(lambda logits: constant.expand_as(logits)), x, y)
    with refused(r"logits for targets \[6, 4\], got \[6, 3\]"):
        RMix(4)(Through(lambda logits: logits[:, :3]), x, y)


def test_bad_quantiles_and_masks_are_named():
    with refused("q must be from 0 to 1, got 1.5"):
        saliency_mask(torch.rand(2, 4, 4), torch.tensor([0.5, 1.5]), 2)
    x, y = small_batch()
    with refused(r"mask must have shape \[6, 1, 8, 8\], got \[6, 1, 4, 4\]"):
        mix_by_saliency(x, F.one_hot(y, 4).float(), torch.ones(6, 1, 4, 4) > 0, torch.arange(6), 0.5)


def test_calibration_error_of_known_predictions():
    confident = torch.tensor([[0.0, 20.0]]).repeat(4, 1)
    assert expected_calibration_error(confident, torch.tensor([1, 1, 0, 0])) == pytest.approx(0.5, abs=1e-6)
    unsure = torch.tensor([[0.75, 0.25]]).log().repeat(4, 1)
    assert expected_calibration_error(unsure, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.0, abs=1e-6)


def test_fgsm_steps_along_the_sign_of_the_gradient_within_the_pixels_range():
    x, y = small_batch()
    model = small_model().eval()
    attacked = fgsm(model, x, y, 0.1)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    torch.testing.assert_close((attacked - x).abs().max(), torch.tensor(0.1))
    assert F.cross_entropy(model(attacked), y) > F.cross_entropy(model(x), y)
    assert torch.equal(fgsm(model, x, y, 0.0), x)
    with refused("epsilon must not be negative"):
        fgsm(model, x, y, -0.1)


def test_importing_rmix_does_not_need_the_extra_and_rl_mix_names_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("paperworks.robust")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("gymnasium", "stable_baselines3"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(paperworks, "robust", None)  # which the import binds anew
    rmix = import_module("paperworks.robust.rmix")
    for name in ("RLMixEnv", "train_rl_mix"):
        with pytest.raises(MissingExtra, match=r"pip install 'paperworks\[agents\]'"):
            getattr(rmix, name)


def test_unknown_names_are_unknown():
    from paperworks.robust import rmix

    with pytest.raises(AttributeError, match="no attribute 'RLMixture'"):
        rmix.RLMixture  # noqa: B018
