"""Digits in several styles: a small stand-in for data sets that were collected in different places."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from paperworks.data.biased.sourced import SourcedData, merge
from paperworks.data.labelled import LabelledData
from paperworks.data.root import DatasetNotFound
from paperworks.data.sources import load
from paperworks.data.splits import few_label
from paperworks.errors import UserError

_CANVAS = 32  # pixels a side on which generated digits are drawn
_FONTS = ("Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "Serif", "Serif-Bold", "Serif-Italic")
# Segments a to g of a seven-segment display that light up for 0 to 9.
_LIT = ("abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg", "abcdfg")
_ENDS = {  # of each segment, as (x, y) in units of the digit's width and half its height
    "a": ((0, 0), (1, 0)),
    "b": ((1, 0), (1, 1)),
    "c": ((1, 1), (1, 2)),
    "d": ((0, 2), (1, 2)),
    "e": ((0, 1), (0, 2)),
    "f": ((0, 0), (0, 1)),
    "g": ((0, 1), (1, 1)),
}


def digit_styles(
    generator: torch.Generator,
    *,
    num_classes: int = 6,
    per_class: int = 174,
    image_size: int = 16,
    root: str | Path | None = None,
) -> SourcedData:
    """Merge three styles of digits: ``scan``, ``mnist`` or ``segments``, and ``print``.

    ``scan`` is scikit-learn's bundled set. ``mnist`` is MNIST's test split where its files lie in the data
    root; elsewhere digits of a seven-segment display stand in, and ``source_names`` says so. ``print`` is
    drawn in the fonts that come with matplotlib.

    Args:
        generator: Draws the examples, and the generated styles.
        num_classes: Digits 0 to ``num_classes - 1``.
        per_class: Examples of each digit in each style; scikit-learn's rarest digit has 174.
        image_size: Pixels a side; one channel.
        root: The data root.

    Raises:
        UserError: If an argument is out of range.
    """
    if not 2 <= num_classes <= 10:
        raise UserError(f"num_classes must be from 2 to 10, got {num_classes}")
    if not 1 <= per_class <= 174:
        raise UserError(f"per_class must be from 1 to 174, got {per_class}")
    if image_size < 8:
        raise UserError(f"image_size must be at least 8, got {image_size}")

    def drawn(data: LabelledData) -> LabelledData:
        return data.subset(few_label(data, generator, per_class=per_class)[0])

    parts = {"scan": drawn(load("digits", image_size=image_size))}
    try:
        parts["mnist"] = drawn(load("mnist", split="test", root=root, image_size=image_size))
    except DatasetNotFound:
        parts["segments"] = _drawn_digits("segments", _segment_glyphs(), per_class, image_size, generator)
    parts["print"] = _drawn_digits("print", _font_glyphs(), per_class, image_size, generator)
    return merge(parts, classes=[str(k) for k in range(num_classes)])


def printed_digits(per_class: int, image_size: int, generator: torch.Generator) -> LabelledData:
    """Digits 0 to 9 in seven fonts, bright on dark, each turned, sheared, scaled and shifted a little."""
    return _drawn_digits("print", _font_glyphs(), per_class, image_size, generator)


def segment_digits(per_class: int, image_size: int, generator: torch.Generator) -> LabelledData:
    """Digits 0 to 9 of a seven-segment display in three line widths, varied as `printed_digits`."""
    return _drawn_digits("segments", _segment_glyphs(), per_class, image_size, generator)


def _drawn_digits(
    name: str, glyphs: Tensor, per_class: int, image_size: int, generator: torch.Generator
) -> LabelledData:
    """Draw ``per_class`` variations of each of the ``[variants, 10, canvas, canvas]`` glyphs' digits."""
    if per_class < 1:
        raise UserError(f"per_class must be at least 1, got {per_class}")
    targets = torch.arange(10).repeat_interleave(per_class)
    variants = torch.randint(len(glyphs), (len(targets),), generator=generator)
    images = _vary(glyphs[variants, targets].unsqueeze(1), generator)
    images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    noise = 0.05 * torch.randn(images.shape, generator=generator)
    return LabelledData((images + noise).clamp(0, 1), targets, tuple("0123456789"), name)


def _vary(images: Float32[Tensor, "n 1 h w"], generator: torch.Generator) -> Float32[Tensor, "n 1 h w"]:
    """Turn up to 0.2 rad, shear and scale up to 15 %, shift up to a tenth of the image."""
    n = len(images)

    def uniform(largest: float) -> Tensor:
        return (2 * torch.rand(n, generator=generator) - 1) * largest

    angle, shear, scale = uniform(0.2), uniform(0.15), 1 + uniform(0.15)
    rows = [scale * angle.cos(), scale * (shear - angle.sin()), uniform(0.1)]
    rows += [scale * angle.sin(), scale * angle.cos(), uniform(0.1)]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(n, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _font_glyphs() -> Float32[Tensor, "fonts 10 side side"]:
    import matplotlib  # for the fonts that come with it

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"DejaVu{name}.ttf"), 28) for name in _FONTS]
    return torch.stack([torch.stack([_glyph(str(k), font) for k in range(10)]) for font in fonts])


def _glyph(text: str, font: ImageFont.FreeTypeFont) -> Tensor:
    image = Image.new("L", (_CANVAS, _CANVAS))
    ImageDraw.Draw(image).text((_CANVAS / 2, _CANVAS / 2), text, fill=255, font=font, anchor="mm")
    return torch.from_numpy(np.array(image)).float() / 255


def _segment_glyphs() -> Float32[Tensor, "widths 10 side side"]:
    return torch.stack([torch.stack([_display(lit, width) for lit in _LIT]) for width in (2, 3, 4)])


def _display(lit: str, width: int) -> Tensor:
    image = Image.new("L", (_CANVAS, _CANVAS))
    pen = ImageDraw.Draw(image)
    for segment in lit:
        pen.line([(10 + 12 * x, 5 + 11 * y) for x, y in _ENDS[segment]], fill=255, width=width)
    return torch.from_numpy(np.array(image)).float() / 255
