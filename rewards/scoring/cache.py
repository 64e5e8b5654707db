"""Scores that were computed once: one SQLite file, written by any number of processes."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

BUSY_SECONDS = 60.0  # another process writes for milliseconds
READ_AT_ONCE = 500  # SQLite's limit of variables in one statement is at least 999


class ScoreCache:
    """Key -> scores as a JSON object. A key holds the hashes of the clip, the prompt and the rewards: nothing in it ever grows stale."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._open()) as database, database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, value TEXT)")

    def get(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The scores of those keys that are known."""
        found: dict[str, dict[str, Any]] = {}
        with closing(self._open()) as database:
            for start in range(0, len(keys), READ_AT_ONCE):
                part = list(keys[start : start + READ_AT_ONCE])
                marks = ",".join("?" * len(part))
                rows = database.execute(
                    f"SELECT key, value FROM scores WHERE key IN ({marks})", part
                )
                found |= {key: json.loads(value) for key, value in rows}
        return found

    def put(self, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep scores, all of them or none."""
        rows = [(key, json.dumps(value)) for key, value in scores.items()]
        with closing(self._open()) as database, database:
            database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=BUSY_SECONDS)
