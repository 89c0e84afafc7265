"""Tables: CSV, TSV and parquet files."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from paperworks.data.indexed import Indexed, in_memory
from paperworks.data.labelled import LabelledData
from paperworks.data.root import locate
from paperworks.errors import UserError, nearest


def read_table(
    path: str | Path, *, names: Sequence[str] | None = None, root: str | Path | None = None, texts: bool = False
) -> pd.DataFrame:
    """Read a CSV, TSV (either may be compressed) or parquet file as it is, texts included.

    Args:
        path: The file, as given or inside the data root (see `data_root`).
        names: The column names of a CSV or TSV file that has no header line.
        root: The data root.
        texts: Take ``NA``, ``null`` and the like for words; only an empty field of a CSV or TSV file is missing.

    Raises:
        DatasetNotFound: If there is no such file.
        UserError: If it is not such a table or has no rows.
    """
    file = locate(path, root)
    try:
        if file.suffix == ".parquet":
            table = pd.read_parquet(file)
        elif {".csv", ".tsv"} & set(file.suffixes[-2:]):
            with warnings.catch_warnings():
                # Lines that are longer than the header lose their end with no more than a warning.
                warnings.simplefilter("error", pd.errors.ParserWarning)
                table = pd.read_csv(
                    file,
                    sep="\t" if ".tsv" in file.suffixes else ",",
                    names=None if names is None else list(names),
                    header="infer" if names is None else None,
                    index_col=False,
                    keep_default_na=not texts,
                    na_values=[""] if texts else None,
                )
        else:
            raise UserError(f"{file} is not a table: expected .csv, .tsv or .parquet")
    except (
        OSError,
        EOFError,
        UnicodeError,
        pa.ArrowException,
        pd.errors.ParserError,
        pd.errors.ParserWarning,
        pd.errors.EmptyDataError,
    ) as error:
        raise UserError(f"{file} cannot be read as a table: {' '.join(str(error).split())}") from error
    if not len(table):
        raise UserError(f"{file} has no rows")
    return table


def labelled_table(file: Path, target: str | None) -> Indexed:
    """Read a table of numbers with one column of labels. In errors, data rows count from 1."""
    table = read_table(file.absolute()).rename(columns=str)
    label = label_column(file.name, list(table.columns), target)
    features = table.drop(columns=label)
    if not len(features.columns):
        raise UserError(f"{file.name} has no column beside {label!r}")
    targets, classes = encode_labels(file.name, table[label])
    columns = [torch.from_numpy(_numbers(file.name, features[column])) for column in features]
    return in_memory(LabelledData(torch.stack(columns, dim=1), targets, classes, file.name))


def label_column(name: str, columns: Sequence[str], wanted: str | None) -> str:
    """Return the column of labels: the one wanted, else ``label``, ``target`` or ``class``, else the last."""
    if wanted is not None:
        if wanted not in columns:
            raise UserError(f"{name} has no column {wanted!r}.{nearest(wanted, columns)}")
        return wanted
    return next((column for column in ("label", "target", "class") if column in columns), columns[-1])


def encode_labels(name: str, labels: pd.Series) -> tuple[Tensor, tuple[str, ...]]:
    """Number the distinct values of a column (whole numbers or words) in sorted order."""
    what = f"{name}: label column {labels.name!r}"
    if labels.isna().any():
        raise UserError(f"{what} is empty in data row {_first(labels.isna())}")
    if pd.api.types.is_float_dtype(labels):
        fractional = labels % 1 != 0
        if fractional.any():
            row = _first(fractional)
            raise UserError(
                f"{what} holds {labels.iloc[row - 1]} in data row {row}, expected whole numbers or words; "
                "name another column with target="
            )
        labels = labels.astype("int64")
    codes, values = pd.factorize(labels, sort=True)
    return torch.from_numpy(codes.astype(np.int64)), tuple(str(value) for value in values)


def _numbers(name: str, column: pd.Series) -> np.ndarray:
    what = f"{name}: column {column.name!r}"
    numeric = pd.api.types.is_numeric_dtype(column)
    numbers = pd.to_numeric(column if numeric else column.astype("string"), errors="coerce")
    if column.isna().any():
        raise UserError(f"{what} is empty or NaN in data row {_first(column.isna())}")
    if numbers.isna().any():
        row = _first(numbers.isna())
        raise UserError(
            f"{what} is not numeric: data row {row} holds {str(column.iloc[row - 1])!r} "
            "(drop or encode the column; read_table reads texts)"
        )
    with np.errstate(over="ignore"):
        values = numbers.to_numpy(np.float32)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0]) + 1
        raise UserError(f"{what} holds {column.iloc[row - 1]} in data row {row}, expected a finite 32-bit number")
    return values


def _first(mask: pd.Series) -> int:
    """The first data row, from 1, where the mask is true."""
    return int(np.flatnonzero(mask.to_numpy(bool))[0]) + 1
