"""Files of a project: images read safely, paths that stay inside, writes that are whole or absent."""

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from paperworks.errors import UserError

from .fills import Pixels

FORMATS = {".bmp": "BMP", ".gif": "GIF", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Entry:
    """One image: ``<split>/<class>/<file>`` inside the project.

    Attributes:
        name: That path with slashes, by which the image is called everywhere.
        split, label, path: Its split, class folder and file.
    """

    name: str
    split: str
    label: str
    path: Path


def scan(root: Path) -> tuple[list[Entry], dict[str, str]]:
    """All images of a project, and what was skipped: path to reason."""
    entries: list[Entry] = []
    skipped: dict[str, str] = {}
    for split in SPLITS:
        for folder in _children(root / split):
            if not folder.is_dir():
                skipped[f"{split}/{folder.name}"] = "not in a class folder"
                continue
            for path in _children(folder):
                name = f"{split}/{folder.name}/{path.name}"
                if not is_inside(root, path):
                    skipped[name] = "a link out of the project"
                elif not path.is_file() or path.suffix.lower() not in FORMATS:
                    skipped[name] = f"not an image file ({', '.join(FORMATS)})"
                elif not _is_text(name):
                    skipped[ascii(name)] = "its name is not valid text"
                else:
                    entries.append(Entry(name, split, folder.name, path))
    return entries, skipped


def is_inside(root: Path, path: Path) -> bool:
    """Whether a path, with all links followed, stays in the folder."""
    return path.resolve().is_relative_to(root.resolve())


def read_image(
    source: Path | bytes, formats: tuple[str, ...] = tuple(sorted(set(FORMATS.values()))), *, side: int | None = None
) -> Pixels:
    """Decode to RGB as people see it (orientation applied).

    Args:
        source: A file or its content.
        formats: Which of Pillow's are taken.
        side: What it must at least have for its purpose; a JPEG much larger is decoded to a fraction, which is fast.

    Raises:
        UserError: If it is too large, damaged, or none of the formats; the message is the reason alone.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"a file of {size} bytes, at most {MAX_BYTES} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise UserError(f"{opened.width}x{opened.height} pixels, at most {MAX_PIXELS} in all are read")
                if opened.mode.startswith(("I", "F")):
                    raise UserError(f"pixels of mode {opened.mode}, expected 8-bit ones")
                if side is not None:
                    opened.draft("RGB", (side, side))
                return np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    except UnidentifiedImageError as error:
        raise UserError("empty" if size == 0 else f"not an image of {', '.join(formats)}") from error
    except UserError:
        raise
    # Pillow's formats raise each of these on damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(str(error)) from error


def _children(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
