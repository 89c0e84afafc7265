"""Categorical tables: a CSV of anyone's, UCI Splice and UCI Adult."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn import functional as F

from paperworks.data import DatasetNotFound, locate, read_table
from paperworks.data.tables import encode_labels, label_column
from paperworks.errors import UserError, unknown

MISSING = "?"
"""The value of what a table leaves empty."""


@dataclass(frozen=True, eq=False)
class CategoricalTable:
    """Rows of categorical features, as codes.

    Attributes:
        rows: Codes, 0 to the feature's number of values less one.
        targets: Class indices.
        features: The features' names.
        values: The names of each feature's values, in the order of the codes.
        classes: The classes' names.
    """

    rows: Int64[Tensor, "n features"]
    targets: Int64[Tensor, " n"]
    features: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]

    @property
    def n_values(self) -> list[int]:
        """The number of values of each feature."""
        return [len(names) for names in self.values]

    def allowed(self, without: Collection[str] = (MISSING,)) -> Bool[Tensor, "features values"]:
        """A mask of the values that features have, but for some, by name in whatever feature they occur."""
        mask = torch.zeros(len(self.features), max(self.n_values), dtype=torch.bool)
        for i, names in enumerate(self.values):
            mask[i, : len(names)] = torch.tensor([name not in without for name in names])
        return mask

    def masks(
        self, rows: Int64[Tensor, "batch features"], without: Collection[str] = (MISSING,)
    ) -> Bool[Tensor, "batch features values"]:
        """``allowed`` for each of some rows, where a feature that holds one of the values left out may only keep it."""
        mask = self.allowed(without)
        own = F.one_hot(rows, mask.shape[1]).bool()
        kept = ~(own & mask).any(2, keepdim=True)
        return torch.where(kept, own, mask)

    def all_but(self, *fixed: str) -> Bool[Tensor, " features"]:
        """A mask of the features that may change: all but those named.

        Raises:
            UserError: For a feature that is not there.
        """
        for name in fixed:
            if name not in self.features:
                raise unknown("feature", name, self.features)
        return torch.tensor([name not in fixed for name in self.features])

    def within(self, allowed: Bool[Tensor, "features values"]) -> Bool[Tensor, " n"]:
        """Which rows hold allowed values only, so that they can be attacked."""
        return allowed[torch.arange(len(self.features)), self.rows].all(1)


def read_categorical(
    path: str | Path,
    *,
    target: str | None = None,
    sequence: str | None = None,
    separator: str = "",
    names: Sequence[str] | None = None,
    max_values: int = 1000,
    root: str | Path | None = None,
) -> CategoricalTable:
    """Read a table (CSV, TSV or parquet) whose columns are categorical. What is empty becomes the value ``?``.

    Args:
        path: The file, as given or inside the data root.
        target: The column of labels; by default ``label``, ``target`` or ``class``, else the last.
        sequence: A column of sequences: each place becomes a feature, and all have the same values. Other columns
            are left out. Without it every column but the labels is a feature.
        separator: What stands between the items of a sequence; what short ones lack is ``?`` then. Without it the
            items are characters, as many in every row.
        names: Column names of a file without a header line.
        max_values: More distinct values in a column than these are taken for a mistake.
        root: The data root (see ``paperworks.data.data_root``).

    Raises:
        DatasetNotFound: If there is no such file.
        UserError: If a column is missing, a label empty, strings differ in length, or a column is not categorical.
    """
    table = read_table(path, names=names, root=root).rename(columns=str)
    file = Path(path).name
    label = label_column(file, [c for c in table.columns if c != sequence], target)
    targets, classes = encode_labels(file, table[label])
    if sequence is None:
        features = table.drop(columns=label).convert_dtypes()  # whole numbers stay so beside what is missing
    elif sequence not in table.columns:
        raise unknown(f"column of {file}", sequence, table.columns)
    else:
        features = _places(file, table[sequence], separator)
    if not len(features.columns):
        raise UserError(f"{file} has no column beside {label!r}")
    codes, values = [], []
    shared = sorted(set(features.to_numpy().ravel().tolist())) if sequence else None
    for column in features:
        found = pd.Categorical(features[column].astype("string").str.strip().fillna(MISSING), categories=shared)
        if len(found.categories) > max_values:
            raise UserError(
                f"{file}: column {column!r} has {len(found.categories)} distinct values, more than {max_values}: "
                "leave it out or put its values into classes"
            )
        codes.append(torch.tensor(found.codes, dtype=torch.int64))
        values.append(tuple(str(name) for name in found.categories))
    return CategoricalTable(torch.stack(codes, 1), targets, tuple(map(str, features.columns)), tuple(values), classes)


def _places(file: str, column: pd.Series, separator: str) -> pd.DataFrame:
    """Sequences as a column for each place."""
    texts = [str(text).strip() for text in column.fillna("")]
    items = [text.split(separator) for text in texts] if separator else [list(text) for text in texts]
    lengths = [len(row) for row in items]
    usual = max(lengths) if separator else max(set(lengths), key=lengths.count)
    if not usual or (not separator and len(set(lengths)) > 1):
        row = next((i for i, length in enumerate(lengths) if length != usual), 0)
        raise UserError(
            f"{file}: {column.name!r} has {lengths[row]} characters in data row {row + 1}, expected {max(usual, 1)}"
        )
    padded = [row + [MISSING] * (usual - len(row)) for row in items]
    return pd.DataFrame(padded, columns=[f"{column.name}[{i}]" for i in range(usual)])


BASES = ("A", "G", "T", "C", MISSING)
SPLICE_CLASSES = ("IE", "N", "EI")
_SPLICE_PLACES = ("splice.data", "splice/splice.data", "tables/splice.npz")


def load_splice(path: str | Path | None = None, *, root: str | Path | None = None) -> CategoricalTable:
    """Read UCI's splice-junction sequences: 60 bases, of which the last 30 follow the junction, if there is one.

    Args:
        path: UCI's ``splice.data``, or an ``.npz`` of ``x`` [N, 60] (0 to 4: A, G, T, C, ambiguous) and ``y``
            [N] (0 to 2: IE, N, EI). By default one of them in the data root.
        root: The data root (see ``paperworks.data.data_root``).

    Raises:
        DatasetNotFound: If there is none.
        UserError: If the file is not as described; the message names the line.
    """
    how = "Get splice.data from https://archive.ics.uci.edu/dataset/69 into the data root."
    file = _first(_SPLICE_PLACES, root, how) if path is None else locate(path, root, how=how)
    if file.suffix == ".npz":
        try:
            with np.load(file, allow_pickle=False) as arrays:
                x, y = arrays["x"].astype(np.int64), arrays["y"].astype(np.int64)
        except (KeyError, OSError, ValueError, BadZipFile) as error:
            raise UserError(f"{file} must hold arrays x and y: {' '.join(str(error).split())}") from error
        if (
            x.shape != (len(y), 60)
            or y.ndim != 1
            or not (0 <= x.min() <= x.max() <= 4 and 0 <= y.min() <= y.max() <= 2)
        ):
            raise UserError(f"{file} must hold x [N, 60] in 0 to 4 and y [N] in 0 to 2")
    else:
        x, y = _splice_lines(file)
    names = tuple(f"{i:+d}" for i in (*range(-30, 0), *range(1, 31)))
    return CategoricalTable(torch.from_numpy(x), torch.from_numpy(y), names, (BASES,) * 60, SPLICE_CLASSES)


def _splice_lines(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Lines ``EI, NAME, CCAGC…``; D, N, S and R stand for several bases."""
    code = {base: k for k, base in enumerate("AGTC")} | dict.fromkeys("DNSR", 4)
    rows, labels = [], []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 3 or parts[0] not in SPLICE_CLASSES or len(parts[2]) != 60 or not set(parts[2]) <= set(code):
            raise UserError(f"{file}, line {number}: expected 'EI|IE|N, name, 60 of ACGTDNSR', got {line[:40]!r}")
        rows.append([code[base] for base in parts[2]])
        labels.append(SPLICE_CLASSES.index(parts[0]))
    if not rows:
        raise UserError(f"{file} has no lines")
    return np.array(rows), np.array(labels)


# The columns of a9a, in its order: UCI Adult with numbers cut into fifths, or into some and none.
_FIFTHS = ("lowest fifth", "second fifth", "middle fifth", "fourth fifth", "highest fifth")
_ADULT: dict[str, tuple[str, ...]] = {
    "age": _FIFTHS,
    "workclass": (
        *("Private", "Self-emp-not-inc", "Self-emp-inc", "Federal-gov", "Local-gov", "State-gov", "Without-pay"),
        "Never-worked",
    ),
    "fnlwgt": _FIFTHS,
    "education": (
        *("Bachelors", "Some-college", "11th", "HS-grad", "Prof-school", "Assoc-acdm", "Assoc-voc", "9th", "7th-8th"),
        *("12th", "Masters", "1st-4th", "10th", "Doctorate", "5th-6th", "Preschool"),
    ),
    "education-num": _FIFTHS,
    "marital-status": (
        *("Married-civ-spouse", "Divorced", "Never-married", "Separated", "Widowed", "Married-spouse-absent"),
        "Married-AF-spouse",
    ),
    "occupation": (
        *("Tech-support", "Craft-repair", "Other-service", "Sales", "Exec-managerial", "Prof-specialty"),
        *("Handlers-cleaners", "Machine-op-inspct", "Adm-clerical", "Farming-fishing", "Transport-moving"),
        *("Priv-house-serv", "Protective-serv", "Armed-Forces"),
    ),
    "relationship": ("Wife", "Own-child", "Husband", "Not-in-family", "Other-relative", "Unmarried"),
    "race": ("White", "Asian-Pac-Islander", "Amer-Indian-Eskimo", "Other", "Black"),
    "sex": ("Female", "Male"),
    "capital-gain": ("none", "some"),
    "capital-loss": ("none", "some"),
    "hours-per-week": _FIFTHS,
    "native-country": (
        *("United-States", "Cambodia", "England", "Puerto-Rico", "Canada", "Germany", "Outlying-US", "India", "Japan"),
        *("Greece", "South", "China", "Cuba", "Iran", "Honduras", "Philippines", "Italy", "Poland", "Jamaica"),
        *("Vietnam", "Mexico", "Portugal", "Ireland", "France", "Dominican-Republic", "Laos", "Ecuador", "Taiwan"),
        *("Haiti", "Columbia", "Hungary", "Guatemala", "Nicaragua", "Scotland", "Thailand", "Yugoslavia"),
        *("El-Salvador", "Trinadad&Tobago", "Peru", "Hong", "Holand-Netherlands"),
    ),
}
_ADULT_PLACES = ("a9a", "a9a.libsvm", "tables/a9a.libsvm")


def load_adult(path: str | Path | None = None, *, root: str | Path | None = None) -> CategoricalTable:
    """Read UCI Adult as LIBSVM's a9a, whose 123 binary columns are 14 features: who earns more than $50,000 a year?

    Each feature has one value more, ``?`` for what is missing.

    Args:
        path: The file in LIBSVM's format, by default ``a9a`` or ``a9a.libsvm`` in the data root.
        root: The data root (see ``paperworks.data.data_root``).

    Raises:
        DatasetNotFound: If there is none.
        UserError: If it is not a9a.
    """
    from sklearn.datasets import load_svmlight_file

    how = "Get a9a from LIBSVM's page of data sets into the data root."
    file = _first(_ADULT_PLACES, root, how) if path is None else locate(path, root, how=how)
    try:
        columns, labels = load_svmlight_file(str(file), n_features=sum(map(len, _ADULT.values())))
    except ValueError as error:
        raise UserError(f"{file} is not a9a: {' '.join(str(error).split())}") from error
    dense, codes, start = columns.toarray(), [], 0
    for feature, names in _ADULT.items():
        group = dense[:, start : start + len(names)]
        if ((group != 0).sum(1) > 1).any():
            raise UserError(f"{file} is not a9a: data row {int(group.sum(1).argmax()) + 1} has two values of {feature}")
        codes.append(np.where(group.any(1), group.argmax(1), len(names)))
        start += len(names)
    values = tuple((*names, MISSING) for names in _ADULT.values())
    rows = torch.from_numpy(np.stack(codes, 1)).long()
    return CategoricalTable(rows, torch.from_numpy(labels > 0).long(), tuple(_ADULT), values, ("<=50K", ">50K"))


def _first(places: Sequence[str], root: str | Path | None, how: str) -> Path:
    """The first of some places in the data root that there is."""
    for place in places[:-1]:
        try:
            return locate(place, root)
        except DatasetNotFound:
            continue
    return locate(places[-1], root, how=how)
