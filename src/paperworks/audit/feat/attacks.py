"""The attacks: one row, or many in lock-step so that one forward pass serves them all."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor

from paperworks.errors import UserError, check_counts, unknown

from . import search
from .problem import CategoricalProblem, Labels, Mask, Masks, Rows, as_array
from .search import Ask, Round, Row, Search, Step, Strategy

Status = Literal["success", "exhausted", "out of queries", "out of time", "already misclassified"]
Example = Int[Tensor, " features"] | Int[np.ndarray, " features"]

METHODS: dict[str, Callable[..., Strategy]] = {
    "random": search.random,
    "gradient": search.gradient,
    "ompgs": search.ompgs,
    "fsgs": search.fsgs,
    "ucb": search.ucb,
    "feat": search.feat,
}
WITH_GRADIENTS = ("gradient", "ompgs", "feat")


class Change(NamedTuple):
    """A feature that differs from the clean row."""

    feature: int
    before: int
    after: int


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack on one row came to.

    Attributes:
        status: ``"success"``; ``"exhausted"``: nothing more to try; ``"out of queries"``; ``"out of time"``; or
            ``"already misclassified"``, with nothing to attack and no query counted.
        x_adv: The row with the largest margin of those the search went through. The clean row if no change helped.
        changed: Where ``x_adv`` differs from it.
        margin: Of ``x_adv``, positive exactly if it is misclassified.
        queries: Rows scored, and rows whose gradient was taken.
        gradients: The latter alone.
        seconds: From the row's first query to its last. In lock-step rows wait for one another.
        trace: Each accepted change (the random attack, which changes several at once, has none).
        rounds: Each round of pulls, with rewards; the gradient and the random attack pull no arms.
    """

    status: Status
    x_adv: Int64[Tensor, " features"]
    changed: tuple[Change, ...]
    margin: float
    queries: int
    gradients: int
    seconds: float
    trace: tuple[Step, ...]
    rounds: tuple[Round, ...]

    @property
    def success(self) -> bool:
        """Whether the attack made the model err."""
        return self.status == "success"

    @property
    def regret(self) -> Float64[np.ndarray, " rounds"]:
        r"""What pulling the best arm only would have won more, $\sum (\max_i \mu_i - r)$ over all pulls up to a round.

        $\mu_i$ is the mean reward of arm $i$ over the whole search. It is small if the search soon kept to what pays.
        """
        rewards: dict[int, list[float]] = {}
        for found in self.rounds:
            for feature, reward in zip(found.features, found.rewards, strict=True):
                rewards.setdefault(feature, []).append(reward)
        best = max((sum(of_arm) / len(of_arm) for of_arm in rewards.values()), default=0.0)
        return np.cumsum([sum(best - reward for reward in found.rewards) for found in self.rounds], dtype=float)


def attack_batch(
    method: str,
    problem: CategoricalProblem,
    X: Rows,
    y: Labels,
    max_changes: int,
    max_queries: int = 300,
    *,
    allowed: Masks | None = None,
    guide: CategoricalProblem | None = None,
    time_limit: float | None = None,
    generator: torch.Generator | None = None,
    lockstep: int = 64,
    **options: Any,
) -> list[AttackResult]:
    """Attack many rows, whose searches advance together: one forward pass scores what all of them ask.

    Results are those of one row after the other, but for the last bits of the model's arithmetic.

    Args:
        method: ``"feat"``, ``"ucb"``, ``"fsgs"``, ``"ompgs"``, ``"gradient"`` or ``"random"``: see ``feat_attack``
            and so on.
        problem: The classifier and what may be changed.
        X: Rows of codes, ``[batch, n]``.
        y: Their true classes.
        max_changes: Features that may differ from the clean row, 1 to n.
        max_queries: Rows that may be scored for each row attacked.
        allowed: ``[n, m]``, or one mask for each row, ``[batch, n, m]``: allowed beside ``problem.allowed``.
        guide: A differentiable stand-in whose gradients guide the search, at no query, where the problem has
            none: a model trained on the classifier's answers, for instance. It sees the same codes.
        time_limit: Seconds a row's search may take; its best so far is kept.
        generator: For ``"random"`` and ``"ucb"``; seeded with 0 by default.
        lockstep: Rows under attack at a time.
        options: The method's own.

    Raises:
        UserError: For an argument that is not as described, or a model that returns no scores.
    """
    strategy = _strategy(method, options, problem, guide)
    x, labels = (_whole(name, value) for name, value in (("X", X), ("y", y)))
    if x.ndim != 2 or labels.ndim != 1:
        raise UserError(f"X must be [batch, features] and y [batch], got {list(x.shape)} and {list(labels.shape)}")
    n = x.shape[1]
    if not 1 <= max_changes <= n:
        raise UserError(f"max_changes must be from 1 to the {n} features, got {max_changes}")
    check_counts(max_queries=max_queries, lockstep=lockstep)
    if time_limit is not None and not time_limit > 0:
        raise UserError(f"time_limit must be positive, got {time_limit}")
    masks = problem.check(x, labels, allowed)
    mutable = np.ones(n, dtype=bool) if problem.mutable is None else problem.mutable
    if guide is not None:
        guide.check(x, labels)
        if guide.m != problem.m:
            raise UserError(f"guide must be of {problem.m} values as the problem is, got {guide.m}")
    draw = generator or torch.Generator().manual_seed(0)
    seeds = torch.randint(2**62, (len(x),), generator=draw).tolist()

    rows = (
        (k, Row(x[k], masks[k], mutable, max_changes, max_queries, time_limit, seeds[k], guide is not None))
        for k in range(len(x))
    )
    results = {k: _result(row) for k, row in _drive(rows, strategy, problem, guide or problem, labels, lockstep)}
    return [results[k] for k in range(len(x))]


def feat_attack(
    problem: CategoricalProblem,
    x: Example,
    y: int,
    max_changes: int,
    max_queries: int = 300,
    *,
    pool: int = 8,
    pulls: int = 4,
    alpha: float = 0.1,
    refit: bool = False,
    samples: int | None = None,
    allowed: Mask | None = None,
    guide: CategoricalProblem | None = None,
    time_limit: float | None = None,
    generator: torch.Generator | None = None,
) -> AttackResult:
    r"""FEAT: a bandit search for the fewest changes that make a classifier err, guided by matching pursuit.

    Arm $i$ is to change feature $i$. Pulling it scores all its allowed values in one forward pass; its reward
    is what the best of them adds to the margin $g$. Orthogonal matching pursuit ranks the arms by the
    gradient at the current row's one-hot form $Z$,

    $$c_i = \max_v \left(\frac{\partial g}{\partial Z_{iv}} - \frac{\partial g}{\partial Z_{i x_i}}\right),$$

    as one-hot mass moves from the current value to another. An episode starts from the clean row; of the
    $\min(r, 4) K$ arms with the largest $c$ ($r$ the episode) it pulls the $p$ with the largest index

    $$U_i = \frac{\mu_i N_i + \gamma \rho_i}{N_i + 1} + \alpha \gamma \sqrt{\frac{2 \ln (t + 1)}{N_i + 1}},$$

    with $N_i$ pulls of mean reward $\mu_i$, $\rho$ the scores $c$ scaled to [0, 1], $\gamma$ the largest reward
    so far (1 before the first) and $t$ rounds. OMP's score counts as one pull, so that an arm never pulled has an
    informed index. The best change is accepted if it raises $g$; arms that were of no use rest until one is. No set
    of features is tried twice. When all are tried from the clean row, episodes start from the best row that was an
    improvement and was passed by. All statistics last for the whole attack on a row.

    Reconstructed from the paper's abstract; its regret bound is not reproduced. $\gamma$ in the bonus makes the
    search the same at any scale of $g$: where a model is nearly sure, rewards are thousandths. The defaults are
    those of runs on Splice, not the paper's. There the pool and the episodes with memory carried the gain, and
    the bonus mattered little. As every accepted change must help, features that only help together are not found.

    Args:
        problem: The classifier and what may be changed.
        x: A row of n codes.
        y: Its true class.
        max_changes: $\varepsilon$: features that may differ from the clean row, 1 to n.
        max_queries: Q: rows that may be scored. A gradient costs one query, and so does the clean row's margin.
        pool: K: arms that OMP lets the bandit choose from in the first episode.
        pulls: p: arms pulled together.
        alpha: The weight of the bonus.
        refit: After each accepted change choose the values of all changed features again, as the orthogonal
            step of matching pursuit does; a feature may so return to its clean value.
        samples: Where there are scores only: estimate each feature's effect from as many random rows with
            ``max_changes`` changes, by ridge regression, in place of the gradients; 32 is a good number.
        allowed: ``[n, m]``: values that this row's features may take, beside ``problem.allowed``.
        guide: A differentiable stand-in for a problem of scores only: its gradients guide, at no query.
        time_limit: Seconds; the best so far is kept.
        generator: For the rows that ``samples`` draws; seeded with 0 by default.

    Raises:
        UserError: For an argument that is not as described, or gradients asked of a problem of scores only.

    Example:
        >>> problem = CategoricalProblem(model.eval(), n_values=5)
        >>> result = feat_attack(problem, x, y=2, max_changes=2)
        >>> result.success, result.changed, result.queries
    """
    options = {"pool": pool, "pulls": pulls, "alpha": alpha, "refit": refit, "samples": samples}
    limits = {"allowed": allowed, "guide": guide, "time_limit": time_limit, "generator": generator}
    return _one("feat", problem, x, y, max_changes, max_queries, **limits, **options)


def ucb_attack(
    problem: CategoricalProblem,
    x: Example,
    y: int,
    max_changes: int,
    max_queries: int = 300,
    *,
    pool: int = 8,
    pulls: int = 4,
    alpha: float = 0.1,
    refit: bool = False,
    allowed: Mask | None = None,
    time_limit: float | None = None,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """FEAT with a random order in place of OMP's scores: the bandit alone, for classifiers that give scores only.

    Arguments and errors are those of ``feat_attack``.
    """
    options = {"pool": pool, "pulls": pulls, "alpha": alpha, "refit": refit}
    limits = {"allowed": allowed, "time_limit": time_limit, "generator": generator}
    return _one("ucb", problem, x, y, max_changes, max_queries, **limits, **options)


def fsgs_attack(
    problem: CategoricalProblem,
    x: Example,
    y: int,
    max_changes: int,
    max_queries: int = 300,
    *,
    allowed: Mask | None = None,
    time_limit: float | None = None,
) -> AttackResult:
    """Forward stepwise greedy search (Wang et al., KDD 2020): score every change of every feature, take the best.

    Where the queries do not reach for all, the first features are scored. It needs scores only. Arguments and
    errors are those of ``feat_attack``.
    """
    return _one("fsgs", problem, x, y, max_changes, max_queries, allowed=allowed, time_limit=time_limit)


def ompgs_attack(
    problem: CategoricalProblem,
    x: Example,
    y: int,
    max_changes: int,
    max_queries: int = 300,
    *,
    top: int = 5,
    allowed: Mask | None = None,
    guide: CategoricalProblem | None = None,
    time_limit: float | None = None,
) -> AttackResult:
    """Greedy search guided by matching pursuit (Bao et al., ICLR 2022): score the changes of the ``top`` features.

    If none of these helps, the next ``top`` are scored. This is FEAT of one episode with ``pool = pulls = top`` and
    ``alpha = 0``. Other arguments and errors are those of ``feat_attack``.
    """
    limits = {"allowed": allowed, "guide": guide, "time_limit": time_limit}
    return _one("ompgs", problem, x, y, max_changes, max_queries, **limits, top=top)


def gradient_attack(
    problem: CategoricalProblem,
    x: Example,
    y: int,
    max_changes: int,
    max_queries: int = 300,
    *,
    allowed: Mask | None = None,
    guide: CategoricalProblem | None = None,
    time_limit: float | None = None,
) -> AttackResult:
    """Make the change that is best to first order, whether it helps or not, and repeat.

    Arguments and errors are those of ``feat_attack``.
    """
    limits = {"allowed": allowed, "guide": guide, "time_limit": time_limit}
    return _one("gradient", problem, x, y, max_changes, max_queries, **limits)


def random_attack(
    problem: CategoricalProblem,
    x: Example,
    y: int,
    max_changes: int,
    max_queries: int = 300,
    *,
    allowed: Mask | None = None,
    time_limit: float | None = None,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Score rows with ``max_changes`` random changes, 16 at a time. It needs scores only.

    Arguments and errors are those of ``feat_attack``.
    """
    limits = {"allowed": allowed, "time_limit": time_limit, "generator": generator}
    return _one("random", problem, x, y, max_changes, max_queries, **limits)


def _one(
    method: str, problem: CategoricalProblem, x: Example, y: int, max_changes: int, max_queries: int, **rest: Any
) -> AttackResult:
    if x.ndim != 1:
        raise UserError(f"x must be one row of codes, got {list(x.shape)}: attack_batch takes many")
    return attack_batch(method, problem, x[None], np.array([y]), max_changes, max_queries, lockstep=1, **rest)[0]


def _strategy(
    method: str, options: dict[str, Any], problem: CategoricalProblem, guide: CategoricalProblem | None
) -> Strategy:
    """The method with its options, checked."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    for name, value in options.items():
        if name not in (known := signature(METHODS[method]).parameters):
            raise unknown(f"option of {method}", name, known)
        if name in ("pool", "pulls", "top", "samples") and value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
        if name == "alpha" and not value >= 0:
            raise UserError(f"alpha must be at least 0, got {value}")
    guided = method in WITH_GRADIENTS and options.get("samples") is None
    if guide is not None and not guided:
        raise UserError(f"guide= gives gradients, and {method} as asked for uses none")
    if guided and not (guide or problem).differentiable:
        ways = "samples= or guide=" if method == "feat" else "guide="
        raise UserError(f"{method} needs gradients, and this problem gives scores only: give {ways}, or use ucb")
    return METHODS[method](**options)


def _drive(
    rows: Iterator[tuple[int, Row]],
    strategy: Strategy,
    problem: CategoricalProblem,
    guide: CategoricalProblem,
    labels: np.ndarray,
    lockstep: int,
) -> Iterator[tuple[int, Row]]:
    """Put the questions of up to ``lockstep`` searches together; yield each row when its search ends."""
    active: list[tuple[int, Row, Search, Ask]] = []
    while True:
        while len(active) < lockstep and (following := next(rows, None)):
            k, row = following
            asking = row.search(strategy)
            active.append((k, row, asking, next(asking)))
        if not active:
            return
        answers: dict[int, np.ndarray] = {}
        for gradient, answer in ((False, problem.margin), (True, guide.gradient)):
            group = [(k, ask.rows) for k, _, _, ask in active if ask.gradient is gradient]
            if group:
                sizes = [len(asked) for _, asked in group]
                y = np.repeat(labels[[k for k, _ in group]], sizes)
                answered = answer(np.concatenate([asked for _, asked in group]), y)
                parts = np.split(answered, np.cumsum(sizes)[:-1])
                answers |= {k: part for (k, _), part in zip(group, parts, strict=True)}
        going = []
        for k, row, asking, _ in active:
            try:
                going.append((k, row, asking, asking.send(answers[k])))
            except StopIteration:
                yield k, row
        active = going


def _result(row: Row) -> AttackResult:
    where = np.flatnonzero(row.best_x != row.clean).tolist()
    status: Status = row.status  # type: ignore[assignment]
    return AttackResult(
        status,
        torch.from_numpy(row.best_x.copy()),
        tuple(Change(i, int(row.clean[i]), int(row.best_x[i])) for i in where),
        row.best,
        row.queries,
        row.gradients,
        row.seconds,
        tuple(row.trace),
        tuple(row.rounds),
    )


def _whole(name: str, values: object) -> np.ndarray:
    array = as_array(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{name} must hold whole numbers, got {array.dtype}")
    return array.astype(np.int64)
