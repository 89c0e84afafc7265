"""One door to every labelled set: by name, by folder or by file."""

from pathlib import Path

import torch

from paperworks.data.decode import Decoder
from paperworks.data.images import image_column, image_folder, image_parquet, parquet_splits
from paperworks.data.indexed import Indexed, choose_split, in_memory
from paperworks.data.labelled import LabelledData
from paperworks.data.official import OFFICIAL
from paperworks.data.root import DatasetNotFound, data_root, locate
from paperworks.data.tables import labelled_table
from paperworks.errors import UserError, nearest

BUNDLED = ("digits", "iris", "wine", "breast_cancer")


def load(
    source: str | Path,
    *,
    split: str = "all",
    root: str | Path | None = None,
    target: str | None = None,
    image_size: int | None = None,
    grayscale: bool = False,
    limit: int | None = None,
    seed: int = 0,
    skip_broken: bool = False,
) -> LabelledData:
    """Read a labelled set into memory. Nothing is downloaded and nothing written.

    ``source`` is one of

    - ``"digits"``, ``"iris"``, ``"wine"``, ``"breast_cancer"``: bundled with scikit-learn, always there;
    - ``"mnist"``, ``"fashion-mnist"``, ``"cifar10"``, ``"cifar100"``: the official files in the data root, in
      torchvision's folders (MNIST may be gzipped). Without ``cifar-10-batches-py``, ``"cifar10"`` is read
      from ``cifar10-jpeg/{train,test}.parquet``, and its ``name`` says so;
    - a folder ``<class>/<image>`` or ``<split>/<class>/<image>``;
    - a folder of parquet files ``<split>*.parquet``, or one such file, with a column of images
      ``{bytes, path}`` (the layout of the Hugging Face hub);
    - a CSV, TSV or parquet table of numbers with a column of labels.

    Paths are taken as given or inside the data root.

    Args:
        source: The set.
        split: ``"train"``, ``"test"``, another that the set has, or ``"all"`` of them together.
        root: The data root (see `data_root`).
        target: The column of labels of a table or parquet file; by default ``label``, ``target`` or
            ``class``, else the last one.
        image_size: Scale images to cover a square of this side and cut out its centre.
        grayscale: Read images with one channel. Otherwise image files become RGB.
        limit: Read no more than this many examples, a stratified random draw; without it, all in order.
        seed: Decides the draw.
        skip_broken: Leave out images that cannot be read and warn, rather than raise.

    Returns:
        Images as ``[n, channels, height, width]`` in [0, 1], or table rows as ``[n, columns]``.

    Raises:
        DatasetNotFound: If the set is not on this machine; the message says how to get it.
        UserError: If an argument or the data are not as described; the message names the file, row or column.
    """
    decoder = Decoder(image_size, grayscale, skip_broken)
    name = str(source)
    if name in BUNDLED or name in OFFICIAL:
        _refuse_target(name, target)
        read = OFFICIAL.get(name)
        found = read(name, data_root(root), split, decoder) if read else _bundled(name, split, decoder)
    else:
        found = _at_path(_path(source, root), split, target, decoder)
    data = found.take(limit, seed)
    if data.inputs.ndim == 2 and decoder != Decoder():
        raise UserError(f"{name} is a table: image_size, grayscale and skip_broken apply to images only")
    return data


def _path(source: str | Path, root: str | Path | None) -> Path:
    try:
        return locate(source, root)
    except DatasetNotFound as error:
        if Path(source).name != str(source) or Path(source).suffix:  # meant as a path, not as a name
            raise
        names = [*BUNDLED, *OFFICIAL]
        raise DatasetNotFound(f"unknown data set {str(source)!r}.{nearest(source, names)} ({error})") from None


def _at_path(path: Path, split: str, target: str | None, decoder: Decoder) -> Indexed:
    if path.is_dir():
        if splits := parquet_splits(path):
            return image_parquet(path.name, splits, split, decoder, target=target)
        _refuse_target(path.name, target)
        return image_folder(path, split, decoder)
    if path.suffix == ".parquet" and image_column(path):
        return image_parquet(path.name, {"all": [path]}, split, decoder, target=target)
    choose_split(path.name, split, {"all": path})
    return labelled_table(path, target)


def _bundled(name: str, split: str, decoder: Decoder) -> Indexed:
    from sklearn import datasets  # takes a second to import

    choose_split(name, split, {"all": name})
    bunch = getattr(datasets, f"load_{name}")()
    targets, classes = torch.from_numpy(bunch.target).long(), tuple(str(k) for k in bunch.target_names)
    if name == "digits":  # grey levels 0 to 16
        inputs = decoder.fit(torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1))
    else:
        inputs = torch.from_numpy(bunch.data).float()
    return in_memory(LabelledData(inputs, targets, classes, name))


def _refuse_target(name: str, target: str | None) -> None:
    if target is not None:
        raise UserError(f"{name} has no columns: target={target!r} applies to tables and parquet files only")
