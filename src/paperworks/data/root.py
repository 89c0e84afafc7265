"""Where data sets lie on this machine."""

import os
from pathlib import Path

from paperworks.errors import UserError


class DatasetNotFound(UserError):
    """A data set is not on this machine; the message says where it was looked for and how to get it."""


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder of data sets: ``root``, else ``$PAPERWORKS_DATA``, else the user's cache folder.

    The cache folder is ``$XDG_CACHE_HOME/paperworks``, by default ``~/.cache/paperworks``.
    """
    chosen = root or os.environ.get("PAPERWORKS_DATA")
    if not chosen:
        chosen = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "paperworks"
    return Path(chosen).expanduser()


def locate(path: str | Path, root: str | Path | None = None, *, how: str = "") -> Path:
    """Find a file or folder: as it is given, or inside the data root.

    Args:
        path: For instance ``my/table.csv``, or ``text/ag_news_test.csv`` inside the data root.
        root: The data root (see `data_root`).
        how: How to get it, for the error: for instance the address of the official archive.

    Raises:
        DatasetNotFound: If it is at neither place.
    """
    given, inside = Path(path).expanduser(), data_root(root) / path
    # The root that was asked for by name comes before whatever happens to lie in the working directory.
    places = (inside, given) if root else (given, inside)
    for place in places:
        if place.exists():
            return place
    looked = " or ".join(dict.fromkeys(str(place.absolute()) for place in places))
    raise DatasetNotFound(
        f"nothing at {looked}."
        + (f" {how}" if how else " Name the folder that holds it with PAPERWORKS_DATA or root=.")
    )
