"""What a page is of: a folder with results, a store of runs, and the state of the server itself."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from paperworks.bench.combine import Combination
from paperworks.bench.results import Summary
from paperworks.bench.store import Store
from paperworks.catalog import SCALES
from paperworks.errors import UserError

M = TypeVar("M", bound=BaseModel)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 +._-]*")


@dataclass(frozen=True)
class Project:
    """Where a page reads and writes.

    Attributes:
        store: URL of the runs.
        results: Folder of verdicts and figures.
        folder: What the page may read data from, beside ``data_root``.
        data_root: Folder of the data sets, by default the one that ``PAPERWORKS_DATA`` names.
    """

    store: str = "paperworks-runs"
    results: Path = Path("results")
    folder: Path = Path()
    data_root: Path | None = field(default_factory=lambda: _folder(os.environ.get("PAPERWORKS_DATA", "")))

    @property
    def state(self) -> Path:
        """The server's own files: beside the records, or on this machine for a store that is elsewhere."""
        store = Store(self.store)
        if store.local:
            return Path(store.root) / "serve"
        digest = hashlib.sha256(self.store.encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"paperworks-{os.getuid()}" / f"serve-{digest}"

    @contextmanager
    def alone(self, address: str) -> Iterator[None]:
        """One server at a time; a killed one lets go.

        Raises:
            UserError: If there is another, with its address.
        """
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            file = open(self.state / "server", "a+")  # noqa: SIM115 (open as long as the server)
        except OSError as error:
            raise UserError(f"cannot write to {self.state}: {error.strerror or error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                there = file.read().strip()
                raise UserError(
                    f"the store {self.store} is served at {there} already: open that, stop it, or give another --store"
                ) from error
            file.truncate(0)
            file.write(address)
            file.flush()
            yield

    def summary(self, slug: str, scale: str) -> Summary | None:
        """What ``check`` last published of a method at a scale."""
        return _read(self.results / slug / f"{scale}.json", Summary)

    def summaries(self, slug: str) -> dict[str, Summary]:
        """By scale."""
        found = {scale: self.summary(slug, scale) for scale in SCALES}
        return {scale: summary for scale, summary in found.items() if summary}

    def combinations(self) -> dict[str, Combination]:
        """What ``combine`` published, by the name of its file, the latest first."""
        paths = [path for path in (self.results / "combine").glob("*.json") if NAME.fullmatch(path.stem)]
        found = {path.stem: _read(path, Combination) for path in sorted(paths, key=_changed, reverse=True)}
        return {name: combination for name, combination in found.items() if combination}

    def pictures(self, slug: str, scale: str) -> list[str]:
        """The figures that were published beside a result."""
        names = [path.name for path in (self.results / slug).glob(f"{scale}-*.png")]
        return sorted(name for name in names if NAME.fullmatch(name))

    def file(self, folder: str, name: str) -> Path | None:
        """A published file; nothing if the name is odd, there is none, or it leads out of the results."""
        if not (NAME.fullmatch(folder) and NAME.fullmatch(name)):
            return None
        try:
            path = (self.results / folder / name).resolve(strict=True)
        except (OSError, RuntimeError):
            return None
        return path if path.is_relative_to(self.results.resolve()) and path.is_file() else None

    def refuse_outside(self, name: str, value: str) -> None:
        """Refuse a setting that names a file or folder outside the project; the command line takes it.

        Raises:
            UserError: If it does.
        """
        roots = [self.folder.resolve(), *([self.data_root.resolve()] if self.data_root else [])]
        for part in re.split(r"[\s,\[\]\"']+", value):
            path = Path(part)
            leads_out = path.is_absolute() or ".." in path.parts or part.startswith("~") or "://" in part
            if leads_out or not any((self.folder / part).resolve().is_relative_to(root) for root in roots):
                raise UserError(f"setting {name}: {part!r} is outside this folder; the command line takes it")


_cache: dict[Path, tuple[int, BaseModel | None]] = {}


def _read(path: Path, model: type[M]) -> M | None:
    """A result, read again only when it changed; nothing if it is not there or none."""
    try:
        changed = path.stat().st_mtime_ns
        if path not in _cache or _cache[path][0] != changed:
            try:
                _cache[path] = changed, model.model_validate_json(path.read_bytes())
            except ValidationError:
                _cache[path] = changed, None
    except OSError:
        return None
    found = _cache[path][1]
    return found if isinstance(found, model) else None


def _folder(name: str) -> Path | None:
    return Path(name) if name else None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
