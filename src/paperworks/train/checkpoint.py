"""Checkpoints that are whole or absent, and random states that travel in them. Loading executes no code."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from paperworks.errors import UserError
from paperworks.files import whole

FORMAT = 1


def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path`` so that a kill at any moment leaves the old file or the new one.

    Raises:
        UserError: If the disk is full or read-only, or ``content`` holds what ``load`` would refuse.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            if refused := get_unsafe_globals_in_checkpoint(file.name):
                raise UserError(f"a checkpoint holds tensors, numbers, text and containers of them, not {refused[0]}")
    except (OSError, RuntimeError) as error:  # PyTorch's writer hides the system's error behind one of its own
        reasons = (getattr(e, "strerror", None) for e in (error, error.__context__))
        reason = next(filter(None, reasons), error)
        raise UserError(f"cannot write the checkpoint {path}: {reason}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: If the file is damaged or of another format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({type(error).__name__}); delete it to start anew"
        ) from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UserError(f"checkpoint {path} is of another format than {FORMAT}; delete it to start anew")
    return content


def random_state() -> dict[str, Any]:
    """The state of every global generator, as tensors and numbers."""
    name, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every global generator inside the block and give the caller's states back after it.

    Dropout and many data transforms draw from the global generators; there is no other way to steer them.
    """
    before = random_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(before)
