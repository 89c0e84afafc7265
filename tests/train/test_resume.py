"""A run that was killed at any moment ends with the numbers of an undisturbed one."""

import os
import pickle
import random
import signal
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, OneCycleLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from paperworks import files
from paperworks.errors import UserError
from paperworks.train import Intervention, Stream, Trainer, checkpoint


class Jitter(Dataset):
    """Examples under random transforms that draw from every global generator."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        inputs, target = self.data[index]
        return inputs + 0.1 * torch.randn(4) + random.random() * np.random.rand(), target


class Draws(Intervention):
    """Draws from everywhere: a generator of its own, the global one, and a second dataset."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)
        self.stream = Stream(TensorDataset(torch.arange(10.0)), 4, seed=1)
        self.count = 0

    def on_epoch_start(self, state):
        self.shift = torch.rand(()).item()

    def on_batch(self, state):
        self.count += 1
        more = next(self.stream)[0].mean()
        state.inputs = state.inputs + torch.rand((), generator=self.generator) + 0.01 * more + 0.1 * torch.rand(())
        state.logs["count"] = self.count

    def state_dict(self):
        return {"generator": self.generator.get_state(), "stream": self.stream.state_dict(), "count": self.count}

    def load_state_dict(self, state_dict):
        self.generator.set_state(state_dict["generator"])
        self.stream.load_state_dict(state_dict["stream"])
        self.count = state_dict["count"]


class StopAt(Intervention):
    """Ends the run at a step: ``end()`` raises, or kills the process."""

    def __init__(self, step, end):
        self.step, self.end = step, end

    def on_step_end(self, state):
        if state.step == self.step:
            self.end()


class Stopped(Exception):
    pass


def stop():
    raise Stopped


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def as_dataset(data):
    return data


def as_transformed(data):
    return Jitter(data)


def as_loader(data):
    return DataLoader(Jitter(data), 4, shuffle=True)


def as_loader_with_generator(data):
    return DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(9))


def as_loader_with_workers(data):
    return DataLoader(Jitter(data), 4, shuffle=True, num_workers=1)


@pytest.fixture
def run(network, data):
    """Trains from scratch, or resumes; returns all that must be equal."""

    def start(folder=None, *, at=0, end=stop, form=as_dataset, epochs=3, **options):
        model = network(dropout=0.3)
        model.insert(1, nn.BatchNorm1d(8))
        interventions = [Draws(), StopAt(at, end)]
        trainer = Trainer(epochs, batch_size=4, interventions=interventions, checkpoint_dir=folder, **options)
        history = trainer.fit(
            model,
            form(data),
            data,
            loss=F.cross_entropy,
            optimizer=partial(SGD, lr=0.1, momentum=0.9),
            scheduler=partial(MultiStepLR, milestones=[4, 9], gamma=0.5),
        )
        return list(history), {name: value.tolist() for name, value in model.state_dict().items()}

    return start


@pytest.mark.parametrize("at", range(1, 16))
def test_stopped_at_any_step(run, tmp_path, at):
    with pytest.raises(Stopped):
        run(tmp_path, at=at, checkpoint_every=2)
    assert run(tmp_path, checkpoint_every=2) == run()


@pytest.mark.parametrize("at", [3, 7, 11])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "checkpoint_every": 1}, {"schedule": "epoch"}])
def test_stopped_with_other_options(run, tmp_path, at, options):
    with pytest.raises(Stopped):
        run(tmp_path, at=at, epochs=5, **options)
    assert run(tmp_path, epochs=5, **options) == run(epochs=5, **options)


@pytest.mark.parametrize(
    "form", [as_transformed, as_loader, as_loader_with_generator, as_loader_with_workers], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("every", [None, 1])  # a checkpoint after each epoch only, or after each step too
def test_killed_in_mid_epoch(run, forked, tmp_path, form, every):
    assert forked(lambda: run(tmp_path, at=8, end=kill, form=form, checkpoint_every=every)) == -signal.SIGKILL
    assert run(tmp_path, form=form, checkpoint_every=every) == run(form=form)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("call", [1, 4])
def test_killed_while_a_checkpoint_is_written(run, forked, tmp_path, monkeypatch, moment, call):
    done = getattr(os, moment)

    def interrupted():
        calls = []

        def replaced(*arguments):
            calls.append(1)
            if len(calls) == call:
                kill()
            done(*arguments)

        monkeypatch.setattr(os, moment, replaced)
        run(tmp_path, checkpoint_every=2)

    assert forked(interrupted) == -signal.SIGKILL
    assert (tmp_path / "checkpoint.pt").exists() == (call > 1)
    assert run(tmp_path, checkpoint_every=2) == run()


def test_stopped_twice(run, tmp_path):
    for at in (4, 9):
        with pytest.raises(Stopped):
            run(tmp_path, at=at, checkpoint_every=1, form=as_loader)
    assert run(tmp_path, checkpoint_every=1, form=as_loader) == run(form=as_loader)


def test_a_finished_run_is_not_trained_again(run, tmp_path):
    finished = run(tmp_path)
    assert run(tmp_path, at=1) == finished


@pytest.mark.parametrize("kind", [Adam, partial(SGD, lr=0.1)], ids=["adam", "sgd"])
def test_further_modules_resume_too(network, data, tmp_path, kind):
    class Scale(Intervention):
        def setup(self, state):
            self.layer = nn.Linear(3, 3)
            nn.init.eye_(self.layer.weight)
            state.optimizer.add_param_group({"params": list(self.layer.parameters()), "lr": 0.01})

        def compute_loss(self, state, next):
            state.outputs = self.layer(state.outputs)
            return next(state)

        def state_dict(self):
            return self.layer.state_dict()

        def load_state_dict(self, state_dict):
            self.layer.load_state_dict(state_dict)

    def run(folder=None, at=0):
        scale, model = Scale(), network()
        trainer = Trainer(2, batch_size=4, interventions=[scale, StopAt(at, stop)], checkpoint_dir=folder)
        trainer.fit(model, data, loss=F.cross_entropy, optimizer=kind)
        return [p.tolist() for p in (*scale.layer.parameters(), *model.parameters())]

    with pytest.raises(Stopped):
        run(tmp_path, at=7)
    assert run(tmp_path) == run()


@pytest.mark.parametrize(
    "scheduler", [partial(OneCycleLR, max_lr=0.1, total_steps=10), None], ids=["one-cycle", "none"]
)
def test_schedulers_resume(network, data, tmp_path, scheduler):
    def run(folder=None, at=0):
        model = network()
        trainer = Trainer(2, batch_size=4, interventions=[StopAt(at, stop)], checkpoint_dir=folder, checkpoint_every=3)
        trainer.fit(model, data, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1), scheduler=scheduler)
        return [p.tolist() for p in model.parameters()]

    with pytest.raises(Stopped):
        run(tmp_path, at=7)
    assert run(tmp_path) == run()


# Checkpoints that cannot be used.


@pytest.fixture
def plain(network, data, tmp_path):
    """One epoch with a checkpoint in ``tmp_path``."""

    def start(model=None, *, optimizer=None, train_data=data, **options):
        options = {"epochs": 1, "batch_size": 4, "checkpoint_dir": tmp_path} | options
        return Trainer(**options).fit(
            model or network(), train_data, loss=F.cross_entropy, optimizer=optimizer or partial(SGD, lr=0.1)
        )

    return start


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_executes_no_code(plain, tmp_path):
    content = {"format": checkpoint.FORMAT, "bomb": Bomb(tmp_path / "exploded")}
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint.pt cannot be read .*delete it"):
        plain()
    (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match="cannot be read"):
        plain()
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-200] + bytes(200)])
def test_a_damaged_checkpoint_is_refused_in_one_line(plain, tmp_path, damage):
    plain()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"^checkpoint \S+ cannot be read \(\w+\); delete it to start anew$"):
        plain()


@pytest.mark.parametrize("content", [{"format": 0}, {"weights": torch.ones(2)}, [1, 2], torch.ones(3)])
def test_another_format_is_refused(plain, tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="of another format than 1; delete it"):
        plain()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 1}, "seed"),
        ({"epochs": 2}, "steps"),
        ({"interventions": [Draws()]}, "interventions"),
        ({"model": nn.Linear(4, 3)}, "model"),
        ({"model": nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Dropout(0.0), nn.Linear(9, 3))}, "model"),
        ({"optimizer": lambda p: SGD([{"params": [q]} for q in p], lr=0.1)}, "optimizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_checkpoint_of_another_run_is_refused(plain, changed, words):
    plain()
    with pytest.raises(UserError, match=rf"^checkpoint \S+ is of another run: .*{words}.*delete it") as caught:
        plain(**changed)
    assert "\n" not in str(caught.value)


def test_what_could_not_be_loaded_is_not_written(plain, tmp_path):
    class Odd(Intervention):
        def state_dict(self):
            return {"path": tmp_path}

    with pytest.raises(UserError, match="Path"):
        plain(interventions=[Odd()])
    assert not (tmp_path / "checkpoint.pt").exists()


def test_numpy_figures_are_no_hindrance(plain):
    class Log(Intervention):
        def on_step_end(self, state):
            state.logs["figure"] = np.float64(0.5)

    history = plain(interventions=[Log()], checkpoint_every=2)
    assert plain(interventions=[Log()], checkpoint_every=2) == history


def test_a_scheduler_made_of_functions_resumes(network, data, tmp_path):
    def fit():
        trainer = Trainer(1, batch_size=4, checkpoint_dir=tmp_path)
        decay = partial(LambdaLR, lr_lambda=lambda step: 0.9**step)
        return trainer.fit(network(), data, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1), scheduler=decay)

    assert fit() == fit()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
def test_a_full_disk_is_an_error_of_one_line(plain, monkeypatch):
    monkeypatch.setattr(files, "open", lambda path, mode: open("/dev/full", mode), raising=False)  # noqa: SIM115
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*: No space left on device"):
        plain()


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(plain, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        plain(checkpoint_dir=tmp_path / "file")
