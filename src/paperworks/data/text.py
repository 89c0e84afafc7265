"""Labelled texts: AG News, and any table with columns of text and one of labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Int64
from torch import Tensor

from paperworks.data.root import DatasetNotFound, data_root
from paperworks.data.tables import label_column, read_table
from paperworks.errors import UserError, nearest, unknown

TEXT_NAMES = ("text", "sentence", "content", "review")
AG_NEWS = "ag_news"
_AG_NEWS_COLUMNS = ("class", "title", "description")
_AG_NEWS_CLASSES = ("World", "Sports", "Business", "Sci/Tech")
_AG_NEWS_HOW = (
    "Get ag_news_csv.tar.gz (Zhang et al., 2015; for instance from the Hugging Face hub's fancyzhx/ag_news) and unpack "
    "it there."
)


class LabelledTexts(NamedTuple):
    """Texts with a class each.

    Attributes:
        texts: One string an example.
        targets: Class indices, 0 to K - 1.
        classes: The name of each class, in the order of the indices.
    """

    texts: list[str]
    targets: Int64[Tensor, " n"]
    classes: tuple[str, ...]


def load_text(
    source: str | Path,
    *,
    text: str | Sequence[str] | None = None,
    target: str | None = None,
    names: Sequence[str] | None = None,
    split: str | None = None,
    root: str | Path | None = None,
) -> LabelledTexts:
    """Read labelled texts.

    Args:
        source: ``"ag_news"`` (the official ``ag_news_csv/{train,test}.csv``), or a CSV, TSV or parquet
            file, as given or inside the data root.
        text: The column of texts, or several that are joined by a space. By default the one called ``text``,
            ``sentence``, ``content`` or ``review``.
        target: The column of labels; by default ``label``, ``target`` or ``class``, else the last.
        names: The column names of a file that has no header line.
        split: Which of AG News' files, ``"train"`` or ``"test"`` (the default); other sources have none.
        root: The data root (see ``data_root``).

    Raises:
        UserError: If the file or a column is missing, a text or label is empty, or there is one class only.
    """
    if str(source) == AG_NEWS:
        return _ag_news(split or "test", root)
    if split is not None:
        raise UserError(f"{source} has no split {split!r}: a file is one split")
    table = read_table(source, names=names, root=root, texts=True).rename(columns=str)
    columns, file = list(table.columns), Path(source).name
    wanted = _text_columns(file, columns, text)
    label = label_column(file, [column for column in columns if column not in wanted], target)
    targets, values = _classes(file, table[label])
    return LabelledTexts(_join(file, table, wanted), targets, values)


def has_ag_news(root: str | Path | None = None, split: str = "test") -> bool:
    """Whether AG News lies in the data root."""
    return any((data_root(root) / place).exists() for place in _places(split))


def _ag_news(split: str, root: str | Path | None) -> LabelledTexts:
    if split not in ("train", "test"):
        raise unknown("split of ag_news", split, ("train", "test"))
    folder, places = data_root(root), _places(split)
    place = next((folder / place for place in places if (folder / place).exists()), None)
    if place is None:
        raise DatasetNotFound(f"nothing at {' or '.join(str(folder / place) for place in places)}. {_AG_NEWS_HOW}")
    table = read_table(place, names=_AG_NEWS_COLUMNS, texts=True)
    numbers = pd.to_numeric(table["class"], errors="coerce")
    if not numbers.isin(range(1, 5)).all():
        row = _first(~numbers.isin(range(1, 5)))
        raise UserError(f"{place.name}: class is {table['class'].iloc[row - 1]} in row {row}, expected 1 to 4")
    targets = torch.tensor(numbers.to_numpy(), dtype=torch.int64) - 1
    return LabelledTexts(_join(place.name, table, ["title", "description"]), targets, _AG_NEWS_CLASSES)


def _places(split: str) -> tuple[str, ...]:
    return f"ag_news_csv/{split}.csv", f"text/ag_news_{split}.csv"


def _text_columns(file: str, columns: list[str], text: str | Sequence[str] | None) -> list[str]:
    if text is None:
        usual = [column for name in TEXT_NAMES for column in columns if column.lower() == name]
        if not usual:
            shown = ", ".join(column if len(column) < 40 else column[:37] + "…" for column in columns)
            raise UserError(
                f"{file} has no column called {', '.join(TEXT_NAMES)}: name the texts with text= (it has: {shown}; "
                "a file without a header line needs names=)"
            )
        return usual[:1]
    wanted = [text] if isinstance(text, str) else list(text)
    for column in wanted:
        if column not in columns:
            raise UserError(f"{file} has no column {column!r}.{nearest(column, columns)}")
    if not wanted:
        raise UserError("text must name at least one column, got none")
    return wanted


def _join(file: str, table: pd.DataFrame, columns: list[str]) -> list[str]:
    parts = table[columns].astype("string").fillna("")
    texts = parts.agg(" ".join, axis="columns").str.strip()
    if (texts == "").any():
        raise UserError(f"{file}: column {' and '.join(columns)} is empty in row {_first(texts == '')}")
    return [str(item) for item in texts]


def _classes(file: str, labels: pd.Series) -> tuple[Tensor, tuple[str, ...]]:
    if labels.isna().any():
        raise UserError(f"{file}: label column {labels.name!r} is empty in row {_first(labels.isna())}")
    codes, values = pd.factorize(labels, sort=True)
    if len(values) < 2:
        raise UserError(f"{file}: label column {labels.name!r} holds {values[0]!r} only, expected at least 2 classes")
    return torch.as_tensor(codes, dtype=torch.int64), tuple(str(value) for value in values)


def _first(mask: pd.Series) -> int:
    """The first row, from 1 and without the header line, where the mask is true."""
    return int(mask.to_numpy(bool).argmax()) + 1
