"""The audit: every cue's share of the task, the evidence for it, and the questions that carry it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from paperworks.audit.mrclens.candidates import Candidates, Unit, ranges
from paperworks.audit.mrclens.cues import Cue, resolve
from paperworks.audit.mrclens.data import MRCDataset
from paperworks.audit.mrclens.profile import profile
from paperworks.audit.mrclens.ranking import PENALTY, Ranker
from paperworks.audit.mrclens.report import MIN_ADVANTAGE, SIGNIFICANCE, AuditReport, Combined, Finding, Ranked
from paperworks.audit.mrclens.statistics import (
    advantage,
    bootstrap_ci,
    holm,
    index_divergence,
    permutation_pvalue,
    shared_hits,
)
from paperworks.errors import UserError

MIN_QUESTIONS, MIN_PASSAGES = 50, 10
SEVERITIES = ((0.5, "high"), (0.2, "medium"), (MIN_ADVANTAGE, "low"))
UNITS: tuple[Unit, ...] = ("sentence", "option", "answerability")


@dataclass(frozen=True)
class Score:
    """How well a ranking does.

    Attributes:
        accuracy: Share of questions in which it puts the right candidate first, ties shared.
        chance: The same for a guess.
        advantage: The part of what chance leaves open: (accuracy - chance) / (1 - chance).
        questions: How many were ranked.
    """

    accuracy: float
    chance: float
    advantage: float
    questions: int


def cue_statistic(data: MRCDataset | Candidates, cue: Cue | str) -> Score:
    """How often a cue alone points to the answer, without anything being learned (but by a learned cue).

    Raises:
        UserError: If no question of the set has candidates of the cue's unit.
    """
    candidates, (cue,) = _candidates(data, cue), resolve([cue])
    return _score(candidates, cue.features(candidates)[:, 0])


class CueProbe:
    """A ranking logistic regression that sees nothing of a question but one cue's features.

    Args:
        cue: The cue, or its name.
        penalty: C of the L2 penalty; the larger, the weaker.

    Example:
        >>> CueProbe("overlap").fit(train).evaluate(test).advantage

    Raises:
        UserError: For an unknown cue, one that is learned by itself, or a penalty that is not positive.
    """

    def __init__(self, cue: Cue | str, penalty: float = PENALTY) -> None:
        (self.cue,) = resolve([cue])
        if self.cue.learned:
            raise UserError(f"cue {self.cue.name!r} is a probe by itself: measure it with cue_statistic or audit")
        if not penalty > 0:
            raise UserError(f"penalty must be positive, got {penalty}")
        self.penalty = penalty

    def fit(self, data: MRCDataset | Candidates) -> "CueProbe":
        """Learn from every usable question of a set.

        Raises:
            UserError: If there is none.
        """
        candidates = _candidates(data, self.cue)
        self.ranker = Ranker.fit(self.cue.features(candidates), candidates.starts, candidates.gold, self.penalty)
        return self

    def evaluate(self, data: MRCDataset | Candidates) -> Score:
        """How well it does on a set.

        Raises:
            UserError: If it was not fitted, or no question is usable.
        """
        if not hasattr(self, "ranker"):
            raise UserError("CueProbe.evaluate before CueProbe.fit: fit it to a training set first")
        candidates = _candidates(data, self.cue)
        return _score(candidates, self.ranker.scores(self.cue.features(candidates)))


def audit(
    data: MRCDataset,
    cues: Iterable[str | Cue] | None = None,
    n: int = 400,
    seed: int = 0,
    *,
    draws: int = 1999,
    resamples: int = 1000,
    progress: Callable[[float, str], None] | None = None,
) -> AuditReport:
    r"""Measure how much of a reading-comprehension set each cue solves, before any reader is trained.

    For each cue: its *statistic* (how often its score alone points to the answer); the *accuracy* $a$ of a probe that
    sees nothing but the cue; its *advantage* over chance $c$, $(a - c)/(1 - c)$, with a bootstrap interval over
    passages; and the p-value of a permutation test. A cue is *biased* if its p-value, corrected by Holm's method over
    all cues, is below .01 and the lower end of the interval above .05. The advantage then makes it low, medium (from
    .2) or high (from .5). "Biased" says that questions can be solved by the cue, and not that they are flawed.

    Probes are fitted on ``n`` questions in two halves, each used on the passages of the other, so every question is
    ranked by a probe that did not see its passage.

    Args:
        data: The set.
        cues: Cues or names of ``CUES``; by default all that apply.
        n: Questions on which probes are fitted: few, since what needs many to be learned is no superficial cue.
        seed: Draws folds, samples, permutations and resamples.
        draws: Random answer keys of the permutation test. The smallest corrected p-value is the number of cues over
            ``draws + 1``, which must be below .01.
        resamples: Bootstrap resamples.
        progress: Called with the share that is done and what is being done.

    Raises:
        UserError: For an argument out of range, an unknown cue, one that the set has no candidates for, or a set in
            which no question can be used.
    """
    for name, value, least in (("n", n, 20), ("draws", draws, 99), ("resamples", resamples, 99)):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    named = cues is not None
    chosen = resolve(cues)
    say = progress or (lambda fraction, text: None)
    say(0.0, "splitting passages into sentences")
    # A set of options has no answers in its passages, and the other way round.
    groups = {unit: Candidates(data, unit, n, seed) for unit in UNITS if any(cue.unit == unit for cue in chosen)}
    usable = {unit: group for unit, group in groups.items() if len(group)}
    for cue in chosen:
        if named and cue.unit not in usable:
            raise _nothing_for(cue, data)
    if not usable:
        raise UserError(f"{data.name} has no question whose answer stands in a passage of two sentences or more")
    chosen = [cue for cue in chosen if cue.unit in usable]
    findings: list[Finding] = []
    ranked: dict[str, Ranked] = {}
    combined: dict[Unit, Combined] = {}
    for unit, group in usable.items():
        evaluator = _Evaluator(group, seed, draws, resamples)
        found: list[Finding] = []
        features: list[np.ndarray] = []
        rankings: dict[str, Ranked] = {}
        for cue in (cue for cue in chosen if cue.unit == unit):
            say(0.05 + 0.85 * (len(findings) + len(found)) / len(chosen), f"cue {cue.name}")
            features.append(cue.features(group))
            finding, rankings[cue.name] = evaluator.cue(cue, features[-1])
            found.append(finding)
        if evaluator.enough and len(found) > 1:
            say(0.05 + 0.85 * (len(findings) + len(found)) / len(chosen), "all cues together")
            name = "all" if unit == next(iter(usable)) else f"all ({unit})"
            accuracy, rankings[name] = evaluator.together(found, features)
        if evaluator.enough:
            ends = evaluator.intervals(rankings.values())
            for finding, end in zip(found, ends, strict=False):
                finding.low, finding.high = end
            if len(found) > 1:
                combined[unit] = Combined(accuracy, advantage(accuracy, evaluator.chance), *ends[-1])
        findings += found
        ranked |= rankings
    say(0.95, "verdicts")
    notes = _notes(data, groups, usable)
    judged(findings)
    return AuditReport(data, findings, combined, ranked, profile(next(iter(usable.values()))), notes, n=n, seed=seed)


_PLURAL = {"sentence": "sentences", "option": "options", "answerability": "answerable and impossible questions"}


class _Evaluator:
    """Ranks one group of candidates by cues and gathers the evidence."""

    def __init__(self, group: Candidates, seed: int, draws: int, resamples: int) -> None:
        self.group, self.seed, self.draws, self.resamples = group, seed, draws, resamples
        self.chance = float(group.chance.mean())
        self.enough = len(group) >= MIN_QUESTIONS and len(group.passages) >= MIN_PASSAGES
        samples = [group.sample(fold) for fold in (0, 1)]
        self.pairs, self.heads = zip(*(ranges(group.starts, sample) for sample in samples), strict=True)
        self.gold = [group.gold[sample] for sample in samples]
        self.others = [group.fold[group.owner] != fold for fold in (0, 1)]

    def cue(self, cue: Cue, phi: Float[np.ndarray, "pairs features"]) -> tuple[Finding, Ranked]:
        """The finding on one cue, interval and verdict still open, and its ranking."""
        group, statistic = self.group, _score(self.group, phi[:, 0]).accuracy
        finding = Finding(cue.name, cue.side, cue.unit, cue.about, len(group), self.chance, statistic)
        if cue.name.endswith("position"):
            finding.divergence = index_divergence(group.gold, group.sizes)
        if not self.enough:
            return finding, self.rank(phi[:, 0])[0]
        # A learned cue's score is that of a probe already.
        ranking, ties = self.rank(phi[:, 0] if cue.learned else self.cross_fitted(phi)[0])
        finding.accuracy = float(ranking.hits.mean())
        finding.advantage = advantage(finding.accuracy, self.chance)
        rng = np.random.default_rng([self.seed, 0])
        finding.p = permutation_pvalue(ranking.hits, ties, group.sizes, self.draws, rng)
        return finding, ranking

    def together(self, findings: list[Finding], features: list[np.ndarray]) -> tuple[float, Ranked]:
        """Accuracy and ranking of a probe on all cues; sets what each cue adds to all others."""
        every = np.concatenate(features, 1)
        bounds = np.cumsum([0, *(phi.shape[1] for phi in features)])
        scores, weights = self.cross_fitted(every)
        ranking, _ = self.rank(scores)
        accuracy = float(ranking.hits.mean())
        for finding, (begin, end) in zip(findings, pairwise(bounds), strict=True):
            out = np.s_[begin:end]
            rest, _ = self.cross_fitted(np.delete(every, out, 1), [np.delete(w, out) for w in weights])
            without = float(self.rank(rest)[0].hits.mean())
            finding.conditional = (accuracy - without) / (1 - self.chance)
        return accuracy, ranking

    def cross_fitted(
        self, phi: Float[np.ndarray, "pairs features"], weights: Sequence[np.ndarray | None] = (None, None)
    ) -> tuple[Float[np.ndarray, " pairs"], list[np.ndarray]]:
        """Scores of each fold by a probe fitted on a sample of the other, and the probes' weights."""
        scores, rankers = np.zeros(len(phi)), []
        for pairs, heads, gold, others, start in zip(
            self.pairs, self.heads, self.gold, self.others, weights, strict=True
        ):
            ranker = Ranker.fit(phi[pairs], heads, gold, start=start)
            scores[others] = ranker.scores(phi[others])
            rankers.append(ranker.weights)
        return scores, rankers

    def rank(self, scores: Float[np.ndarray, " pairs"]) -> tuple[Ranked, np.ndarray]:
        hits, ties = shared_hits(scores, self.group.starts, self.group.gold)
        return Ranked(self.group.rows, hits, self.group.chance), ties

    def intervals(self, rankings: Iterable[Ranked]) -> list[tuple[float, float]]:
        group, rng = self.group, np.random.default_rng([self.seed, 1])
        hits = np.stack([ranking.hits for ranking in rankings], 1)
        ends = bootstrap_ci(hits, group.chance, group.passage, self.resamples, rng)
        return [(float(low), float(high)) for low, high in ends]


def judged(findings: list[Finding]) -> None:
    """Set the verdicts of findings that have evidence, corrected for their number."""
    tested = [(finding, finding.p) for finding in findings if finding.p is not None]
    for (finding, _), p in zip(tested, holm([p for _, p in tested]), strict=True):
        assert finding.advantage is not None
        assert finding.low is not None
        finding.p_holm = p
        finding.biased = p < SIGNIFICANCE and finding.low > MIN_ADVANTAGE
        if finding.biased:
            finding.severity = next(name for least, name in SEVERITIES if finding.advantage >= least)


def _notes(data: MRCDataset, groups: dict[Unit, Candidates], usable: dict[Unit, Candidates]) -> list[str]:
    notes = []
    moved = sum(what == "moved" for what in data.repaired.values())
    if moved:
        notes.append(f"{moved} answers did not stand at their start and were looked up in the passage.")
    lost = len(data.repaired) - moved
    if lost:
        notes.append(f"{lost} questions have answers that occur nowhere in their passage.")
    impossible = sum(example.impossible for example in data)
    if impossible:
        notes.append(f"{impossible} questions are marked impossible: only impossible_words looks at them.")
    for unit, group in groups.items():
        if group.unusable and unit in usable:
            notes.append(f"{group.unusable} questions are left out because they have no answer in their passage.")
        if group.single and unit in usable:
            what = "their passage has one sentence" if unit == "sentence" else "they have one option"
            notes.append(f"{group.single} questions are left out because {what}.")
    for unit, group in usable.items():
        if len(group) < MIN_QUESTIONS or len(group.passages) < MIN_PASSAGES:
            notes.append(
                f"No verdicts on {_PLURAL[unit]}: {len(group)} usable questions on {len(group.passages)} passages, "
                f"and at least {MIN_QUESTIONS} on {MIN_PASSAGES} are needed."
            )
    return notes


def _candidates(data: MRCDataset | Candidates, cue: Cue | str) -> Candidates:
    (cue,) = resolve([cue])
    candidates = data if isinstance(data, Candidates) else Candidates(data, cue.unit)
    if candidates.unit != cue.unit or not len(candidates):
        raise _nothing_for(cue, candidates.data)
    return candidates


def _nothing_for(cue: Cue, data: MRCDataset) -> UserError:
    return UserError(f"cue {cue.name!r} ranks {_PLURAL[cue.unit]}: {data.name} has none to choose from")


def _score(candidates: Candidates, scores: Float[np.ndarray, " pairs"]) -> Score:
    hits, _ = shared_hits(scores, candidates.starts, candidates.gold)
    accuracy, chance = float(hits.mean()), float(candidates.chance.mean())
    return Score(accuracy, chance, advantage(accuracy, chance), len(candidates))
