import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor, nn

from paperworks.audit import CategoricalProblem, attack_batch, changes_table, feat_attack, read_categorical
from paperworks.audit.feat import (
    METHODS,
    SequenceConv,
    fsgs_attack,
    gradient_attack,
    load_adult,
    load_splice,
    ompgs_attack,
    random_attack,
    ucb_attack,
)
from paperworks.data import DatasetNotFound, data_root
from paperworks.errors import UserError


class Additive(nn.Module):
    """Two classes; with the logit margin, g of class 1 is ``bias + <W, Z>``."""

    def __init__(self, weights: Tensor, bias: float) -> None:
        super().__init__()
        self.weights, self.bias = nn.Parameter(weights.double()), bias

    def forward(self, z: Tensor) -> Tensor:
        g = (z * self.weights).sum((1, 2)) + self.bias
        return torch.stack([g, torch.zeros_like(g)], 1)


class Table(nn.Module):
    """Margins of two binary features, looked up; differentiable by interpolation."""

    def __init__(self, margins: list[list[float]]) -> None:
        super().__init__()
        self.margins = nn.Parameter(torch.tensor(margins, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        g = torch.einsum("ba,bc,ac->b", z[:, 0], z[:, 1], self.margins)
        return torch.stack([g, torch.zeros_like(g)], 1)


def conv(seed: int, n: int = 6, m: int = 4, classes: int = 3) -> nn.Module:
    """A random network, with weights large enough that inputs matter."""
    torch.manual_seed(seed)
    model = SequenceConv(n, m, classes, width=6).double().eval()
    for parameter in model.parameters():
        parameter.data *= 2.5 if parameter.ndim > 1 else 0
    return model


def attackable(model: nn.Module, number: int, n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows with the class that the model gives them."""
    x = torch.randint(m, (number, n), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return x, model(nn.functional.one_hot(x, m).double()).argmax(1)


def example(gains: list[float]) -> tuple[CategoricalProblem, Tensor]:
    """Three values a feature: the clean one 0, one that adds the gain, one that adds less."""
    gain = torch.tensor(gains)
    weights = torch.stack([torch.zeros_like(gain), gain, gain - 0.2], 1)
    return CategoricalProblem(Additive(weights, -1.0), 3, margin="logit"), torch.zeros(len(gains), dtype=torch.long)


GAINS = [0.05, 0.4, -0.1, 0.5, -0.3, 0.3, -0.2, -0.4, -0.1, -0.2]


# Known answers.


@pytest.mark.parametrize("attack", [feat_attack, fsgs_attack, ompgs_attack, gradient_attack])
def test_the_additive_example(attack):
    problem, x = example(GAINS)
    short = attack(problem, x, 1, max_changes=2)
    assert not short.success
    assert short.margin == pytest.approx(-0.1)
    found = attack(problem, x, 1, max_changes=3)
    assert found.success
    assert found.margin == pytest.approx(0.2)
    assert [(c.feature, c.before, c.after) for c in found.changed] == [(1, 0, 1), (3, 0, 1), (5, 0, 1)]


def test_feat_needs_fewer_queries_than_greedy_search():
    problem, x = example(GAINS)
    assert feat_attack(problem, x, 1, 3).queries < fsgs_attack(problem, x, 1, 3).queries


def test_the_books_of_the_bandit():
    problem, x = example([0.5, 0.1, 0.3])
    found = feat_attack(problem, x, 1, 2, pool=3, pulls=2)
    assert [r.features for r in found.rounds[:2]] == [(0, 2), (1, 2)]
    assert found.rounds[0].rewards == pytest.approx((0.5, 0.3))
    assert found.rounds[1].rewards == pytest.approx((0.1, 0.3))
    assert [r.queries for r in found.rounds[:2]] == [1 + 1 + 4, 1 + 1 + 4 + 1 + 4]
    assert found.regret[:2] == pytest.approx([0.2, 0.2 + 0.4 + 0.2])  # the best arm is worth 0.5 a pull
    assert gradient_attack(problem, x, 1, 2).regret.shape == (0,)


def test_effects_are_exact_where_the_model_is_additive():
    problem, x = example(GAINS)
    slopes = problem.gradient(x[None], torch.tensor([1]))[0]
    np.testing.assert_allclose(slopes[:, 1] - slopes[:, 0], GAINS, atol=1e-7)


@pytest.mark.parametrize("method", ["feat", "fsgs", "ucb", "ompgs"])
def test_features_that_only_help_together_are_not_found(method):
    problem = CategoricalProblem(Table([[-0.2, -0.3], [-0.3, 0.4]]), 2, margin="logit")
    found = attack_batch(method, problem, torch.zeros(1, 2, dtype=torch.long), torch.tensor([1]), 2)[0]
    assert found.status == "exhausted"
    assert found.margin == pytest.approx(-0.2)
    assert found.changed == ()


def test_the_best_row_that_was_passed_by_is_taken_up_again():
    # Greedy search takes feature 0 and is stuck; feature 1 and then feature 2 succeed.
    class Deceptive(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            a, b, c = z[:, 0, 1], z[:, 1, 1], z[:, 2, 1]
            g = -1 + 0.6 * a + 0.5 * b - 0.7 * a * b + 0.8 * b * c - 0.1 * c
            return torch.stack([g, torch.zeros_like(g)], 1)

    problem = CategoricalProblem(Deceptive(), 2, margin="logit")
    x = torch.zeros(3, dtype=torch.long)
    greedy, ours = fsgs_attack(problem, x, 1, 2), feat_attack(problem, x, 1, 2, max_queries=50)
    assert not greedy.success
    assert greedy.margin == pytest.approx(-0.4)
    assert ours.success
    assert ours.margin == pytest.approx(0.2)
    assert [c.feature for c in ours.changed] == [1, 2]


def test_targeted():
    problem = CategoricalProblem(conv(3), 4, targeted=2)
    x, y = attackable(problem.model, 40, 6, 4)
    results = attack_batch("feat", problem, x, y, 3)
    for row, label, result in zip(x, y, results, strict=True):
        logits = problem.model(nn.functional.one_hot(result.x_adv[None], 4).double())
        assert result.success == (label != 2 and int(logits.argmax()) == 2)
        if label == 2:
            assert result.status == "already misclassified"
            assert torch.equal(result.x_adv, row)
    assert any(result.success for result in results)


def test_refit_lets_a_feature_return():
    # The gradient prefers feature 0, but once feature 1 is changed it is better left alone.
    class Late(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            a, b = z[:, 0, 1], z[:, 1, 1]
            g = -1 + 0.5 * a + 0.7 * b - 0.6 * a * b + 2 * a * (1 - a)
            return torch.stack([g, torch.zeros_like(g)], 1)

    problem, x = CategoricalProblem(Late(), 2, margin="logit"), torch.zeros(2, dtype=torch.long)
    found = feat_attack(problem, x, 1, 2, pulls=1, alpha=0, refit=True)
    assert [(s.feature, s.value) for s in found.trace[:3]] == [(0, 1), (1, 1), (0, 0)]
    assert [s.margin for s in found.trace[:3]] == pytest.approx([-0.5, -0.4, -0.3])
    assert [c.feature for c in found.changed] == [1]


# Limits that it shares with its neighbours.


def greedy(problem: CategoricalProblem, x: Tensor, y: int, changes: int, top: int) -> list[tuple[int, int]]:
    """Greedy search among the ``top`` features, written plainly: which changes are made."""
    x, made, label = x.clone(), [], torch.tensor([y])
    margin = float(problem.margin(x[None], label)[0])
    while len(made) < changes and margin <= 0:
        slopes, barred = problem.gradient(x[None], label)[0], {i for i, _ in made}
        while True:
            promise = {
                i: max(slopes[i, v] - slopes[i, x[i]] for v in range(problem.m) if v != x[i])
                for i in range(len(x))
                if i not in barred
            }
            arms = sorted(sorted(promise, key=lambda i: -promise[i])[:top])
            if not arms:
                return made
            options = {}
            for i in arms:
                for v in range(problem.m):
                    if v != x[i]:
                        row = x.clone()
                        row[i] = v
                        options[i, v] = float(problem.margin(row[None], label)[0])
            best = max(options, key=lambda option: options[option])
            if options[best] - margin > 1e-6:
                break
            barred |= set(arms)
        x[best[0]], margin = best[1], options[best]
        made.append(best)
    return made


@pytest.mark.parametrize("seed", range(3))
def test_one_episode_with_all_arms_is_greedy_search(seed):
    problem = CategoricalProblem(conv(seed), 4)
    for row, label in zip(*attackable(problem.model, 8, 6, 4, seed), strict=True):
        expected = greedy(problem, row, int(label), 3, top=6)
        for attack, options in [(fsgs_attack, {}), (ompgs_attack, {"top": 6})]:
            found = attack(problem, row, int(label), 3, 10_000, **options)
            assert [(s.feature, s.value) for s in found.trace] == expected
        ours = feat_attack(problem, row, int(label), 3, 10_000, pool=6, pulls=6, alpha=0)
        assert [(s.feature, s.value) for s in ours.trace if s.episode == 1] == expected


@pytest.mark.parametrize("top", [1, 2, 4])
def test_ompgs_is_one_episode_without_a_bonus(top):
    problem = CategoricalProblem(conv(5), 4)
    for row, label in zip(*attackable(problem.model, 8, 6, 4), strict=True):
        expected = greedy(problem, row, int(label), 3, top)
        found = ompgs_attack(problem, row, int(label), 3, 10_000, top=top)
        assert [(s.feature, s.value) for s in found.trace] == expected
        ours = feat_attack(problem, row, int(label), 3, 10_000, pool=top, pulls=top, alpha=0)
        assert [(s.feature, s.value) for s in ours.trace if s.episode == 1] == expected


def test_a_large_bonus_pulls_what_was_pulled_least(monkeypatch):
    problem, x = example([0.2, 0.19, 0.18, 0.17, 0.16, 0.15])
    pulls = []
    score = problem.margin

    def spy(rows, y):
        if len(rows) == 2:  # both values of one arm
            pulls.append(int(np.flatnonzero(rows[0] != rows[1])[0]))
        return score(rows, y)

    monkeypatch.setattr(problem, "margin", spy)
    feat_attack(problem, x, 1, 2, pool=6, pulls=1, alpha=1e6)
    assert sorted(pulls[:6]) == list(range(6))
    pulls.clear()
    feat_attack(problem, x, 1, 2, pool=6, pulls=1, alpha=0)
    assert sorted(pulls[:6]) != list(range(6))


# What every result must be.


@examples(max_examples=40)
@given(
    method=st.sampled_from(sorted(METHODS)),
    seed=st.integers(0, 50),
    changes=st.integers(1, 4),
    queries=st.integers(1, 80),
    refit=st.booleans(),
)
def test_every_result_keeps_to_its_limits(method, seed, changes, queries, refit):
    model = conv(seed)
    draw = np.random.default_rng(seed)
    x, y = attackable(model, 3, 6, 4, seed)
    allowed = draw.random((3, 6, 4)) < 0.7
    np.put_along_axis(allowed, x.numpy()[..., None], True, axis=2)
    mutable = draw.random(6) < 0.8
    problem = CategoricalProblem(model, 4, mutable=mutable)
    options = {"refit": refit} if method in ("feat", "ucb") else {}
    results = attack_batch(method, problem, x, y, changes, queries, allowed=allowed, **options)
    assert problem.queries + problem.gradients == sum(result.queries for result in results)
    assert problem.gradients == sum(result.gradients for result in results)
    for k, result in enumerate(results):
        moved = (result.x_adv != x[k]).numpy()
        assert moved.sum() <= changes
        assert not moved[~mutable].any()
        assert allowed[k][np.arange(6), result.x_adv.numpy()].all()
        assert result.queries <= queries
        assert [c.feature for c in result.changed] == np.flatnonzero(moved).tolist()
        fresh = problem.margin(result.x_adv[None], y[k : k + 1])[0]
        clean = problem.margin(x[k : k + 1], y[k : k + 1])[0]
        assert result.margin == pytest.approx(fresh, abs=1e-9)
        assert result.success == (fresh > 0)
        assert fresh >= clean


@pytest.mark.parametrize("method", sorted(METHODS))
def test_many_rows_at_once_are_what_each_is_alone(method):
    model = conv(1)
    x, y = attackable(model, 20, 6, 4)
    alone = {
        "feat": feat_attack,
        "ucb": ucb_attack,
        "fsgs": fsgs_attack,
        "ompgs": ompgs_attack,
        "gradient": gradient_attack,
        "random": random_attack,
    }[method]
    seeded = {"generator": torch.Generator().manual_seed(7)} if method in ("feat", "ucb", "random") else {}
    together = attack_batch(
        method, CategoricalProblem(model, 4), x, y, 3, lockstep=8, generator=torch.Generator().manual_seed(7)
    )
    for row, label, result in zip(x, y, together, strict=True):
        single = alone(CategoricalProblem(model, 4), row, int(label), 3, **seeded)
        assert torch.equal(single.x_adv, result.x_adv)
        assert (single.status, single.queries, len(single.trace)) == (
            result.status,
            result.queries,
            len(result.trace),
        )


def test_the_same_generator_gives_the_same_search():
    model = conv(2)
    x, y = attackable(model, 10, 6, 4)
    runs = [
        attack_batch("ucb", CategoricalProblem(model, 4), x, y, 2, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    ]
    traces = [[result.trace for result in results] for results in runs]
    assert traces[0] == traces[1]
    assert traces[0] != traces[2]


def test_rows_share_forward_passes_in_chunks(monkeypatch):
    model = conv(4)
    x, y = attackable(model, 16, 6, 4)
    sizes = []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    attack_batch("fsgs", CategoricalProblem(model, 4, chunk=50), x, y, 1)
    assert max(sizes) == 50
    assert len(sizes) == 1 + -(-16 * 18 // 50)


@pytest.mark.parametrize("method", ["feat", "ucb"])
def test_the_search_does_not_depend_on_the_scale_of_the_margin(method):
    model = conv(3)
    x, y = attackable(model, 10, 6, 4)

    louder = conv(3)
    louder.body[-1].weight.data *= 1024
    problems = [CategoricalProblem(m, 4, margin="logit") for m in (model, louder)]
    both = [attack_batch(method, problem, x, y, 2, alpha=0.5) for problem in problems]
    steps = [[[(s.episode, s.feature, s.value) for s in result.trace] for result in results] for results in both]
    assert steps[0] == steps[1]


# Gradients.


@pytest.mark.parametrize("margin", ["prob", "logit"])
def test_gradients_against_finite_differences(margin):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(28, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    x, y = attackable(model, 4, 7, 4)
    problem = CategoricalProblem(model, 4, margin=margin)
    slopes, z, step = problem.gradient(x, y), nn.functional.one_hot(x, 4).double(), 1e-6

    def margins(z: Tensor) -> Tensor:
        scores = model(z).softmax(1) if margin == "prob" else model(z)
        own = scores.gather(1, y[:, None]).squeeze(1)
        return scores.scatter(1, y[:, None], -torch.inf).amax(1) - own

    with torch.no_grad():
        for i, v in [(0, 0), (2, 1), (6, 3)]:
            change = torch.zeros_like(z)
            change[:, i, v] = step
            difference = (margins(z + change) - margins(z - change)) / (2 * step)
            np.testing.assert_allclose(slopes[:, i, v], difference, rtol=1e-3, atol=1e-9)


def test_embeddings_give_the_gradient_of_one_hot_rows():
    torch.manual_seed(0)
    table = torch.randn(5, 3, dtype=torch.float64)
    top = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval()

    class OneHot(nn.Module):
        def __init__(self):
            super().__init__()
            self.top = top

        def forward(self, z):
            return self.top(z @ table)

    one_hot, embedded = CategoricalProblem(OneHot().eval(), 5), CategoricalProblem(top, 5, embedding=table)
    x, y = attackable(one_hot.model, 6, 4, 5)
    np.testing.assert_allclose(embedded.margin(x, y), one_hot.margin(x, y))
    np.testing.assert_allclose(embedded.gradient(x, y), one_hot.gradient(x, y), atol=1e-12)


def test_the_model_is_left_as_it_was():
    model = conv(0)
    before = [parameter.clone() for parameter in model.parameters()]
    x, y = attackable(model, 4, 6, 4)
    attack_batch("feat", CategoricalProblem(model, 4), x, y, 2)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# Scores only.


def forest() -> tuple[RandomForestClassifier, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (300, 8))
    y = (x[:, 0] + x[:, 3] >= 2).astype(int)
    model = RandomForestClassifier(20, random_state=0).fit(x, y)
    return model, x[:20], model.predict(x[:20])


@pytest.mark.parametrize(("method", "options"), [("ucb", {}), ("feat", {"samples": 12}), ("fsgs", {}), ("random", {})])
def test_a_classifier_of_scores_only_is_attacked(method, options):
    model, x, y = forest()
    asked = []

    def scores(rows: np.ndarray) -> np.ndarray:
        asked.append(len(rows))
        return model.predict_proba(rows)

    problem = CategoricalProblem.from_scores(scores, 3)
    results = attack_batch(method, problem, x, y, 2, **options)
    assert sum(asked) == sum(result.queries for result in results)
    assert np.mean([result.success for result in results]) > 0.9
    for result, label in zip(results, y, strict=True):
        assert result.success == (model.predict(result.x_adv.numpy()[None])[0] != label)


def test_a_stand_in_guides_at_no_query():
    model, x, y = forest()
    torch.manual_seed(0)
    stand_in = SequenceConv(8, 3, 2, width=8).eval()
    problem = CategoricalProblem.from_scores(model.predict_proba, 3)
    guide = CategoricalProblem(stand_in, 3)
    results = attack_batch("feat", problem, x, y, 2, guide=guide)
    assert problem.queries == sum(result.queries for result in results)
    assert problem.gradients == 0
    assert guide.gradients == sum(result.gradients for result in results) > 0


@pytest.mark.parametrize("attack", [feat_attack, ompgs_attack, gradient_attack])
def test_gradients_asked_of_scores_are_refused_in_one_line(attack):
    model, x, y = forest()
    problem = CategoricalProblem.from_scores(model.predict_proba, 3)
    with pytest.raises(UserError, match="needs gradients, and this problem gives scores only") as caught:
        attack(problem, x[0], int(y[0]), 2)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="scores only"):
        problem.gradient(x, y)


def test_a_guide_is_refused_where_it_would_do_nothing():
    model, x, y = forest()
    problem = CategoricalProblem.from_scores(model.predict_proba, 3)
    torch.manual_seed(0)
    guide = CategoricalProblem(SequenceConv(8, 4, 2, width=8).eval(), 4)
    with pytest.raises(UserError, match="ucb as asked for uses none"):
        attack_batch("ucb", problem, x, y, 2, guide=guide)
    with pytest.raises(UserError, match="guide must be of 3 values as the problem is, got 4"):
        attack_batch("feat", problem, x, y, 2, guide=guide)


# How a search ends.


def test_rows_already_wrong_are_left_alone():
    problem = CategoricalProblem(conv(0), 4)
    x, y = attackable(problem.model, 1, 6, 4)
    found = feat_attack(problem, x[0], (int(y[0]) + 1) % 3, 2)
    assert (found.status, found.queries, found.success, found.changed) == ("already misclassified", 0, False, ())


def test_a_search_out_of_time_keeps_its_best():
    problem, x = example(GAINS)
    found = feat_attack(problem, x, 1, 2, time_limit=1e-9)
    assert (found.status, found.queries) == ("out of time", 1)
    assert torch.equal(found.x_adv, x)
    assert found.margin == pytest.approx(-1)


def test_a_row_of_which_nothing_may_change_is_exhausted():
    model = conv(0)
    x, y = attackable(model, 1, 6, 4)
    for method in METHODS:
        found = attack_batch(method, CategoricalProblem(model, 4, mutable=[False] * 6), x, y, 2)[0]
        assert found.status == "exhausted"
    found = attack_batch("feat", CategoricalProblem(model, 4, mutable=[False] * 6), x, y, 2, samples=8)[0]
    assert found.status == "exhausted"


# Bad input.


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r"x\[1, 2\] is 4, expected a value from 0 to 3", {"x": [[0, 0, 0], [0, 0, 4]]}),
        (r"x\[0, 1\] is 3, which is not allowed there", {"x": [[0, 3, 0], [0, 0, 0]]}),
        ("max_changes must be from 1 to the 3 features, got 0", {"max_changes": 0}),
        ("max_changes must be from 1 to the 3 features, got 4", {"max_changes": 4}),
        ("max_queries must be at least 1", {"max_queries": 0}),
        ("y holds class 7, but the model has classes 0 to 1", {"y": [0, 7]}),
        (r"y\[0\] is -1", {"y": [-1, 0]}),
        ("y must have a class for each of 2 rows, got 1", {"y": [0]}),
        ("X must hold whole numbers", {"x": [[0.5, 0, 0], [0, 0, 0]]}),
        ("unknown method 'feet'. Did you mean 'feat'", {"method": "feet"}),
        ("unknown option of feat 'pol'. Did you mean 'pool'", {"pol": 3}),
        ("pool must be at least 1, got 0", {"pool": 0}),
        ("pulls must be at least 1, got 0", {"pulls": 0}),
        ("alpha must be at least 0", {"alpha": -1.0}),
        ("alpha must be at least 0", {"alpha": float("nan")}),
        ("time_limit must be positive", {"time_limit": 0.0}),
        (r"allowed must be bool \[2, 3, 4\], got bool \[2, 2\]", {"allowed": np.ones((2, 2), bool)}),
    ],
)
def test_bad_arguments_are_refused(message, changed):
    allowed = torch.ones(3, 4, dtype=torch.bool)
    allowed[1, 3] = False
    problem = CategoricalProblem(conv(0, n=3, classes=2), 4, allowed)
    x = torch.tensor([[0, 1, 2], [3, 0, 1]])
    y = problem.model(nn.functional.one_hot(x, 4).double()).argmax(1)
    call = {"method": "feat", "x": x, "y": y, "max_changes": 2} | changed
    with pytest.raises(UserError, match=message) as caught:
        attack_batch(call.pop("method"), problem, np.array(call.pop("x")), np.array(call.pop("y")), **call)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"allowed\[1\] is empty", {"n_values": 2, "allowed": np.array([[True, True], [False, False]])}),
        ("allowed must be bool", {"n_values": 3, "allowed": np.ones((2, 2), bool)}),
        ("n_values must be at least 2 .*, got 1", {"n_values": 1}),
        ("unknown margin 'probs'. Did you mean 'prob'", {"n_values": 2, "margin": "probs"}),
        ("embedding must have a row for each of 5 values, got 4", {"n_values": 5, "embedding": torch.randn(4, 2)}),
        ("mutable must say of each of 2 features", {"n_values": [2, 3], "mutable": [True]}),
        ("chunk must be at least 1", {"n_values": 2, "chunk": 0}),
        ("targeted must be a class", {"n_values": 2, "targeted": -1}),
    ],
)
def test_bad_problems_are_refused(message, arguments):
    with pytest.raises(UserError, match=message):
        CategoricalProblem(nn.Identity(), **arguments)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda z: torch.zeros(len(z)), r"the model returned \[1\], expected \[1, classes\]"),
        (lambda z: torch.full((len(z), 2), torch.nan), "the model returned NaN"),
    ],
)
def test_bad_models_are_refused(output, message):
    class Broken(nn.Module):
        def forward(self, z):
            return output(z)

    with pytest.raises(UserError, match=message):
        feat_attack(CategoricalProblem(Broken().eval(), 2), torch.zeros(3, dtype=torch.long), 0, 1)


def test_a_model_in_training_mode_is_warned_of():
    model = conv(0)
    x, y = attackable(model, 1, 6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feat_attack(CategoricalProblem(model, 4), x[0], int(y[0]), 1)
    with pytest.warns(UserWarning, match="training mode"):
        feat_attack(CategoricalProblem(model.train(), 4), x[0], int(y[0]), 1)


# Tables and reports.


def test_a_table_is_read_and_its_changes_are_reported(tmp_path):
    file = tmp_path / "jobs.csv"
    file.write_text("job,city,label\ncook,Rome,no\nclerk,,yes\ncook,Oslo,no\n")
    table = read_categorical(file)
    assert table.features == ("job", "city")
    assert table.values == (("clerk", "cook"), ("?", "Oslo", "Rome"))
    assert table.rows.tolist() == [[1, 2], [0, 0], [1, 1]]
    assert (table.classes, table.targets.tolist()) == (("no", "yes"), [0, 1, 0])
    assert table.allowed().tolist() == [[True, True, False], [False, True, True]]
    assert table.within(table.allowed()).tolist() == [True, False, True]
    assert table.masks(table.rows[:2]).tolist() == [
        [[True, True, False], [False, True, True]],
        [[True, True, False], [True, False, False]],
    ]
    with pytest.raises(UserError, match=r"unknown feature 'cty'\. Did you mean 'city'"):
        table.all_but("cty")

    problem = CategoricalProblem.from_scores(
        lambda rows: np.stack([rows[:, 0] == 1, rows[:, 0] == 0], 1) * 1.0,
        table.n_values,
        table.allowed(),
        mutable=table.all_but("city"),
    )
    results = attack_batch("fsgs", problem, table.rows[[0]], table.targets[[0]], 1)
    report = changes_table(results, table.features, table.values)
    assert report.to_dict("records") == [
        {"row": 0, "feature": "job", "before": "cook", "after": "clerk", "margin": 1.0, "queries": 2}
    ]
    assert len(changes_table([])) == 0
    with pytest.raises(UserError, match="features must have an entry for each of 2 features, got 1"):
        changes_table(results, ["job"])


def test_sequences_become_a_feature_a_place(tmp_path):
    file = tmp_path / "dna.csv"
    file.write_text("id,dna,label\na,ACGT,1\nb,TTGA,0\n")
    table = read_categorical(file, sequence="dna")
    assert table.features == ("dna[0]", "dna[1]", "dna[2]", "dna[3]")
    assert table.values == (("A", "C", "G", "T"),) * 4
    assert table.rows.tolist() == [[0, 1, 2, 3], [3, 3, 2, 0]]
    with pytest.raises(UserError, match=r"unknown column of dna.csv 'dnaa'. Did you mean 'dna'"):
        read_categorical(file, sequence="dnaa")
    file.write_text("dna,label\nACGT,1\nTTG,0\nAAAA,1\n")
    with pytest.raises(UserError, match="has 3 characters in data row 2, expected 4"):
        read_categorical(file, sequence="dna")


def test_shorter_sequences_of_tokens_are_filled_up(tmp_path):
    file = tmp_path / "log.csv"
    file.write_text("events,label\nlogin read read,ok\nlogin,bad\n")
    table = read_categorical(file, sequence="events", separator=" ")
    assert table.features == ("events[0]", "events[1]", "events[2]")
    named = [[table.values[i][k] for i, k in enumerate(row)] for row in table.rows.tolist()]
    assert named == [["login", "read", "read"], ["login", "?", "?"]]


def test_whole_numbers_are_categories_and_a_constant_column_is_none_to_change(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("size,colour,label\n1,red,a\n,red,b\n12,red,a\n")
    table = read_categorical(file)
    assert table.values == (("1", "12", "?"), ("red",))
    problem = CategoricalProblem.from_scores(
        lambda rows: np.stack([rows[:, 0] == 0, rows[:, 0] > 0], 1) * 1.0, table.n_values, table.allowed()
    )
    found = fsgs_attack(problem, table.rows[0], 0, 2)
    assert [(c.feature, c.after) for c in found.changed] == [(0, 1)]


def test_a_column_of_too_many_values_is_refused(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("a,label\n" + "".join(f"{i},{i % 2}\n" for i in range(20)))
    with pytest.raises(UserError, match="column 'a' has 20 distinct values, more than 10"):
        read_categorical(file, max_values=10)


def test_the_official_splice_file(tmp_path):
    file = tmp_path / "splice.data"
    bases = "AGTC" * 14 + "DNSR"
    file.write_text(f"EI,  SOME-1,   {bases}\nN,OTHER,{bases[::-1]}\n")
    table = load_splice(root=tmp_path)
    assert table.rows.shape == (2, 60)
    assert table.rows[0, :4].tolist() == [0, 1, 2, 3]
    assert (table.rows[0, 56:] == 4).all()
    assert [table.classes[k] for k in table.targets] == ["EI", "N"]
    assert (table.features[0], table.features[29:31], table.features[-1]) == ("-30", ("-1", "+1"), "+30")
    file.write_text(f"EI,SOME,{bases}\nEJ,OTHER,{bases}\n")
    with pytest.raises(UserError, match="line 2: expected"):
        load_splice(file)
    with pytest.raises(DatasetNotFound, match=r"Get splice\.data"):
        load_splice(root=tmp_path / "nowhere")


def test_a_broken_archive_is_refused(tmp_path):
    file = tmp_path / "splice.npz"
    file.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match="must hold arrays x and y"):
        load_splice(file)
    np.savez(file, x=np.zeros((3, 60), np.uint8))
    with pytest.raises(UserError, match="must hold arrays x and y"):
        load_splice(file)
    np.savez(file, x=np.full((3, 60), 5, np.uint8), y=np.zeros(3, np.uint8))
    with pytest.raises(UserError, match="in 0 to 4"):
        load_splice(file)


def test_adult_in_the_format_of_libsvm(tmp_path):
    file = tmp_path / "a9a"
    file.write_text("-1 3:1 11:1 14:1 19:1 39:1 42:1 55:1 64:1 67:1 73:1 75:1 76:1 80:1 83:1\n+1 5:1 73:1\n")
    table = load_adult(root=tmp_path)
    named = {f: v[k] for f, v, k in zip(table.features, table.values, table.rows[0].tolist(), strict=True)}
    assert (named["workclass"], named["education"], named["sex"]) == ("State-gov", "Bachelors", "Male")
    assert (named["capital-gain"], named["native-country"]) == ("some", "United-States")
    assert table.values[3][int(table.rows[1, 3])] == "?"
    assert table.targets.tolist() == [0, 1]
    file.write_text("-1 1:1 2:1\n")
    with pytest.raises(UserError, match="not a9a: data row 1 has two values of age"):
        load_adult(file)


@pytest.mark.skipif(not (data_root() / "tables/splice.npz").exists(), reason="UCI Splice is not on this machine")
def test_real_splice_junctions_hold_their_consensus():
    table = load_splice()
    assert torch.bincount(table.targets).tolist() == [768, 1655, 767]
    for name, place, pair in [("IE", 28, "AG"), ("EI", 30, "GT")]:
        rows = table.rows[table.targets == table.classes.index(name)]
        for offset, base in enumerate(pair):
            share = (rows[:, place + offset] == table.values[0].index(base)).double().mean()
            assert share > 0.98
