"""Hooks on modules."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def removing(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks when the block ends, however it does."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
