"""MNIST, Fashion-MNIST and CIFAR in the formats their authors publish, where torchvision keeps them."""

import gzip
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paperworks.data.decode import Decoder
from paperworks.data.images import image_parquet, parquet_splits
from paperworks.data.indexed import Indexed, choose_split, split_name
from paperworks.data.root import DatasetNotFound
from paperworks.errors import UserError

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_MNIST = {
    "mnist": ("MNIST", "https://ossci-datasets.s3.amazonaws.com/mnist/", tuple("0123456789")),
    "fashion-mnist": (
        "FashionMNIST",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
    ),
}
_CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


def mnist(name: str, root: Path, split: str, decoder: Decoder) -> Indexed:
    """Index ``MNIST/raw/*-ubyte[.gz]`` or ``FashionMNIST/raw/…``; a split may be there without the other."""
    folder_name, url, classes = _MNIST[name]
    folder = root / folder_name / "raw"
    # torchvision's class wants all four files, unpacked; read-only and partial folders are common.
    stems = {"train": "train", "test": "t10k"}
    found = {part: files for part, stem in stems.items() if (files := _idx_files(folder, stem))}
    if not found:
        raise DatasetNotFound(
            f"{name} is not in {folder}: put train-*-ubyte.gz and t10k-*-ubyte.gz from {url} there, "
            "or name another data root with PAPERWORKS_DATA or root="
        )
    if split == "all" and len(found) < 2:
        raise UserError(f"{name}: split 'all' needs train and test; {folder} holds only {next(iter(found))}")
    chosen = choose_split(f"{name} in {folder}", split, found)
    images = [torch.from_numpy(read_idx(files[0])) for files in chosen]
    targets = [torch.from_numpy(read_idx(files[1])).long() for files in chosen]
    for files, x, y in zip(chosen, images, targets, strict=True):
        if x.ndim != 3 or y.shape != x.shape[:1]:
            raise UserError(f"{files[0]} holds an array {list(x.shape)} and {files[1].name} one {list(y.shape)}")
    pixels = torch.cat(images).unsqueeze(1)
    read = partial(_read_pixels, decoder, pixels)
    return Indexed(torch.cat(targets), classes, split_name(name, split), read)


def cifar(name: str, root: Path, split: str, decoder: Decoder) -> Indexed:
    """Index ``cifar-10-batches-py`` or ``cifar-100-python``; for want of the former, ``cifar10-jpeg``."""
    folder, jpegs = root / _CIFAR_FOLDERS[name], root / "cifar10-jpeg"
    if not folder.is_dir():
        if name == "cifar10" and (splits := parquet_splits(jpegs)):
            return image_parquet(jpegs.name, splits, split, decoder, classes=_CIFAR10)
        raise DatasetNotFound(
            f"{name} is not in {folder}: unpack the Python version from {_CIFAR_PAGE} there, "
            "or name another data root with PAPERWORKS_DATA or root="
        )
    from torchvision import datasets  # takes a second to import

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        parts = [
            kind(root, train=train, download=False)
            for train in choose_split(name, split, {"train": True, "test": False})
        ]
    except RuntimeError as error:  # torchvision compares checksums before it unpickles anything
        raise UserError(
            f"{folder} is incomplete or damaged (checksums differ); unpack it again from {_CIFAR_PAGE}"
        ) from error
    pixels = torch.from_numpy(np.concatenate([part.data for part in parts])).permute(0, 3, 1, 2)
    targets = torch.tensor([k for part in parts for k in part.targets])
    read = partial(_read_pixels, decoder, pixels)
    return Indexed(targets, tuple(parts[0].classes), split_name(name, split), read)


OFFICIAL = {"mnist": mnist, "fashion-mnist": mnist, "cifar10": cifar, "cifar100": cifar}


def read_idx(path: Path) -> np.ndarray:
    """Read an array of bytes in the IDX format: 0, 0, 8, ndim, big-endian 32-bit dimensions, the bytes."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise UserError(f"{path} is not an IDX file of bytes (it starts with {data[:4].hex(' ') or 'nothing'})")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4).astype(int)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != shape.prod():
        raise UserError(f"{path} is cut short or damaged: {body.size} bytes for an array {shape.tolist()}")
    return body.reshape(shape).copy()


def _idx_files(folder: Path, stem: str) -> tuple[Path, Path] | None:
    """The images and labels of a split, unpacked or not, if both are there."""
    found = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        plain = folder / f"{stem}-{kind}"
        there = [file for file in (plain, plain.with_name(f"{plain.name}.gz")) if file.is_file()]
        found += there[:1]
    return (found[0], found[1]) if len(found) == 2 else None


def _read_pixels(decoder: Decoder, pixels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return decoder.fit(pixels[rows].contiguous().float().div_(255)), rows
