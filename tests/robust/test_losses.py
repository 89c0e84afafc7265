import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from paperworks.errors import UserError
from paperworks.robust.losses import (
    asymmetric_gce,
    focal_loss,
    generalized_cross_entropy,
    mean_absolute_error,
    nce_and_rce,
    normalized_cross_entropy,
    partially_huberised_cross_entropy,
    reverse_cross_entropy,
)

quick = settings(max_examples=50)
ALL = [
    asymmetric_gce,
    focal_loss,
    generalized_cross_entropy,
    mean_absolute_error,
    nce_and_rce,
    normalized_cross_entropy,
    partially_huberised_cross_entropy,
    reverse_cross_entropy,
]


def at(*probabilities):
    """Logits of one example with these probabilities; its label is the first."""
    return torch.tensor([probabilities], dtype=torch.float64).log(), torch.tensor([0])


@pytest.mark.parametrize(
    ("loss", "probabilities", "expected"),
    [
        (generalized_cross_entropy, (0.25, 0.75), (1 - 0.25**0.7) / 0.7),
        (mean_absolute_error, (0.25, 0.5, 0.25), 0.75 + 0.5 + 0.25),
        (partially_huberised_cross_entropy, (0.5, 0.5), math.log(2)),
        (partially_huberised_cross_entropy, (0.05, 0.95), -0.5 + math.log(10) + 1),
        (focal_loss, (0.25, 0.75), 0.75**2 * math.log(4)),
        (normalized_cross_entropy, (0.5, 0.25, 0.25), 1 / 5),
        (reverse_cross_entropy, (0.25, 0.75), 4 * 0.75),
        (nce_and_rce, (0.5, 0.25, 0.25), 1 / 5 + 4 * 0.5),
        (asymmetric_gce, (0.25, 0.75), (1.6**0.6 - 0.85**0.6) / 0.6),
    ],
)
def test_values_by_hand(loss, probabilities, expected):
    assert float(loss(*at(*probabilities))) == pytest.approx(expected)


@pytest.mark.parametrize("loss", ALL)
def test_the_mean_over_the_batch(loss):
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    each = [loss(logits[i : i + 1], targets[i : i + 1]) for i in range(6)]
    assert torch.allclose(loss(logits, targets), torch.stack(each).mean())
    assert gradcheck(lambda x: loss(x, targets), logits.requires_grad_())


@pytest.mark.parametrize("loss", ALL)
def test_extreme_logits_give_finite_values_and_gradients(loss):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    value = loss(logits, torch.tensor([0, 0]))
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@quick
@given(
    p=st.floats(1e-5, 1 - 1e-5),
    loss=st.sampled_from([generalized_cross_entropy, mean_absolute_error, reverse_cross_entropy, asymmetric_gce]),
)
def test_bounded_and_falling_in_the_probability_of_the_label(p, loss):
    nearer, farther = float(loss(*at(p, 1 - p))), float(loss(*at(0.9 * p, 1 - 0.9 * p)))
    assert 0 <= nearer < farther <= float(loss(*at(1e-300, 1.0))) + 1e-9


@quick
@given(seed=st.integers(0, 1000))
def test_the_symmetric_losses_sum_to_a_constant_over_labels(seed):
    logits = 3 * torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    constants = {mean_absolute_error: 8, reverse_cross_entropy: 16, normalized_cross_entropy: 1, nce_and_rce: 17}
    for loss, constant in constants.items():
        assert float(sum(loss(logits, torch.tensor([k])) for k in range(5))) == pytest.approx(constant)


def test_generalised_cross_entropy_lies_between_cross_entropy_and_mean_absolute_error():
    logits, target = at(0.3, 0.6, 0.1)
    assert float(generalized_cross_entropy(logits, target, q=1e-6)) == pytest.approx(-math.log(0.3), rel=1e-4)
    assert float(generalized_cross_entropy(logits, target, q=1.0)) == pytest.approx(1 - 0.3)


def test_the_huberised_loss_is_smooth_where_it_turns_linear():
    slopes = []
    for p in (0.1 - 1e-6, 0.1 + 1e-6):
        logits = at(p, 1 - p)[0].requires_grad_()
        loss = partially_huberised_cross_entropy(logits, torch.tensor([0]))
        assert float(loss.detach()) == pytest.approx(math.log(10), abs=1e-4)
        slopes.append(torch.autograd.grad(loss, logits)[0])
    assert torch.allclose(*slopes, atol=1e-4)


def test_focal_loss_without_focus_is_cross_entropy():
    logits, target = at(0.3, 0.6, 0.1)
    assert torch.allclose(focal_loss(logits, target, gamma=0.0), F.cross_entropy(logits, target))


@pytest.mark.parametrize(
    ("loss", "arguments", "words"),
    [
        (generalized_cross_entropy, {"q": 0.0}, r"q must be in \(0, 1\], got 0.0"),
        (generalized_cross_entropy, {"q": 1.1}, "q must be"),
        (generalized_cross_entropy, {"q": math.nan}, "q must be"),
        (partially_huberised_cross_entropy, {"tau": 1.0}, "tau must exceed 1, got 1.0"),
        (asymmetric_gce, {"a": 0.0}, "a and q must be positive"),
        (asymmetric_gce, {"q": -1.0}, "a and q must be positive"),
        (focal_loss, {"gamma": -0.5}, "gamma must not be negative, got -0.5"),
        (reverse_cross_entropy, {"log_zero": 1.0}, "log_zero must be negative, got 1.0"),
    ],
)
def test_bad_arguments(loss, arguments, words):
    with pytest.raises(UserError, match=words):
        loss(*at(0.5, 0.5), **arguments)
