import json
import math
from functools import partial

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load as tensors
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import TensorDataset

from paperworks.bench import Run
from paperworks.errors import UserError


@pytest.fixture
def kept():
    return {}


@pytest.fixture
def make(tmp_path, kept):
    def run(seed=0, report=lambda live: None):
        return Run(
            seed=seed,
            scale="smoke",
            device="cpu",
            data_root=None,
            folder=tmp_path,
            keep=kept.__setitem__,
            report=report,
        )

    return run


def test_generators_depend_on_seed_and_names_alone(make):
    def draw(seed, *names):
        return float(torch.rand((), generator=make(seed).generator(*names), dtype=torch.float64))

    assert draw(0, "noise", 1) == draw(0, "noise", 1)
    drawn = {draw(0), draw(1), draw(0, "noise"), draw(0, "split"), draw(0, "noise", 1), draw(0, "noise", "1", "")}
    assert len(drawn) == 6


def test_curves_skip_what_is_not_finite(make):
    run = make()
    run.log(0, loss=1)
    run.log(1, loss=math.nan, accuracy=0.5)
    run.log(2.5, loss=torch.tensor(2.0))
    assert run.curves == {"loss": [(0, 1), (2.5, 2)], "accuracy": [(1, 0.5)]}


def test_artefacts_are_bytes_text_tensors_or_json(make, kept):
    run = make()
    run.save("raw", b"\x00")
    run.save("some words", "<script>")
    run.save("weights", {"w": torch.ones(2)})
    run.save("table", {"a": [1, 2]})
    figure = Figure()
    figure.subplots().plot([1, 2])
    run.figure("curve", figure)
    assert kept["raw.bin"] == b"\x00"
    assert kept["some-words.txt"] == b"<script>"
    assert torch.equal(tensors(kept["weights.safetensors"])["w"], torch.ones(2))
    assert json.loads(kept["table.json"]) == {"a": [1, 2]}
    assert kept["curve.png"].startswith(b"\x89PNG")
    assert run.artefacts.keys() == kept.keys()


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a.b", "<b>"])
def test_names_of_artefacts_are_names_of_files(make, name, kept):
    with pytest.raises(UserError, match="artefact name"):
        make().save(name, "text")
    assert not kept


def test_a_trainer_is_seeded_and_checkpoints_under_its_name(make, tmp_path):
    run = make(seed=7)
    trainer = run.trainer(2, "first", batch_size=5)
    assert (trainer.seed, trainer.batch_size, trainer.epochs) == (7, 5, 2)
    assert trainer.checkpoint_path == tmp_path / "first" / "checkpoint.pt"
    assert run.trainer(1, "second", seed=3).seed == 3
    with pytest.raises(ValueError, match="'first' already"):
        run.trainer(1, "first")


def test_progress_is_reported_in_bounds_and_not_too_often(make):
    told = []
    run = make(report=told.append)
    for step in range(1000):
        run.progress(step, "busy")
    assert len(told) < 20
    assert told[0] == {"fraction": 0.0, "text": "busy", "curves": {}, "training": {}}
    assert all(0 <= live["fraction"] <= 1 for live in told)


def test_the_live_report_has_the_epochs_of_the_trainer_at_work(make):
    told = []
    run = make(report=told.append)
    rows = TensorDataset(torch.randn(8, 2), torch.zeros(8, 1))
    for name in ("first", "second"):
        run.trainer(3, name, batch_size=4).fit(nn.Linear(2, 1), rows, loss=F.mse_loss, optimizer=partial(SGD, lr=0.1))
        run._last_report = 0.0
        run.progress(1.0)
        training = told[-1]["training"]
        assert training.keys() == {"train/loss"}
        assert [epoch for epoch, _ in training["train/loss"]] == [1, 2, 3]
    assert run.curves == {}  # only what the claim logs is kept
