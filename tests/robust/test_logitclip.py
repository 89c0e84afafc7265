import math
from inspect import unwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from paperworks.errors import UserError
from paperworks.robust import LogitClip, LogitClipLoss, ce_bounds, clip_logits, excess_risk_bound, normalize_logits

quick = settings(max_examples=50)
orders = st.sampled_from([1.0, 1.5, 2.0, 3.0, math.inf])
taus = st.floats(0.05, 20)
seeds = st.integers(0, 2**31)
z = torch.tensor([3.0, -4, 0, 1])


def table(seed, rows=6, classes=5, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)


def cross_entropy(logits, target=1):
    return float(F.cross_entropy(logits, torch.tensor(target)))


# The formula.


def test_three_four_five():
    clipped = clip_logits(torch.tensor([3.0, 4.0]), tau=1.0)
    assert clipped.tolist() == pytest.approx([0.6, 0.8])
    assert cross_entropy(clipped, 0) == pytest.approx(math.log1p(math.exp(0.2))) == pytest.approx(0.7981389)


@pytest.mark.parametrize(("tau", "expected"), [(0.5, 1.808229), (1.0, 2.282757), (2.0, 3.349323), (10.0, 7.170615)])
def test_cross_entropy_of_clipped_logits(tau, expected):
    assert cross_entropy(clip_logits(z, tau)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("p", "clipped", "expected"),
    [(1.0, [0.375, -0.5, 0, 0.125], 1.933815), (math.inf, [0.75, -1, 0, 0.25], 2.562117)],
)
def test_other_norms(p, clipped, expected):
    assert clip_logits(z, 1.0, p).tolist() == pytest.approx(clipped)
    assert cross_entropy(clip_logits(z, 1.0, p)) == pytest.approx(expected, abs=1e-6)


def test_the_gradient_is_orthogonal_to_the_logits():
    leaf = z.clone().requires_grad_()
    F.cross_entropy(clip_logits(leaf), torch.tensor(1)).backward()
    assert leaf.grad.tolist() == pytest.approx([-0.035818, -0.023094, 0.043834, 0.015077], abs=1e-6)
    assert float(leaf.grad @ z) == pytest.approx(0, abs=1e-7)


@quick
@given(seed=seeds, tau=taus, p=orders)
def test_rows_within_the_threshold_are_untouched_and_others_lie_on_it(seed, tau, p):
    logits = table(seed)
    norms = torch.linalg.vector_norm(logits, p, dim=1)
    clipped = clip_logits(logits, tau, p)
    assert torch.equal(clipped[norms <= tau], logits[norms <= tau])
    after = torch.linalg.vector_norm(clipped, p, dim=1)
    assert torch.allclose(after, norms.clamp(max=tau))
    assert torch.equal(clipped.argsort(1), logits.argsort(1))
    assert torch.allclose(clip_logits(clipped, tau, p), clipped)


@quick
@given(seed=seeds, factor=st.floats(1, 1e6), p=orders)
def test_beyond_the_threshold_only_the_direction_counts(seed, factor, p):
    logits = table(seed)
    tau = float(torch.linalg.vector_norm(logits, p, dim=1).min())
    assert torch.allclose(clip_logits(factor * logits, tau, p), clip_logits(logits, tau, p))


@quick
@given(seed=seeds, p=orders)
def test_permuting_classes_permutes_the_result(seed, p):
    logits, order = table(seed), torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(clip_logits(logits[:, order], 1.0, p), clip_logits(logits, 1.0, p)[:, order])


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_continuous_at_the_threshold(p):
    unit = (z / torch.linalg.vector_norm(z, p)).double()
    below, above = (clip_logits(unit * (1 + step), 1.0, p) for step in (-1e-6, 1e-6))
    assert (above - below).abs().max() < 2.1e-6


def test_a_large_threshold_changes_nothing():
    logits, targets = table(0).float(), torch.arange(6) % 5
    gradients = []
    for change in (lambda x: x, lambda x: clip_logits(x, 1e9)):
        leaf = logits.clone().requires_grad_()
        loss = F.cross_entropy(change(leaf), targets)
        loss.backward()
        gradients.append((loss.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, math.inf])
def test_zero_stays_zero_with_a_finite_gradient(p):
    leaf = torch.zeros(2, 4, requires_grad=True)
    clipped = clip_logits(leaf, 1.0, p)
    F.cross_entropy(clipped, torch.tensor([0, 1])).backward()
    assert not clipped.any()
    assert torch.allclose(leaf.grad, torch.full((2, 4), 0.125) - torch.eye(4)[:2] / 2)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_gradcheck(p):
    logits = table(1)
    norms = torch.linalg.vector_norm(logits, p, dim=1)
    tau = float(norms.sort().values[2:4].mean())  # some rows are clipped, none is near the threshold
    assert gradcheck(lambda x: clip_logits(x, tau, p), logits.requires_grad_())
    assert gradcheck(lambda x: normalize_logits(x, tau, p), logits)


def test_a_target_norm_reproduces_the_reference_code():
    rows = torch.tensor([[1.6, 0.0], [1.4, 0.0]])
    expected = torch.tensor([[2 / 3, 0.0], [1.4, 0.0]])
    assert torch.allclose(clip_logits(rows, 1.5, target_norm=1 / 1.5), expected)
    assert torch.allclose(clip_logits(z, 1.0, target_norm=1.0), clip_logits(z, 1.0))


def test_another_dimension():
    images = table(3, 4, 6).reshape(2, 2, 6).float()
    assert torch.allclose(clip_logits(images, dim=1), clip_logits(images.mT, dim=-1).mT)


def test_logit_norm_scales_small_rows_too():
    rows = torch.tensor([[0.3, 0.4], [30.0, 40.0]])
    assert normalize_logits(rows, 2.0).tolist() == [pytest.approx([1.2, 1.6])] * 2
    assert torch.equal(LogitClip(2.0, always=True)(rows), normalize_logits(rows, 2.0))
    assert torch.isfinite(normalize_logits(torch.zeros(1, 3))).all()


# Precision and transforms.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_shape_are_kept_and_the_norm_does_not_overflow(dtype):
    logits = torch.full((2, 3, 1000), 60.0, dtype=dtype)  # in half precision, the sum of squares is infinite
    clipped = clip_logits(logits, 10.0)
    assert (clipped.dtype, clipped.shape) == (dtype, logits.shape)
    assert torch.allclose(clipped.double(), torch.tensor(10 / 1000**0.5, dtype=torch.float64), rtol=1e-2)


def test_vmap_and_jacobian():
    logits = table(5)
    assert torch.allclose(torch.vmap(clip_logits)(logits), clip_logits(logits))
    jacobian = torch.func.vmap(torch.func.jacrev(clip_logits))(5 * logits)
    norm = (5 * logits).norm(dim=1)[:, None, None]
    unit = (5 * logits) / norm[..., 0]
    expected = (torch.eye(5, dtype=torch.float64) - unit[:, :, None] * unit[:, None, :]) / norm
    assert torch.allclose(jacobian, expected)


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        logits = nn.Linear(4, 3)(torch.ones(2, 4)) * 100
        clipped = clip_logits(logits)
    assert clipped.dtype == logits.dtype == torch.bfloat16
    assert torch.allclose(clipped.float().norm(dim=1), torch.ones(2), rtol=1e-2)


@pytest.mark.slow
def test_compiled():
    compiled = torch.compile(unwrap(clip_logits), fullgraph=True)
    logits = table(6).float().requires_grad_()
    expected = clip_logits(logits)
    assert torch.allclose(compiled(logits), expected)
    (ours,), (plain,) = (torch.autograd.grad(f.square()[:, 0].sum(), logits) for f in (compiled(logits), expected))
    assert torch.allclose(ours, plain, atol=1e-6)


def test_traced_whole():
    traced = torch.compile(unwrap(clip_logits), fullgraph=True, backend="eager")
    assert torch.equal(traced(z), clip_logits(z))


# Loss and layer.


def test_the_loss_hands_everything_on_to_its_criterion():
    logits, targets = table(7).float(), torch.arange(6) % 5
    clipped, weight = clip_logits(logits, 0.7), torch.rand(5)
    for criterion, target in [
        (nn.CrossEntropyLoss(reduction="none"), targets),
        (nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1), targets),
        (nn.CrossEntropyLoss(), logits.softmax(1)),
        (nn.MultiMarginLoss(), targets),
    ]:
        assert torch.equal(LogitClipLoss(criterion, 0.7)(logits, target), criterion(clipped, target))
    loss = LogitClipLoss(F.cross_entropy, 0.7)
    assert torch.equal(loss(logits, targets, reduction="sum"), F.cross_entropy(clipped, targets, reduction="sum"))


def test_the_layer_has_no_parameters_and_says_what_it_is():
    layer = LogitClip(0.5, p=math.inf)
    assert not list(layer.parameters())
    assert not layer.state_dict()
    assert repr(layer) == "LogitClip(tau=0.5, p=inf)"
    assert repr(LogitClip(always=True)) == "LogitClip(tau=1.0, p=2.0, always=True)"


def test_rows_that_are_not_finite_are_named_if_asked():
    logits = table(8).float()
    logits[4, 1], logits[5, 0] = math.nan, math.inf
    targets = torch.zeros(6, dtype=torch.long)
    with pytest.raises(UserError, match="row 4"):
        LogitClipLoss(F.cross_entropy, check_finite=True)(logits, targets)
    with pytest.raises(UserError, match="row 0"):
        LogitClipLoss(F.cross_entropy, check_finite=True)(logits[4], targets[4])
    assert LogitClipLoss(F.cross_entropy)(logits, targets).isnan()
    assert LogitClipLoss(F.cross_entropy, check_finite=True)(logits[:4], targets[:4]).isfinite()


# Bounds.


def largest_loss(classes, tau, p, sign):
    """Searches the ball for the largest (or smallest) cross entropy of class 0, from many starts."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(64, classes, generator=generator, dtype=torch.float64)
    found[:32, 0] = -sign * found[:32, 0].abs() - 3.0 * sign
    found = (found * 10 * tau).requires_grad_()
    optimizer = torch.optim.Adam([found], lr=0.3 * tau)
    targets = torch.zeros(64, dtype=torch.long)
    for _ in range(300):
        loss = F.cross_entropy(clip_logits(found, tau, p), targets, reduction="none")
        (-sign * loss).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return float((sign * loss.detach()).max()) * sign


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_bounds_hold_and_the_lower_one_is_attained(classes, tau, p):
    lower, upper = ce_bounds(classes, tau, p)
    q = 1 / (1 - 1 / p) if p > 1 else math.inf
    best = torch.full((classes,), -1 / (classes - 1), dtype=torch.float64)
    best[0] = 1
    direction = best.sign() * best.abs() ** (q - 1) if q < math.inf else torch.eye(classes, dtype=torch.float64)[0]
    attained = cross_entropy(clip_logits(1e6 * direction, tau, p), 0)
    assert attained == pytest.approx(lower, rel=1e-9)
    logits = table(classes, 500, classes, scale=10.0)
    losses = F.cross_entropy(clip_logits(logits, tau, p), torch.arange(500) % classes, reduction="none")
    assert lower - 1e-9 <= losses.min() <= losses.max() <= upper + 1e-9


def test_bounds_for_the_maximum_norm_are_both_attained():
    for classes, tau in [(2, 0.5), (10, 1.0), (1000, 4.0)]:
        logits = torch.full((classes,), -1e3, dtype=torch.float64)
        logits[0] = 1e3
        clipped = clip_logits(logits, tau, math.inf)
        found = cross_entropy(clipped, 0), cross_entropy(-clipped, 0)
        assert found == pytest.approx(ce_bounds(classes, tau, math.inf))
        expected = [math.log1p((classes - 1) * math.exp(sign * 2 * tau)) for sign in (-1, 1)]
        assert found == pytest.approx(expected)


def test_the_search_finds_what_the_specification_found():
    assert largest_loss(10, 0.5, 2.0, 1) == pytest.approx(2.787803, abs=1e-5)
    assert largest_loss(10, 0.5, 2.0, 1) <= ce_bounds(10, 0.5)[1]
    assert largest_loss(10, 0.5, 2.0, -1) == pytest.approx(ce_bounds(10, 0.5)[0], abs=1e-5)
    tau, classes = 8.0, 10  # the worst case of a large threshold has one wrong class
    worst = math.log1p(math.exp(math.sqrt(2) * tau) + (classes - 2) * math.exp(tau / math.sqrt(2)))
    assert worst - 1e-3 <= largest_loss(classes, tau, 2.0, 1) <= ce_bounds(classes, tau)[1]


def test_the_ceiling_of_the_probability():
    assert math.exp(-ce_bounds(100, 1.0)[0]) == pytest.approx(0.027, abs=5e-4)


def test_bounds_do_not_overflow():
    lower, upper = ce_bounds(10, 1e6, math.inf)
    assert lower == pytest.approx(0, abs=1e-12)
    assert upper == pytest.approx(2e6, rel=1e-5)


@quick
@given(seed=seeds, classes=st.integers(2, 8), tau=st.floats(0.1, 5), share=st.floats(0, 0.99))
def test_symmetric_noise_changes_the_minimiser_by_no_more_than_the_bound(seed, classes, tau, share):
    rate = share * (1 - 1 / classes)
    models = table(seed, 40 * 30, classes).reshape(40, 30, classes)  # forty models on thirty examples
    labels = torch.randint(classes, (30,), generator=torch.Generator().manual_seed(seed))
    each = -clip_logits(models, tau).log_softmax(-1)  # loss of every label
    clean = each[:, torch.arange(30), labels].mean(1)
    noise = rate / (classes - 1)
    noisy = (1 - rate) * clean + noise * (each.sum(-1) - each[:, torch.arange(30), labels]).mean(1)
    theorem = (1 - rate * classes / (classes - 1)) * clean + noise * each.sum(-1).mean(1)
    assert torch.allclose(noisy, theorem)
    lower, upper = ce_bounds(classes, tau)
    sums = each.sum(-1)
    assert classes * lower - 1e-9 <= sums.min() <= sums.max() <= classes * upper + 1e-9
    gap = float(clean[noisy.argmin()] - clean.min())
    assert -1e-12 <= gap <= excess_risk_bound(classes, tau, rate) + 1e-9


def test_the_excess_risk_bound():
    lower, upper = ce_bounds(10, 1.0)
    assert excess_risk_bound(10, 1.0, 0.5) == pytest.approx(0.5 * 10 * (upper - lower) / (9 - 5))
    assert excess_risk_bound(10, 1.0, 0.0) == 0


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tau": 0.0}, "tau must be positive and finite, got 0.0"),
        ({"tau": -1.0}, "tau must be"),
        ({"tau": math.inf}, "tau must be"),
        ({"tau": math.nan}, "tau must be"),
        ({"p": 0.5}, "p must be at least 1 or inf, got 0.5"),
        ({"p": math.nan}, "p must be"),
    ],
)
def test_bad_thresholds(arguments, words):
    for function in (
        lambda **a: clip_logits(z, **a),
        lambda **a: normalize_logits(z, **a),
        lambda **a: LogitClipLoss(F.cross_entropy, **a),
        LogitClip,
        lambda **a: ce_bounds(10, **a),
        lambda **a: excess_risk_bound(10, **{"tau": 1.0, "noise_rate": 0.1, **a}),
    ):
        with pytest.raises(UserError, match=words):
            function(**arguments)


@pytest.mark.parametrize("change", [clip_logits, normalize_logits])
@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (torch.tensor([3, 4]), "floating point, got torch.int64"),
        (torch.zeros(5, 1), r"at least 2 classes in dimension -1, got shape \(5, 1\)"),
    ],
)
def test_bad_logits(change, logits, words):
    with pytest.raises(UserError, match=words):
        unwrap(change)(logits)  # without the tests' own checks of shapes and types


def test_bad_target_norm_and_rates():
    with pytest.raises(UserError, match="target_norm must be positive"):
        clip_logits(z, target_norm=0.0)
    with pytest.raises(UserError, match="num_classes"):
        ce_bounds(1)
    for rate in (-0.1, 0.9, math.nan):
        with pytest.raises(UserError, match=r"noise_rate must be in \[0, 0.9\)"):
            excess_risk_bound(10, 1.0, rate)
