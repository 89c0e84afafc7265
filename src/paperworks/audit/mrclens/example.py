"""A question on a passage."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """An answer's text and the character of the passage at which it starts."""

    text: str
    start: int


@dataclass(frozen=True)
class Example:
    """A question on a passage.

    Attributes:
        id: Its name, unique in the set.
        context: The passage.
        question: The question.
        answers: Spans of the passage; the first is the one that counts.
        impossible: Whether the passage does not answer it (SQuAD v2).
        options: The choices, of a multiple-choice question.
        label: Index of the right option.
        title: The article that the passage is from.
    """

    id: str
    context: str
    question: str
    answers: tuple[Answer, ...] = ()
    impossible: bool = False
    options: tuple[str, ...] = ()
    label: int | None = None
    title: str = ""
