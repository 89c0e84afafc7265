import csv
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from paperworks.errors import UserError
from paperworks.robust import LogitClip, LogitClipLoss
from paperworks.train import Intervention, NonFiniteLoss, Trainer

sgd = partial(SGD, lr=0.1)
cross_entropy = {"loss": F.cross_entropy, "optimizer": sgd}


class Recorder(Intervention):
    """Writes down every call."""

    def __init__(self, calls, name=""):
        self.calls, self.name = calls, name

    def note(self, moment):
        self.calls.append(self.name + moment)

    def setup(self, state):
        self.note("setup")

    def on_epoch_start(self, state):
        self.note("epoch start")

    def on_batch(self, state):
        self.note("batch")

    def compute_loss(self, state, next):
        self.note("loss")
        loss = next(state)
        self.note("loss done")
        return loss

    def on_gradients(self, state):
        self.note("gradients")

    def on_step_end(self, state):
        self.note("step end")

    def on_epoch_end(self, state):
        self.note("epoch end")

    def teardown(self, state):
        self.note("teardown")


class Watch(Intervention):
    """Calls a function at the moments named."""

    def __init__(self, **moments):
        for moment, function in moments.items():
            setattr(self, moment, function)


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(network, data, epochs=2, *, fit=cross_entropy, **options):
    model = network()
    Trainer(epochs, **{"batch_size": 8, **options}).fit(model, data, **fit)
    return parameters(model)


def test_hooks_come_in_order(network, data):
    calls = []
    Trainer(2, batch_size=5, accumulate=2, interventions=[Recorder(calls)]).fit(network(), data, **cross_entropy)
    batch = ["batch", "loss", "loss done"]
    step = [*batch, *batch, "gradients", "step end"]
    epoch = ["epoch start", *step, *step, "epoch end"]
    assert calls == ["setup", *epoch, *epoch, "teardown"]


def test_interventions_run_in_the_order_of_the_list_and_the_first_loss_is_outermost(network, data):
    calls = []
    both = [Recorder(calls, "a "), Recorder(calls, "b ")]
    Trainer(1, batch_size=20, interventions=both).fit(network(), data, **cross_entropy)
    moments = ["setup", "epoch start", "batch", "loss"]
    before = [name + moment for moment in moments for name in ("a ", "b ")]
    after = ["b loss done", "a loss done"]
    after += [name + moment for moment in ("gradients", "step end", "epoch end") for name in ("a ", "b ")]
    assert calls == [*before, *after, "b teardown", "a teardown"]


def test_losses_compose_from_the_outside_in(network, data):
    class Double(Intervention):
        def compute_loss(self, state, next):
            return 2 * next(state)

    class AddOne(Intervention):
        def compute_loss(self, state, next):
            return next(state) + 1

    def first_loss(*interventions):
        trainer = Trainer(1, batch_size=20, interventions=interventions)
        return trainer.fit(network(), data, **cross_entropy).last["train/loss"]

    plain = first_loss()
    assert first_loss(Double(), AddOne()) == pytest.approx(2 * (plain + 1))
    assert first_loss(AddOne(), Double()) == pytest.approx(2 * plain + 1)


def test_an_intervention_may_replace_loss_inputs_and_gradients(network, data):
    class Replace(Intervention):
        def on_batch(self, state):
            state.inputs = torch.zeros_like(state.inputs)

        def compute_loss(self, state, next):
            assert not state.inputs.any()
            return state.outputs.square().mean()

        def on_gradients(self, state):
            for p in state.module.parameters():
                p.grad.zero_()

    trainer = Trainer(1, interventions=[Replace()])
    model = network()
    before = parameters(model)
    history = trainer.fit(model, data, loss=lambda outputs, targets: 1 / 0, optimizer=sgd)
    assert torch.equal(parameters(model), before)
    assert history.last["train/loss"] == pytest.approx(float(network()(torch.zeros(1, 4)).square().mean().detach()))


def test_a_layer_in_the_list_is_the_loss_on_clipped_logits(network, data):
    strong = partial(SGD, lr=2.0)
    clipped = trained(network, data, interventions=[LogitClip(0.5)], fit={"loss": F.cross_entropy, "optimizer": strong})
    loss = {"loss": LogitClipLoss(F.cross_entropy, 0.5), "optimizer": strong}
    assert torch.equal(clipped, trained(network, data, fit=loss))


def test_setup_may_train_further_modules_along(network, data):
    class Scale(Intervention):
        def setup(self, state):
            self.scale = state.fabric.to_device(nn.Parameter(torch.ones(3)))
            state.optimizer.add_param_group({"params": [self.scale]})

        def compute_loss(self, state, next):
            state.outputs = state.outputs * self.scale
            return next(state)

    scale = Scale()
    Trainer(1, interventions=[scale]).fit(network(), data, **cross_entropy)
    assert (scale.scale != 1).all()


@pytest.mark.parametrize("batch_size", [4, 5])  # five batches and four: the last group may be incomplete
def test_accumulated_batches_equal_a_big_one(network, data, batch_size):
    small = trained(network, data, batch_size=batch_size, accumulate=2)
    assert torch.allclose(small, trained(network, data, batch_size=2 * batch_size), atol=1e-7)


def test_clipping_bounds_the_whole_gradient_after_the_interventions(network, data):
    norms = {"before": [], "after": []}

    def norm(state):
        return float(torch.cat([p.grad.flatten() for p in state.module.parameters()]).norm())

    class Norms(Intervention):
        def on_gradients(self, state):
            norms["before"].append(norm(state))

        def on_step_end(self, state):
            norms["after"].append(norm(state))

    Trainer(2, clip_norm=0.3, batch_size=8, interventions=[Norms()]).fit(network(), data, **cross_entropy)
    assert max(norms["before"]) > 0.3 > min(norms["after"]) - 1e-3
    assert norms["after"] == pytest.approx([min(n, 0.3) for n in norms["before"]], rel=1e-4)


@pytest.mark.parametrize(("schedule", "expected"), [("step", [1, 0.5, 0.25, 0.125]), ("epoch", [1, 1, 0.5, 0.5])])
def test_the_scheduler_steps_per_step_or_epoch(network, data, schedule, expected):
    rates = []
    watch = Watch(on_gradients=lambda state: rates.append(state.optimizer.param_groups[0]["lr"]))
    trainer = Trainer(2, batch_size=10, schedule=schedule, interventions=[watch])
    halve = partial(StepLR, step_size=1, gamma=0.5)
    trainer.fit(network(), data, loss=F.cross_entropy, optimizer=partial(SGD, lr=1.0), scheduler=halve)
    assert rates == expected


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_steps_is_the_length_of_the_run(network, data, accumulate):
    trainer = Trainer(3, batch_size=4, accumulate=accumulate)
    steps = []
    trainer.interventions = [Watch(on_step_end=lambda state: steps.append((state.step, state.total_steps)))]
    cycle = partial(OneCycleLR, max_lr=0.1, total_steps=trainer.steps(data))
    trainer.fit(network(), data, scheduler=cycle, **cross_entropy)
    assert steps == [(step, trainer.steps(data)) for step in range(1, trainer.steps(data) + 1)]


def test_evaluation_measures_the_plain_model_on_all_examples(network, data):
    held_out = TensorDataset(torch.randn(7, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0]))
    model = network(dropout=0.5)
    metrics = {"accuracy": MulticlassAccuracy(3, average="micro")}
    trainer = Trainer(2, batch_size=3, metrics=metrics, interventions=[LogitClip(0.1)])
    last = trainer.fit(model, data, held_out, **cross_entropy).last
    assert model.training
    with torch.no_grad():
        outputs = model.eval()(held_out.tensors[0])
    assert last["eval/loss"] == pytest.approx(float(F.cross_entropy(outputs, held_out.tensors[1])))
    assert last["eval/accuracy"] == pytest.approx(float((outputs.argmax(1) == held_out.tensors[1]).float().mean()))
    again = trainer.evaluate(model, held_out, F.cross_entropy)
    assert again == pytest.approx({name: last[name] for name in again})
    assert set(trainer.evaluate(model, held_out)) == {"eval/accuracy"}


def test_evaluation_leaves_frozen_parts_frozen(network, data):
    model = network(dropout=0.5)
    frozen = next(model.children()).eval()
    Trainer(1).evaluate(model, data, F.cross_entropy)
    assert model.training
    assert not frozen.training


def test_evaluation_comes_every_so_many_epochs_and_last(network, data):
    history = Trainer(5, eval_every=2).fit(network(), data, data, **cross_entropy)
    assert ["eval/loss" in row for row in history] == [False, True, False, True, True]
    assert len(history.column("eval/loss")) == 3


def test_evaluation_does_not_change_training(network, data):
    class Noisy(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.randn(4), torch.tensor(0)

    def run(eval_data):
        model = network(dropout=0.5)
        Trainer(2, batch_size=8).fit(model, data, eval_data, **cross_entropy)
        return parameters(model)

    assert torch.equal(run(None), run(Noisy()))


def test_history_holds_the_mean_loss_and_what_interventions_log(network, data):
    losses = []

    class Log(Intervention):
        def compute_loss(self, state, next):
            loss = next(state)
            losses.append(float(loss.detach()))
            state.logs["largest"] = max(losses[-3:])
            return loss

    history = Trainer(2, batch_size=8, interventions=[Log()]).fit(network(), data, **cross_entropy)
    assert [set(row) for row in history] == [{"train/loss", "largest"}] * 2
    assert history.column("train/loss") == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])])
    assert history.column("largest") == [max(losses[:3]), max(losses[3:])]
    assert history.last is history[-1]


def test_logs_are_written(network, data, tmp_path):
    Trainer(2, batch_size=8, log_dir=tmp_path).fit(network(), data, data, **cross_entropy)
    (table,) = tmp_path.glob("csv/*/metrics.csv")
    rows = list(csv.DictReader(table.open()))
    assert [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len([row for row in rows if row["eval/loss"]]) == 2
    (events,) = tmp_path.glob("tensorboard/*/events*")
    assert events.stat().st_size > 0


def test_extra_items_of_a_batch_are_kept(network):
    data = TensorDataset(torch.randn(6, 4), torch.zeros(6, dtype=torch.long), torch.arange(6), torch.ones(6))
    seen = []
    Trainer(1, batch_size=4, interventions=[Watch(on_batch=lambda state: seen.append(state.extra))]).fit(
        network(), data, **cross_entropy
    )
    assert [len(extra) for extra in seen] == [2, 2]
    assert sorted(torch.cat([indices for indices, _ in seen]).tolist()) == list(range(6))


# Randomness.


def test_the_callers_random_states_come_back(network, data):
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed():
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    seed()
    expected = draw()
    seed()
    Trainer(1).fit(network(dropout=0.5), data, data, **cross_entropy)
    assert draw() == expected
    seed()
    with pytest.raises(ZeroDivisionError):
        Trainer(1).fit(network(dropout=0.5), data, loss=lambda *_: 1 / 0, optimizer=sgd)
    assert draw() == expected


def test_the_seed_alone_decides(network, data):
    dropping = partial(network, dropout=0.5)
    torch.manual_seed(1)
    first = trained(dropping, data, seed=5)
    torch.manual_seed(2)
    assert torch.equal(trained(dropping, data, seed=5), first)
    assert not torch.equal(trained(dropping, data, seed=6), first)


# Data.


def test_a_dataloader_is_used_as_it_is(network, data):
    seen = []
    watch = Watch(on_batch=lambda state: seen.append(state.inputs))
    loader = DataLoader(data, batch_size=6, drop_last=True)
    history = Trainer(1, batch_size=2, interventions=[watch]).fit(network(), loader, loader, **cross_entropy)
    assert torch.equal(torch.cat(seen), data.tensors[0][:18])
    assert "eval/loss" in history.last


def test_a_dataset_is_shuffled_anew_each_epoch(network, data):
    seen = []
    watch = Watch(on_batch=lambda state: seen.extend(state.inputs[:, 0].tolist()))
    Trainer(2, batch_size=8, drop_last=True, interventions=[watch]).fit(network(), data, **cross_entropy)
    assert len(seen) == 32
    assert seen[:16] != seen[16:]
    assert len(set(seen[:16])) == 16


def test_examples_that_are_no_tensors_are_collated(network):
    examples = [(torch.randn(4), label % 3) for label in range(5)]
    history = Trainer(1, batch_size=2).fit(network(), examples, examples, **cross_entropy)
    assert math.isfinite(history.last["eval/loss"])


# Faults.


def test_a_loss_that_is_not_finite_is_named_by_epoch_and_batch(network, data):
    def fails_at(call, value):
        calls = []

        def loss(outputs, targets):
            calls.append(1)
            plain = F.cross_entropy(outputs, targets)
            return plain * value if len(calls) == call else plain

        return loss

    trainer = Trainer(40, batch_size=8)  # three batches an epoch
    for call, value, words in [(1, math.nan, "nan at epoch 0, batch 0"), (110, math.inf, "inf at epoch 36, batch 1")]:
        with pytest.raises(NonFiniteLoss, match=words):
            trainer.fit(network(), data, loss=fails_at(call, value), optimizer=sgd)


def test_nan_in_the_inputs_is_an_error_of_one_line(network, data):
    data.tensors[0][3, 1] = math.nan
    with pytest.raises(UserError, match=r"^the loss is nan at epoch 0, batch \d .*NaN in the inputs$"):
        Trainer(1, batch_size=8).fit(network(), data, **cross_entropy)


def test_what_was_set_up_is_torn_down_by_an_error_too(network, data):
    calls = []

    class Fails(Intervention):
        def setup(self, state):
            raise RuntimeError("no")

        def teardown(self, state):
            calls.append("never set up")

    with pytest.raises(RuntimeError):
        Trainer(1, interventions=[Recorder(calls), Fails()]).fit(network(), data, **cross_entropy)
    assert calls == ["setup", "teardown"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be"),
        ({"eval_every": -1}, "eval_every must be"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"clip_norm": math.nan}, "clip_norm must be positive"),
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
        ({"schedule": "batch"}, "schedule must be 'step' or 'epoch', got 'batch'"),
        ({"interventions": [F.relu]}, "must be Intervention objects"),
        ({"accelerator": "abacus"}, "abacus"),
        ({"devices": 0}, "devices=0"),
        ({"precision": "int3"}, "int3"),
        ({"strategy": "hope"}, "hope"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(UserError, match=words):
        Trainer(**{"epochs": 1, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="cuda"):
        Trainer(1, accelerator="cuda")


def test_bad_data(network, data):
    for batch_size in (0, -1):
        with pytest.raises(UserError, match="batch_size"):
            Trainer(1, batch_size=batch_size).fit(network(), data, **cross_entropy)
    nothing = TensorDataset(torch.empty(0, 4), torch.empty(0))
    with pytest.raises(UserError, match="empty"):
        Trainer(1).fit(network(), nothing, **cross_entropy)
    with pytest.raises(UserError, match="empty"):
        Trainer(1).fit(network(), data, nothing, **cross_entropy)
    with pytest.raises(UserError, match="no batch"):
        Trainer(1).fit(network(), DataLoader(data, 21, drop_last=True), **cross_entropy)
    with pytest.raises(UserError, match="drop_last"):
        Trainer(1, batch_size=21, drop_last=True).fit(network(), data, **cross_entropy)


# Device and progress.


def test_mixed_precision_trains(network, data):
    history = Trainer(3, precision="bf16-mixed", batch_size=8).fit(network(), data, data, **cross_entropy)
    exact = Trainer(3, batch_size=8).fit(network(), data, data, **cross_entropy)
    assert history.last != exact.last
    assert history.last == pytest.approx(exact.last, rel=0.05)


def test_interventions_see_gradients_of_the_loss_not_of_the_scaled_loss(network, data):
    norms = []

    class Norm(Intervention):
        def on_gradients(self, state):
            norms.append(float(nn.utils.get_total_norm([p.grad for p in state.module.parameters()])))

    trainer = Trainer(1, batch_size=20, clip_norm=1e-3, interventions=[Norm()])
    trainer.fit(network(), data, **cross_entropy)
    trainer.fabric = Fabric(accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu")])
    trainer.fit(network(), data, **cross_entropy)
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_progress_is_told(network, data):
    told = []
    Trainer(2, batch_size=10, progress=lambda *progress: told.append(progress)).fit(network(), data, **cross_entropy)
    assert told == [(0.25, "epoch 1/2"), (0.5, "epoch 1/2"), (0.75, "epoch 2/2"), (1.0, "epoch 2/2")]


def test_a_bar_is_shown_and_ends(network, data, capsys):
    Trainer(2, batch_size=10, progress=True).fit(network(), data, **cross_entropy)
    assert "epoch 2/2" in capsys.readouterr().out
    Trainer(2, batch_size=10, progress=True).fit(network(), data, **cross_entropy)
