"""Pixels to tensors: what every image goes through, whatever file it lay in."""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int64, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from paperworks.errors import UserError

_SHOWN = 5  # how many broken images a message names

Item = Callable[[int], tuple[bytes | Path, str]]
"""Maps a row to an encoded image (bytes or a file) and what to call it in a message."""


@dataclass(frozen=True)
class Decoder:
    """Reads images as float32 ``[n, channels, height, width]`` in [0, 1].

    Attributes:
        image_size: Scale to cover a square of this side and cut its centre out; None keeps the size.
        grayscale: One channel (ITU-R 601 luma); else encoded images become RGB and arrays stay as they are.
        skip_broken: Leave out images that cannot be read, with a warning; else they are an error.
    """

    image_size: int | None = None
    grayscale: bool = False
    skip_broken: bool = False

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"image_size must be at least 1, got {self.image_size}")

    def fit(self, images: Float32[Tensor, "n channels side side"]) -> Float32[Tensor, "n c s s"]:
        """Apply size and grayscale to square images that are already in memory."""
        if self.grayscale and images.shape[1] == 3:
            luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
            images = (images * luma).sum(1, keepdim=True).clamp(0, 1)
        if self.image_size and self.image_size != images.shape[-1]:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
        return images

    def decode(self, encoded: bytes | Path) -> UInt8[np.ndarray, "h w c"]:
        """Decode one image; what Pillow raises for a broken one passes through."""
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as opened:
            if opened.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {opened.mode}, expected 8-bit ones")
            image = opened.convert("L" if self.grayscale else "RGB")
        if self.image_size:
            image = ImageOps.fit(image, (self.image_size, self.image_size), Image.Resampling.BILINEAR)
        return np.atleast_3d(np.asarray(image))

    def read(
        self, item: Item, name: str, rows: Int64[Tensor, "rows"]
    ) -> tuple[Float32[Tensor, "kept c h w"], Int64[Tensor, "kept"]]:
        """Decode the images at ``rows``; return them with those of the rows that could be read.

        Raises:
            UserError: If images are broken (all are looked at, up to five are named) or differ in size.
        """
        images: list[np.ndarray] = []
        kept: list[int] = []
        broken: list[str] = []
        first = ""
        for row in rows.tolist():
            encoded, label = item(row)
            try:
                image = self.decode(encoded)
            # Pillow's formats raise each of these on damaged files.
            except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
                broken.append(f"{label} ({_reason(error, encoded)})")
                continue
            first = first or label
            if images and image.shape != images[0].shape:
                a, b = (f"{i.shape[1]}x{i.shape[0]}" for i in (images[0], image))
                raise UserError(f"{name}: {first} is {a} and {label} is {b} pixels: set image_size to make them equal")
            images.append(image)
            kept.append(row)
        if broken:
            named = "; ".join(broken[:_SHOWN]) + ("; …" if len(broken) > _SHOWN else "")
            count = f"{len(broken)} of {len(rows)} images"
            if not (self.skip_broken and images):
                raise UserError(f"{name}: {count} cannot be read: {named}. Mend them or set skip_broken.")
            warnings.warn(f"{name}: skipped {count} that cannot be read: {named}", stacklevel=2)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return pixels.float().div_(255).contiguous(), torch.tensor(kept)


def _reason(error: Exception, encoded: bytes | Path) -> str:
    if (len(encoded) if isinstance(encoded, bytes) else encoded.stat().st_size) == 0:
        return "empty"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"  # Pillow's own text holds the address of a buffer
    return str(error)
