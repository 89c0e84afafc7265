"""MRCLens on the page: a question set is uploaded, audited by a process of its own, and read with its findings."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Literal

from paperworks.errors import UserError
from paperworks.files import write_whole

LARGEST = 20 * 1024 * 1024
KEPT = 20
MOST_WAITING = 5
SPLITS = ("biased.json", "anti-biased.json", "balanced.json", "tags.csv")
DOWNLOADS = ("report.md", "report.json", "report.html", *(f"splits/{name}" for name in SPLITS))


@dataclass(frozen=True)
class Audit:
    """One audit.

    Attributes:
        id: Its name here.
        name: Of the file that was uploaded, for people to read.
        size: Of that file, in bytes.
        status: Where it stands.
        message: Why it failed.
        fraction, text: How far it is.
        begun: When, in seconds since 1970.
    """

    id: str
    name: str
    size: int
    status: Literal["waiting", "running", "done", "failed", "stopped"] = "waiting"
    message: str = ""
    fraction: float = 0.0
    text: str = ""
    begun: float = 0.0

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.status in ("waiting", "running")


class Audits:
    """The audits of a folder, one process at a time; the oldest make room for new ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._turn, self._lock, self._closed = threading.Lock(), threading.Lock(), False
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for audit in self.all():
            if audit.active:  # of a server before this one
                self._write(replace(audit, status="stopped"))

    def all(self) -> list[Audit]:
        """The latest first."""
        found = [self.get(path.name) for path in self.folder.iterdir()]
        return sorted((audit for audit in found if audit), key=lambda audit: -audit.begun)

    def get(self, id: str) -> Audit | None:
        """One of them."""
        if not re.fullmatch("[0-9a-f]{16}", id):
            return None
        try:
            audit = Audit(**json.loads((self.folder / id / "audit.json").read_text("utf-8")))
            if audit.status == "running":
                with suppress(OSError, ValueError):
                    progress = json.loads((self.folder / id / "progress.json").read_text("utf-8"))
                    audit = replace(audit, fraction=progress["fraction"], text=progress["text"])
        except (OSError, ValueError, TypeError):
            return None
        return audit

    def file(self, id: str, name: str) -> Path | None:
        """A file to take home."""
        path = self.folder / id / name
        return path if self.get(id) and name in DOWNLOADS and path.is_file() and not path.is_symlink() else None

    def start(self, name: str, content: IO[bytes]) -> Audit:
        """Audit an uploaded file.

        Raises:
            UserError: If it is no JSON file by name or start, too large, or if too many wait already.
        """
        name = shown_name(name)
        if not name.lower().endswith(".json"):
            raise UserError(f"{name}: only a SQuAD file that ends in .json is taken here")
        data = content.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UserError(f"{name} is larger than {LARGEST // 1024**2} MB: use paperworks mrclens scan")
        if data[:4].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
            raise UserError(f"{name} does not hold a JSON object, as a SQuAD file does")
        if sum(audit.active for audit in self.all()) >= MOST_WAITING:
            raise UserError(f"{MOST_WAITING} audits wait or run already: let one of them end first")
        for old in [audit for audit in self.all() if not audit.active][KEPT - 1 :]:
            self.remove(old.id)
        audit = Audit(secrets.token_hex(8), name, len(data), begun=time.time())
        (self.folder / audit.id).mkdir()
        write_whole(self.folder / audit.id / "questions.json", data, durable=False)
        self._write(audit)
        threading.Thread(target=self._run, args=(audit,), name=f"audit-{audit.id}", daemon=True).start()
        return audit

    def cancel(self, id: str) -> None:
        """Stop one."""
        with self._lock:
            audit = self.get(id)
            if audit and audit.active:
                self._write(replace(audit, status="stopped"))
                if process := self._processes.get(id):
                    process.terminate()

    def remove(self, id: str) -> None:
        """Stop one and forget it with its files."""
        self.cancel(id)
        if self.get(id):
            shutil.rmtree(self.folder / id, ignore_errors=True)

    def close(self) -> None:
        """Stop what runs."""
        self._closed = True
        for audit in self.all():
            self.cancel(audit.id)

    def _run(self, audit: Audit) -> None:
        with self._turn:
            with self._lock:
                if self._closed or (self.get(audit.id) or audit).status != "waiting":
                    return
                self._write(replace(audit, status="running", text="reading"))
                command = [sys.executable, "-m", __name__, str(self.folder / audit.id), audit.name]
                pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
                process = self._processes[audit.id] = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
            _, error = process.communicate()
        with self._lock:
            self._processes.pop(audit.id)
            stands = self.get(audit.id)
            if stands is None or stands.status != "running":
                return
            if process.returncode == 0:
                self._write(replace(stands, status="done", fraction=1.0, text=""))
            else:
                lines = error.decode("utf-8", "replace").strip().splitlines()
                message = lines[-1] if lines else f"the process was killed by signal {-process.returncode}"
                self._write(replace(stands, status="failed", message=message[:500], text=""))

    def _write(self, audit: Audit) -> None:
        path = self.folder / audit.id / "audit.json"
        with suppress(FileNotFoundError):  # removed meanwhile
            write_whole(path, json.dumps(asdict(audit)).encode(), durable=False)


def shown_name(name: str) -> str:
    """The last part of an uploaded file's name, without what cannot be seen."""
    last = PureWindowsPath(PurePosixPath(name).name).name
    return "".join(c for c in last if c.isprintable()).strip(". ")[-120:] or "a file"


def work(folder: Path, name: str) -> None:
    """Audit the questions of a folder and write what was found beside them."""
    from paperworks.audit.mrclens import MRCDataset, audit
    from paperworks.audit.mrclens.report import MIN_ADVANTAGE, cells

    last = 0.0

    def progress(fraction: float, text: str) -> None:
        nonlocal last
        if (now := time.monotonic()) - last > 0.3:
            last = now
            state = {"fraction": fraction, "text": text}
            write_whole(folder / "progress.json", json.dumps(state).encode(), durable=False)

    data = MRCDataset.from_squad(folder / "questions.json", repair=True)
    data.name = name
    report = audit(data, progress=progress)
    solved = [row for row in report.rows() if row["biased"]]
    page = {
        "sentences": report.sentences(),
        "bar": MIN_ADVANTAGE,
        "findings": [asdict(finding) for finding in report.findings],
        "cells": [cells(finding) for finding in report.findings],
        "gaps": report.summary()["gaps"],
        "questions": len(data),
        "solved": len(solved),
        "rows": solved[:100],
    }
    for file, content in (
        ("page.json", json.dumps(page)),
        ("report.json", report.to_json()),
        ("report.md", report.to_markdown()),
        ("report.html", report.to_html()),
    ):
        write_whole(folder / file, content.encode(), durable=False)
    report.export(folder / "splits")


if __name__ == "__main__":
    try:
        work(Path(sys.argv[1]), sys.argv[2])
    except (UserError, MemoryError) as mistake:
        sys.exit(" ".join(str(mistake).split()) or "there is not enough memory for this file")
