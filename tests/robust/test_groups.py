from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import TensorDataset

from paperworks.errors import UserError
from paperworks.robust.groups import DANN, GroupDRO, reverse_gradient, update_group_weights
from paperworks.train import Intervention, Trainer
from stopping import Stop, StopAt


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def data(n=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 4, 4, generator=generator)
    return TensorDataset(images, torch.arange(n) % 3, torch.randint(2, (n,), generator=generator))


def fit(net, interventions, epochs=1, train=None, batch_size=24, **options):
    trainer = Trainer(epochs, interventions=interventions, batch_size=batch_size, accelerator="cpu", **options)
    return trainer.fit(net, train or data(), loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1))


# GroupDRO


def test_weights_grow_with_the_loss_and_stay_where_a_group_is_absent():
    weights = update_group_weights(
        torch.full((3,), 1 / 3), torch.tensor([0.0, 2.0, 5.0]), torch.tensor([True, True, False]), 0.5
    )
    assert float(weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(weights[1] / weights[0], torch.tensor(1.0).exp())
    torch.testing.assert_close(weights[2], weights[0])


def test_the_loss_is_the_weighted_sum_of_the_groups_losses():
    net = model()
    images, labels, sources = data().tensors
    groups = labels * 2 + sources
    losses = torch.stack([F.cross_entropy(net(images[groups == g]), labels[groups == g]) for g in range(6)])
    q = torch.softmax(0.01 * losses.detach(), 0)
    dro = GroupDRO(3, 2)
    history = fit(net, [dro])
    assert history.last["train/loss"] == pytest.approx((q * losses).sum().item(), rel=1e-5)
    torch.testing.assert_close(dro.weights, q)


def test_with_one_group_a_batch_it_is_the_plain_loss_times_its_weight():
    images, _, _ = data(6).tensors
    one = TensorDataset(images, torch.ones(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64))
    plain, dro = model(), model()
    loss = fit(plain, [], train=one).last["train/loss"]
    group = GroupDRO(3, 2)
    assert fit(dro, [group], train=one).last["train/loss"] == pytest.approx(float(group.weights[3]) * loss)


def test_later_interventions_shape_the_groups_losses():
    class Double(Intervention):
        def compute_loss(self, state, next):
            return 2 * next(state)

    plain = fit(model(), [GroupDRO(3, 2, step_size=1e-6)]).last["train/loss"]
    assert fit(model(), [GroupDRO(3, 2, step_size=1e-6), Double()]).last["train/loss"] == pytest.approx(
        2 * plain, rel=1e-4
    )


def test_the_group_that_is_hard_gets_the_weight():
    images, labels, sources = data(48).tensors
    labels = torch.where(sources == 1, torch.randint(3, (48,), generator=torch.Generator().manual_seed(0)), 0)
    dro = GroupDRO(3, 2, step_size=0.1)
    fit(model(), [dro], epochs=20, train=TensorDataset(images, labels, sources), batch_size=48)
    easy = dro.weights[0]  # class 0 of source 0 is all there is of source 0
    assert dro.weights[[3, 5]].min() > easy


@pytest.mark.parametrize("make", [partial(GroupDRO, 3, 2), partial(DANN, "1", 4, 2)])
def test_a_killed_run_resumes_to_the_same_model(make, tmp_path):
    whole, killed, resumed = model(), model(), model(3)
    fit(whole, [make()], 3, batch_size=8)
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1, "batch_size": 8}
    with pytest.raises(Stop):
        fit(killed, [make(), StopAt(5)], 3, **options)
    fit(resumed, [make(), StopAt()], 3, **options)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


# DANN


def test_reversed_gradients_by_hand():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = reverse_gradient(x, 0.5)
    assert torch.equal(y, x)
    (y * torch.tensor([3.0, 4.0])).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([-1.5, -2.0]))


def test_the_first_step_trains_the_discriminator_and_the_model_plainly():
    plain, adversarial = model(), model()
    fit(plain, [])
    dann = DANN("1", 4, 2)
    before = [p.detach().clone() for p in dann.discriminator.parameters()]
    fit(adversarial, [dann])  # the reversal starts from scale 0
    for p, q in zip(plain.parameters(), adversarial.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert all(not torch.equal(p, q) for p, q in zip(before, dann.discriminator.parameters(), strict=True))


def test_features_lose_the_source():
    images, labels, sources = data(96).tensors
    images = images + sources.view(-1, 1, 1, 1)
    marked = TensorDataset(images, labels, sources)

    def gap(interventions):
        net = model()
        fit(net, interventions, 200, marked, 96)
        features = net[1](net[0](images)).flatten(2).mean(2)
        means = torch.stack([features[sources == m].mean(0) for m in range(2)])
        return float((means[0] - means[1]).norm() / features.std(0).norm())

    assert gap([DANN("1", 4, 2, weight=2.0)]) < 0.2 * gap([])


def test_the_hook_is_gone_after_training():
    net = model()
    fit(net, [DANN("1", 4, 2)])
    assert not net[1]._forward_hooks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(DANN, "1", 4, 1), "num_sources must be at least 2, got 1"),
        (partial(DANN, "1", 4, 2, weight=-1.0), "weight must not be negative"),
        (partial(GroupDRO, 1, 2), "num_classes must be at least 2"),
        (partial(GroupDRO, 2, 1), "num_sources must be at least 2"),
        (partial(GroupDRO, 2, 2, step_size=0.0), "step_size must be positive"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("make", [partial(GroupDRO, 3), partial(DANN, "1", 4)])
def test_bad_data(make):
    images, labels, _ = data().tensors
    with pytest.raises(UserError, match="examples come without a source"):
        fit(model(), [make(2)], train=TensorDataset(images, labels))
    with pytest.raises(UserError, match="sources\\[0\\] is 7"):
        fit(model(), [make(2)], train=TensorDataset(images, labels, labels * 0 + 7))


def test_an_unknown_layer_is_named():
    with pytest.raises(UserError, match="no layer 'body'"):
        fit(model(), [DANN("body", 4, 2)])


def test_a_class_out_of_range_would_be_another_group():
    images, labels, _ = data().tensors
    with pytest.raises(UserError, match="targets\\[0\\] is 9, expected 0 to 2"):
        fit(model(), [GroupDRO(3, 2)], train=TensorDataset(images, labels * 0 + 9, labels * 0))
