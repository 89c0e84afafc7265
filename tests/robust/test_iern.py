import math
import os
import socket
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

from paperworks.errors import UserError
from paperworks.nn.backbones import ConvNet
from paperworks.robust.iern import (
    IERN,
    ConfounderBank,
    Discriminator,
    Disentangle,
    Reconstructor,
    augmentation,
    average_strata,
    backdoor_average,
    confusion_loss,
    rate_factor,
    resnet_base,
    strata_logits,
    strata_spread,
)
from paperworks.train import Batches, Intervention, Trainer
from stopping import Stop, StopAt


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def conv_base():
    return ConvNet(1, 3, widths=(8, 8), strides=(1, 2)).body


def plain_base():
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU())


def small_iern(base=None, **options):
    torch.manual_seed(0)
    base = (base or conv_base)()
    options = {"channels": 8, "feature_size": 4, "generator": seeded()} | options
    return IERN(base, num_classes=3, num_sources=2, **options)


def batch(n=6, seed=1):
    generator = seeded(seed)
    images = torch.rand(n, 1, 8, 8, generator=generator)
    return images, torch.arange(n) % 3, torch.arange(n) % 2


def state_of(model, part):
    return {name: tensor.clone() for name, tensor in getattr(model, part).state_dict().items()}


PARTS = (
    "base",
    "emotion_encoder",
    "context_encoder",
    "reconstructor",
    "emotion_discriminator",
    "source_discriminator",
    "head",
    "bank",
)


def moved(model, before):
    """The parts in which some parameter differs from ``before``, byte for byte."""
    changed = set()
    for part in PARTS:
        names = [name for name, _ in getattr(model, part).named_parameters()]
        now = state_of(model, part)
        if any(now[name].numpy().tobytes() != before[part][name].numpy().tobytes() for name in names):
            changed.add(part)
    return changed


# backdoor_average


@pytest.fixture
def adjustment():
    generator = seeded()
    weights = torch.randn(2, 4, 5, generator=generator)

    def combine(e, z):
        return torch.tanh(e @ weights[0] + z @ weights[1])

    last = torch.randn(5, 3, generator=generator)
    e, z = torch.randn(7, 4, generator=generator), torch.randn(3, 4, generator=generator)
    return e, z, combine, lambda f: f @ last


def test_one_stratum_is_the_plain_prediction(adjustment):
    e, z, combine, classify = adjustment
    torch.testing.assert_close(backdoor_average(e, z[:1], combine, classify), classify(combine(e, z[:1].expand(7, 4))))


@pytest.mark.parametrize("average", ["logit", "prob"])
def test_identical_strata_are_as_one(adjustment, average):
    e, z, combine, classify = adjustment
    several = backdoor_average(e, z[:1].expand(3, 4), combine, classify, average=average)
    one = classify(combine(e, z[:1].expand(7, 4)))
    torch.testing.assert_close(several.softmax(1), one.softmax(1))


@pytest.mark.parametrize("average", ["logit", "prob"])
@given(order=st.permutations([0, 1, 2]))
@settings(max_examples=6, deadline=None)
def test_the_order_of_the_strata_does_not_matter(average, order):
    logits = torch.randn(3, 5, 4, generator=seeded())
    prior = torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close(
        average_strata(logits[list(order)], prior[list(order)], average), average_strata(logits, prior, average)
    )


@pytest.mark.parametrize("average", ["logit", "prob"])
def test_a_prior_on_one_stratum_predicts_under_it(adjustment, average):
    e, z, combine, classify = adjustment
    adjusted = backdoor_average(e, z, combine, classify, prior=torch.tensor([0.0, 1.0, 0.0]), average=average)
    under = classify(combine(e, z[1:2].expand(7, 4)))
    torch.testing.assert_close(adjusted.softmax(1), under.softmax(1))


def test_for_a_linear_model_the_average_goes_inside():
    e, z, W = torch.randn(7, 4), torch.randn(3, 4), torch.randn(4, 5)
    adjusted = backdoor_average(e, z, lambda e, z: e + z, lambda f: f @ W)
    torch.testing.assert_close(adjusted, (e + z.mean(0)) @ W)


@pytest.mark.parametrize(
    ("logits", "of_logits", "of_probabilities"),
    [(((0, math.log(3)), (0, -math.log(3))), 0.5, 0.5), (((0, 0), (0, 2 * math.log(3))), 0.75, 0.7)],
)
def test_averages_of_two_strata_by_hand(logits, of_logits, of_probabilities):
    strata = torch.tensor(logits).view(2, 1, 2)
    assert float(average_strata(strata, None, "logit").softmax(1)[0, 1]) == pytest.approx(of_logits)
    assert float(average_strata(strata, None, "prob").exp()[0, 1]) == pytest.approx(of_probabilities)


def test_one_pass_is_the_loop_over_strata(adjustment):
    e, z, combine, classify = adjustment
    torch.testing.assert_close(
        strata_logits(e, z, combine, classify), strata_logits(e, z, combine, classify, one_pass=False)
    )


def test_the_adjustment_has_the_right_gradient(adjustment):
    e, z, _, _ = (x.double() if isinstance(x, torch.Tensor) else x for x in adjustment)
    W = torch.randn(4, 3, dtype=torch.float64, generator=seeded())
    for average in ("logit", "prob"):
        assert torch.autograd.gradcheck(
            lambda e, z, a=average: backdoor_average(e, z, lambda e, z: torch.tanh(e * z), lambda f: f @ W, average=a),
            (e.requires_grad_(), z.requires_grad_()),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": torch.tensor([0.5, 0.2, 0.2])}, "prior must be non-negative and sum to 1"),
        ({"prior": torch.tensor([1.5, -0.5, 0.0])}, "prior must be non-negative and sum to 1"),
        ({"prior": torch.tensor([float("nan"), 0.5, 0.5])}, "prior must be non-negative"),
        ({"prior": torch.tensor([0.5, 0.5])}, r"one entry for each of 3 strata, got \[2\]"),
        ({"average": "mean"}, "average must be 'logit' or 'prob', got 'mean'"),
    ],
)
def test_bad_arguments_of_the_adjustment(adjustment, options, message):
    with pytest.raises(UserError, match=message):
        backdoor_average(*adjustment, **options)


def test_the_adjustment_needs_a_stratum(adjustment):
    e, z, combine, classify = adjustment
    with pytest.raises(UserError, match="at least 1 stratum"):
        backdoor_average(e, z[:0], combine, classify)


def test_spread_is_zero_for_equal_strata_and_half_for_two_opposite_ones():
    same = torch.randn(1, 4, 3).expand(2, 4, 3)
    assert strata_spread(same).abs().max() < 1e-6
    opposite = torch.tensor([[[50.0, 0.0]], [[0.0, 50.0]]])
    torch.testing.assert_close(strata_spread(opposite), torch.tensor([0.5]))


# losses


@pytest.mark.parametrize(("logits", "loss"), [((0, 0, 0, 0), 0), ((99, 0), 0.25), ((99, 0, 0), 2 / 9)])
def test_confusion_loss_by_hand(logits, loss):
    assert float(confusion_loss(torch.tensor([logits, logits]).float())) == pytest.approx(loss, abs=1e-7)


def test_center_loss_and_its_gradients_by_hand():
    bank = ConfounderBank(2, (2,), weight=5e-4)
    with torch.no_grad():
        bank.centers.zero_()
    context = torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss = bank.center_loss(context, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(5 * 5e-4)
    torch.testing.assert_close(bank.centers.grad, torch.tensor([[0.0, 0.0], [-2.0, -4.0]]))  # full rate
    torch.testing.assert_close(context.grad, 5e-4 * torch.tensor([[2.0, 4.0]]))


def test_centers_come_to_lie_at_the_means_of_their_sources():
    bank = ConfounderBank(2, (3,), generator=seeded())
    contexts, sources = torch.randn(20, 3, generator=seeded(1)), torch.arange(20) % 2
    optimizer = SGD(bank.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        bank.center_loss(contexts, sources).backward()
        optimizer.step()
    means = torch.stack([contexts[sources == m].mean(0) for m in range(2)])
    torch.testing.assert_close(bank.prototypes(), means, atol=1e-3, rtol=0)


def test_the_empirical_prior_is_the_share_of_what_was_seen():
    bank = ConfounderBank(3, (2,))
    torch.testing.assert_close(bank.prior(), torch.full((3,), 1 / 3))
    bank.observe(torch.tensor([0, 0, 2, 0]))
    torch.testing.assert_close(bank.prior(), torch.tensor([0.75, 0.0, 0.25]))


def test_bad_arguments_of_the_bank():
    with pytest.raises(UserError, match="num_strata must be at least 2, got 1"):
        ConfounderBank(1, (2,))
    with pytest.raises(UserError, match="weight must be positive"):
        ConfounderBank(2, (2,), weight=0.0)
    bank = ConfounderBank(2, (2,))
    with pytest.raises(UserError, match=r"strata\[1\] is 2, expected 0 to 1"):
        bank.center_loss(torch.zeros(2, 2), torch.tensor([0, 2]))
    with pytest.raises(UserError, match=r"of shape \[2\], got \[3\]"):
        bank.center_loss(torch.zeros(2, 3), torch.tensor([0, 1]))


# networks


def test_the_split_first_convolution_is_that_of_the_concatenation():
    R = Reconstructor(8)
    e, c = torch.randn(2, 3, 8, 5, 5, generator=seeded())
    whole = nn.Conv2d(16, 8, 3, padding=1)
    with torch.no_grad():
        whole.weight.copy_(torch.cat([R.emotion.weight, R.context.weight], dim=1))
        whole.bias.copy_(R.emotion.bias)
    torch.testing.assert_close(R(e, c), R.blocks(whole(torch.cat([e, c], dim=1))), atol=1e-5, rtol=1e-5)


def test_the_adjusted_model_is_the_adjustment_of_its_unsplit_parts():
    model = small_iern()
    images, _, _ = batch()
    e = model.emotion_encoder(model.base(images))
    plain = backdoor_average(e, model.bank.prototypes(), model.reconstructor, model.head)
    torch.testing.assert_close(model(images), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(7, 7), (4, 4), (2, 3), (9, 2)])
def test_discriminators_fit_any_map_and_a_batch_of_one(size):
    assert Discriminator(16, 5, size)(torch.randn(1, 16, *size)).shape == (1, 5)


def test_a_map_smaller_than_the_discriminators_kernel_is_refused():
    with pytest.raises(UserError, match="feature_size 1x7 is too small: the discriminator's 4x4 kernel leaves 0x3"):
        Discriminator(16, 5, (1, 7))
    with pytest.raises(UserError, match="channels must be at least 8"):
        Discriminator(4, 5)


def test_initial_weights_have_the_papers_scale_and_keep_its_gain_at_other_widths():
    model = small_iern()
    weights = torch.cat([m.weight.flatten() for m in model.reconstructor.modules() if isinstance(m, nn.Conv2d)])
    assert float(weights.std()) == pytest.approx(0.02 * 8, rel=0.05)
    again = small_iern()
    assert torch.equal(model.head[2].weight, again.head[2].weight)


def test_the_resnet_base_gives_512_maps_of_an_eighth_of_a_quarter():
    base = resnet_base("resnet18", channels=32)
    assert base.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 32, 2, 2)
    with pytest.raises(UserError, match="Did you mean 'resnet18'"):
        resnet_base("resnet-18")


# training: what moves in which step


class Recorded(SGD):
    """Calls ``before`` and ``after`` around its step."""

    def __init__(self, parameters, before, after):
        super().__init__(parameters, lr=0.1)
        self.before, self.after = before, after

    def step(self, closure=None):
        self.before()
        super().step(closure)
        self.after()


def test_each_step_moves_its_own_parameters_and_no_other():
    model = small_iern()
    snapshot, steps, without_gradient = {}, [], []

    def before():
        snapshot.update({part: state_of(model, part) for part in PARTS})
        without_gradient.append(
            {part for part in PARTS if all(p.grad is None for p in getattr(model, part).parameters())}
        )

    def recorded(optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return Recorded(parameters, before, lambda: steps.append(moved(model, snapshot)))

    optimizers = model.optimizers()
    losses = model.training_step(*batch(), type(optimizers)(*map(recorded, optimizers)))
    assert steps == [
        {"emotion_discriminator", "source_discriminator"},
        {"emotion_encoder", "context_encoder", "reconstructor", "bank"},
        {"base", "emotion_encoder", "head"},
    ]
    assert {"base", "emotion_encoder", "context_encoder", "reconstructor", "head", "bank"} <= without_gradient[0]
    assert set(losses) == {"discriminators", "confusion", "center", "reconstruction", "classification"}
    assert all(math.isfinite(loss) for loss in losses.values())


def reference_iteration(model, images, labels, sources, optimizers):
    """The reference implementation's order, with its loop over strata, written down plainly."""
    for p in model.parameters():
        p.requires_grad_(True)
    f = model.base(images)
    e, c = model.emotion_encoder(f), model.context_encoder(f)
    told = F.cross_entropy(model.emotion_discriminator(e.detach()), labels)
    told = (told + F.cross_entropy(model.source_discriminator(c.detach()), sources)) / 2
    optimizers.discriminators.zero_grad()
    told.backward()
    optimizers.discriminators.step()

    def from_uniform(logits):
        return F.mse_loss(logits.softmax(1), torch.full_like(logits, 1 / logits.shape[1]))

    confused = (from_uniform(model.emotion_discriminator(c)) + from_uniform(model.source_discriminator(e))) / 2
    center = model.bank.weight * (c - model.bank.centers[sources]).square().sum() / len(images)
    rebuilt = F.mse_loss(model.reconstructor(e, c), f)
    optimizers.features.zero_grad()
    (confused + center + rebuilt).backward()
    model.bank.centers.grad /= model.bank.weight
    optimizers.features.step()

    e = model.emotion_encoder(model.base(images))
    logits = [model.head(model.reconstructor(e, z.expand_as(e))) for z in model.bank.centers.detach()]
    loss = F.cross_entropy(torch.stack(logits).mean(0), labels)
    optimizers.classifier.zero_grad()
    loss.backward()
    optimizers.classifier.step()
    return {
        "discriminators": told,
        "confusion": confused,
        "center": center,
        "reconstruction": rebuilt,
        "classification": loss,
    }


def test_training_is_the_reference_order_written_plainly():
    ours, plain = small_iern(plain_base).double(), small_iern(plain_base).double()
    optimizers, others = ours.optimizers(0.01, 0.01), plain.optimizers(0.01, 0.01)
    for seed in range(3):
        images, labels, sources = batch(seed=seed)
        losses = ours.training_step(images.double(), labels, sources, optimizers)
        expected = reference_iteration(plain, images.double(), labels, sources, others)
        for name, loss in expected.items():
            torch.testing.assert_close(losses[name], loss.detach(), rtol=1e-6, atol=1e-9)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_that_are_pending_survive_the_disentangling_steps():
    model = small_iern()
    images, labels, sources = batch()
    model(images).sum().backward()
    pending = [p.grad.clone() for p in model.emotion_encoder.parameters()]
    model.disentangle(model.base(images), labels, sources, model.optimizers())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.emotion_encoder.parameters(), pending, strict=True))


def test_the_rates_of_the_steps():
    optimizers = small_iern().optimizers(1e-2, 1e-3, 1e-4)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    assert rates == [[1e-2], [1e-4], [1e-2, 1e-3]]
    assert small_iern().optimizers().features.param_groups[0]["lr"] == 2e-4


def test_outside_its_step_nothing_else_requires_gradients():
    model = small_iern()
    model.training_step(*batch(), model.optimizers())
    trainable = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"base", "emotion_encoder", "head"}


def test_without_adversaries_the_discriminators_stay():
    model = small_iern(confusion_weight=0.0)
    before = {part: state_of(model, part) for part in PARTS}
    losses = model.training_step(*batch(), model.optimizers())
    assert "discriminators" not in losses
    assert moved(model, before) == set(PARTS) - {"emotion_discriminator", "source_discriminator"}


def test_without_intervention_the_true_context_is_used():
    model = small_iern(intervene=False)
    images, _, _ = batch()
    f = model.base(images)
    expected = model.head(model.reconstructor(model.emotion_encoder(f), model.context_encoder(f)))
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("options", [{}, {"norm": "batch"}, {"average": "prob"}, {"prior": "empirical"}])
def test_a_few_steps_learn_the_training_batch(options):
    model = small_iern(**options)
    images, labels, sources = batch(12)
    images = images * 0.3 + labels.view(-1, 1, 1, 1) / 3
    optimizers = model.optimizers(5e-3, 5e-3)
    first = model.training_step(images, labels, sources, optimizers)
    for _ in range(30):
        last = model.training_step(images, labels, sources, optimizers)
    assert float(last["classification"]) < 0.5 * float(first["classification"])
    assert float(last["reconstruction"]) < 0.5 * float(first["reconstruction"])


def test_batch_normalisation_sees_one_stratum_at_a_time_in_training():
    model = small_iern(norm="batch")
    images, _, _ = batch()
    norm = model.reconstructor.blocks[0].body[1]
    seen = []
    norm.register_forward_hook(lambda layer, inputs, output: seen.append(len(inputs[0])))
    model(images)
    model.eval()(images)
    assert seen == [6, 6, 12]


def test_a_batch_of_one_works():
    model = small_iern()
    losses = model.training_step(*(x[:1] for x in batch()), model.optimizers())
    assert math.isfinite(losses["classification"])
    assert model(batch()[0][:1]).shape == (1, 3)


# prediction


def trained(**options):
    model = small_iern(**options)
    model.training_step(*batch(), model.optimizers(1e-2, 1e-2))
    return model


def test_prediction_is_in_evaluation_mode_and_leaves_the_mode():
    model = trained()
    images, _, _ = batch()
    together, alone = model.predict(images), torch.cat([model.predict(x[None]) for x in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert model.training
    assert not together.requires_grad


def test_a_one_hot_prior_predicts_under_its_stratum():
    model = trained(prior=torch.tensor([0.0, 1.0]))
    images, _, _ = batch()
    torch.testing.assert_close(model.predict(images), model.predict_under(images, 1))
    with pytest.raises(UserError, match="stratum must be from 0 to 1, got 2"):
        model.predict_under(images, 2)


def test_uniform_prediction_is_the_mean_over_strata():
    model = trained()
    images, _, _ = batch()
    under = torch.stack([model.predict_under(images, m) for m in range(2)])
    torch.testing.assert_close(model.predict(images), under.mean(0))
    torch.testing.assert_close(model.spread(images), strata_spread(under))


def test_prototypes_and_prior_survive_saving(tmp_path):
    model = trained(prior="empirical")
    torch.save(model.state_dict(), tmp_path / "iern.pt")
    again = small_iern(prior="empirical", generator=seeded(5))
    again.load_state_dict(torch.load(tmp_path / "iern.pt", weights_only=True))
    assert torch.equal(again.bank.prototypes(), model.bank.prototypes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(again.predict(batch()[0]), model.predict(batch()[0]))


def test_predicting_with_random_prototypes_warns():
    model = small_iern()
    images, labels, _ = batch()
    with pytest.warns(UserWarning, match="prototype of source 0, 1 is random"):
        model.predict(images)
    model.training_step(images, labels, torch.zeros(6, dtype=torch.int64), model.optimizers())
    with pytest.warns(UserWarning, match="prototype of source 1 is random"):
        model.predict_under(images, 0)


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "even"}, "prior must be 'uniform', 'empirical' or a vector, got 'even'"),
        ({"prior": torch.tensor([0.7, 0.7])}, "sum to 1"),
        ({"average": "max"}, "average must be"),
        ({"confusion_weight": -1.0}, "confusion_weight must not be negative"),
        ({"center_weight": 0.0}, "weight must be positive"),
        ({"norm": "layer"}, "norm must be 'group' or 'batch'"),
        ({"feature_size": 1}, "feature_size 1x1 is too small"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        small_iern(**options)


def test_one_class_or_one_source_is_refused():
    for name, (classes, sources) in {"num_classes": (1, 2), "num_sources": (2, 1)}.items():
        with pytest.raises(UserError, match=f"{name} must be at least 2, got 1"):
            IERN(nn.Identity(), classes, sources)


def test_bad_batches_are_refused_before_anything_is_learnt():
    model = small_iern()
    before = {part: state_of(model, part) for part in PARTS}
    images, labels, sources = batch()
    broken = images.clone()
    broken[4] = float("nan")
    optimizers = model.optimizers()
    model.eval()  # keeps the running statistics of the base out of this
    for arguments, message in [
        ((images, labels, sources + 1), r"sources\[1\] is 2, expected 0 to 1"),
        ((images, labels + 1, sources), r"labels\[2\] is 3, expected 0 to 2"),
        ((broken, labels, sources), "features of example 4 of the batch are not finite"),
        ((images[..., :6], labels, sources), r"base gave features \[8, 4, 3\], but .* announce \[8, 4, 4\]"),
    ]:
        with pytest.raises(UserError, match=message):
            model.training_step(*arguments, optimizers)
    assert moved(model, before) == set()
    assert model.bank.seen.tolist() == [0, 0]


# in the trainer


def triples(n=24):
    images, labels, sources = batch(n)
    return TensorDataset(images, labels, sources)


def fit(model, optimizers, epochs=2, data=None, interventions=(), **options):
    trainer = Trainer(
        epochs, interventions=[Disentangle(optimizers), *interventions], batch_size=6, accelerator="cpu", **options
    )
    return trainer.fit(model, data or triples(), loss=nn.CrossEntropyLoss(), optimizer=optimizers.classifier)


def test_the_trainer_takes_the_same_steps():
    ours, plain = small_iern(), small_iern()
    fit(ours, ours.optimizers(1e-2, 1e-2), epochs=1, data=TensorDataset(*batch()))
    order = torch.tensor(next(iter(Batches(6, 6, seed=0))))
    plain.training_step(*(x[order] for x in batch()), plain.optimizers(1e-2, 1e-2))
    for (name, p), q in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}")


def test_the_losses_of_the_steps_are_logged():
    model = small_iern()
    history = fit(model, model.optimizers())
    assert {"iern/center", "iern/reconstruction", "iern/confusion", "iern/discriminators"} <= set(history.last)


def test_a_killed_run_resumes_to_the_same_model(tmp_path):
    whole = small_iern()
    fit(whole, whole.optimizers(), epochs=3)
    killed = small_iern()
    with pytest.raises(Stop):
        fit(killed, killed.optimizers(), 3, interventions=[StopAt(6)], checkpoint_dir=tmp_path, checkpoint_every=1)
    resumed = small_iern(generator=seeded(9))
    fit(resumed, resumed.optimizers(), 3, interventions=[StopAt()], checkpoint_dir=tmp_path, checkpoint_every=1)
    for p, q in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q)


def test_rates_of_all_steps_follow_the_trainers_schedule():
    model = small_iern()
    optimizers = model.optimizers(1e-2)
    trainer = Trainer(4, interventions=[Disentangle(optimizers)], batch_size=6, schedule="epoch", accelerator="cpu")
    trainer.fit(
        model,
        triples(),
        loss=nn.CrossEntropyLoss(),
        optimizer=optimizers.classifier,
        scheduler=partial(LambdaLR, lr_lambda=lambda epoch: 0.5**epoch),
    )
    assert optimizers.features.param_groups[0]["lr"] == pytest.approx(1e-2 / 8)


def test_what_the_trainer_cannot_train_is_an_error():
    model = small_iern()
    with pytest.raises(UserError, match="Disentangle trains an IERN, got a Linear"):
        Trainer(1, interventions=[Disentangle(model.optimizers())], accelerator="cpu").fit(
            nn.Linear(2, 2), triples(), loss=nn.CrossEntropyLoss(), optimizer=partial(SGD, lr=0.1)
        )
    with pytest.raises(UserError, match="examples come without a source"):
        fit(model, model.optimizers(), data=TensorDataset(*batch()[:2]))


def test_extra_passes_and_evaluation_do_not_train():
    model = small_iern()
    optimizers = model.optimizers()
    before = model.bank.prototypes().clone()

    class Look(Intervention):
        def compute_loss(self, state, next):
            centers = model.bank.prototypes().clone()
            state.module(state.inputs)
            assert torch.equal(centers, model.bank.prototypes())
            return next(state)

    fit(model, optimizers, epochs=1, interventions=[Look()])
    assert not torch.equal(before, model.bank.prototypes())
    after = model.bank.prototypes().clone()
    model(batch()[0])
    assert torch.equal(after, model.bank.prototypes())


def _in_one_of_two_processes(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    torch.set_num_threads(1)
    model = small_iern(plain_base)
    fit(model, model.optimizers(1e-2, 1e-2), 1, devices=2, strategy="ddp", checkpoint_dir=folder)


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_in_one_of_two_processes, (port, tmp_path), nprocs=2)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    model = small_iern(plain_base)
    fit(model, model.optimizers(1e-2, 1e-2), 1)
    for name, p in model.named_parameters():
        torch.testing.assert_close(saved[name], p.detach(), atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


# recipe


def test_the_papers_schedule_warms_up_stays_and_falls_to_nothing():
    factors = [rate_factor(epoch) for epoch in range(161)]
    assert factors[4] < 1
    assert factors[5:21] == [1.0] * 16
    assert factors[90] == pytest.approx(0.5)
    assert factors[160] == 0
    assert factors[:6] == sorted(factors[:6])


def test_the_papers_augmentation_gives_crops_around_zero():
    torch.manual_seed(0)
    image = augmentation(56)(torch.rand(3, 64, 64))
    assert image.shape == (3, 56, 56)
    assert image.min() >= -1
    assert image.max() <= 1
