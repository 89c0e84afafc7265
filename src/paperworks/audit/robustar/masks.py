"""Masks on the disk: one PNG an image, written whole, replaced and removed only with the old one kept."""

import io
import os
import secrets
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from paperworks.errors import UserError
from paperworks.files import sync_folder, write_whole

from .files import Entry, is_inside, read_image
from .fills import Mask, Pixels

_DIGEST = "image-sha256"


@dataclass(frozen=True)
class StoredMask:
    """A mask and the SHA-256 of the image file that it was drawn on, empty where that is not known."""

    mask: Mask
    image_digest: str


class MaskFolder:
    """Masks as ``<folder>/<class>/<image file>.png``: one channel, 255 where pixels are spurious.

    Each file carries the digest of its image, so that mask and digest change together.

    Args:
        root: The project; nothing is written outside.
        name: Of the folder: ``paired`` for accepted masks, ``proposed`` for proposals.
        trash: Where replaced and removed masks go.
    """

    def __init__(self, root: Path, name: str, trash: Path) -> None:
        self.root, self.folder, self.trash = root, root / name, trash

    def path(self, entry: Entry) -> Path:
        """Where an image's mask lies or would lie.

        Raises:
            UserError: If links lead out of the project.
        """
        path = self.folder / entry.label / f"{entry.path.name}.png"
        if not (is_inside(self.root, path) and is_inside(self.root, self.trash)):
            raise UserError(f"{self.folder.name} has a link out of the project: nothing is read or written there")
        return path

    def __contains__(self, entry: Entry) -> bool:
        return entry.split == "train" and self.path(entry).is_file()

    def having(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those of many images that have a mask, in one look at the folder."""
        found = {(path.parent.name, path.name) for path in self.folder.glob("*/*.png")}
        return [e for e in entries if e.split == "train" and (e.label, f"{e.path.name}.png") in found]

    def load(self, entry: Entry) -> StoredMask | None:
        """An image's mask, or None.

        Raises:
            UserError: If the file is damaged.
        """
        if entry not in self:
            return None
        path = self.path(entry)
        try:
            content = path.read_bytes()  # once: somebody may replace or remove it meanwhile
            with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
                digest = str(opened.info.get(_DIGEST, ""))
            return StoredMask(read_image(content, ("PNG",))[..., 0] >= 128, digest)
        except FileNotFoundError:
            return None
        except (UserError, OSError) as error:
            raise UserError(f"the mask {path} cannot be read: {error}") from error

    def save(self, entry: Entry, stored: StoredMask) -> None:
        """Write a mask; the one it replaces goes to the trash."""
        if entry.split != "train":
            raise UserError(f"masks are for training images, got one of {entry.split}")
        path = self.path(entry)
        text = PngInfo()
        text.add_text(_DIGEST, stored.image_digest)
        buffer = io.BytesIO()
        Image.fromarray(stored.mask.astype(np.uint8) * 255).save(buffer, "PNG", pnginfo=text)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._keep(path)
        write_whole(path, buffer.getvalue())

    def delete(self, entry: Entry) -> bool:
        """Move a mask to the trash; returns whether there was one."""
        path = self.path(entry)
        kept = self._keep(path)
        path.unlink(missing_ok=True)
        return kept

    def _keep(self, path: Path) -> bool:
        """Give a file a second name in the trash, so that it has a name at every moment."""
        place = self.trash / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}" / self.folder.name
        place = place / path.parent.name
        if not path.is_file():
            return False
        place.mkdir(parents=True)
        try:
            os.link(path, place / path.name)
        except FileNotFoundError:  # somebody else removed it just now, and kept it
            return False
        except OSError:  # a file system without hard links
            write_whole(place / path.name, path.read_bytes())
        sync_folder(place)
        return True


def mask_from_white(edited: Pixels, original: Pixels) -> Mask:
    """The mask of a picture edited for the reference implementation: where it is pure white.

    That implementation takes all pure white as annotated; here, what was white before is not, with a warning.

    Raises:
        UserError: If the sizes differ.
    """
    if edited.shape != original.shape:
        shapes = [f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (edited, original)]
        raise UserError(f"the edited picture is {shapes[0]} pixels, its image {shapes[1]}")
    before, after = np.asarray((original == 255).all(2)), np.asarray((edited == 255).all(2))
    if before.any():
        warnings.warn(f"{before.sum()} pixels are white in the image itself and are not annotated", stacklevel=2)
    return after & ~before


def shrink_mask(mask: Mask, factor: int) -> Bool[np.ndarray, "rows columns"]:
    """Reduce a mask drawn on an image enlarged by an integer: a pixel is masked if any of its block is."""
    height, width = mask.shape
    if factor < 1 or height % factor or width % factor:
        raise UserError(f"a mask of {width}x{height} is not {factor} times as large as its image")
    return np.asarray(mask.reshape(height // factor, factor, width // factor, factor).any((1, 3)))


def check_size(mask: Mask, image: Pixels, name: str) -> None:
    """Refuse a mask of another size than its image."""
    if mask.shape != image.shape[:2]:
        sizes = [f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (mask, image)]
        raise UserError(f"the mask of {name} must be {sizes[1]} pixels as its image, got {sizes[0]}")


def by_mask_name(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Training images by the names of their masks in an archive: ``<class>/<image file>.png``."""
    return {f"{entry.label}/{entry.path.name}.png": entry for entry in entries.values() if entry.split == "train"}
