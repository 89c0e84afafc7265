"""Errors that speak to the person at the keyboard: one clear line, with the nearest valid choice."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the caller can mend: a wrong name, value, file or missing package.

    The command line prints its message as one line and exits with code 2.
    """


class MissingExtra(UserError, ImportError):
    """An optional dependency is not installed; the message holds the command that mends it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: pip install 'paperworks[{extra}]'")
        self.package, self.extra, self.purpose = package, extra, purpose

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.package, self.extra, self.purpose)


def nearest(name: object, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the choice closest to ``name``, else the list of choices."""
    options = list(choices)
    by_case = {option.casefold(): option for option in options}
    close = get_close_matches(str(name).casefold(), by_case, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {by_case[close[0]]!r}?"
    return f" Choose from: {', '.join(options)}." if options else ""


def check_counts(**counts: int) -> None:
    """Refuse numbers of things below 1.

    Raises:
        UserError: Naming the first of them.
    """
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} must be at least 1, got {count}")


def unknown(kind: str, name: object, choices: Iterable[str]) -> UserError:
    """The error for a name that is not among ``choices``, e.g. ``unknown("setting", "epoch", fields)``."""
    return UserError(f"unknown {kind} {str(name)!r}.{nearest(name, choices)}")
