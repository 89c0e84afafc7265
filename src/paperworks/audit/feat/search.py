"""One row's search: what it asks of the classifier, and the strategies that choose what to ask.

A search is a generator that yields questions and is sent their answers, so that many can share a forward pass.
"""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np

EPSILON = 1e-6
"""What a change must add to the margin to count as an improvement."""

DRAWS = 16
"""Rows that the random attack scores together."""


class Ask(NamedTuple):
    """A question: the margins of rows ``[k, n]``, or the gradient at one row ``[1, n]``."""

    rows: np.ndarray
    gradient: bool = False


class Step(NamedTuple):
    """A change that was accepted: which, the margin it led to, and the queries spent by then."""

    episode: int
    feature: int
    value: int
    margin: float
    queries: int


class Round(NamedTuple):
    """Arms that were pulled together and their rewards, and the queries spent by then."""

    episode: int
    features: tuple[int, ...]
    rewards: tuple[float, ...]
    queries: int


Search = Generator[Ask, np.ndarray, None]
Answer = Generator[Ask, np.ndarray, np.ndarray]
Strategy = Callable[["Row"], Search]
Guide = Callable[["Row", np.ndarray], Answer]


class Done(Exception):
    """Ends a search; its argument is the status."""


@dataclass
class Row:
    """A row under attack: what may change, what is left to spend, and the best found so far."""

    x: np.ndarray
    allowed: np.ndarray
    mutable: np.ndarray
    max_changes: int
    max_queries: int
    time_limit: float | None
    seed: int
    free_guide: bool = False
    status: str = ""
    queries: int = 0
    gradients: int = 0
    trace: list[Step] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begun = time.perf_counter()
        self.rng = np.random.default_rng(self.seed)
        self.clean = self.best_x = self.x
        self.best = self.clean_margin = -np.inf
        others = self.allowed.copy()
        np.put_along_axis(others, self.x[:, None], False, axis=1)
        others &= self.mutable[:, None]
        self.others = others  # the changes there are
        self.features, self.values = np.nonzero(others)
        self.sizes = others.sum(1)
        self.ends = self.sizes.cumsum()

    @property
    def seconds(self) -> float:
        """Since the search began."""
        return time.perf_counter() - self.begun

    @property
    def room(self) -> int:
        """Queries left."""
        return self.max_queries - self.queries

    def search(self, strategy: Strategy) -> Search:
        """The strategy, until it succeeds, finds no more to try, or has spent what it may."""
        try:
            margin = float((yield from self.score(self.x[None]))[0])
            if margin > 0:
                self.queries = 0  # there is nothing to attack
                raise Done("already misclassified")
            self.clean_margin = margin
            self.keep(self.x, margin)
            yield from strategy(self)
            self.status = "exhausted"
        except Done as done:
            self.status = str(done)

    def score(self, rows: np.ndarray) -> Answer:
        """The margins of rows, which must be affordable."""
        self._spend(len(rows))
        return (yield Ask(rows))

    def effects(self, x: np.ndarray) -> Answer:
        r"""$G_{iv} - G_{i,x_i}$: to first order, what each change adds to the margin."""
        self._spend(0 if self.free_guide else 1)
        self.gradients += 1
        slopes = (yield Ask(x[None], gradient=True))[0]
        return slopes - np.take_along_axis(slopes, x[:, None], axis=1)

    def keep(self, x: np.ndarray, margin: float, step: Step | None = None) -> None:
        """Note an iterate, and end the search if it succeeds."""
        if step is not None:
            self.trace.append(step)
        if margin > self.best:
            self.best_x, self.best = x, margin
        if margin > 0:
            raise Done("success")

    def keep_best(self, rows: np.ndarray, margins: np.ndarray) -> None:
        """Note the best of rows that were scored."""
        best = int(margins.argmax())
        self.keep(rows[best], float(margins[best]))

    def accept(self, x: np.ndarray, episode: int, feature: int, value: int, margin: float) -> np.ndarray:
        """Change a feature."""
        x = changed(x, feature, value)
        self.keep(x, margin, Step(episode, feature, value, margin, self.queries))
        return x

    def pull(self, x: np.ndarray, arms: np.ndarray) -> Generator[Ask, np.ndarray, "Pulled"]:
        """Score every change of the features ``arms``, in that order for as long as they are affordable."""
        arms = np.sort(arms[self.sizes[arms].cumsum() <= self.room])
        if not len(arms):
            raise Done("out of queries")
        spans = [np.arange(self.ends[i] - self.sizes[i], self.ends[i]) for i in arms]
        which = np.concatenate(spans)
        rows = np.repeat(x[None], len(which), axis=0)
        rows[np.arange(len(which)), self.features[which]] = self.values[which]
        margins = yield from self.score(rows)
        parts = np.split(margins, self.sizes[arms].cumsum()[:-1])
        best = [int(part.argmax()) for part in parts]  # of equals the lowest
        values = np.array([self.values[span[k]] for span, k in zip(spans, best, strict=True)])
        return Pulled(arms, values, np.array([part[k] for part, k in zip(parts, best, strict=True)]))

    def _spend(self, queries: int) -> None:
        if self.time_limit is not None and self.queries and self.seconds >= self.time_limit:
            raise Done("out of time")
        if queries > self.room:
            raise Done("out of queries")
        self.queries += queries


class Pulled(NamedTuple):
    """The arms that were pulled, in ascending order, with the best value of each and the margin it leads to."""

    arms: np.ndarray
    values: np.ndarray
    margins: np.ndarray


class Place(NamedTuple):
    """A row, its margin, and the features in which it differs from the clean row."""

    x: np.ndarray
    margin: float
    support: frozenset[int] = frozenset()


def changed(x: np.ndarray, feature: int, value: int) -> np.ndarray:
    """A copy of a row with one feature set."""
    x = x.copy()
    x[feature] = value
    return x


# How promising each feature is.


def omp(row: Row, x: np.ndarray) -> Answer:
    """The OMP score c: the most that a change of a feature adds, to first order."""
    return np.where(row.others, (yield from row.effects(x)), -np.inf).max(1)


def shuffled(row: Row, x: np.ndarray) -> Answer:
    """Random."""
    yield from ()
    return row.rng.random(len(x))


def fixed(scores: np.ndarray) -> Guide:
    """The same at every iterate."""

    def guide(row: Row, x: np.ndarray) -> Answer:
        yield from ()
        return scores

    return guide


def measured(row: Row, samples: int) -> Answer:
    """Each feature's effect on the margin, by ridge regression on random rows that change as many as is allowed."""
    if not row.room:
        raise Done("out of queries")
    rows = draw(row, min(samples, row.room))
    margins = yield from row.score(rows)
    row.keep_best(rows, margins)
    atoms = (rows != row.clean).astype(float)
    atoms -= atoms.mean(0)
    return atoms.T @ np.linalg.solve(atoms @ atoms.T + np.eye(len(rows)), margins - margins.mean())


def draw(row: Row, number: int) -> np.ndarray:
    """Rows with ``max_changes`` random changes."""
    movable = np.flatnonzero(row.sizes)
    rows = np.repeat(row.clean[None], number, axis=0)
    for drawn in rows:
        for i in row.rng.choice(movable, min(row.max_changes, len(movable)), replace=False):
            drawn[i] = row.rng.choice(row.values[row.ends[i] - row.sizes[i] : row.ends[i]])
    return rows


# The strategies.


def bandit(
    row: Row,
    *,
    pool: int,
    pulls: int,
    alpha: float = 0.0,
    refit: bool = False,
    episodes: int | None = None,
    guide: Guide = omp,
) -> Search:
    """UCB over features, restricted to those that the guide prefers."""
    n = len(row.x)
    pulled, reward, gamma, rounds = np.zeros(n), np.zeros(n), 1.0, 0
    tried: dict[frozenset[int], tuple[float, Place, int, int]] = {}  # the margin, and the change that led there
    opened: set[frozenset[int]] = set()
    known: dict[bytes, np.ndarray] = {}  # the guide's scores
    clean = start = Place(row.clean, row.clean_margin)
    for episode in count(1):
        before, place = rounds, start
        banned = np.zeros(n, dtype=bool)
        while len(place.support) < row.max_changes:
            x, margin, support = place
            opened.add(support)
            free = (row.sizes > 0) & ~banned
            free[list(support)] = False
            arms = np.array([i for i in np.flatnonzero(free).tolist() if support | {i} not in tried], dtype=np.intp)
            if not len(arms):
                break
            if x.tobytes() not in known:
                known[x.tobytes()] = yield from guide(row, x)
            scores = known[x.tobytes()][arms]
            span = np.ptp(scores)
            prior = (scores - scores.min()) / span if span > 0 else np.zeros(len(arms))
            bonus = alpha * gamma * np.sqrt(2 * np.log(rounds + 1) / (pulled[arms] + 1))
            index = (reward[arms] * pulled[arms] + gamma * prior) / (pulled[arms] + 1) + bonus
            inside = np.argsort(-scores, kind="stable")[: pool * min(episode, 4)]
            chosen = inside[np.argsort(-index[inside], kind="stable")[:pulls]]

            found = yield from row.pull(x, arms[chosen])
            gains = found.margins - margin
            gamma = max(float(gains.max()), gamma if rounds else 0.0)
            rounds += 1
            row.rounds.append(Round(episode, tuple(found.arms.tolist()), tuple(gains.tolist()), row.queries))
            pulled[found.arms] += 1
            reward[found.arms] += (gains - reward[found.arms]) / pulled[found.arms]
            for i, value, reached in zip(*(part.tolist() for part in found), strict=True):
                tried[support | {i}] = (reached, place, i, value)
            best = int(gains.argmax())
            if gains[best] > EPSILON:
                i, value, reached = (part[best].item() for part in found)
                place = Place(row.accept(x, episode, i, value, reached), reached, support | {i})
                banned[:] = False  # they were of no use where the search no longer is
                if refit:
                    place = yield from sweep(row, place, episode)
            else:
                banned[found.arms] = True
        if episode == episodes:
            return
        if rounds == before:  # nothing new from here: go on from the best row that helped and was passed by
            rest = [
                passed
                for features, passed in tried.items()
                if features not in opened and len(features) < row.max_changes and passed[0] - clean.margin > EPSILON
            ]
            if not rest:
                return
            margin, place, i, value = max(rest, key=lambda passed: passed[0])
            start = Place(changed(place.x, i, value), margin, place.support | {i})


def sweep(row: Row, place: Place, episode: int) -> Generator[Ask, np.ndarray, Place]:
    """Choose the value of each changed feature again, its clean one included."""
    x, margin, support = place
    for i in sorted(support):
        values = np.flatnonzero(row.allowed[i] & (np.arange(row.allowed.shape[1]) != x[i]))
        if len(values) > row.room:
            raise Done("out of queries")
        rows = np.repeat(x[None], len(values), axis=0)
        rows[:, i] = values
        margins = yield from row.score(rows)
        best = int(margins.argmax())
        if margins[best] - margin > EPSILON:
            margin = float(margins[best])
            x = row.accept(x, episode, i, int(values[best]), margin)
    return Place(x, margin, frozenset(np.flatnonzero(x != row.clean).tolist()))


def feat(
    pool: int = 8, pulls: int = 4, alpha: float = 0.1, refit: bool = False, samples: int | None = None
) -> Strategy:
    """FEAT, guided by gradients, or by as many measurements as ``samples``."""
    search = partial(bandit, pool=pool, pulls=pulls, alpha=alpha, refit=refit)
    if samples is None:
        return search

    def strategy(row: Row) -> Search:
        if row.sizes.any():
            effects = yield from measured(row, samples)
            yield from search(row, guide=fixed(effects))

    return strategy


def ucb(pool: int = 8, pulls: int = 4, alpha: float = 0.1, refit: bool = False) -> Strategy:
    """FEAT with a random order in place of OMP's."""
    return partial(bandit, pool=pool, pulls=pulls, alpha=alpha, refit=refit, guide=shuffled)


def ompgs(top: int = 5) -> Strategy:
    """Greedy among the ``top`` features by OMP's score."""
    return partial(bandit, pool=top, pulls=top, episodes=1)


def fsgs() -> Strategy:
    """Greedy among all changes of all features."""

    def strategy(row: Row) -> Search:
        n = len(row.x)
        return bandit(row, pool=n, pulls=n, episodes=1, guide=fixed(np.zeros(n)))

    return strategy


def gradient() -> Strategy:
    """The best change to first order, not asking whether it helped."""

    def strategy(row: Row) -> Search:
        x, free = row.clean, row.others.copy()
        while free.any() and np.count_nonzero(x != row.clean) < row.max_changes:
            effects = np.where(free, (yield from row.effects(x)), -np.inf)
            feature, value = (int(k) for k in np.unravel_index(effects.argmax(), effects.shape))
            margins = yield from row.score(changed(x, feature, value)[None])
            x = row.accept(x, 1, feature, value, float(margins[0]))
            free[feature] = False

    return strategy


def random() -> Strategy:
    """As many random changes as are allowed, again and again."""

    def strategy(row: Row) -> Search:
        while row.sizes.any():
            if not row.room:
                raise Done("out of queries")
            rows = draw(row, min(DRAWS, row.room))
            row.keep_best(rows, (yield from row.score(rows)))

    return strategy
