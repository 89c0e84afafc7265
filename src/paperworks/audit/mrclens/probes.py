"""Models that see only a cue: text probes, and cross-fitting them so that no passage is scored by what it taught."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.audit.mrclens.candidates import Candidates, Texts, Vocabulary, key, ranges
from paperworks.audit.mrclens.text import normalise

DIM = 32
STEPS = 40
NONE = -20.0  # log-probability of a sentence that holds no known answer


class TextProbe(nn.Module):
    r"""Bags of embeddings: how well a text suits as an answer, alone or to a question.

    $$s(c \mid q) = \mathrm{relu}(\bar e_c) \cdot (u + W \bar e_q)$$

    with mean embeddings $\bar e$ of the words that training held.

    Args:
        words: Ids of the words that training holds.
        questions: Whether it sees the question; else $W \bar e_q$ is left out.
        dim: Size of an embedding.
        generator: Draws the start.
    """

    def __init__(
        self, words: Int[np.ndarray, " words"], *, questions: bool, generator: torch.Generator, dim: int = DIM
    ) -> None:
        super().__init__()
        self.row = {int(word): k + 1 for k, word in enumerate(np.unique(words))}
        self.table = nn.Parameter(torch.randn(len(self.row) + 1, dim, generator=generator))
        self.alone = nn.Parameter(torch.randn(dim, generator=generator) / dim**0.5)
        self.query = nn.Parameter(torch.randn(dim, dim, generator=generator) / dim) if questions else None

    def bag(self, texts: Texts, lower: Int[np.ndarray, " forms"]) -> tuple[Tensor, Tensor]:
        """Rows of the table and where each text begins, for ``embed``."""
        known = np.array([self.row.get(k, 0) for k in range(int(lower.max()) + 1)], np.int64)
        return torch.from_numpy(known[lower[texts.surfaces]]), torch.from_numpy(texts.starts[:-1])

    def embed(self, bag: tuple[Tensor, Tensor]) -> Float[Tensor, "texts dim"]:
        """Mean embedding of each text."""
        return F.embedding_bag(bag[0], self.table, bag[1], mode="mean", padding_idx=0)

    def weigh(self, question: Float[Tensor, "texts dim"] | None) -> Float[Tensor, "*texts dim"]:
        """What a candidate is multiplied by."""
        return self.alone if question is None or self.query is None else self.alone + question @ self.query.T

    def learn(self, loss: Callable[[], Tensor], steps: int = STEPS, lr: float = 0.06) -> "TextProbe":
        """Take steps of AdamW on the whole sample."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.01, fused=True)
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return self.requires_grad_(False)


def chosen(texts: Texts, which: Int[np.ndarray, " n"]) -> Texts:
    """Some texts, in the order given."""
    part = object.__new__(Texts)
    items, part.starts = ranges(texts.starts, which)
    part.surfaces = texts.surfaces[items]
    return part


def across(
    candidates: Candidates,
    fit: Callable[[Candidates, Int[np.ndarray, " sample"]], Callable[[np.ndarray], np.ndarray]],
) -> Float[np.ndarray, "pairs features"]:
    """Scores from two fits, each on the sample of one fold and used on the other fold."""
    scores = np.zeros((int(candidates.starts[-1]), 1))
    for fold in (0, 1):
        other = np.flatnonzero(candidates.fold != fold)
        pairs, _ = ranges(candidates.starts, other)
        if len(other):
            sample = candidates.sample(fold)
            scores[pairs, 0] = fit(candidates, sample)(other) if len(sample) else 0.0
    return scores


def _seed(candidates: Candidates, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(key(candidates.seed, name)[:7], "big"))


def _ranking_loss(scores: Tensor, candidates: Candidates, sample: np.ndarray, heads: np.ndarray) -> Tensor:
    """Cross-entropy of the right candidate over each question's own."""
    sizes = torch.from_numpy(np.diff(heads))
    padded = torch.full((len(sample), int(sizes.max())), -torch.inf)
    padded[torch.arange(padded.shape[1]) < sizes[:, None]] = scores
    return F.cross_entropy(padded, torch.from_numpy(candidates.gold[sample]))


def candidate_scores(candidates: Candidates, *, questions: bool) -> Float[np.ndarray, "pairs features"]:
    """A probe that ranks sentences or options by their words, seeing the question's words too or not."""

    def fit(c: Candidates, sample: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        pairs, heads = ranges(c.starts, sample)
        texts, queries, lower = chosen(c.texts, c.text_of[pairs]), chosen(c.questions, sample), c.words.lower
        seen = np.concatenate([lower[texts.surfaces], lower[queries.surfaces] if questions else []])
        probe = TextProbe(seen.astype(np.int64), questions=questions, generator=_seed(c, f"{c.unit} {questions}"))
        bags, owner = (
            (probe.bag(texts, lower), probe.bag(queries, lower)),
            np.repeat(np.arange(len(sample)), np.diff(heads)),
        )

        def score(bags: tuple, owner: np.ndarray) -> Tensor:
            hidden = probe.embed(bags[0]).relu()
            if not questions:
                return hidden @ probe.weigh(None)
            return (hidden * probe.weigh(probe.embed(bags[1]))[torch.from_numpy(owner)]).sum(1)

        probe.learn(lambda: _ranking_loss(score(bags, owner), c, sample, heads))

        def use(rows: np.ndarray) -> np.ndarray:
            pairs, heads = ranges(c.starts, rows)
            if not questions:  # each distinct text once
                every = probe.embed(probe.bag(c.texts, lower)).relu() @ probe.weigh(None)
                return every.numpy()[c.text_of[pairs]].astype(np.float64)
            bags = probe.bag(chosen(c.texts, c.text_of[pairs]), lower), probe.bag(chosen(c.questions, rows), lower)
            return score(bags, np.repeat(np.arange(len(rows)), np.diff(heads))).numpy().astype(np.float64)

        return use

    return across(candidates, fit)


def answer_scores(candidates: Candidates) -> Float[np.ndarray, "pairs features"]:
    """A probe that guesses the answer's text from the question, among the answers of its own sample.

    A sentence scores the log-probability of the likeliest answer that stands in it.
    """

    def fit(c: Candidates, sample: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        examples, lower = [c.examples[k] for k in sample], c.words.lower
        normal = [normalise(example.answers[0].text) for example in examples]
        texts = {text: e.answers[0].text for text, e in sorted(zip(normal, examples, strict=True), key=lambda p: p[0])}
        number = {text: k for k, text in enumerate(texts)}
        target = torch.tensor([number[text] for text in normal])
        forms = {name: k for k, name in enumerate(c.words.names)}
        answers = _known(list(texts.values()), forms)
        queries = chosen(c.questions, sample)
        seen = np.concatenate([answers.surfaces, lower[queries.surfaces]])
        probe = TextProbe(seen, questions=True, generator=_seed(c, "answers"))
        same = np.arange(len(c.words.names))
        bags = probe.bag(answers, same), probe.bag(queries, lower)

        def logits(queries: tuple[Tensor, Tensor]) -> Tensor:
            return probe.weigh(probe.embed(queries)) @ probe.embed(bags[0]).relu().T

        probe.learn(lambda: F.cross_entropy(logits(bags[1]), target))
        sentence, answer = c.occurrences(list(texts.values()))
        bounds = np.searchsorted(sentence, np.arange(len(c.texts.lengths) + 1))

        def use(rows: np.ndarray) -> np.ndarray:
            odds = logits(probe.bag(chosen(c.questions, rows), lower)).log_softmax(1).numpy()
            pairs, heads = ranges(c.starts, rows)
            owner = np.repeat(np.arange(len(rows)), np.diff(heads))
            items, ends = ranges(bounds, c.text_of[pairs])
            scores = np.full(len(pairs), NONE)
            held = np.diff(ends) > 0
            if held.any():
                values = odds[np.repeat(owner, np.diff(ends)), answer[items]].astype(np.float64)
                scores[held] = np.maximum.reduceat(values, ends[:-1][held])
            return scores

        return use

    return across(candidates, fit)


def impossible_scores(candidates: Candidates) -> Float[np.ndarray, "pairs features"]:
    """A probe that tells from the question's words that the passage does not answer it."""

    def fit(c: Candidates, sample: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        queries, lower = chosen(c.questions, sample), c.words.lower
        probe = TextProbe(lower[queries.surfaces], questions=False, generator=_seed(c, "impossible"))
        bag, target = probe.bag(queries, lower), torch.from_numpy(c.gold[sample]).float()

        def score(bag: tuple[Tensor, Tensor]) -> Tensor:
            return probe.embed(bag).relu() @ probe.weigh(None)

        probe.learn(lambda: F.binary_cross_entropy_with_logits(score(bag), target))

        def use(rows: np.ndarray) -> np.ndarray:
            odds = score(probe.bag(chosen(c.questions, rows), lower)).numpy().astype(np.float64)
            return np.stack([np.zeros(len(rows)), odds], 1).ravel()

        return use

    return across(candidates, fit)


def _known(answers: Sequence[str], forms: dict[str, int]) -> Texts:
    """Answers in lower-case word ids that the passages use."""
    vocabulary = Vocabulary(forms)
    texts = Texts(vocabulary, (answer.lower() for answer in answers))
    texts.surfaces = np.where(texts.surfaces < len(forms), texts.surfaces, 0)
    return texts
