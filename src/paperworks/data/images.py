"""Labelled images in files: class folders, and parquet tables in the layout of the Hugging Face hub."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from paperworks.data.decode import Decoder
from paperworks.data.indexed import Indexed, choose_split, split_name
from paperworks.data.labels import check_labels
from paperworks.data.tables import encode_labels, label_column
from paperworks.errors import UserError, nearest

_SPLITS = {"train", "val", "valid", "validation", "test"}


def image_folder(path: Path, split: str, decoder: Decoder) -> Indexed:
    """Index ``<class>/<image>``, or ``<split>/<class>/<image>`` if all sub-folders are named as splits."""
    # Imported here as it takes a second, which other sources need not wait for.
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    parts = {folder.name: folder for folder in _subfolders(path)}
    if not parts or not parts.keys() <= _SPLITS:
        parts = {"all": path}
    # One numbering for all splits, even where a class is in one of them only.
    classes = sorted({folder.name for part in parts.values() for folder in _subfolders(part)})
    if not classes:
        raise UserError(f"{path} holds neither class folders ({path.name}/<class>/<image>) nor parquet files")
    numbers = {name: k for k, name in enumerate(classes)}
    samples: list[tuple[str, int]] = []
    for folder in choose_split(path.name, split, parts):
        samples += (found := make_dataset(str(folder), numbers, IMG_EXTENSIONS, allow_empty=True))
        filled = {number for _, number in found}
        empty = [sub for sub in _subfolders(folder) if numbers[sub.name] not in filled]
        if empty:
            raise UserError(f"{empty[0]} holds no images ({', '.join(IMG_EXTENSIONS)})")
    files = [Path(file) for file, _ in samples]
    targets = torch.tensor([number for _, number in samples])

    def item(row: int) -> tuple[Path, str]:
        return files[row], str(files[row])

    name = split_name(path.name, split)
    return Indexed(targets, tuple(classes), name, partial(decoder.read, item, name))


def parquet_splits(folder: Path) -> dict[str, list[Path]]:
    """The parquet files of a folder, or its sub-folders, by split: their names up to the first hyphen."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.parquet")) or sorted(folder.glob("*/*.parquet")):
        splits.setdefault(file.stem.split("-")[0], []).append(file)
    return splits


def image_column(file: Path) -> str | None:
    """The column of a parquet file that holds encoded images ``{bytes, path}``, if there is one."""
    for field in _open(file).schema_arrow:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return str(field.name)
    return None


def image_parquet(
    name: str,
    splits: Mapping[str, list[Path]],
    split: str,
    decoder: Decoder,
    *,
    target: str | None = None,
    classes: tuple[str, ...] | None = None,
) -> Indexed:
    """Index parquet files of images and labels.

    Labels that are numbers are named by ``classes``, else by the hub's metadata, else by themselves.
    """
    chosen = choose_split(name, split, {part: part for part in splits})
    sample = splits[chosen[0]][0]
    schema, pictures = _open(sample).schema_arrow, image_column(sample)
    if pictures is None:
        raise UserError(f"{sample} has no column of images {{bytes, path}}; name the file itself to load it as a table")
    others = [column for column in schema.names if column != pictures]
    if not others:
        raise UserError(f"{sample} has no column beside {pictures!r}, and needs one of labels")
    label = label_column(name, others, target)
    # The labels of all splits, so that a class has the same number in each of them.
    columns = {part: _column(files, label).to_pandas() for part, files in splits.items()}
    labels = pd.concat(columns).rename(label)
    names = classes or _hub_names(schema, label)
    if names and pd.api.types.is_integer_dtype(labels):
        targets = torch.tensor(labels.to_numpy(np.int64))
    else:
        targets, names = encode_labels(name, labels)
    targets = targets[torch.from_numpy(labels.index.get_level_values(0).isin(chosen))]
    check_labels(targets, len(names), f"{name}: column {label!r}")
    images = _column([file for part in chosen for file in splits[part]], pictures)

    def item(row: int) -> tuple[bytes, str]:
        image = images[row].as_py() or {}
        return image.get("bytes") or b"", f"row {row} ({image.get('path') or 'no path'})"

    name = split_name(name, split)
    return Indexed(targets, names, name, partial(decoder.read, item, name))


def _subfolders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet: {error}") from error


def _column(files: list[Path], column: str) -> pa.ChunkedArray:
    """One column of several files, end to end."""
    chunks = []
    for file in files:
        parquet = _open(file)
        if column not in parquet.schema_arrow.names:
            raise UserError(f"{file} has no column {column!r}.{nearest(column, parquet.schema_arrow.names)}")
        try:
            chunks += parquet.read([column])[column].chunks
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} cannot be read as parquet: {error}") from error
    return pa.chunked_array(chunks, type=_open(files[0]).schema_arrow.field(column).type)


def _hub_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """The class names that the Hugging Face hub writes into a file's metadata."""
    hub = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = hub.get("info", {}).get("features", {})
    names = features.get(label, {}).get("names")
    return tuple(names) if names else None
