"""Files that are written whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` when the block ends without an error.

    A kill at any moment leaves the old file or the new one.

    Args:
        path: In a folder that is there.
        durable: Wait until it is on the disk, so that a loss of power does no more harm than a kill.
    """
    partial = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.partial")  # long names stay possible
    try:
        with open(partial, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
        if durable:
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file as ``whole`` does."""
    with whole(path, durable=durable) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
