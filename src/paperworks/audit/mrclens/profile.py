"""What a set looks like: question words, where answers start, how long passages are."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from paperworks.audit.mrclens.candidates import Candidates
from paperworks.audit.mrclens.text import wh_word, words


class Profile(NamedTuple):
    """Counts.

    Attributes:
        questions: Usable ones.
        passages: Distinct passages of those.
        candidates: Mean number of candidates of a usable question.
        wh_words: All questions by their first question word.
        quarters: Share of all answers that start in each quarter of the passage's characters; empty if there are none.
        places: Share of right candidates in each place, those from the tenth on together.
    """

    questions: int
    passages: int
    candidates: float
    wh_words: dict[str, int]
    quarters: list[float]
    places: list[float]


def profile(candidates: Candidates) -> Profile:
    """Count over a set and the usable questions in it."""
    data = candidates.data
    counted = Counter(wh_word(words(example.question.lower())) for example in data)
    starts = [min(4 * e.answers[0].start // len(e.context), 3) for e in data if e.answers]
    quarters = [float(share) for share in np.bincount(starts, minlength=4) / len(starts)] if starts else []
    places = np.bincount(np.minimum(candidates.gold, 9), minlength=min(int(candidates.sizes.max()), 10))
    return Profile(
        len(candidates),
        len(candidates.passages),
        float(candidates.sizes.mean()),
        dict(sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))),
        quarters,
        [float(share) for share in places / len(candidates)],
    )
