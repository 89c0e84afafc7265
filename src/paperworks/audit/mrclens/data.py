"""Reading-comprehension sets: SQuAD, RACE and MRQA files, what is wrong with them, and how they are written again."""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from paperworks.audit.mrclens.example import Answer, Example
from paperworks.audit.mrclens.formats import (
    FORMATS,
    Place,
    json_file,
    json_lines,
    mrqa_examples,
    race_examples,
    sniff,
    squad_examples,
)
from paperworks.errors import UserError, unknown

Repair = Literal["moved", "lost"]


class MRCDataset(Sequence[Example]):
    """Questions on passages, in their order.

    Args:
        examples: The questions.
        name: What reports call the set.
        repair: Look up answers that do not stand at their ``start`` in the passage, instead of refusing them: the
            nearest place where the text occurs counts, and an answer that occurs nowhere is left out.

    Attributes:
        repaired: What ``repair`` did, by id: ``"moved"``, or ``"lost"`` where no answer was left.

    Raises:
        UserError: For no examples, an id that occurs twice, an empty passage or question, a label that is no index
            of an option, or, without ``repair``, an answer that does not stand at its start.
    """

    def __init__(self, examples: Iterable[Example], name: str = "questions", *, repair: bool = False) -> None:
        self.examples, self.name = list(examples), name
        self.repaired: dict[str, Repair] = {}
        if not self.examples:
            raise UserError(f"{name} holds no questions")
        times = Counter(example.id for example in self)
        self._refuse("an id that occurs twice", [id for id, count in times.items() if count > 1])
        self._refuse("an empty passage or question", [example.id for example in self if _empty(example)])
        self._refuse("a label that is no index of an option", [e.id for e in self if e.options and not _labelled(e)])
        misplaced = [row for row, example in enumerate(self) if not all(map(_stands_in(example), example.answers))]
        if not repair:
            fault, way = "an answer that does not stand at its start", "; repair=True (--repair) looks them up"
            self._refuse(fault, [self[row].id for row in misplaced], way)
        for row in misplaced:
            self.examples[row], self.repaired[self.examples[row].id] = _repaired(self.examples[row])

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @property
    def multiple_choice(self) -> bool:
        """Whether questions come with options."""
        return any(example.options for example in self.examples)

    def subset(self, ids: Collection[str]) -> "MRCDataset":
        """The questions of these ids, in the order of this set.

        Raises:
            UserError: For an id that is not there.
        """
        wanted = set(ids)
        kept = [example for example in self.examples if example.id in wanted]
        if len(kept) < len(wanted):
            missing = wanted - {example.id for example in kept}
            raise UserError(f"{self.name} has no question {_listed(sorted(missing))}")
        return type(self)(kept, self.name)

    @classmethod
    def load(cls, path: str | Path, format: str | None = None, *, repair: bool = False) -> "MRCDataset":
        """Read a file or folder of any of the formats.

        Args:
            path: Where it lies; ``.gz`` is unpacked.
            format: ``"squad"``, ``"race"`` or ``"mrqa"``; by default what the content looks like.
            repair: As for the class.

        Raises:
            UserError: If there is nothing, it is malformed, or its content is refused.
        """
        if format is None:
            format = sniff(Path(path))
        if format not in FORMATS:
            raise unknown("format", format, FORMATS)
        if format == "race":
            return cls.from_multiple_choice(path)
        return cls.from_squad(path, repair=repair) if format == "squad" else cls.from_mrqa(path)

    @classmethod
    def from_squad(cls, source: str | Path | dict[str, Any], *, repair: bool = False) -> "MRCDataset":
        """Read SQuAD v1.1 or v2.0 JSON: ``{"data": [{"paragraphs": [{"context", "qas": […]}]}]}``.

        Raises:
            UserError: If it is malformed, or its content is refused.
        """
        name = "the dict" if isinstance(source, dict) else Path(source).name
        content = source if isinstance(source, dict) else json_file(Path(source))
        return cls(squad_examples(Place(content, name)), name, repair=repair)

    @classmethod
    def from_multiple_choice(cls, source: str | Path) -> "MRCDataset":
        """Read RACE: objects of ``article``, ``questions``, ``options`` and ``answers`` (letters).

        They may be one object or a list in a JSON file, one a line, or one a file in a folder, as RACE comes.

        Raises:
            UserError: If it is malformed, or its content is refused.
        """
        path = Path(source)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".json") and file.is_file())
            if not files:
                raise UserError(f"{path} holds no .txt or .json files of RACE")
            parts = [(file.name, str(file.relative_to(path).with_suffix("")), json_file(file)) for file in files]
        elif path.name.removesuffix(".gz").endswith(".jsonl"):
            parts = [(f"{path.name}: line {k}", f"{k}", item) for k, item in json_lines(path)]
        else:
            content = json_file(path)
            items = content if isinstance(content, list) else [content]
            parts = [(f"{path.name}: item {k}", f"{k}", item) for k, item in enumerate(items)]
        return cls((e for where, id, item in parts for e in race_examples(Place(item, where), id)), path.name)

    @classmethod
    def from_mrqa(cls, source: str | Path) -> "MRCDataset":
        """Read MRQA 2019 JSON lines, plain or ``.gz``; the first detected span is the answer.

        Raises:
            UserError: If it is malformed, or its content is refused.
        """
        path = Path(source)
        lines = ((k, line) for k, line in json_lines(path) if not (isinstance(line, dict) and "header" in line))
        return cls((e for k, line in lines for e in mrqa_examples(Place(line, f"{path.name}: line {k}"))), path.name)

    def to_squad(self) -> dict[str, Any]:
        """This set as SQuAD JSON, ids and order kept; version 2.0 if any question is impossible.

        Raises:
            UserError: If questions come with options, for which SQuAD has no place.
        """
        if self.multiple_choice:
            raise UserError(f"{self.name} is multiple choice, which SQuAD's format cannot hold; save() writes RACE's")
        second = any(example.impossible for example in self)
        articles = []
        for title, members in groupby(self, lambda example: example.title):
            paragraphs = [
                {"context": context, "qas": [_qa(example, second) for example in group]}
                for context, group in groupby(members, lambda example: example.context)
            ]
            articles.append({"title": title, "paragraphs": paragraphs})
        return {"version": "v2.0" if second else "1.1", "data": articles}

    def save(self, path: str | Path) -> None:
        """Write SQuAD JSON, or for multiple choice a JSON list of RACE's objects with ``ids`` beside ``answers``."""
        content: Any
        if self.multiple_choice:
            content = [
                {
                    "id": title,
                    "article": article,
                    "ids": [e.id for e in members],
                    "questions": [e.question for e in members],
                    "options": [list(e.options) for e in members],
                    "answers": [chr(ord("A") + (e.label or 0)) for e in members],
                }
                for (title, article), group in groupby(self, lambda e: (e.title, e.context))
                for members in [list(group)]
            ]
        else:
            content = self.to_squad()
        Path(path).write_text(json.dumps(content, ensure_ascii=False), "utf-8")

    def _refuse(self, fault: str, ids: Sequence[str], way: str = "") -> None:
        if ids:
            count = f"{len(ids)} question{'s' * (len(ids) > 1)}"
            raise UserError(f"{self.name}: {count} with {fault}: {_listed(ids)}{way}")


def _qa(example: Example, second: bool) -> dict[str, Any]:
    answers = [{"text": answer.text, "answer_start": answer.start} for answer in example.answers]
    qa = {"id": example.id, "question": example.question, "answers": answers}
    return qa | {"is_impossible": example.impossible} if second else qa


def _empty(example: Example) -> bool:
    return not (example.context.strip() and example.question.strip())


def _labelled(example: Example) -> bool:
    return example.label is not None and 0 <= example.label < len(example.options)


def _stands_in(example: Example) -> Callable[[Answer], bool]:
    return lambda a: bool(a.text) and a.start >= 0 and example.context.startswith(a.text, a.start)


def _repaired(example: Example) -> tuple[Example, Repair]:
    """The answers moved to the nearest places where they occur, in any case of letters if need be."""
    answers: list[Answer] = []
    for answer in example.answers:
        text = re.escape(answer.text.strip())
        places = list(re.finditer(text, example.context)) or list(re.finditer(text, example.context, re.IGNORECASE))
        if text and places:
            nearest = min(places, key=lambda place: abs(place.start() - answer.start))
            answers.append(Answer(nearest.group(), nearest.start()))
    return replace(example, answers=tuple(answers)), "moved" if answers else "lost"


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
