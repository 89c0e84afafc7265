import pytest
import torch
from torch.utils.data import DataLoader

from paperworks.data import LabelledData
from paperworks.errors import UserError


def toy(n=6, **change):
    arguments = {
        "inputs": torch.arange(n * 4.0).view(n, 1, 2, 2) / (n * 4),
        "targets": torch.arange(n) % 3,
        "classes": ("a", "b", "c"),
        "name": "toy",
    }
    return LabelledData(**{**arguments, **change})


def test_length_classes_and_batches():
    data = toy()
    assert len(data) == 6
    assert data.num_classes == 3
    inputs, targets = next(iter(DataLoader(data.dataset(), batch_size=4)))
    assert torch.equal(inputs, data.inputs[:4])
    assert torch.equal(targets, data.targets[:4])


@pytest.mark.parametrize(
    "index",
    [torch.tensor([4, 1]), [4, 1], torch.tensor([4, 1], dtype=torch.int32)],
    ids=["tensor", "list", "int32"],
)
def test_subset_takes_positions(index):
    part = toy().subset(index)
    assert part.targets.tolist() == [1, 1]
    assert torch.equal(part.inputs[0], toy().inputs[4])
    assert (part.classes, part.name) == (("a", "b", "c"), "toy")


def test_subset_takes_a_mask_and_copies():
    data = toy()
    part = data.subset(data.targets == 2)
    assert part.targets.tolist() == [2, 2]
    part.inputs.zero_()
    assert torch.equal(data.inputs, toy().inputs)


def test_a_value_that_is_not_finite_is_located():
    inputs = toy().inputs.clone()
    inputs[2, 0, 1, 0] = torch.nan
    with pytest.raises(UserError, match=r"toy: inputs\[2, 0, 1, 0\] is nan"):
        toy(inputs=inputs)
    inputs[2, 0, 1, 0] = -torch.inf
    with pytest.raises(UserError, match=r"inputs\[2, 0, 1, 0\] is -inf"):
        toy(inputs=inputs)


def test_large_finite_values_pass_though_their_sum_overflows():
    assert len(toy(inputs=torch.full((6, 2), 3e38))) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 1, 2, 3, 0, 0])}, r"targets\[3\] is 3, expected 0 to 2"),
        ({"targets": torch.tensor([0, -1, 2, 0, 0, 0])}, r"targets\[1\] is -1"),
        ({"inputs": torch.zeros(6)}, r"inputs must be float32 \[n, ...\], got torch.float32 \[6\]"),
    ],
)
def test_bad_tensors_are_named(change, message):
    with pytest.raises(UserError, match=message):
        toy(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"targets": torch.tensor([0, 1])},
        {"targets": torch.zeros(6)},
        {"inputs": torch.zeros(6, 2, dtype=torch.float64)},
    ],
)
def test_wrong_types_and_lengths_are_named(change):
    # Where shapes in signatures are checked, that check speaks first, with a TypeError.
    with pytest.raises((UserError, TypeError), match=next(iter(change))):
        toy(**change)
