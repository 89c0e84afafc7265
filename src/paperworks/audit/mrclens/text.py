"""English by rule: sentences, tokens, stop words, and the coarse types that question words ask for."""

import re
from collections.abc import Sequence

WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[“\"(A-Z0-9])")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = re.compile(r"[^\w\s]")

DATE, NUMBER, NAME, PLACE = 1, 2, 4, 8
"""Flags of a token's coarse type; a question asks for some of them, or for 0: none that is known."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


STOP_WORDS = _set(
    """
    a about above after again against all also am an and any are as at be because been before being below between both
    but by can could did do does doing during each few for from further had has have having he her here hers him his
    how i if in into is it its itself just many me more most much my no nor not of off on once one only or other our out
    over own s same she should so some such t than that the their them then there these they this those through to too
    under until up very was we were what when where which while who whom whose why will with would you your
    """
)
PLACE_PREPOSITIONS = _set("at in near from to into across toward towards outside inside")
_MONTHS_AND_DAYS = _set(
    """
    january february march april may june july august september october november december
    monday tuesday wednesday thursday friday saturday sunday century centuries
    """
)
_NUMBER_WORDS = _set(
    """
    two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty thirty forty fifty sixty seventy
    eighty ninety hundred thousand million billion trillion half dozen twice
    """
)
_YEAR = re.compile(r"(1\d{3}|20\d{2})s?")
_NUMBER = re.compile(r"\d[\d_]*(st|nd|rd|th)?")

WH_WORDS = _set("what how who when which where why whom whose")
_AMOUNT = _set("many much long old far tall high large big fast often deep wide heavy few")
_NOUN_TYPES = {
    DATE: _set("year date day month century decade era"),
    NUMBER: _set("percentage percent number amount age population size length height"),
    PLACE | NAME: _set("city country state place town region river county island continent"),
    NAME: _set("person name scientist president king queen author team player company organization"),
}


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Begin and end of each sentence: it ends at ``.``, ``!`` or ``?``, white space, and a capital, digit or quote."""
    begins, ends = [0], []
    for gap in _SENTENCE_END.finditer(text):
        ends.append(gap.start())
        begins.append(gap.end())
    return list(zip(begins, [*ends, len(text)], strict=True))


def split_sentences(text: str) -> list[str]:
    """The sentences of a passage, as the cues see them.

    Example:
        >>> split_sentences("Ann lives in Rome. Bob works in Oslo.")
        ['Ann lives in Rome.', 'Bob works in Oslo.']
    """
    return [text[begin:end] for begin, end in sentence_spans(text)]


def words(text: str) -> list[str]:
    """The words of a text as they are written."""
    return WORD.findall(text)


def normalise(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, without articles, punctuation and double spaces."""
    return " ".join(_ARTICLE.sub(" ", _PUNCTUATION.sub("", answer.lower())).split())


def word_type(word: str) -> int:
    """Whether a word by itself is a date or a number, else 0; names and places depend on what stands before."""
    lower = word.lower()
    if lower[:1].isdigit():
        return DATE if _YEAR.fullmatch(lower) else NUMBER if _NUMBER.fullmatch(lower) else 0
    if lower in _MONTHS_AND_DAYS and word != "may":
        return DATE
    return NUMBER if lower in _NUMBER_WORDS else 0


def wh_word(question: Sequence[str]) -> str:
    """The first question word among lower-case words, or ``"other"``."""
    place = _wh_place(question)
    return question[place] if place >= 0 else "other"


def _wh_place(question: Sequence[str]) -> int:
    for place, word in enumerate(question):
        if word in WH_WORDS:
            return place
    return -1


def asked_type(question: Sequence[str]) -> int:
    """The coarse types that a question in lower-case words asks for: flags, or 0 where the rules know none.

    ``when`` asks for a date, ``who`` for a name, ``where`` for a place, ``how many`` and its like for a number;
    ``what`` and ``which`` for what the noun within the next two words says, such as ``what year``.
    """
    place = _wh_place(question)
    if place < 0:
        return 0
    word, following = question[place], question[place + 1 : place + 3]
    if word == "how":
        return NUMBER if following and following[0] in _AMOUNT else 0
    if word in ("what", "which"):
        return next((flag for noun in following for flag, nouns in _NOUN_TYPES.items() if noun in nouns), 0)
    return {"when": DATE, "where": PLACE}.get(word, NAME if word.startswith("who") else 0)
