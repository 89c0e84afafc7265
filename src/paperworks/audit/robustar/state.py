"""What a project has worked out, in SQLite: a cache that may be lost, unlike masks and checkpoints."""

import json
import sqlite3
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_TABLES = """
CREATE TABLE IF NOT EXISTS facts (
    kind TEXT, checkpoint TEXT, path TEXT, stamp TEXT, value TEXT, PRIMARY KEY (kind, checkpoint, path)
) WITHOUT ROWID;
"""


class Facts:
    """Values by (kind, checkpoint, image path), valid while the image's stamp is the same. Safe across threads."""

    def __init__(self, file: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._open(file)
        except sqlite3.DatabaseError as error:
            damaged = file.with_suffix(".damaged")
            file.replace(damaged)
            warnings.warn(f"{file} is damaged ({error}): moved to {damaged.name}, starting a new one", stacklevel=3)
            self._open(file)

    def _open(self, file: Path) -> None:
        self._connection = sqlite3.connect(file, timeout=30, check_same_thread=False)
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.executescript(_TABLES)
        except sqlite3.DatabaseError:
            self._connection.close()
            raise

    def get(self, kind: str, checkpoint: str, path: str, stamp: str) -> Any | None:
        """One value, or None if there is none for this stamp."""
        query = "SELECT value FROM facts WHERE kind = ? AND checkpoint = ? AND path = ? AND stamp = ?"
        with self._lock:
            row = self._connection.execute(query, (kind, checkpoint, path, stamp)).fetchone()
        return json.loads(row[0]) if row else None

    def all(self, kind: str, checkpoint: str) -> dict[str, tuple[str, Any]]:
        """Stamp and value of every path."""
        query = "SELECT path, stamp, value FROM facts WHERE kind = ? AND checkpoint = ?"
        with self._lock:
            rows = self._connection.execute(query, (kind, checkpoint)).fetchall()
        return {path: (stamp, json.loads(value)) for path, stamp, value in rows}

    def put(self, kind: str, checkpoint: str, rows: Iterable[tuple[str, str, Any]]) -> None:
        """Store values as (path, stamp, value), all or none."""
        encoded = [(kind, checkpoint, path, stamp, json.dumps(value)) for path, stamp, value in rows]
        with self._lock, self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?)", encoded)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()
