"""Preference data as files: written batch by batch, so that an export of any size fits in memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from annotation.records import (
    PREFERENCE_SCHEMA,
    PREFERENCE_SCHEMA_VERSION,
    SPLIT_FRACTIONS,
    SPLIT_SALT,
    TABLES,
    preference_schemas,
)
from reelhf.errors import UserError
from reelhf.hashing import sha256_file

FORMATS = ("parquet", "jsonl", "csv")
BATCH_ROWS = 10_000
"""Rows of one table held back until they are written, and rows of a Parquet row group."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet runs a cell that begins so."""


class PreferenceWriter:
    """Writes the three tables of contract 3 and at last the manifest; a folder without one is an export that never finished.

    Use in a `with` block: `write` as often as there are rows, `finish` once.

    Args:
        fmt: `parquet`, `jsonl` (one object per line, timestamps in ISO 8601) or `csv` (to look at: it is not read back).
    Raises: UserError if the format is unknown or the folder cannot be written.
    """

    def __init__(self, folder: Path | str, *, fmt: str = "parquet"):
        if fmt not in FORMATS:
            raise UserError(
                f"format is {fmt!r}; expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
            )
        self.folder, self._fmt = Path(folder), fmt
        self._waiting: dict[str, list[Mapping[str, Any]]] = {name: [] for name in TABLES}
        self._rows = dict.fromkeys(TABLES, 0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "manifest.json").unlink(missing_ok=True)
            self._files = {name: _open(self._aside(name), name, fmt) for name in TABLES}
        except OSError as error:
            raise self._cannot(error) from error

    def write(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows to `clips`, `judgments` or `preferences`."""
        for row in rows:
            self._waiting[table].append(row)
            if len(self._waiting[table]) >= BATCH_ROWS:
                self._flush(table)

    def finish(
        self, *, guideline_version: str, source_query: str, extra: Mapping[str, Any] | None = None
    ) -> Path:
        """Puts the tables in their places and writes the manifest. Returns the folder."""
        files: dict[str, Any] = {}
        try:
            for table in TABLES:
                self._flush(table)
                self._files[table].close()
                path = self.folder / f"{table}.{self._fmt}"
                self._aside(table).replace(path)
                files[path.name] = {
                    "rows": self._rows[table],
                    "bytes": path.stat().st_size,
                    "sha256": sha256_file(path),
                }
            manifest = {
                "schema": PREFERENCE_SCHEMA,
                "schema_version": PREFERENCE_SCHEMA_VERSION,
                "format": self._fmt,
                "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "guideline_version": guideline_version,
                "source_query": source_query,
                "split": {"salt": SPLIT_SALT, "fractions": SPLIT_FRACTIONS},
                "files": files,
                **(extra or {}),
            }
            aside = self.folder / "manifest.json.tmp"
            text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
            aside.write_text(text, encoding="utf-8")
            aside.replace(self.folder / "manifest.json")
        except OSError as error:
            raise self._cannot(error) from error
        return self.folder

    def __enter__(self) -> PreferenceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is None:
            return
        for table in TABLES:
            self._files[table].close()
            self._aside(table).unlink(missing_ok=True)

    def _aside(self, table: str) -> Path:
        return self.folder / f"{table}.{self._fmt}.tmp"

    def _flush(self, table: str) -> None:
        rows, self._waiting[table] = self._waiting[table], []
        self._rows[table] += len(rows)
        if rows:
            try:
                self._files[table].write(rows)
            except OSError as error:
                raise self._cannot(error) from error

    def _cannot(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write preference data to {self.folder}: {error.strerror or error}"
        )


class _ParquetFile:
    def __init__(self, path: Path, table: str):
        import pyarrow.parquet as pq

        self._schema = preference_schemas()[table]
        self._writer = pq.ParquetWriter(path, self._schema)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_pylist(list(rows), schema=self._schema))

    def close(self) -> None:
        self._writer.close()


class _TextFile:
    """JSON lines, or comma-separated values with a head."""

    def __init__(self, path: Path, table: str, fmt: str):
        self._schema = preference_schemas()[table]
        self._file: IO[str] = path.open("w", encoding="utf-8", newline="")
        self._csv = None
        if fmt == "csv":
            self._csv = csv.writer(self._file)
            self._csv.writerow(self._schema.names)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        import pyarrow as pa

        for row in pa.Table.from_pylist(list(rows), schema=self._schema).to_pylist():
            if self._csv is not None:
                self._csv.writerow([csv_cell(value) for value in row.values()])
            else:
                self._file.write(json.dumps(row, ensure_ascii=False, default=_iso) + "\n")

    def close(self) -> None:
        self._file.close()


def _open(path: Path, table: str, fmt: str) -> _ParquetFile | _TextFile:
    return _ParquetFile(path, table) if fmt == "parquet" else _TextFile(path, table, fmt)


def csv_cell(value: object) -> object:
    """A value as a CSV cell. Text that a spreadsheet would run as a formula gets an apostrophe before it."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, (list, dict)):
        value = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return "'" + value
    return value


def _iso(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
