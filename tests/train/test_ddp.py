"""Two gloo processes, started as torchrun starts them, give the numbers of one."""

import os
import signal
import socket
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from paperworks.train import Intervention, NonFiniteLoss, Trainer

WORLD = 2


@pytest.fixture
def together(forked, tmp_path):
    """Runs a function in two processes of a group; returns their results."""

    def run(function):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]

        def process(rank):
            os.environ |= {
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(WORLD),
                "LOCAL_WORLD_SIZE": str(WORLD),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "TORCHELASTIC_RUN_ID": "test",
            }
            torch.save(function(rank), tmp_path / f"{rank}.pt")

        codes = forked(*[partial(process, rank) for rank in range(WORLD)])
        if any(codes):
            return codes
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]

    return run


@pytest.fixture
def train(network, data):
    """Trains on ``devices`` processes and returns history and parameters."""

    def start(devices, *, form=lambda data: data, interventions=(), **options):
        model = network()
        metrics = {"accuracy": MulticlassAccuracy(3, average="micro")}
        options = {"batch_size": 8, "interventions": interventions, "metrics": metrics} | options
        trainer = Trainer(3, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", **options)
        held_out = TensorDataset(*(tensor[:9] for tensor in data.tensors))  # the last batch has one example
        history = trainer.fit(
            model, form(data), held_out, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.5, momentum=0.9)
        )
        return list(history), nn.utils.parameters_to_vector(model.parameters()).detach()

    return start


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip_norm": 0.2}], ids=["plain", "accumulate-clip"])
def test_two_processes_give_the_numbers_of_one(together, train, options):
    alone, parameters = train(1, **options)
    for history, same in together(lambda rank: train(WORLD, **options)):
        assert torch.allclose(same, parameters, atol=1e-6)
        for row, expected in zip(history, alone, strict=True):
            assert row == pytest.approx(expected, abs=1e-6)


class KillAt(Intervention):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, state):
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def test_two_killed_processes_resume(together, train, tmp_path):
    options = {"checkpoint_dir": tmp_path / "run", "checkpoint_every": 2}

    def as_loader(data):
        return DataLoader(data, 4, shuffle=True)

    undisturbed = together(lambda rank: train(WORLD, form=as_loader, interventions=[KillAt(0)]))
    killed = together(lambda rank: train(WORLD, form=as_loader, interventions=[KillAt(7)], **options))
    assert killed == [-signal.SIGKILL] * WORLD
    resumed = together(lambda rank: train(WORLD, form=as_loader, interventions=[KillAt(0)], **options))
    for (history, parameters), (expected, same) in zip(resumed, undisturbed, strict=True):
        assert history == expected
        assert torch.equal(parameters, same)


def test_nan_in_one_process_stops_both(together, train):
    class Spoil(Intervention):
        def compute_loss(self, state, next):
            return next(state) * (torch.nan if state.fabric.global_rank == 1 else 1)

    def spoiled(rank):
        with pytest.raises(NonFiniteLoss, match="epoch 0, batch 0"):
            train(WORLD, interventions=[Spoil()])
        return rank

    assert together(spoiled) == [0, 1]
