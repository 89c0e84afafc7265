"""Reading SQuAD, RACE and MRQA files: what is malformed is named by its place in the file."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paperworks.audit.mrclens.example import Answer, Example
from paperworks.errors import UserError

FORMATS = ("squad", "race", "mrqa")


class Place:
    """A value inside a JSON document that knows where it stands, for the error."""

    def __init__(self, value: Any, where: str) -> None:
        self.value, self.where = value, where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        if not isinstance(self.value, dict):
            raise UserError(f"{self.where}: expected an object with {key!r}, got {_kind(self.value)}")
        if key not in self.value and default is not None:
            return default
        if key not in self.value:
            raise UserError(f"{self.where} has no {key!r}")
        found = self.value[key]
        if not isinstance(found, kind) or isinstance(found, bool) != (kind is bool):
            raise UserError(f"{self.where}: {key} is {_kind(found)}, expected {_KINDS[kind]}")
        return found

    def items(self, key: str, *, optional: bool = False) -> Iterator["Place"]:
        for k, value in enumerate(self.get(key, list, [] if optional else None)):
            yield Place(value, f"{self.where}: {key}[{k}]")

    def texts(self, key: str) -> list[str]:
        found = self.get(key, list)
        for value in found:
            if not isinstance(value, str):
                raise UserError(f"{self.where}: {key} holds {_kind(value)}, expected text")
        return list(found)


_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "true or false"}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "null" if value is None else "a number")


def squad_examples(root: Place) -> Iterator[Example]:
    """The questions of a SQuAD document."""
    for article in root.items("data"):
        title = article.get("title", str, "")
        for paragraph in article.items("paragraphs"):
            context = paragraph.get("context", str)
            for qa in paragraph.items("qas"):
                id, impossible = _id(qa, "id"), qa.get("is_impossible", bool, False)
                found = [] if impossible else qa.items("answers", optional=True)
                answers = tuple(Answer(a.get("text", str), a.get("answer_start", int)) for a in found)
                yield Example(id, context, qa.get("question", str), answers, impossible, title=title)


def race_examples(article: Place, fallback: str) -> Iterator[Example]:
    """The questions of one of RACE's objects; ``fallback`` is its id if it has none."""
    title = article.get("id", str, fallback)
    context, questions = article.get("article", str), article.texts("questions")
    options, letters = article.get("options", list), article.texts("answers")
    ids = article.texts("ids") if "ids" in article.value else [f"{title}#{k}" for k in range(len(questions))]
    if not len(questions) == len(options) == len(letters) == len(ids):
        counts = f"{len(questions)} questions, {len(options)} lists of options, {len(letters)} answers, {len(ids)} ids"
        raise UserError(f"{article.where}: {counts}")
    choices = [Place({"options": choice}, f"{article.where}: question {k}") for k, choice in enumerate(options)]
    for id, question, choice, letter in zip(ids, questions, choices, letters, strict=True):
        label = ord(letter) - ord("A") if len(letter) == 1 else -1
        yield Example(id, context, question, options=tuple(choice.texts("options")), label=label, title=title)


def mrqa_examples(line: Place) -> Iterator[Example]:
    """The questions of one of MRQA's lines."""
    context = line.get("context", str)
    for qa in line.items("qas"):
        answers = []
        for found in qa.items("detected_answers", optional=True):
            for span in found.get("char_spans", list):
                if not (isinstance(span, list) and len(span) == 2 and all(isinstance(end, int) for end in span)):
                    raise UserError(f"{found.where}: char_spans holds {json.dumps(span)[:40]}, expected [begin, end]")
                begin, end = span
                if not 0 <= begin <= end < len(context):
                    raise UserError(f"{found.where}: char_spans {span} lies outside its context")
                answers.append(Answer(context[begin : end + 1], begin))
        yield Example(_id(qa, "qid"), context, qa.get("question", str), tuple(answers))


def _id(qa: Place, key: str) -> str:
    value = qa.value.get(key) if isinstance(qa.value, dict) else None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else str(qa.get(key, str))


def _read(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a file")
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not UTF-8 text: byte {error.start}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def json_file(path: Path) -> Any:
    """The content of a JSON file, plain or ``.gz``."""
    return _parsed(_read(path), path.name)


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a file of JSON lines, plain or ``.gz``, with the numbers of their lines."""
    for k, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            yield k, _parsed(line, f"{path.name}: line {k}")


def _parsed(text: str, where: str) -> Any:
    try:
        content = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half of a surrogate pair, which is no text") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{where} cannot be read as JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply") from error


def sniff(path: Path) -> str:
    """The format that a file looks like, by its first characters."""
    if path.is_dir():
        return "race"
    head = _read(path)[:65536]
    if '"article"' in head:
        return "race"
    return "squad" if '"paragraphs"' in head else "mrqa" if '"qas"' in head or '"header"' in head else "squad"
