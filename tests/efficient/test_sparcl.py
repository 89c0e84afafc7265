import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from paperworks.data import LabelledData
from paperworks.efficient import (
    ActiveBatches,
    DynamicDataRemoval,
    DynamicGradientMask,
    Replay,
    ReservoirBuffer,
    SparCL,
    SparseExecution,
    SparsityMask,
    TaskAwareDynamicMask,
    TrainingMeter,
    average_accuracy,
    der_pp_loss,
    er_loss,
    forgetting,
    forward_flops,
    gradient_mask,
    layer_training_flops,
    learn_tasks,
    learning_accuracy,
    single_head_cross_entropy,
    split_by_class,
    task_accuracies,
    training_flops,
    weight_importance,
)
from paperworks.errors import UserError
from paperworks.nn.backbones import CifarResNet, ConvNet, mlp
from paperworks.train import Intervention, State, Trainer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def one_layer(*weights: float) -> nn.Linear:
    layer = nn.Linear(len(weights), 1, bias=False)
    layer.weight.data = torch.tensor([weights], dtype=torch.float32)
    return layer


def small_model(seed: int = 0) -> ConvNet:
    torch.manual_seed(seed)
    return ConvNet(1, 4, widths=(4, 8, 8), strides=(1, 2, 1))


HIDDEN = ["body.1.0", "body.2.0"]


def refused(message: str):
    """Expect our error, or beartype's where that is on and looks first."""
    return pytest.raises((UserError, TypeError), match=f"{message}|Type-check error")


def live(mask: SparsityMask) -> list[list[int]]:
    return [m.flatten().nonzero()[:, 0].tolist() for m in mask.masks]


# Weight masks.


def test_the_first_mask_keeps_the_largest_weights_of_each_hidden_layer():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    mask = SparsityMask(model, 0.75)
    assert mask.names == HIDDEN
    for (name, weight), m in zip(mask, mask.masks, strict=True):
        start = before[f"{name}.weight"]
        assert int(m.sum()) == round(start.numel() / 4) == int(weight.count_nonzero())
        assert start.abs()[m == 1].min() >= start.abs()[m == 0].max()
        assert torch.equal(weight, start * m)
    others = set(before) - {f"{name}.weight" for name in HIDDEN}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in others)
    total, hidden = sum(p.numel() for p in model.parameters()), 4 * 8 * 9 + 8 * 8 * 9
    assert mask.density() == mask.density(HIDDEN[0]) == 0.25
    assert mask.overall_density() == pytest.approx((total - 0.75 * hidden) / total)


@given(
    sparsity=st.floats(0, 0.98),
    to=st.floats(0, 0.98),
    granularity=st.sampled_from(["element", "filter", "column"]),
    seed=st.integers(0, 99),
)
def test_sizes_are_exact_whatever_the_order_of_shrinking_and_growing(sparsity, to, granularity, seed):
    model = small_model(seed)
    mask = SparsityMask(model, sparsity, granularity=granularity)
    units = [{"element": w.numel(), "filter": len(w), "column": w[0].numel()}[granularity] for w in mask.parameters]
    assert [int(m.sum()) for m in mask.masks] == [max(1, round(n * (1 - sparsity))) for n in units]
    before = [m.clone() for m in mask.masks]
    (mask.shrink if to > sparsity else partial(mask.grow, generator=seeded(seed)))(to)
    assert [int(m.sum()) for m in mask.masks] == [max(1, round(n * (1 - to))) for n in units]
    for was, now, weight in zip(before, mask.masks, mask.parameters, strict=True):
        assert (now <= was).all() if to > sparsity else (now >= was).all()
        assert not weight[(was * now).expand_as(weight) == 0].any()  # grown weights are zero at birth


def test_filters_and_columns_live_and_die_as_a_whole():
    layer = nn.Linear(3, 4, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.0, 3.0], [2.0, 2.0, 0.0], [0.0, 0.1, 0.0], [9.0, 0.0, 0.0]])
    by_filter = SparsityMask(copy.deepcopy(layer), 0.5, "all", granularity="filter")
    assert live(by_filter) in ([[0, 3]], [[1, 3]])  # rows of sum 4, 4, 0.1, 9
    by_column = SparsityMask(layer, 0.34, "all", granularity="column")
    assert live(by_column) == [[0, 2]]  # columns of sum 12, 2.1, 3
    assert not layer.weight[:, 1].any()


def test_layers_can_be_chosen_and_shortcuts_are_left_out():
    assert SparsityMask(small_model(), 0.5, "all").names == ["body.0.0", *HIDDEN, "classifier"]
    assert SparsityMask(small_model(), 0.5, "body.1.0").names == HIDDEN[:1]
    assert SparsityMask(small_model(), 0.5, lambda name, module: isinstance(module, nn.Linear)).names == ["classifier"]
    blocks = nn.ModuleDict({"stem": nn.Conv2d(1, 1, 1), "a": nn.Conv2d(1, 1, 1), "shortcut": nn.Conv2d(1, 1, 1)})
    blocks["fc"] = nn.Linear(1, 1)
    assert SparsityMask(blocks, 0.5).names == ["a"]
    with pytest.raises(UserError, match=r"unknown convolution or linear layer 'body.9.0'. Did you mean 'body.\d.0'"):
        SparsityMask(small_model(), 0.5, ["body.9.0"])
    with pytest.raises(UserError, match="leaves none of the 1 convolutions and linear layers"):
        SparsityMask(mlp(4, (), 2), 0.5)


def test_scores_make_other_first_masks():
    random = SparsityMask(small_model(), 0.75, scores=lambda _, w: torch.rand(w.shape, generator=seeded(1)))
    assert random.density() == 0.25
    assert live(random) != live(SparsityMask(small_model(), 0.75))
    assert live(SparsityMask(one_layer(0.5, -0.1, 0.3), 0.6, "all", scores=lambda _, w: -w.abs())) == [[1]]


def test_masks_survive_a_round_trip_and_refuse_other_layers():
    mask, other = SparsityMask(small_model(), 0.9), SparsityMask(small_model(1), 0.5)
    other.load_state_dict(mask.state_dict())
    assert live(other) == live(mask)
    assert other.parameters[0].count_nonzero() <= mask.masks[0].sum()
    with pytest.raises(UserError, match="masks are of layers"):
        SparsityMask(small_model(), 0.5, "all").load_state_dict(mask.state_dict())


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan])
def test_sparsity_must_be_a_share_below_one(sparsity):
    with pytest.raises(UserError, match=r"sparsity must be in \[0, 1\), got"):
        SparsityMask(small_model(), sparsity)
    with pytest.raises(UserError, match=r"gradient sparsity must be in \[0, 1\), got"):
        DynamicGradientMask(SparsityMask(small_model(), 0.5), sparsity)


# TDM.


def test_the_worked_importance():
    w, current, memory = (
        torch.tensor([0.5, -0.1, 0.3, 0.05]),
        torch.tensor([0, 0.6, 0, 0.1]),
        torch.tensor([0, 0, 0.1, 0.9]),
    )
    importance = weight_importance(w, current, memory, alpha=0.5, beta=1)
    torch.testing.assert_close(importance, torch.tensor([0.5, 0.4, 0.4, 1.0]))
    assert torch.equal(weight_importance(w), w.abs())
    mask = SparsityMask(one_layer(*w.tolist()), 0.0, "all")
    mask.shrink(0.5, [importance[None]])
    assert live(mask) == [[0, 3]]


def tdm(n: int = 100, sparsity: float = 0.75, **options) -> TaskAwareDynamicMask:
    mask = SparsityMask(one_layer(*draw(n).tolist()), sparsity, "all")
    return TaskAwareDynamicMask(mask, generator=seeded(), **options)


def test_a_task_expands_then_exchanges_then_stays():
    dynamic = tdm(p_inter=0.05, p_intra=0.03)
    dynamic.on_task_start(50)
    sizes, changed = [], []
    for epoch in range(50):
        gradient = [draw(1, 100, seed=epoch)]
        changed += [epoch] if dynamic.on_epoch_start(epoch, gradient, gradient) else []
        sizes.append(int(dynamic.mask.masks[0].sum()))
    assert changed == [0, 5, 10, 15, 20, 25, 30, 35, 40]  # fixed in the last tenth
    assert sizes == [30] * 5 + [25] * 45
    dynamic.on_task_end()
    assert sizes[-1] == int(dynamic.mask.masks[0].sum())


def test_an_update_keeps_the_most_important_and_frees_others_at_random():
    dynamic = tdm(p_inter=0.0, p_intra=0.05, period=1)
    dynamic.on_task_start(10)
    weight, (mask,) = dynamic.mask.parameters[0], dynamic.mask.masks
    before, current, memory = set(live(dynamic.mask)[0]), draw(1, 100, seed=1), draw(1, 100, seed=2)
    importance = weight_importance(weight.detach(), current, memory)[0]
    best = set(sorted(before, key=lambda i: -importance[i])[:20])
    dynamic.on_epoch_start(1, [current], [memory])
    after = set(live(dynamic.mask)[0])
    assert best <= after
    assert len(after) == 25
    assert not weight[0, list(after - best)].any()
    assert not weight[mask == 0].any()


def test_a_task_too_short_for_an_update_still_ends_at_the_sparsity():
    dynamic = tdm(p_inter=0.1)
    dynamic.on_task_start(3)
    for epoch in range(3):
        dynamic.on_epoch_start(epoch)
    assert dynamic.mask.density() == pytest.approx(0.35)
    dynamic.on_task_end()
    assert dynamic.mask.density() == pytest.approx(0.25)


def test_without_gradients_magnitude_decides_and_it_is_said():
    dynamic = tdm(p_inter=0.0, period=1)
    dynamic.on_task_start(10)
    with pytest.warns(UserWarning, match="ranked by magnitude alone"):
        dynamic.on_epoch_start(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p_intra": 0.25}, r"p_intra must be from 0 to below 1 - sparsity = 0.25, got 0.25"),
        ({"p_inter": 0.8}, r"p_inter must be from 0 to the sparsity 0.75, got 0.8"),
        ({"period": 0}, "period must be at least 1 epoch, got 0"),
        ({"frozen": 1.0}, r"frozen must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_schedules_are_refused(options, message):
    with refused(message):
        tdm(**options)


# DGM.


def test_the_worked_gradient_mask():
    gradient = torch.tensor([4.0, -3, 2, 1, 0, 0, 0, 0])
    assert gradient_mask(gradient.abs(), 0.75).nonzero()[:, 0].tolist() == [0, 1]
    assert gradient_mask(gradient.abs(), 0.25).nonzero()[:, 0].tolist() == [0, 1, 2, 3]  # never where it is zero
    layer = one_layer(0, *[1.0] * 7)
    mask = SparsityMask(layer, 1 / 8, "all")
    assert live(mask) == [[1, 2, 3, 4, 5, 6, 7]]
    layer.weight.grad = gradient[None].clone()
    DynamicGradientMask(mask, 0.75).apply()
    assert layer.weight.grad.tolist() == [[0, -3, 2, 0, 0, 0, 0, 0]]


def test_importance_weighs_both_losses_and_spares_the_gradient():
    layer = one_layer(1, 1, 1, 1)
    layer.weight.grad = torch.tensor([[1.0, 1, 1, 1]])
    current, memory = torch.tensor([[0.0, 6, 0, 1]]), torch.tensor([[0.0, 0, 2.5, 1]])
    DynamicGradientMask(SparsityMask(layer, 0.0, "all"), 0.5, alpha=0.5, beta=1).apply([current], [memory])
    assert layer.weight.grad.tolist() == [[0, 1, 1, 0]]


def test_a_gradient_mask_serves_for_so_many_steps():
    layer = one_layer(1, 1, 1, 1)
    masked = DynamicGradientMask(SparsityMask(layer, 0.0, "all"), 0.75, refresh=3)
    passed = []
    for step in range(5):
        layer.weight.grad = torch.ones(1, 4)
        layer.weight.grad[0, step % 4] = 2.0
        masked.apply()
        passed.append(layer.weight.grad.argmax().item())
    assert passed == [0, 0, 0, 3, 3]
    masked.expire()
    assert masked.due
    layer.weight.grad = None
    with pytest.raises(UserError, match="apply comes after the backward pass"):
        masked.apply()
    with refused("refresh must be at least 1 step, got 0"):
        DynamicGradientMask(masked.mask, 0.5, 0)


def test_a_gradient_mask_survives_a_round_trip():
    layer = one_layer(1, 1, 1, 1)
    mask = SparsityMask(layer, 0.0, "all")
    one, other = DynamicGradientMask(mask, 0.75), DynamicGradientMask(mask, 0.75)
    layer.weight.grad = torch.tensor([[0.0, 1, 2, 0]])
    one.apply()
    other.load_state_dict(one.state_dict())
    layer.weight.grad = torch.ones(1, 4)
    other.apply()
    assert layer.weight.grad.tolist() == [[0, 0, 1, 0]]


# DDR.


def test_the_worked_removal():
    removal = DynamicDataRemoval(10, 0.5)
    for count in range(1, 6):
        indices = torch.arange(10)
        removal.observe(indices, torch.tensor([0, 3, 0, 1, 5, 0, 2, 0, 0, 4]) < count)
    assert removal.counts.tolist() == [0, 3, 0, 1, 5, 0, 2, 0, 0, 4]
    assert removal.remove(3).tolist() == [0, 2, 5]
    assert not removal.counts.any()
    assert removal.active_indices().tolist() == [1, 3, 4, 6, 7, 8, 9]


def test_removals_follow_the_schedule():
    removal = DynamicDataRemoval(10_000, 0.3, period=5, cutoff=20)
    sizes = {epoch: len(removal.on_epoch(epoch)) for epoch in range(50)}
    assert {epoch: size for epoch, size in sizes.items() if size} == {5: 750, 10: 750, 15: 750, 20: 750}


@given(n=st.integers(1, 60), fraction=st.floats(0, 0.99), rounds=st.integers(1, 9), least=st.integers(1, 60))
def test_what_is_left_only_shrinks_to_the_share_but_not_below_a_batch(n, fraction, rounds, least):
    removal = DynamicDataRemoval(n, fraction, period=1, cutoff=rounds, minimum=least)
    left = set(range(n))
    for epoch in range(rounds + 3):
        removal.observe(torch.tensor(sorted(left)), torch.rand(len(left), generator=seeded(epoch)) < 0.5)
        gone = set(removal.on_epoch(epoch).tolist())
        assert gone <= left
        left -= gone
    assert sorted(left) == removal.active_indices().tolist()
    assert len(left) == max(min(n, least), n - round(fraction * n))


def test_forgetting_counts_turns_from_right_to_wrong_and_keeps_the_never_learnt():
    removal = DynamicDataRemoval(4, 0.5, score="forgetting")
    for right in ([1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1], [0, 1, 0, 0]):
        removal.observe(torch.arange(4), torch.tensor(right).bool())
    assert removal.counts.tolist() == [2, 0, 0, 1]
    assert removal.remove(3).tolist() == [1, 3, 0]


def test_removal_survives_a_round_trip():
    one, other = DynamicDataRemoval(6, 0.5), DynamicDataRemoval(6, 0.5)
    one.observe(torch.tensor([0, 3]), torch.tensor([False, True]))
    one.remove(2)
    one.observe(torch.tensor([0]), torch.tensor([False]))
    other.load_state_dict(one.state_dict())
    assert other.remove(2).tolist() == one.remove(2).tolist()
    assert torch.equal(other.active, one.active)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove_fraction": 1.0}, r"remove_fraction must be in \[0, 1\), got 1.0"),
        ({"period": 0}, "period must be at least 1 epoch, got 0"),
        ({"cutoff": 4}, "cutoff must be at least the period of 5 epochs, got 4"),
        ({"n": 0}, "n and minimum must be at least 1, got 0 and 1"),
        ({"score": "loss"}, "unknown score 'loss'. Choose from: misclassified, forgetting"),
    ],
)
def test_bad_removals_are_refused(options, message):
    with refused(message):
        DynamicDataRemoval(**{"n": 10} | options)


def test_batches_hold_what_is_left():
    removal = DynamicDataRemoval(10, 0.5)
    batches = ActiveBatches(removal, 4, seed=3)
    assert list(batches) == list(ActiveBatches(DynamicDataRemoval(10), 4, seed=3))
    removal.remove(3)
    assert len(batches) == len(list(batches)) == 2
    assert sorted(i for batch in batches for i in batch) == list(range(3, 10))
    first = list(batches)
    batches.epoch = 1
    assert list(batches) != first


# Replay.


def test_single_head_cross_entropy_among_a_tasks_classes():
    logits = torch.tensor([[1.0, 2.0, 5.0]], requires_grad=True)
    loss = single_head_cross_entropy(logits, torch.tensor([1]), (0, 1))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    loss.backward()
    assert logits.grad[0, 2] == 0
    everything = single_head_cross_entropy(logits, torch.tensor([1]), range(3))
    assert everything.item() == pytest.approx(F.cross_entropy(logits, torch.tensor([1])).item())


def test_replay_losses_are_weighted_means():
    logits, targets = draw(5, 3), torch.tensor([0, 1, 2, 0, 1])
    remembered, other = draw(5, 3, seed=1), draw(4, 3, seed=2)
    assert torch.equal(er_loss(logits, targets, beta=0.5), 0.5 * F.cross_entropy(logits, targets))
    expected = 0.1 * (logits - remembered).square().mean() + 0.5 * F.cross_entropy(other, targets[:4])
    torch.testing.assert_close(der_pp_loss(logits, remembered, other, targets[:4]), expected)


def test_a_reservoir_keeps_every_example_equally_likely():
    kept = torch.zeros(30)
    for seed in range(2000):
        buffer = ReservoirBuffer(6, seeded(seed))
        for batch in torch.arange(30).split(7):
            buffer.add(batch)
        assert len(buffer.fields[0].unique()) == 6
        kept[buffer.fields[0]] += 1
    # Counts of draws without replacement vary less than the test assumes, by 1 - 6/30.
    assert stats.chisquare(kept.numpy()).statistic / (1 - 6 / 30) < stats.chi2.ppf(0.999, 29)


def test_a_reservoir_fills_up_first_and_keeps_rows_together():
    buffer = ReservoirBuffer(8, seeded())
    for start in range(0, 40, 5):
        index = torch.arange(start, start + 5)
        buffer.add(index[:, None].float().requires_grad_(), index)
        if start == 0:
            assert buffer.fields[1][:5].tolist() == [0, 1, 2, 3, 4]
            assert len(buffer) == 5
            assert sorted(buffer.draw(9)[1].tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(buffer.fields[0][:, 0].long(), buffer.fields[1])
    assert not buffer.fields[0].requires_grad
    inputs, index = buffer.draw(4)
    assert len(index.unique()) == 4
    assert torch.equal(inputs[:, 0].long(), index)
    other = ReservoirBuffer(8, seeded(9))
    other.load_state_dict(copy.deepcopy(buffer.state_dict()))
    assert torch.equal(other.draw(5)[1], buffer.draw(5)[1])


def test_bad_buffers_are_refused():
    with refused("buffer's size must be at least 1, got 0"):
        ReservoirBuffer(0, seeded())
    buffer = ReservoirBuffer(2, seeded())
    with pytest.raises(UserError, match="the buffer is empty"):
        buffer.draw(1)
    buffer.add(torch.zeros(3), torch.zeros(3))
    with pytest.raises(UserError, match=r"expected 2 fields of equal length, got lengths \[3\]"):
        buffer.add(torch.zeros(3))
    with refused(r"unknown replay method 'derpp'. Did you mean 'der\+\+'"):
        Replay(buffer, "derpp")
    with refused("batch_size must be positive"):
        Replay(buffer, batch_size=0)


# Tasks and figures.


def digits(n: int = 64, classes: int = 4, seed: int = 0) -> LabelledData:
    targets = torch.arange(n) % classes
    prototypes = draw(classes, 1, 8, 8, seed=99)
    inputs = prototypes[targets] + 0.5 * draw(n, 1, 8, 8, seed=seed)
    return LabelledData(inputs, targets, tuple("abcdefgh"[:classes]), "toy")


def test_tasks_have_classes_of_their_own():
    stream = split_by_class(digits(), digits(16, seed=1), 2)
    assert [task.classes for task in stream] == [(0, 1), (2, 3)]
    assert [set(task.train.targets.tolist()) for task in stream] == [{0, 1}, {2, 3}]
    assert [len(task.test) for task in stream] == [8, 8]
    assert [task.classes for task in split_by_class(digits(), digits(), [(3,), (0, 2)])] == [(3,), (0, 2)]
    with pytest.raises(UserError, match="class 1 is in several tasks"):
        split_by_class(digits(), digits(), [(0, 1), (1, 2)])
    with pytest.raises(UserError, match="4 classes cannot be divided equally among 3 tasks"):
        split_by_class(digits(), digits(), 3)
    with pytest.raises(UserError, match="class 7 is none of the 4 classes"):
        split_by_class(digits(), digits(), [(0, 7)])
    with pytest.raises(UserError, match=r"task of classes \[2, 3\] has no examples"):
        split_by_class(digits(2), digits(), 2)


def test_figures_of_a_worked_matrix():
    matrix = torch.tensor([[0.9, 0.0, 0.0], [0.95, 0.8, 0.0], [0.7, 0.6, 0.8]])
    assert average_accuracy(matrix) == pytest.approx(0.7)
    assert learning_accuracy(matrix) == pytest.approx((0.9 + 0.8 + 0.8) / 3)
    assert forgetting(matrix) == pytest.approx((0.25 + 0.2) / 2)
    assert forgetting(torch.tensor([[0.5, 0.0], [0.7, 0.9]])) == pytest.approx(-0.2)
    assert forgetting(matrix[:1, :1]) == 0


def test_knowing_the_task_makes_it_easier():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            right = F.one_hot((x[:, 0, 0, 0]).long(), 4).float()
            return self.scale * (right + torch.tensor([0.0, 0.0, 0.0, 2.0]))  # class 3 always wins

    targets = torch.tensor([0, 1, 2, 3])
    data = LabelledData(targets[:, None, None, None].float(), targets, tuple("abcd"), "toy")
    model = Fixed().train()
    class_il, task_il = task_accuracies(model, split_by_class(data, data, 2))
    assert class_il.tolist() == [0, 0.5]
    assert task_il.tolist() == [1, 0.5]
    assert model.training


# FLOPs.


def test_the_worked_count():
    assert layer_training_flops(100) == 300
    assert layer_training_flops(100, 0.25, 0.2) == pytest.approx(70)
    assert layer_training_flops(100, 0.1, 0.2) == pytest.approx(30)  # no more gradients than live weights


def test_flops_of_a_model_by_hand():
    model = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 10, bias=False)).train()
    model[0].eval()  # frozen
    assert forward_flops(model, (10,)) == {"": 200.0, "0": 100.0, "2": 100.0}
    assert [part.training for part in model] == [False, True, True]
    assert training_flops(model, (10,)) == 600
    mask = SparsityMask(model, 0.75, ["2"])
    assert training_flops(model, (10,), mask, 0.8) == pytest.approx(300 + 100 * (0.24 + 0.24 + 0.2))  # 12 of 50 live
    with pytest.raises(UserError, match="gradient_sparsity needs a mask"):
        training_flops(model, (10,), None, 0.8)


def test_flops_of_convolutions():
    count = forward_flops(small_model(), (1, 8, 8))
    assert count["body.1.0"] == 2 * 9 * 4 * 8 * 16
    assert count[""] == sum(count[name] for name in ("body.0.0", *HIDDEN, "classifier"))


# Real sparsity.


def outputs_and_gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    g = draw(*y.shape, seed=7)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], g)]


@pytest.mark.parametrize("granularity", ["element", "column", "filter"])
@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 20)])
@pytest.mark.parametrize("bias", [True, False])
def test_sparse_linear_layers_are_exact_but_for_dead_gradients(granularity, shape, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12, bias=bias))
    mask = SparsityMask(model, 0.8, "all", granularity=granularity)
    y, gx, gw, *gb = outputs_and_gradients(model, draw(*shape))
    kernel = "sliced" if granularity == "filter" else "csr"
    execution = SparseExecution(model, mask, shape, ["0"], rounds=1)
    assert execution.table.kernel.tolist() == [kernel]
    found = outputs_and_gradients(model, draw(*shape))
    torch.testing.assert_close(found, [y, gx, gw * mask.masks[0], *gb], rtol=1e-4, atol=1e-5)
    mask.grow(0.5, seeded())
    model[0].weight.data[mask.masks[0].expand(12, 20) == 1] += 1.0
    found = outputs_and_gradients(model, draw(*shape))  # kernels follow the mask
    execution.remove()
    y, gx, gw, *gb = outputs_and_gradients(model, draw(*shape))
    torch.testing.assert_close(found, [y, gx, gw * mask.masks[0], *gb], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["element", "filter"])
def test_sparse_products_in_mixed_precision(granularity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 12))
    mask, x = SparsityMask(model, 0.5, "all", granularity=granularity), draw(6, 20)
    expected = outputs_and_gradients(model, x)
    SparseExecution(model, mask, x.shape, ["0", "2"], rounds=1)
    with torch.autocast("cpu", torch.bfloat16):
        y, *gradients = outputs_and_gradients(model, x)
    torch.testing.assert_close(y.float(), expected[0], rtol=0.05, atol=0.05)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "bias": False}])
def test_sliced_convolutions_are_exact_but_for_dead_gradients(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, **options))
    mask = SparsityMask(model, 0.75, "all", granularity="filter")
    x = draw(2, 3, 9, 9)
    y, gx, gw, *gb = outputs_and_gradients(model, x)
    SparseExecution(model, mask, x.shape, ["0"], rounds=1)
    found = outputs_and_gradients(model, x)
    torch.testing.assert_close(found, [y, gx, gw * mask.masks[0], *gb], rtol=1e-4, atol=1e-5)


def test_gradients_of_the_sparse_product_are_right():
    from paperworks.efficient.sparcl.execution import _Pattern, _SparseProduct

    live = draw(4, 5) > 0.3
    x, weight = draw(3, 5, seed=1).double().requires_grad_(), (draw(4, 5, seed=2) * live).double().requires_grad_()
    pattern = _Pattern(live)
    assert torch.autograd.gradcheck(lambda x, w: _SparseProduct.apply(x, w * live, pattern), (x, weight))


def test_it_is_said_where_sparsity_does_not_pay():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 8))
    mask = SparsityMask(model, 0.5, ["1", "3"])
    execution = SparseExecution(model, mask, (2, 1, 8, 8), gain=1e9)
    assert execution.table.kernel.tolist() == ["none", "csr"]
    assert execution.table.gain.isna().tolist() == [True, False]
    assert execution.used == []
    assert not execution.table.used.any()
    with pytest.raises(UserError, match="layer '1' has no sparse kernel: element masks of convolutions"):
        execution.use(["1"])
    with pytest.raises(UserError, match="unknown masked layer '0'"):
        execution.use(["0"])


# Training.


class Stop(Exception):
    pass


class StopAt(Intervention):
    def __init__(self, step: int | None) -> None:
        self.step, self.steps = step, 0

    def on_batch(self, state: State) -> None:
        self.steps += 1
        if self.steps - 1 == self.step:
            raise Stop


def learn(model=None, folder=None, stop=None, replay="der++", buffer=24, removed=None, epochs=4, seed=0, **options):
    """A stream of two tasks; returns the model, what was learnt, and what took part."""
    model = model or small_model()
    memory = Replay(ReservoirBuffer(buffer, seeded(1)), replay, batch_size=8) if isinstance(replay, str) else replay
    sparse = SparCL(period=1, refresh=3, replay=memory, **options) if options else None
    meter, stopper = TrainingMeter((1, 8, 8), sparse=sparse, replay=memory), StopAt(stop)

    def trainer(task: int, joined: list[Intervention]) -> Trainer:
        keep = {"checkpoint_dir": folder / str(task), "checkpoint_every": 1} if folder else {}
        return Trainer(epochs, interventions=joined, batch_size=8, seed=seed, accelerator="cpu", **keep)

    learned = learn_tasks(
        model,
        split_by_class(digits(), digits(32, seed=1), 2),
        trainer=trainer,
        optimizer=partial(SGD, lr=0.05),
        sparse=sparse,
        replay=memory,
        removal=(lambda n: DynamicDataRemoval(n, removed, 1, 2)) if removed is not None else None,
        interventions=[meter, stopper],
    )
    return model, learned, sparse, meter


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_replay_keeps_what_fine_tuning_forgets():
    _, kept, _, _ = learn(epochs=10)
    _, lost, _, _ = learn(epochs=10, replay=None)
    assert lost.class_il[1, 0] <= 0.5
    assert kept.class_il[1, 0] >= 0.9
    assert kept.summary().keys() == {"class_il", "task_il", "learning", "forgetting"}
    assert (kept.task_il >= kept.class_il).all()
    assert len(kept.histories) == 2


def test_with_nothing_masked_or_removed_it_is_dense_der_plus_plus_bit_for_bit():
    dense, _, _, meter = learn()
    other, _, _, counted = learn(sparsity=0.0, gradient_sparsity=0.0, removed=0.0)
    assert same(dense, other)
    assert meter.flops == counted.flops > 0


def test_without_weight_the_memory_changes_nothing():
    replay = Replay(ReservoirBuffer(24, seeded(1)), batch_size=8, alpha=0.0, beta=0.0)
    for model in (one := small_model(), other := small_model()):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # the memory's passes would move the statistics
    learn(one, replay=replay)
    learn(other, replay=None)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("replay", ["er", "der++"])
def test_dead_weights_stay_dead_and_sizes_are_exact(release, replay):
    _, _, sparse, meter = learn(replay=replay, removed=0.5, sparsity=0.75, faithful_release=release)
    assert [int(m.sum()) for m in sparse.mask.masks] == [72, 144]
    assert all(not p[m == 0].any() for p, m in zip(sparse.mask.parameters, sparse.mask.masks, strict=True))
    _, _, _, full = learn(replay=replay)
    assert meter.steps < full.steps
    assert meter.flops < 0.8 * full.flops
    start = SparsityMask(small_model(), 0.75)
    assert live(sparse.mask) != live(start)  # the mask has moved


def test_a_static_mask_stays():
    _, _, sparse, _ = learn(sparsity=0.75, dynamic=False)
    assert live(sparse.mask) == live(SparsityMask(small_model(), 0.75))


def test_flops_are_those_of_every_pass():
    model, _, sparse, meter = learn(sparsity=0.75, gradient_sparsity=0.8, dynamic=False)
    # Two tasks of 32 examples, 4 epochs of 4 steps of 8; the second draws 8 twice at every step.
    assert (meter.steps, meter.examples) == (32, 4 * 32 + 4 * 32 * 3)
    cheap = training_flops(model, (1, 8, 8), sparse.mask, 0.8)
    refresh = training_flops(model, (1, 8, 8), sparse.mask)
    per_epoch = [2, 2]  # of 4 steps each: a new gradient mask at the first and, 3 steps on, the last; 2 without
    expected = 4 * 8 * (per_epoch[0] * refresh + per_epoch[1] * cheap) * (1 + 3)
    assert meter.flops == pytest.approx(expected)
    assert meter.seconds > 0


@pytest.mark.parametrize(("stop", "release"), [(6, False), (21, False), (20, True)])
def test_a_killed_stream_resumes_to_the_same_numbers(tmp_path, stop, release):
    options = {"sparsity": 0.75, "removed": 0.4, "faithful_release": release}
    undisturbed, learned, _, meter = learn(folder=tmp_path / "a", **options)
    with pytest.raises(Stop):
        learn(folder=tmp_path / "b", stop=stop, **options)
    resumed, again, _, counted = learn(folder=tmp_path / "b", **options)
    assert same(undisturbed, resumed)
    assert torch.equal(learned.class_il[-1], again.class_il[-1])
    assert (meter.flops, meter.steps) == (counted.flops, counted.steps)


def test_real_sparsity_trains_as_multiplied_zeros_do():
    model, _, sparse, _ = learn(sparsity=0.75, granularity="filter", gradient_sparsity=0.0)
    other, _, real, _ = learn(sparsity=0.75, granularity="filter", gradient_sparsity=0.0, batch_shape=(8, 1, 8, 8))
    assert set(real.execution.table.kernel) == {"sliced"}
    assert not any("forward" in vars(module) for module in other.modules())
    assert live(sparse.mask) == live(real.mask)
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=1e-3, atol=1e-4)


def test_the_gradients_of_both_losses_are_told_apart(monkeypatch):
    seen = []
    monkeypatch.setattr(
        DynamicGradientMask, "apply", lambda self, current=None, memory=None: seen.append((current, memory))
    )
    learn(sparsity=0.5, epochs=1, dynamic=False)
    first_task, second_task = seen[0], seen[4]
    assert first_task[1] is None
    model, inputs = small_model(), digits()
    assert len(second_task[1]) == len(second_task[0]) == 2
    assert all(g.any() for g in (*second_task[0], *second_task[1]))
    data = split_by_class(inputs, inputs, 2)[0].train
    SparsityMask(model, 0.5)
    batch = next(iter(ActiveBatches(DynamicDataRemoval(32), 8, seed=0)))
    loss = single_head_cross_entropy(model.train()(data.inputs[batch]), data.targets[batch], (0, 1))
    expected = torch.autograd.grad(loss, [model.body[1][0].weight, model.body[2][0].weight])
    torch.testing.assert_close(tuple(first_task[0]), expected)


def test_a_single_training_can_be_sparse():
    model = CifarResNet(8, 4, 1, 4)
    data = TensorDataset(digits().inputs, digits().targets)
    sparse = SparCL(0.9, 0.92, period=1)
    trainer = Trainer(3, interventions=[sparse], batch_size=16, accelerator="cpu", precision="bf16-mixed")
    history = trainer.fit(model, data, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.05))
    assert history.last["sparcl/density"] == pytest.approx(sparse.mask.overall_density())
    assert sparse.mask.density() == pytest.approx(0.1, abs=0.01)
    assert all(not p[m == 0].any() for p, m in zip(sparse.mask.parameters, sparse.mask.masks, strict=True))


def test_momentum_is_warned_about_and_dead_weights_stay_dead():
    model, sparse = small_model(), SparCL(0.75, period=1)
    data = TensorDataset(digits().inputs, digits().targets)
    trainer = Trainer(2, interventions=[sparse], batch_size=16, accelerator="cpu")
    optimizer = partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-4)
    with pytest.warns(UserWarning, match=r"optimizer's (momentum|weight_decay) of .* moves weights"):
        trainer.fit(model, data, loss=F.cross_entropy, optimizer=optimizer)
    assert all(not p[m == 0].any() for p, m in zip(sparse.mask.parameters, sparse.mask.masks, strict=True))


def test_misuse_gets_a_clear_error():
    data = digits()
    plain = DataLoader(data.dataset(), batch_size=8)
    with pytest.raises(UserError, match=r"needs examples \(input, target, index\)"):
        Trainer(1, interventions=[DynamicDataRemoval(64)], accelerator="cpu").fit(
            small_model(), plain, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1)
        )
    sparse = SparCL(0.5)
    for model, error in ((small_model(), None), (small_model(), "has masked another model")):
        trainer = Trainer(1, interventions=[sparse], accelerator="cpu")
        fit = partial(trainer.fit, model, plain, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1))
        if error:
            with pytest.raises(UserError, match=error):
                fit()
        else:
            fit()
    with refused(r"gradient_sparsity must be in \[0, 1\), got 1.0"):
        SparCL(0.5, 1.0)
    replay = Replay(ReservoirBuffer(4, seeded()))
    stream = split_by_class(data, data, 2)
    with pytest.raises(UserError, match="sparse and replay must go together"):
        learn_tasks(small_model(), stream, trainer=Trainer, optimizer=SGD, sparse=SparCL(), replay=replay)
    with refused("tasks must hold at least one task"):
        learn_tasks(small_model(), [], trainer=Trainer, optimizer=SGD)


def test_augmented_inputs_are_learnt_from_and_plain_ones_remembered():
    replay = Replay(ReservoirBuffer(64, seeded()), batch_size=8, transform=lambda x: x + 100)
    seen = []
    model = small_model()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]) if model.training else None)
    learn(model, replay=replay, epochs=1)
    assert len(seen) == 4 + 3 * 4
    assert all(x.min() > 50 for x in seen)
    assert replay.buffer.fields[0].max() < 50


# The claim.


def test_the_schedule_is_the_scripts_in_proportion():
    from paperworks.claims.efficient.sparcl import SparCLSettings

    script, short = SparCLSettings(epochs=50), SparCLSettings.at("smoke")
    assert (script.period, script.cutoff) == (5, 20)
    assert (short.period, short.cutoff) == (1, 1)
