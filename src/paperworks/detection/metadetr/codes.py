"""Codes of classes: made of supports, averaged, kept in a file."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.errors import UserError
from paperworks.files import write_whole


@dataclass(frozen=True)
class CodeBook:
    """What a detector knows of classes it is to find.

    Attributes:
        classes: Their labels.
        codes: A row each, in (0, 1).
        instances: Of each class, the instances that formed its code, as ``Shot.key``.
        fingerprint: Of the weights that made the codes; others cannot use them.
    """

    classes: tuple[int, ...]
    codes: Float[Tensor, "classes d"]
    instances: tuple[tuple[tuple[int, int], ...], ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.classes)

    def of(self, classes: Sequence[int]) -> "CodeBook":
        """Some of them, in that order.

        Raises:
            UserError: If one has no code, naming it.
        """
        if missing := [label for label in classes if label not in self.classes]:
            raise UserError(
                f"no support for class {', '.join(map(str, missing))}; there are codes of "
                f"{', '.join(map(str, self.classes))}"
            )
        rows = [self.classes.index(label) for label in classes]
        return CodeBook(tuple(classes), self.codes[rows], tuple(self.instances[row] for row in rows), self.fingerprint)

    def save(self, path: str | Path) -> None:
        """Write it whole, or not at all; folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        torch.save({**vars(self), "codes": self.codes.cpu()}, content)
        write_whole(path, content.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "CodeBook":
        """Read it; no code is run.

        Raises:
            UserError: If the file is missing or no code book.
        """
        try:
            return cls(**torch.load(path, weights_only=True))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except Exception as error:  # whatever a broken file makes the unpickler raise
            raise UserError(f"{path} holds no code book") from error


def fingerprint(*modules: nn.Module) -> str:
    """A hash of all weights and statistics."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
