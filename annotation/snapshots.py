"""Export snapshots: an export that is never changed, under a name, with its hash in the store.

What a model was trained on stays known: the files are made read-only, the row is append-only, and `verify` finds any change.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import insert, select

from annotation import audit
from annotation import schema as t
from annotation.export import ExportQuery, export_preferences
from annotation.projects import project_id
from annotation.store import Store
from reelhf.errors import UserError
from reelhf.hashing import sha256_file

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
READ_ONLY = 0o444


@dataclass(frozen=True)
class Snapshot:
    """One frozen export."""

    name: str
    folder: Path
    query: ExportQuery
    last_judgment: int
    num_rows: dict[str, int]
    manifest_sha256: str
    created_ms: int


def take(
    store: Store,
    name: str,
    query: ExportQuery | None = None,
    *,
    fmt: str = "parquet",
    actor: str = audit.COMMAND_LINE,
) -> Snapshot:
    """Exports into `snapshots/<name>` of the project folder, freezes the files and records their hash.

    Raises: UserError if the name is not a plain file name or was used before.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"snapshot name {name!r}: letters, digits, dots, dashes, 80 at most")
    query = query or ExportQuery()
    folder = store.media.parent / "snapshots" / name
    if folder.exists() or any(snapshot.name == name for snapshot in list_snapshots(store)):
        raise UserError(f"there is already a snapshot {name!r}; snapshots are never overwritten")
    try:
        export_preferences(store, folder, query, fmt=fmt)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for path in folder.iterdir():
            path.chmod(READ_ONLY)
        digest = sha256_file(folder / "manifest.json")
        rows = {file.partition(".")[0]: entry["rows"] for file, entry in manifest["files"].items()}
        with store.write() as connection:
            of_project = None if query.project is None else project_id(connection, query.project)
            connection.execute(
                insert(t.export_snapshot).values(
                    name=name,
                    project_id=of_project,
                    query=json.dumps(asdict(query)),
                    max_judgment_id=manifest["last_judgment"],
                    num_rows=json.dumps(rows),
                    manifest_sha256=digest,
                    folder=f"snapshots/{name}",
                    created_ms=store.now_ms(),
                )
            )
            audit.record(
                connection, store.now_ms(), actor, "snapshot", name, {"sha256": digest, **rows}
            )
    except BaseException:  # an interrupted export leaves no half snapshot behind its name
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return find(store, name)


def list_snapshots(store: Store) -> list[Snapshot]:
    """All of them, oldest first."""
    with store.read() as connection:
        rows = connection.execute(select(t.export_snapshot).order_by(t.export_snapshot.c.id)).all()
    return [_snapshot(store, row) for row in rows]


def find(store: Store, name: str) -> Snapshot:
    """Raises UserError if there is none of that name."""
    found = [snapshot for snapshot in list_snapshots(store) if snapshot.name == name]
    if not found:
        raise UserError(f"there is no snapshot {name!r}")
    return found[0]


def problem(snapshot: Snapshot) -> str | None:
    """What is wrong with a snapshot's files, in words; None if they are as they were written."""
    manifest = snapshot.folder / "manifest.json"
    if not manifest.is_file():
        return f"{manifest} is gone"
    if sha256_file(manifest) != snapshot.manifest_sha256:
        return f"{manifest} was changed"
    for name, entry in json.loads(manifest.read_text(encoding="utf-8"))["files"].items():
        path = snapshot.folder / name
        if not path.is_file():
            return f"{path} is gone"
        if sha256_file(path) != entry["sha256"]:
            return f"{path} was changed"
    return None


def naming(
    store: Store, *, clip_id: int | None = None, account_id: int | None = None
) -> list[Snapshot]:
    """Snapshots that hold a judgment of this clip or by this account, from the store: the files may lie elsewhere by now."""
    found = []
    for snapshot in list_snapshots(store):
        query = snapshot.query
        where: list[sa.ColumnElement[bool]] = [
            t.judgment.c.id <= snapshot.last_judgment,
            t.task.c.round >= query.min_round,
        ]
        if query.max_round is not None:
            where.append(t.task.c.round <= query.max_round)
        if query.exclude_simulated:
            where.append(~t.judgment.c.simulated)
        if account_id is not None:
            where.append(t.judgment.c.account_id == account_id)
        if clip_id is not None:
            shows = select(t.task_clip.c.task_id).where(t.task_clip.c.clip_id == clip_id)
            where.append(t.task.c.id.in_(shows))
        with store.read() as connection:
            if query.project is not None:
                where.append(t.task.c.project_id == project_id(connection, query.project))
            held = (
                select(t.judgment.c.id).join(t.task, t.task.c.id == t.judgment.c.task_id)
            ).where(*where)
            if connection.execute(held.limit(1)).first() is not None:
                found.append(snapshot)
    return found


def _snapshot(store: Store, row: Any) -> Snapshot:
    return Snapshot(
        row.name,
        store.media.parent / row.folder,
        ExportQuery(**json.loads(row.query)),
        row.max_judgment_id,
        json.loads(row.num_rows),
        row.manifest_sha256,
        row.created_ms,
    )
