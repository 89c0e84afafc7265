"""Domain generalisation: one task in several environments, of which one is kept for the test."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Bool, Float32, Int64
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from paperworks.data.decode import Decoder
from paperworks.data.labelled import LabelledData
from paperworks.errors import UserError, unknown

ANGLES = (0.0, 15.0, 30.0, 45.0, 60.0, 75.0)
"""RotatedMNIST's, in degrees anticlockwise (Ghifary et al. 2015)."""


@dataclass(frozen=True, eq=False)
class DomainData:
    """Labelled images of several domains in memory.

    Attributes:
        data: Images, classes and names.
        domains: For each image, the index of its domain.
        domain_names: The name of each domain, in the order of the indices.
        source: For each image, what it was made from, a row of the original set (its own row if nothing was).

    Raises:
        UserError: If the lengths differ or an index is not one of a domain.
    """

    data: LabelledData
    domains: Int64[Tensor, " _"]
    domain_names: tuple[str, ...]
    source: Int64[Tensor, " _"]

    def __post_init__(self) -> None:
        if not len(self.data) == len(self.domains) == len(self.source):
            lengths = f"{len(self.data)}, {len(self.domains)} and {len(self.source)}"
            raise UserError(f"{self.data.name}: data, domains and source must be equally long, got {lengths}")
        if len(self.domains) and not 0 <= int(self.domains.min()) <= int(self.domains.max()) < len(self.domain_names):
            raise UserError(f"{self.data.name}: domains must be 0 to {len(self.domain_names) - 1}")

    def __len__(self) -> int:
        return len(self.data)

    def subset(self, index: Int64[Tensor, " m"] | Bool[Tensor, " n"]) -> "DomainData":
        """The images at ``index`` (positions, or a mask over all) as a copy; domains keep their indices."""
        return DomainData(self.data.subset(index), self.domains[index], self.domain_names, self.source[index])

    def leave_out(self, domain: str) -> tuple["DomainData", "DomainData"]:
        """Images of all other domains, to train on, and of this one, to test on.

        Raises:
            UserError: If there is no such domain.
        """
        away = self.domains == _index(domain, self.domain_names)
        return self.subset(~away), self.subset(away)

    def dataset(self) -> TensorDataset:
        """``(input, target, domain)`` triples for a loader."""
        return TensorDataset(self.data.inputs, self.data.targets, self.domains)


def rotate(images: Float32[Tensor, "n channels h w"], angle: float) -> Float32[Tensor, "n channels h w"]:
    """Turn images about their centre, anticlockwise by ``angle`` degrees; bilinear, corners filled with 0."""
    from torchvision.transforms import InterpolationMode  # takes a second to import
    from torchvision.transforms.v2.functional import rotate as turn

    return turn(images, angle, InterpolationMode.BILINEAR)


def rotated(data: LabelledData, angles: Sequence[float] = ANGLES, *, seed: int = 0) -> DomainData:
    """RotatedMNIST's protocol on any images: deal them out at random to as many domains, and turn each by its angle.

    No image is in two domains. DomainBed turns MNIST so, with bicubic interpolation.

    Args:
        data: Images.
        angles: One domain each, in degrees anticlockwise.
        seed: Decides who goes where.

    Raises:
        UserError: If there are fewer than two angles, one twice, or more angles than images; or ``data`` is a table.
    """
    if data.inputs.ndim != 4:
        raise UserError(f"{data.name} holds rows of a table, and only images can be rotated")
    if len(angles) < 2 or len(set(angles)) < len(angles):
        raise UserError(f"angles must be at least two different ones, got {tuple(angles)}")
    if len(data) < len(angles):
        raise UserError(f"{data.name} has {len(data)} images, too few for {len(angles)} domains")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    parts = [order[k :: len(angles)] for k in range(len(angles))]
    source = torch.cat(parts)
    turned = torch.cat([rotate(data.inputs[part], angle) for part, angle in zip(parts, angles, strict=True)])
    domains = torch.cat([torch.full((len(part),), k) for k, part in enumerate(parts)])
    images = LabelledData(turned, data.targets[source], data.classes, f"rotated {data.name}")
    return DomainData(images, domains, tuple(f"{angle:g}" for angle in angles), source)


class DomainFolders(Dataset[tuple[Tensor, int, int]]):
    """Images in ``root/<domain>/<class>/<image>``: the layout of PACS, VLCS, OfficeHome and others in DomainBed.

    Items are ``(image, class, domain)``, the image as float32 ``[3, image_size, image_size]`` in [0, 1] (scaled to
    cover the square, its centre cut out), after ``transform``. Files are read when they are asked for.

    Args:
        root: The folder of domains.
        image_size: Side in pixels; DomainBed's is 224.
        transform: Applied to the tensor, e.g. torchvision's augmentations and ``Normalize``.

    Attributes:
        classes, domain_names: Their names, in the order of the indices.
        targets, domains: Class and domain of every image.

    Raises:
        UserError: If there are fewer than two domains, or a class is missing in one; when an item is read, if its
            file is broken. The message names folder or file.
    """

    def __init__(
        self, root: str | Path, image_size: int = 224, transform: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        from torchvision.datasets import ImageFolder  # takes a second to import

        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"{self.root} is not a folder; expected <domain>/<class>/<image> in it")
        self.domain_names = tuple(_subfolders(self.root))
        if len(self.domain_names) < 2:
            raise UserError(f"{self.root} must hold at least two folders of domains, got {len(self.domain_names)}")
        inside = {domain: set(_subfolders(self.root / domain)) for domain in self.domain_names}
        self.classes = tuple(sorted(set().union(*inside.values())))
        for domain, found in inside.items():
            if missing := sorted(set(self.classes) - found):
                raise UserError(f"{self.root}: domain {domain!r} has no folder of class {missing[0]!r}, others have")
        load = partial(_read, Decoder(image_size))
        self.parts = [
            ImageFolder(str(self.root / domain), transform, loader=load, allow_empty=True)
            for domain in self.domain_names
        ]
        for domain, part in zip(self.domain_names, self.parts, strict=True):
            counts = torch.bincount(torch.tensor(part.targets, dtype=torch.int64), minlength=len(self.classes))
            if not counts.all():
                raise UserError(f"{self.root / domain / self.classes[int(counts.argmin())]} holds no images")
        self.targets = torch.tensor([target for part in self.parts for target in part.targets])
        self.domains = torch.cat([torch.full((len(part),), k) for k, part in enumerate(self.parts)])
        self._starts = list(accumulate((len(part) for part in self.parts), initial=0))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        index = range(len(self))[index]  # -1 is the last one
        domain = int(self.domains[index])
        image, target = self.parts[domain][index - self._starts[domain]]
        return image, target, domain

    def leave_out(self, domain: str) -> tuple["Subset[tuple[Tensor, int, int]]", "Subset[tuple[Tensor, int, int]]"]:
        """All other domains, to train on, and this one, to test on.

        Raises:
            UserError: If there is no such domain.
        """
        away = self.domains == _index(domain, self.domain_names)
        return Subset(self, (~away).nonzero().flatten().tolist()), Subset(self, away.nonzero().flatten().tolist())

    def in_memory(self, skip_broken: bool = False) -> DomainData:
        """Read everything, for sets and image sizes that fit; ``skip_broken`` leaves out unreadable files and warns."""
        images, kept = [], []
        for index in range(len(self)):
            try:
                images.append(self[index][0])
                kept.append(index)
            except UserError as error:
                if not skip_broken or (index == len(self) - 1 and not kept):
                    raise
                warnings.warn(f"skipped: {error}", stacklevel=2)
        rows = torch.tensor(kept)
        data = LabelledData(torch.stack(images), self.targets[rows], self.classes, self.root.name)
        return DomainData(data, self.domains[rows], self.domain_names, torch.arange(len(rows)))


def _read(decoder: Decoder, file: str) -> Tensor:
    try:
        pixels = decoder.decode(Path(file))
    # Pillow's formats raise each of these on damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{file} cannot be read as an image ({type(error).__name__}): mend it, or set skip_broken"
        ) from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(255)


def _index(domain: str, names: tuple[str, ...]) -> int:
    if domain not in names:
        raise unknown("domain", domain, names)
    return names.index(domain)


def _subfolders(path: Path) -> list[str]:
    return sorted(folder.name for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
