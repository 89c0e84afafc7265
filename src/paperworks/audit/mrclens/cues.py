"""The taxonomy of cues: what in a question or passage may give the answer away without its being understood."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float

from paperworks.audit.mrclens import probes
from paperworks.audit.mrclens.candidates import FAR, TYPES, Candidates, Unit
from paperworks.audit.mrclens.data import MRCDataset
from paperworks.audit.mrclens.example import Example
from paperworks.audit.mrclens.text import normalise, words
from paperworks.errors import UserError, unknown

Side = Literal["passage", "question", "question-passage", "answer"]


@dataclass(frozen=True)
class Cue:
    """Something superficial by which candidates can be ranked.

    Attributes:
        name: What reports call it.
        side: Where it lies: in the passage, the question, what both share, or the answer.
        about: What it points to, in a few words.
        features: Numbers that describe each candidate, of which the first is the score by which the cue alone points.
        unit: What it ranks.
        learned: Whether the score is that of a model fitted on part of the set, and used on passages it did not see.
    """

    name: str
    side: Side
    about: str
    features: Callable[[Candidates], np.ndarray]
    unit: Unit = "sentence"
    learned: bool = False

    @classmethod
    def of(cls, name: str, side: Side, about: str, score: Callable[[Example], Iterable[float]]) -> "Cue":
        """A cue of your own: a function that gives a score to each sentence of an example's passage.

        Sentences are those of ``split_sentences``; for multiple choice set ``unit`` with ``dataclasses.replace``, and
        score the options.

        Example:
            >>> shouting = Cue.of("shouting", "passage", "the sentence with most exclamation marks",
            ...                   lambda e: [s.count("!") for s in split_sentences(e.context)])
        """

        def features(candidates: Candidates) -> np.ndarray:
            rows = []
            for example, size in zip(candidates.examples, candidates.sizes, strict=True):
                scores = np.asarray(list(score(example)), float)
                if scores.shape != (size,) or not np.isfinite(scores).all():
                    raise UserError(
                        f"cue {name!r} gave {scores.tolist()} for question {example.id}, expected {size} finite scores"
                    )
                rows.append(scores)
            return np.concatenate(rows)[:, None]

        return cls(name, side, about, features)

    def score(self, example: Example) -> Float[np.ndarray, " candidates"]:
        """The scores of one example's candidates, in a set of its own.

        Raises:
            UserError: If the example has no candidates of the cue's unit to choose from.
        """
        candidates = Candidates(MRCDataset([example], f"question {example.id}"), self.unit)
        if not len(candidates):
            raise UserError(f"question {example.id} has fewer than two candidates or no answer for cue {self.name!r}")
        return self.features(candidates)[:, 0].astype(np.float64)


def _columns(*columns: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(column, np.float64) for column in columns], 1)


def _is_best(c: Candidates, values: np.ndarray) -> np.ndarray:
    """Whether a candidate has its question's largest value."""
    return values == np.maximum.reduceat(values, c.starts[:-1])[c.owner]


def _position(c: Candidates) -> np.ndarray:
    places = np.minimum(c.index, 9)
    return _columns(-c.index, *(places == k for k in range(10)), c.index == c.sizes[c.owner] - 1)


def _length(c: Candidates) -> np.ndarray:
    lengths = c.texts.lengths[c.text_of]
    return _columns(lengths, np.log(lengths), _is_best(c, lengths), _is_best(c, -lengths))


def _uniqueness(c: Candidates) -> np.ndarray:
    """The rarest coarse type that the sentence holds: one over its tokens in the passage."""
    passage = c.passage_of[c.token_text]
    rarest = np.zeros(len(c.texts.lengths))
    for flag in TYPES:
        holds = (c.token_type & flag) != 0
        count = np.bincount(passage[holds], minlength=len(c.passages))
        there = np.unique(c.token_text[holds])
        rarest[there] = np.maximum(rarest[there], 1 / count[c.passage_of[there]])
    return _columns(rarest[c.text_of])


def _wh_type(c: Candidates) -> np.ndarray:
    typed = c.matches.typed
    return _columns(typed > 0, np.log1p(typed))


def _overlap(c: Candidates) -> np.ndarray:
    overlap = c.matches.overlap
    return _columns(overlap, _is_best(c, overlap))


def _rare_overlap(c: Candidates) -> np.ndarray:
    return _columns(c.matches.rare, _is_best(c, c.matches.rare))


def _proximity(c: Candidates) -> np.ndarray:
    near = c.matches.near
    return _columns(-near, np.log1p(near), near == FAR)


def _frequency(c: Candidates) -> np.ndarray:
    """How often the most frequent answer that stands in the sentence answers questions on other passages."""
    number: dict[str, int] = {}
    spelled: dict[str, str] = {}
    kinds = []
    for example in c.examples:
        text = example.answers[0].text
        normal = normalise(text)
        kinds.append(number.setdefault(normal, len(number)))
        spelled[normal] = min(text, spelled.get(normal, text))
    everywhere = np.bincount(kinds, minlength=len(number))
    own, times = np.unique(c.passage * len(number) + np.array(kinds), return_counts=True)
    sentence, answer = c.occurrences([spelled[normal] for normal in number])
    here = c.passage_of[sentence] * len(number) + answer
    place = np.minimum(np.searchsorted(own, here), len(own) - 1)
    elsewhere = everywhere[answer] - np.where(own[place] == here, times[place], 0)
    most = np.zeros(len(c.texts.lengths))
    np.maximum.at(most, sentence, np.log1p(elsewhere))
    return _columns(most[c.text_of])


def _option_overlap(c: Candidates) -> np.ndarray:
    """Share of an option's content words that stand in the passage."""
    lower = c.words.lower
    forms = {name: k for k, name in enumerate(c.words.names)}
    held = [{forms.get(word.lower(), -1) for word in words(text)} for text in c.passages]
    stop = c.words.stop[c.texts.surfaces]
    owners = c.passage[c.owner][c.token_text]
    inside = np.fromiter((w in held[p] for w, p in zip(lower[c.texts.surfaces], owners, strict=True)), bool)
    heads = c.texts.starts[:-1]
    content = np.add.reduceat(~stop, heads, dtype=np.int64)
    return _columns(np.add.reduceat(inside & ~stop, heads, dtype=np.int64) / np.maximum(content, 1))


_BY_WORDS = partial(probes.candidate_scores, questions=False)
_BY_QUESTION = partial(probes.candidate_scores, questions=True)
_BY_ANSWERS, _IMPOSSIBLE = probes.answer_scores, probes.impossible_scores

CUES: dict[str, Cue] = {
    cue.name: cue
    for cue in (
        Cue("position", "passage", "the first sentence, or wherever answers tend to stand", _position),
        Cue("length", "passage", "the longest sentence, or another length", _length),
        Cue("uniqueness", "passage", "the sentence with the passage's only date, number, name or place", _uniqueness),
        Cue("passage_only", "passage", "the sentence whose words look like an answer", _BY_WORDS, learned=True),
        Cue("wh_type", "question", "a sentence with a word of the type asked for", _wh_type),
        Cue(
            "question_only", "question", "a known answer guessed from the question", probes.answer_scores, learned=True
        ),
        Cue("overlap", "question-passage", "the sentence with most words of the question", _overlap),
        Cue("rare_overlap", "question-passage", "the same, rare words counting more", _rare_overlap),
        Cue("proximity", "question-passage", "an answer-like word beside words of the question", _proximity),
        Cue("frequency", "answer", "an answer that is frequent on other passages", _frequency),
        Cue("option_length", "answer", "the longest option, or another length", _length, "option"),
        Cue("option_position", "answer", "the option in the place that is right most often", _position, "option"),
        Cue("option_only", "answer", "the option whose words look right", _BY_WORDS, "option", True),
        Cue("option_question", "question", "the option that suits the question", _BY_QUESTION, "option", True),
        Cue("option_overlap", "answer", "the option whose words stand in the passage", _option_overlap, "option"),
        Cue("impossible_words", "question", "words of questions without answer", _IMPOSSIBLE, "answerability", True),
    )
}
"""The built-in cues by name. Add yours to it, or give it to ``audit``."""


def resolve(cues: Iterable[str | Cue] | None) -> list[Cue]:
    """Cues of these names; all that are known, for ``None``.

    Raises:
        UserError: For an unknown name or one given twice.
    """
    if cues is None:
        return list(CUES.values())
    found = []
    for cue in cues:
        if isinstance(cue, str) and cue not in CUES:
            raise unknown("cue", cue, CUES)
        found.append(CUES[cue] if isinstance(cue, str) else cue)
    names = [cue.name for cue in found]
    if len(set(names)) < len(names) or not names:
        raise UserError(f"cues must be different and at least one, got {', '.join(names) or 'none'}")
    return found
