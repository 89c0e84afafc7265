"""Where trials are kept: one JSON record a trial, whole or absent, under any fsspec URL."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from paperworks import __version__
from paperworks.errors import UserError
from paperworks.files import write_whole

FORMAT = 1


@dataclass(frozen=True)
class Trial:
    """The unit that is scheduled, stored, skipped when already there, and measured again.

    Attributes:
        claim: Slug of the claim.
        arm: One of its arms, or ``combine:a+b`` for its data under the interventions of methods a and b.
        seed, scale, settings, device: As measured; ``settings`` are JSON values.
        data_root: Folder of the data sets; empty for the default.
        code: Fingerprint of the text that measures.
    """

    claim: str
    arm: str
    seed: int
    scale: str
    settings: dict[str, Any]
    device: str = "cpu"
    data_root: str = ""
    code: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two trials the same measurement."""
        return {name: value for name, value in vars(self).items() if name != "code"}

    @property
    def key(self) -> str:
        """Name of the trial's files, unique to its identity."""
        return f"{self.arm.replace(':', '-')}-seed{self.seed}-{_digest(self.identity)[:12]}"


class DamagedRecord(Exception):
    """A record that is there but cannot be used; the message says why."""


class Store:
    """Records and artefacts of trials.

    Local files are written aside and moved into place; object stores write whole objects by nature.

    Args:
        url: A folder, or any URL that fsspec opens: ``s3://bucket/runs``, ``memory://runs`` …

    Attributes:
        address: The URL for processes that work in other folders.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UserError(f"cannot open the store {url!r}: {error}") from error
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)
        self.address = self.root if self.local else url

    def check_writable(self) -> None:
        """Find out before hours of work, not after.

        Raises:
            UserError: If the store cannot be written.
        """
        probe = f"probe-{os.getpid()}-{secrets.token_hex(4)}"
        self.write(probe, b"")
        self.remove(probe)

    def path(self, trial: Trial) -> str:
        """Where the record of a trial stands, relative to the root."""
        return f"{trial.claim}/{trial.scale}/{trial.key}.json"

    def write(self, path: str, content: bytes, *, durable: bool = True) -> None:
        """Write a file whole or not at all; ``durable`` waits until it is on the disk.

        Raises:
            UserError: If the store is read-only or full.
        """
        target = f"{self.root}/{path}"
        try:
            self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            if not self.local:
                self.fs.pipe_file(target, content)
                return
            write_whole(Path(target), content, durable=durable)
        except OSError as error:
            raise UserError(f"cannot write to the store {self.url}: {error.strerror or error}") from error

    def scratch(self, trial: Trial) -> Path:
        """A folder on this machine for a trial's checkpoints; the same after a kill, another for other code."""
        base = Path(self.root) if self.local else Path(tempfile.gettempdir()) / f"paperworks-{os.getuid()}"
        return base / "scratch" / f"{trial.key}-{_digest(trial.code)[:8]}"

    def read(self, path: str) -> bytes:
        """The content of a file."""
        content: bytes = self.fs.cat_file(f"{self.root}/{path}")
        return content

    def save(self, trial: Trial, measured: dict[str, Any]) -> None:
        """Store a trial's record; ``measured`` holds metrics, curves, figures, versions, machine and seconds."""
        record = {
            "format": FORMAT,
            "paperworks": __version__,
            "code": trial.code,
            **trial.identity,
            **measured,
        }
        record["checksum"] = _digest(record)
        self.write(self.path(trial), json.dumps(record, indent=1, allow_nan=False).encode())

    def live(self) -> list[dict[str, Any]]:
        """The trials that run now: what each is (``key``, ``pid``, ``claim``, ``arm`` …), how far (``fraction``,
        ``text``), its ``curves`` so far and those of the ``training`` under way.
        """
        try:
            paths = self.fs.ls(f"{self.root}/live", detail=False)
        except FileNotFoundError:
            return []
        found = []
        for path in paths:
            try:
                found.append(json.loads(self.fs.cat_file(path)))
            except (OSError, ValueError):  # ended in this moment
                continue
        return found

    def listing(self, claim: str, scale: str) -> dict[str, tuple[float, str]]:
        """The records of a claim at a scale: path, relative to the root, with the time of the last change in seconds
        since 1970 and a mark that changes with the content.
        """
        folder, found = f"{claim}/{scale}", {}
        try:
            entries = self.fs.ls(f"{self.root}/{folder}", detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        for entry in entries:
            name = entry["name"].rpartition("/")[2]
            if entry["type"] == "file" and name.endswith(".json"):
                times = [entry[key] for key in ("mtime", "LastModified", "created") if entry.get(key)]
                latest = times[0] if times else 0.0
                changed = latest.timestamp() if isinstance(latest, datetime) else float(latest)
                found[f"{folder}/{name}"] = changed, f"{changed} {entry.get('ETag')} {entry.get('size')}"
        return found

    def remove(self, path: str) -> None:
        """Remove a file if it is there."""
        with suppress(OSError):
            self.fs.rm_file(f"{self.root}/{path}")

    def artefact(self, trial: Trial, name: str) -> str:
        """Where an artefact of a trial stands, relative to the root."""
        return f"{self.path(trial).removesuffix('.json')}/{name}"

    def load(self, trial: Trial) -> dict[str, Any] | None:
        """The record of a trial, or nothing if it was not measured yet.

        Raises:
            DamagedRecord: If the record is truncated, edited, or of another version of format or claim, or an
                artefact is not the one that was measured.
        """
        try:
            text = self.read(self.path(trial))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read the store {self.url}: {error.strerror or error}") from error
        try:
            record = json.loads(text)
            checksum = record.pop("checksum")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedRecord("the record is truncated or none") from error
        if record.get("format") != FORMAT or record.get("paperworks") != __version__:
            raise DamagedRecord(f"the record is of another version (paperworks {record.get('paperworks')})")
        if checksum != _digest(record):
            raise DamagedRecord("the record was edited: its checksum differs")
        if {name: record.get(name) for name in trial.identity} != trial.identity:
            raise DamagedRecord("the record is of another trial")
        if record.get("code") != trial.code:
            raise DamagedRecord("measured by other code of the claim")
        for name, digest in record["artefacts"].items():
            try:
                content = self.read(self.artefact(trial, name))
            except OSError as error:
                raise DamagedRecord(f"its artefact {name} is gone") from error
            if hashlib.sha256(content).hexdigest() != digest:
                raise DamagedRecord(f"its artefact {name} is not the one that was measured")
        return record | {"checksum": checksum}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
