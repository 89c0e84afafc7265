"""Models that the command line makes by name, and their weights."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from paperworks.commands.models import load_weights, make_model
from paperworks.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somenets.py").write_text("from torch import nn\nmade = nn.Linear(2, 3)\nnumber = 3\n")
    return tmp_path


def test_a_model_is_called_for_with_arguments_or_is_one(here):
    path = list(sys.path)
    assert make_model("torch.nn:Linear", 2, 3).weight.shape == (3, 2)
    assert make_model("somenets:made").weight.shape == (3, 2)
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":made", "a model must be package.module:callable, e.g. torchvision.models:resnet18, got ':made'"),
        ("nonets:made", "cannot import nonets: No module named 'nonets'"),
        ("torch.nn:Linea", "torch.nn has no 'Linea'. Did you mean 'Linear'?"),
        ("torch.nn:Linear", "torch.nn:Linear cannot be made: "),
        ("somenets:number", "somenets:number must return an nn.Module, got int"),
    ],
)
def test_what_is_no_model_gets_one_line(here, name, message):
    with pytest.raises(UserError) as error:
        make_model(name)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_weights_come_from_both_kinds_of_files(tmp_path):
    wanted, model = nn.Linear(2, 3), nn.Linear(2, 3)
    torch.save(wanted.state_dict(), tmp_path / "w.pt")
    save_file({name: 2 * value for name, value in wanted.state_dict().items()}, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.weight, wanted.weight)
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.weight, 2 * wanted.weight)


@pytest.mark.parametrize("name", ["text.pt", "text.safetensors", "empty.pt", "other.pt", "none.pt"])
def test_what_holds_no_weights_gets_one_line(tmp_path, name):
    for text in ("text.pt", "text.safetensors"):
        (tmp_path / text).write_text("no weights")
    (tmp_path / "empty.pt").touch()
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=f"^{tmp_path / name} holds no weights of this model: [^\n]+$"):
        load_weights(nn.Linear(2, 3), tmp_path / name)
