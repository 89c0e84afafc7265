r"""How much of a task a ranking of the candidates solves, and whether that is more than chance.

Question $i$ has $m_i$ candidates. A cue gives each a score and points to the $t_i$ that share the highest. The question
counts $h_i = 1/t_i$ if the right one is among them, else 0, so a guess counts $1/m_i$ on average, and a constant cue
exactly that.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import brentq
from scipy.special import softmax

from paperworks.errors import UserError

TOLERANCE = 1e-6  # of scores that count as equal, relative to the largest


def shared_hits(
    scores: Float[np.ndarray, " pairs"], starts: Int[np.ndarray, " ends"], gold: Int[np.ndarray, " questions"]
) -> tuple[Float[np.ndarray, " questions"], Int[np.ndarray, " questions"]]:
    """What each question counts, and how many candidates share its highest score.

    Args:
        scores: One a candidate, all questions one after another.
        starts: Where each question's candidates begin, and the last one's end.
        gold: The right candidate of each question.
    """
    if len(gold) == 0:
        return np.zeros(0), np.zeros(0, np.int64)
    sizes = np.diff(starts)
    best = np.maximum.reduceat(scores, starts[:-1])
    top = scores >= np.repeat(best - TOLERANCE * (1 + np.abs(best)), sizes)
    ties = np.add.reduceat(top, starts[:-1], dtype=np.int64)
    return top[starts[:-1] + gold] / ties, ties


def advantage(accuracy: float, chance: float) -> float:
    r"""The part of what chance leaves open that is solved: $(a - c)/(1 - c)$."""
    return (accuracy - chance) / (1 - chance)


def permutation_pvalue(
    hits: Float[np.ndarray, " questions"],
    ties: Int[np.ndarray, " questions"],
    sizes: Int[np.ndarray, " questions"],
    draws: int,
    rng: np.random.Generator,
) -> float:
    r"""Share of random answer keys on which the ranking does at least as well: $(1 + \#\{H^* \ge H\})/(1 + draws)$.

    The right candidate of every question is drawn anew, uniformly, with the ranking fixed. Then $h_i$ is $1/t_i$ with
    probability $t_i/m_i$: questions with the same $t$ and $m$ are drawn together, as one binomial number, which has
    the distribution of drawing them one by one and costs as much for a million questions as for ten.
    """
    kinds, count = np.unique(np.stack([ties, sizes]), axis=1, return_counts=True)
    totals = np.zeros(draws)
    for (t, m), number in zip(kinds.T, count, strict=True):
        totals += rng.binomial(number, t / m, draws) / t
    return float((1 + np.sum(totals >= hits.sum() - 1e-9)) / (1 + draws))


def bootstrap_ci(
    hits: Float[np.ndarray, "questions rankings"],
    chance: Float[np.ndarray, " questions"],
    passage: Int[np.ndarray, " questions"],
    resamples: int,
    rng: np.random.Generator,
    level: float = 0.95,
) -> Float[np.ndarray, "rankings ends"]:
    """Percentile interval of the advantage of each ranking, over passages drawn with replacement.

    Passages and not questions are drawn, since questions on one passage are not independent.
    """
    passages = int(passage.max()) + 1
    columns = [np.bincount(passage, weights, passages) for weights in (np.ones(len(chance)), chance, *hits.T)]
    sums = np.stack(columns, 1)
    totals = np.empty((resamples, sums.shape[1]))
    step = max(1, 2**22 // passages)
    for begin in range(0, resamples, step):
        size = min(step, resamples - begin)
        drawn = rng.integers(passages, size=(size, passages)) + passages * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * passages).reshape(size, passages)
        totals[begin : begin + size] = weights @ sums
    number, guessed, solved = totals[:, :1], totals[:, 1:2], totals[:, 2:]
    tail = 50 * (1 - level)
    return np.percentile((solved - guessed) / (number - guessed), [tail, 100 - tail], axis=0).T


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down correction for having asked several questions at once."""
    order = np.argsort(pvalues, kind="stable")
    steps = np.asarray(pvalues)[order] * (len(pvalues) - np.arange(len(pvalues)))
    corrected = np.empty(len(pvalues))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(p) for p in corrected]


def index_divergence(
    gold: Int[np.ndarray, " questions"], sizes: Int[np.ndarray, " questions"], bins: int = 10
) -> float:
    r"""KL divergence in nats of the right candidates' places from uniform ones: $\sum_k p_k \ln (p_k / u_k)$.

    Places from ``bins - 1`` on count as one; $u$ is the mean over questions of the uniform distribution over each one's
    own candidates.
    """
    places = np.bincount(np.minimum(gold, bins - 1), minlength=bins) / len(gold)
    uniform = np.array([np.mean((sizes > k) / sizes) for k in range(bins - 1)])
    uniform = np.append(uniform, 1 - uniform.sum())
    seen = places > 0
    return float(np.sum(places[seen] * np.log(places[seen] / np.maximum(uniform[seen], 1e-12))))


def balancing_weights(
    hits: Float[np.ndarray, " questions"], chance: Float[np.ndarray, " questions"], limit: float = 10.0
) -> Float[np.ndarray, " questions"]:
    r"""Weights of mean 1 under which a ranking does as well as chance, so that following it is of no use.

    Questions that count alike weigh alike: $w_i \propto e^{-\lambda h_i}$ with $\lambda$ such that
    $\sum_i w_i (h_i - c_i) = 0$.

    Args:
        hits: What each question counts, $h$.
        chance: What a guess counts, $c$.
        limit: Largest weight. Where so few questions go against the ranking that they would weigh more, some of its
            advantage stays.

    Raises:
        UserError: If the ranking is never worse, or never better, than chance.
    """
    excess = hits - chance
    if not balanceable(hits, chance):
        raise UserError("no weights can balance a ranking that is never worse, or never better, than chance")
    if not excess.any():
        return np.ones(len(hits))

    def tilted(strength: float) -> np.ndarray:
        return softmax(-strength * hits)

    reach = 1.0
    while (tilted(reach) @ excess) * (tilted(-reach) @ excess) > 0:
        reach *= 2
    weights = len(hits) * tilted(float(brentq(lambda strength: tilted(strength) @ excess, -reach, reach)))
    while (weights > limit * (1 + 1e-9)).any():
        over = weights >= limit
        weights[over] = limit
        weights[~over] *= (len(weights) - limit * over.sum()) / weights[~over].sum()
    return weights


def balanceable(hits: Float[np.ndarray, " questions"], chance: Float[np.ndarray, " questions"]) -> bool:
    """Whether questions that count least do worse than chance and those that count most better, or all the same."""
    excess = hits - chance
    least, most = excess[hits == hits.min()].mean(), excess[hits == hits.max()].mean()
    return bool(least < 0 < most or not excess.any())
