"""How long MRCLens takes on sets as large as SQuAD's: 98,000 questions on 20,000 passages of 120 words.

The whole audit (every cue, probes, permutations, bootstrap) of that set within 60 s of CPU time, and that of 10,000
questions within 10 s, both on one thread, of sets in memory. And what the cues read off questions and sentences (words
in common, their rarity and distance, words of the type asked for), where each passage is tokenised once, at least 5
times as fast as the same rules written question by question, both in interleaved rounds over 10,000 questions.
"""

import sys

import numpy as np
import torch
from timing import compare, seconds, verdict

from paperworks.audit.mrclens import Answer, Example, MRCDataset, audit, split_sentences
from paperworks.audit.mrclens.candidates import FAR, Candidates
from paperworks.audit.mrclens.text import NAME, PLACE, PLACE_PREPOSITIONS, STOP_WORDS, asked_type, word_type, words

ROUNDS = 5
SENTENCES, WORDS, PER_PASSAGE = 5, 24, 5
torch.set_num_threads(1)


def made_up(questions: int, seed: int = 0) -> MRCDataset:
    """Sentences of words that are as frequent as those of a language, and questions that share words with one."""
    rng = np.random.default_rng(seed)
    vocabulary = np.array([f"w{k}" if k % 5 else f"W{k}" for k in range(50_000)] + sorted(STOP_WORDS) * 20)
    rng.shuffle(vocabulary[200:])
    examples = []
    for passage in range(-(-questions // PER_PASSAGE)):
        drawn = vocabulary[np.minimum(rng.zipf(1.2, (SENTENCES, WORDS)), len(vocabulary)) - 1]
        sentences = ["The " + " ".join(row) + "." for row in drawn]
        context = " ".join(sentences)
        for k in range(PER_PASSAGE):
            place = int(rng.integers(SENTENCES))
            asked = " ".join(rng.choice(drawn[place], 6))
            answer = str(drawn[place][int(rng.integers(WORDS))])
            start = sum(len(text) + 1 for text in sentences[:place])
            start = context.index(answer, start)
            wh = ("What", "Who", "When", "Where", "How many")[k]
            examples.append(Example(f"{passage}-{k}", context, f"{wh} {asked}?", (Answer(answer, start),)))
    return MRCDataset(examples[:questions])


def types(tokens: list[str]) -> list[int]:
    """The coarse types of a sentence's words."""
    found, preposition, running = [], False, False
    for k, token in enumerate(tokens):
        capital = token[:1].isupper()
        if k == 0:
            follows = len(tokens) > 1 and tokens[1][:1].isupper()
            capital = capital and follows and token.lower() not in STOP_WORDS
        if capital and not running:
            preposition = k > 0 and tokens[k - 1].lower() in PLACE_PREPOSITIONS
        running = capital
        found.append(word_type(token) | ((PLACE if preposition else NAME) if capital else 0))
    return found


def question_by_question(data: MRCDataset, idf: dict[str, float]) -> np.ndarray:
    """Overlap, rare overlap, distance and words of the type asked for: one row a sentence."""
    rows = []
    for example in data:
        question = words(example.question.lower())
        asked, wanted = set(question) - STOP_WORDS, asked_type(question)
        for sentence in split_sentences(example.context):
            tokens = words(sentence)
            kinds, lower = types(tokens), [token.lower() for token in tokens]
            shared = asked & set(lower)
            places = [k for k, token in enumerate(lower) if token in shared]
            near = FAR
            if places:
                for k, (token, kind) in enumerate(zip(lower, kinds, strict=True)):
                    if token not in shared and (kind & wanted if wanted else token not in STOP_WORDS):
                        near = min(near, min(abs(k - place) for place in places))
            rows.append((len(shared), sum(idf[t] for t in shared), near, sum((kind & wanted) != 0 for kind in kinds)))
    return np.array(rows, float)


def all_at_once(data: MRCDataset) -> np.ndarray:
    return np.stack(Candidates(data).matches, 1).astype(float)


if __name__ == "__main__":
    print(f"PyTorch {torch.__version__}, NumPy {np.__version__}, CPU time of one thread")
    some = made_up(10_000)
    c = Candidates(some)
    idf = dict(zip(c.words.names, c.idf.tolist(), strict=True))
    assert np.allclose(all_at_once(some), question_by_question(some, idf))
    share, milliseconds = compare(lambda: question_by_question(some, idf), lambda: all_at_once(some), ROUNDS)
    print(f"10,000 questions, each passage tokenised once: {milliseconds:.0f} ms")
    met = [verdict("question by question / each passage once", share, at_least=5)]
    met += [verdict("audit of 10,000 questions, s", seconds(lambda: audit(some)), at_most=10)]
    many = made_up(98_000)
    met += [verdict("audit of 98,000 questions, s", seconds(lambda: audit(many)), at_most=60)]
    sys.exit(not all(met))
