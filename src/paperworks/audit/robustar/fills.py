"""What stands in for masked pixels."""

import numpy as np
from jaxtyping import Bool, UInt8

from paperworks.errors import UserError, unknown

Pixels = UInt8[np.ndarray, "height width channels"]
Mask = Bool[np.ndarray, "height width"]

FILLS = ("pure_black", "noise", "noise_weak", "noise_minor", "random_pure", "hstrips", "vstrips", "mixture")
_NOISE = {"noise": (0, 256), "noise_weak": (64, 128), "noise_minor": (96, 64)}  # lowest value, how many


def fill_masked(image: Pixels, mask: Mask, mode: str, rng: np.random.Generator) -> Pixels:
    r"""Replace the masked pixels of an image.

    $$x' = x \circ (1 - M) + F \circ M$$

    | mode | $F$ |
    | --- | --- |
    | `pure_black` | 0 |
    | `noise`, `noise_weak`, `noise_minor` | uniform on 0…255, 64…191, 96…159, for each pixel and channel |
    | `random_pure` | one random colour |
    | `hstrips`, `vstrips` | rows (columns) whose index mod 5 is below 2 have one random colour, the others are 0 |
    | `mixture` | one of the others, drawn for each image |

    A constant fill can become a shortcut of its own; ``random_pure`` cannot. Modes and ranges are those of the
    reference implementation.

    Args:
        image: 8-bit pixels.
        mask: True where a pixel is to be replaced.
        mode: One of the above.
        rng: Draws the fill.

    Returns:
        A new image; outside the mask it equals ``image`` bit by bit.

    Raises:
        UserError: If the mask is of another size, or the mode is unknown.
    """
    if mask.shape != image.shape[:2]:
        raise UserError(f"mask must be of the image's size {_size(image)}, got {_size(mask)}")
    if mode not in FILLS:
        raise unknown("fill", mode, FILLS)
    if mode == "mixture":
        mode = FILLS[rng.integers(len(FILLS) - 1)]
    rows, columns = np.nonzero(mask)
    size = len(rows), image.shape[2]
    fill: np.ndarray
    if mode in _NOISE:
        low, span = _NOISE[mode]
        drawn = np.frombuffer(rng.bytes(size[0] * size[1]), np.uint8).reshape(size)
        fill = low + (drawn & (span - 1))  # spans are powers of 2
    elif mode == "pure_black":
        fill = np.zeros(1, np.uint8)
    else:
        fill = np.frombuffer(rng.bytes(size[1]), np.uint8)
        if mode != "random_pure":
            strip = (rows if mode == "hstrips" else columns) % 5 < 2
            fill = strip[:, None] * fill
    filled = image.copy()
    filled[rows, columns] = fill
    return filled


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
