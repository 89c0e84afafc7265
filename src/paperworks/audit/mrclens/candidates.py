"""What an answer is chosen from, compiled into flat arrays: each passage and question is tokenised once."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from paperworks.audit.mrclens.data import MRCDataset
from paperworks.audit.mrclens.text import (
    DATE,
    NAME,
    NUMBER,
    PLACE,
    PLACE_PREPOSITIONS,
    STOP_WORDS,
    asked_type,
    sentence_spans,
    word_type,
    words,
)

Unit = Literal["sentence", "option", "answerability"]
FAR = 50  # tokens; further apart makes no difference to ``proximity``
_TABLE_BYTES = 2**23


class Vocabulary(dict[str, int]):
    """Numbers words in the order in which they are looked up."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


class Texts:
    """Texts as one flat array of the ids of their words as written.

    Attributes:
        surfaces: All words, text after text; a text without words holds the empty one.
        starts: Where each text begins in ``surfaces``, and where the last one ends.
    """

    def __init__(self, vocabulary: Vocabulary, texts: Iterable[str]) -> None:
        flat: list[int] = []
        starts = [0]
        for text in texts:
            flat.extend(map(vocabulary.__getitem__, words(text) or [""]))
            starts.append(len(flat))
        self.surfaces, self.starts = np.array(flat, np.int64), np.array(starts, np.int64)

    @property
    def lengths(self) -> Int[np.ndarray, " texts"]:
        return np.diff(self.starts)


class Words(NamedTuple):
    """What is known of each written form: its lower-case id, whether it is a stop word, its type, and its looks."""

    lower: Int[np.ndarray, " forms"]
    stop: Bool[np.ndarray, " forms"]
    type: Int[np.ndarray, " forms"]
    capital: Bool[np.ndarray, " forms"]
    preposition: Bool[np.ndarray, " forms"]
    names: list[str]

    @classmethod
    def of(cls, forms: Iterable[str]) -> "Words":
        forms = list(forms)
        names = sorted({form.lower() for form in forms})  # so that ids do not depend on the order of the set
        ids = {name: k for k, name in enumerate(names)}
        lower = [ids[form.lower()] for form in forms]
        return cls(
            np.array(lower, np.int64),
            np.array([not form or names[k] in STOP_WORDS for form, k in zip(forms, lower, strict=True)], bool),
            np.array([word_type(form) for form in forms], np.int64),
            np.array([form[:1].isupper() for form in forms], bool),
            np.array([names[k] in PLACE_PREPOSITIONS for k in lower], bool),
            names,
        )


class Candidates:
    """For every usable question of a set, what its answer is chosen from, and which of them is right.

    The unit is the *sentence* of the passage (the one in which the first answer starts), the *option* of a
    multiple-choice question, or *answerability*: two candidates, that the passage answers the question or does not.
    The candidates of all questions stand in flat arrays ("pairs"), those of question ``i`` from ``starts[i]`` to
    ``starts[i + 1]``. Questions are divided into two folds by passage, so that a probe never sees the passages it is
    tested on. Folds and samples depend on the texts and ids, and not on the order of the set.

    Args:
        data: The set.
        unit: What answers are chosen from.
        n: Probes are fitted on this many questions, half of them from each fold.
        seed: Draws folds and samples.

    Attributes:
        examples: The usable questions.
        rows: Index in the set of each of them.
        starts: Where each question's candidates begin, and the last one's end.
        gold: Which candidate of each question is right.
        passage: Number of each question's passage, in an order that ``seed`` draws.
        fold: 0 or 1, by passage.
        single: Questions left out because there is nothing to choose: one sentence, one option.
        unusable: Questions left out because no answer stands in the passage.
    """

    def __init__(self, data: MRCDataset, unit: Unit = "sentence", n: int = 400, seed: int = 0) -> None:
        self.data, self.unit, self.n, self.seed = data, unit, n, seed
        self.single = self.unusable = 0
        self._spans: dict[str, list[tuple[int, int]]] = {}
        rows, gold, sizes = [], [], []
        for row, right, size in self._usable():
            rows.append(row)
            gold.append(right)
            sizes.append(size)
        self.rows, self.gold = np.array(rows, np.int64), np.array(gold, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(np.array(sizes, np.int64))])
        self.examples = [data.examples[row] for row in rows]
        order = {text: key(seed, text) for text in dict.fromkeys(example.context for example in self.examples)}
        self.passages = sorted(order, key=lambda text: order[text])
        number = {text: k for k, text in enumerate(self.passages)}
        self.passage = np.array([number[example.context] for example in self.examples], np.int64)
        self.fold = self.passage % 2

    def _usable(self) -> Iterator[tuple[int, int, int]]:
        """Row, right candidate and number of candidates."""
        if self.unit == "answerability":
            yield from self._balanced()
            return
        for row, example in enumerate(self.data):
            if self.unit == "option":
                size, right = len(example.options), example.label
            else:
                spans = self._spans_of(example.context)
                size = len(spans)
                right = _holding(spans, example.answers[0].start) if example.answers else None
            if right is None:
                self.unusable += not (example.impossible or (self.unit == "option" and not example.options))
            elif size < 2:
                self.single += 1
            else:
                yield row, right, size

    def _balanced(self) -> Iterator[tuple[int, int, int]]:
        """As many answerable as impossible questions, so that chance is one half."""
        groups: tuple[list[int], list[int]] = ([], [])
        for row, example in enumerate(self.data):
            if example.impossible or example.answers:
                groups[example.impossible].append(row)
        size = min(map(len, groups))
        kept = [
            row for rows in groups for row in sorted(rows, key=lambda row: key(self.seed, self.data[row].id))[:size]
        ]
        for row in sorted(kept):
            yield row, int(self.data[row].impossible), 2

    def _spans_of(self, context: str) -> list[tuple[int, int]]:
        if context not in self._spans:
            self._spans[context] = sentence_spans(context)
        return self._spans[context]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def sizes(self) -> Int[np.ndarray, " questions"]:
        """Number of candidates of each question."""
        return np.diff(self.starts)

    @cached_property
    def chance(self) -> Float[np.ndarray, " questions"]:
        """Share of right answers of a guess, for each question."""
        return 1 / self.sizes

    @cached_property
    def right(self) -> Int[np.ndarray, " questions"]:
        """Index of each question's right candidate among all pairs."""
        return self.starts[:-1] + self.gold

    @cached_property
    def owner(self) -> Int[np.ndarray, " pairs"]:
        """The question of each pair."""
        return np.repeat(np.arange(len(self)), self.sizes)

    @cached_property
    def index(self) -> Int[np.ndarray, " pairs"]:
        """The place of each pair among the candidates of its question."""
        return np.arange(self.starts[-1]) - self.starts[self.owner]

    def sample(self, fold: int) -> Int[np.ndarray, " sample"]:
        """The questions of a fold on which a probe is fitted: half of ``n``, or what there is."""
        return self._samples[fold]

    @cached_property
    def _samples(self) -> list[Int[np.ndarray, " sample"]]:
        keys = [key(self.seed, example.id) for example in self.examples]
        folds = [sorted(np.flatnonzero(self.fold == fold).tolist(), key=keys.__getitem__) for fold in (0, 1)]
        return [np.array(members[: max(1, self.n // 2)], np.int64) for members in folds]

    # Words.

    @cached_property
    def _encoded(self) -> tuple[Words, Texts, Texts]:
        vocabulary = Vocabulary()
        questions = Texts(vocabulary, (example.question for example in self.examples))
        if self.unit == "sentence":
            candidates = Texts(vocabulary, (p[b:e] for p in self.passages for b, e in self._spans_of(p)))
        else:
            candidates = Texts(vocabulary, (option for example in self.examples for option in example.options))
        return Words.of(vocabulary), questions, candidates

    @property
    def words(self) -> Words:
        """What is known of the words that occur."""
        return self._encoded[0]

    @property
    def questions(self) -> Texts:
        """The questions' words."""
        return self._encoded[1]

    @property
    def texts(self) -> Texts:
        """The words of the distinct candidates: each sentence once, or each option."""
        return self._encoded[2]

    @cached_property
    def text_of(self) -> Int[np.ndarray, " pairs"]:
        """Which of ``texts`` each pair is."""
        if self.unit == "option":
            return np.arange(self.starts[-1])
        return self.first_sentence[self.passage][self.owner] + self.index

    @cached_property
    def first_sentence(self) -> Int[np.ndarray, " ends"]:
        """Number of each passage's first sentence, and of all."""
        return np.concatenate([[0], np.cumsum([len(self._spans_of(text)) for text in self.passages])])

    @cached_property
    def passage_of(self) -> Int[np.ndarray, " sentences"]:
        """The passage of each sentence."""
        return np.repeat(np.arange(len(self.passages)), np.diff(self.first_sentence))

    @cached_property
    def token_text(self) -> Int[np.ndarray, " tokens"]:
        """The candidate text of each token."""
        return np.repeat(np.arange(len(self.texts.lengths)), self.texts.lengths)

    @cached_property
    def token_type(self) -> Int[np.ndarray, " tokens"]:
        """Coarse types: dates and numbers by the word itself, names and places by capitals and what stands before.

        A capital at the head of a sentence counts only where the next word has one too.
        """
        form, known = self.texts.surfaces, self.words
        head = np.zeros(len(form), bool)
        head[self.texts.starts[:-1]] = True
        tail = np.roll(head, -1)
        capital = known.capital[form]
        follows = np.roll(capital, -1) & ~tail
        capital &= ~head | (follows & ~known.stop[form])
        begins = capital & (head | ~np.roll(capital, 1))
        run = np.maximum.accumulate(np.where(begins, np.arange(len(form)), 0))
        after_preposition = (known.preposition[np.roll(form, 1)] & ~head)[run]
        return known.type[form] | np.where(capital, np.where(after_preposition, PLACE, NAME), 0)

    @cached_property
    def asked(self) -> Int[np.ndarray, " questions"]:
        """The types that each question asks for."""
        lower = self.words.lower[self.questions.surfaces]
        names = [self.words.names[k] for k in lower.tolist()]
        texts = (names[begin:end] for begin, end in pairwise(self.questions.starts.tolist()))
        return np.array([asked_type(text) for text in texts], np.int64)

    @cached_property
    def idf(self) -> Float[np.ndarray, " vocabulary"]:
        r"""Rarity $1 + \ln\frac{1 + P}{1 + p_w}$ of a word that stands in $p_w$ of the $P$ passages."""
        size = len(self.words.names)
        seen = np.unique(self.passage_of[self.token_text] * size + self.words.lower[self.texts.surfaces])
        return 1 + np.log((1 + len(self.passages)) / (1 + np.bincount(seen % size, minlength=size)))

    @cached_property
    def matches(self) -> "Matches":
        """Question words in each sentence: one pass over all pairs of questions and sentences."""
        size, parts = len(self.words.names), []
        chunk = max(16, _TABLE_BYTES // size)
        table = np.zeros((min(chunk, len(self)), size), bool)
        lower, stop = self.words.lower[self.texts.surfaces], self.words.stop[self.texts.surfaces]
        _, first = np.unique(self.token_text * size + lower, return_index=True)
        distinct = np.zeros(len(lower), bool)
        distinct[first] = True
        asked_words = np.where(self.words.stop[self.questions.surfaces], -1, self.words.lower[self.questions.surfaces])
        weight = np.where(distinct, self.idf[lower], 0.0)
        for begin in range(0, len(self), chunk):
            end = min(begin + chunk, len(self))
            q = slice(self.questions.starts[begin], self.questions.starts[end])
            local = np.repeat(np.arange(end - begin), self.questions.lengths[begin:end])
            content = asked_words[q] >= 0
            table[local[content], asked_words[q][content]] = True
            pairs = slice(self.starts[begin], self.starts[end])
            tokens, heads = ranges(self.texts.starts, self.text_of[pairs])
            owner = np.repeat(self.owner[pairs], np.diff(heads))
            match = table[owner - begin, lower[tokens]]
            overlap = np.add.reduceat(match & distinct[tokens], heads[:-1], dtype=np.int64)
            rare = np.add.reduceat(match * weight[tokens], heads[:-1])
            wanted = self.asked[owner]
            typed = (self.token_type[tokens] & wanted) != 0
            candidate = np.where(wanted != 0, typed, ~stop[tokens]) & ~match
            near = np.minimum.reduceat(np.where(candidate, _distance(match, heads), FAR), heads[:-1])
            parts.append((overlap, rare, near, np.add.reduceat(typed, heads[:-1], dtype=np.int64)))
            table[local[content], asked_words[q][content]] = False
        return Matches(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def occurrences(self, answers: Sequence[str]) -> tuple[Int[np.ndarray, " found"], Int[np.ndarray, " found"]]:
        """In which texts answers of up to five words stand: texts and answers, sorted by text.

        Answers are compared by their lower-case words; those of stop words alone are not looked for.
        """
        ids = {name: k for k, name in enumerate(self.words.names)}
        grouped: dict[int, list[tuple[list[int], int]]] = {}
        for k, answer in enumerate(answers):
            names = words(answer.lower())
            parts = [ids.get(name, -1) for name in names]
            if 1 <= len(parts) <= 5 and min(parts) >= 0 and not STOP_WORDS.issuperset(names):
                grouped.setdefault(len(parts), []).append((parts, k))
        lower = self.words.lower[self.texts.surfaces].astype(np.uint64)
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        for length, members in grouped.items():
            size = len(lower) - length + 1
            if size <= 0:
                continue
            known = _fingerprint([np.array(column, np.uint64) for column in zip(*(m[0] for m in members), strict=True)])
            order = np.argsort(known, kind="stable")
            known, numbers = known[order], np.array([m[1] for m in members])[order]
            grams = _fingerprint([lower[k : k + size] for k in range(length)])
            place = np.minimum(np.searchsorted(known, grams), len(known) - 1)
            inside = self.token_text[:size] == self.token_text[length - 1 :]
            hit = np.flatnonzero((known[place] == grams) & inside)
            found.append((self.token_text[hit], numbers[place[hit]]))
        texts, held = (np.concatenate(part) for part in zip(*found, strict=True))
        order = np.lexsort((held, texts))
        return texts[order], held[order]


class Matches(NamedTuple):
    """What a question and a sentence share, for each pair.

    Attributes:
        overlap: Distinct content words of the question in the sentence.
        rare: The same, weighted by ``idf``.
        near: Fewest tokens between such a word and one that could be the answer, at most ``FAR``.
        typed: Words of the type that is asked for.
    """

    overlap: Int[np.ndarray, " pairs"]
    rare: Float[np.ndarray, " pairs"]
    near: Int[np.ndarray, " pairs"]
    typed: Int[np.ndarray, " pairs"]


def key(seed: int, text: str) -> bytes:
    """A draw that belongs to a text, whatever stands around it."""
    return blake2b(f"{seed} {text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def ranges(
    starts: Int[np.ndarray, " ends"], chosen: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " items"], Int[np.ndarray, " heads"]]:
    """The items of the chosen segments one after another, and where each segment begins among them."""
    lengths = starts[chosen + 1] - starts[chosen]
    heads = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(heads[-1]) + np.repeat(starts[chosen] - heads[:-1], lengths), heads


def _distance(match: Bool[np.ndarray, " tokens"], heads: Int[np.ndarray, " heads"]) -> Int[np.ndarray, " tokens"]:
    """Tokens to the nearest match within the segment, at most ``FAR``."""
    place = np.arange(len(match))
    begin, end = np.repeat(heads[:-1], np.diff(heads)), np.repeat(heads[1:], np.diff(heads))
    left = np.maximum.accumulate(np.where(match, place, -1))
    right = np.minimum.accumulate(np.where(match, place, len(match))[::-1])[::-1]
    before = np.where(left >= begin, place - left, FAR)
    after = np.where(right < end, right - place, FAR)
    return np.minimum(np.minimum(before, after), FAR)


def _fingerprint(columns: Sequence[np.ndarray]) -> np.ndarray:
    """One number for a row of word ids."""
    total = columns[0] + np.uint64(1)
    for column in columns[1:]:
        total = total * np.uint64(0x9E3779B97F4A7C15) + column + np.uint64(1)
    return total


def _holding(spans: Sequence[tuple[int, int]], start: int) -> int:
    """The sentence in which a character stands; white space counts to the one before."""
    return bisect_right(spans, (start, math.inf)) - 1


TYPES = (DATE, NUMBER, NAME, PLACE)
