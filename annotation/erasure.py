"""Erasing what has to go: a person's name, a clip's bytes, a note's words. Everything else stays, and a tombstone says what went.

- A person is named in `account` alone. `purge_user` empties that row and ends its sessions; judgments stay under the pseudonym, which
  nothing connects to anyone any more. With `withdraw`, exports leave the judgments out from then on.
- A clip's bytes and the copies made for showing are deleted; its row (sha256, model, sizes) stays, since judgments and old exports
  name it. Its open tasks leave the queue, and exports leave out every pair it is in.
- Judgments are append-only, but the trigger lets one change through: a note that said something may become empty.
- Snapshots are never changed. What is returned names those that hold the erased thing, and the run folders whose config or
  manifest names such a snapshot, so that one can decide about them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, delete, insert, select, update

from annotation import audit, snapshots
from annotation import schema as t
from annotation.snapshots import Snapshot
from annotation.store import Store
from reelhf.errors import UserError

NO_PASSWORD = "purged"
"""No argon2 hash: nothing verifies against it."""
WAYS_IN = (t.session, t.identity, t.api_token, t.sign_in_link, t.lease, t.project_member)
"""Rows that let someone in or hold work for them; `identity` names them at their provider."""
NAMING_FILES = ("config.yaml", "manifest.json", "environment.json", "summary.json")
MAX_READ_BYTES = 10_000_000
KEPT_OF_ACCOUNT = {"id", "name", "password_hash", "role", "pseudonym", "simulated", "created_ms"}


@dataclass(frozen=True)
class Erasure:
    """What goes, or went, and what holds copies of it."""

    subject: str
    """The pseudonym, the sha256, or the judgment."""
    keys: list[str] = field(default_factory=list)
    """Files of the media folder."""
    num_bytes: int = 0
    tasks: list[int] = field(default_factory=list)
    """Open tasks that leave the queue."""
    judgments: int = 0
    """That name the subject and stay."""
    snapshots: list[Snapshot] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    """Run folders that name one of the snapshots."""


def purge_user(
    store: Store,
    name: str,
    *,
    reason: str,
    withdraw: bool = False,
    runs: Path | None = None,
    dry_run: bool = False,
    actor: str = audit.COMMAND_LINE,
) -> Erasure:
    """Forgets who an account belonged to.

    Args:
        withdraw: exports leave the judgments out from now on.
        runs: folder searched for runs that name the snapshots touched.
        dry_run: only says what would go.
    Raises: UserError if there is no such account.
    """
    account = store.find_user(name)
    if account is None:
        raise UserError(f"there is no user named {name!r}")
    touched = snapshots.naming(store, account_id=account.id)
    with store.read() as connection:
        mine = t.judgment.c.account_id == account.id
        number = connection.execute(select(sa.func.count()).where(mine)).scalar_one()
    found = Erasure(
        account.pseudonym, judgments=number, snapshots=touched, runs=runs_naming(runs, touched)
    )
    if dry_run:
        return found
    with store.write() as connection:
        emptied: dict[str, Any] = {
            column.name: None
            for column in t.account.c
            if column.nullable and column.name not in KEPT_OF_ACCOUNT
        }
        emptied |= {"name": f"purged {account.pseudonym}", "password_hash": NO_PASSWORD}
        connection.execute(update(t.account).where(t.account.c.id == account.id).values(emptied))
        for table in WAYS_IN:
            connection.execute(delete(table).where(table.c.account_id == account.id))
        shown = select(t.presentation.c.id).where(t.presentation.c.account_id == account.id)
        connection.execute(delete(t.draft).where(t.draft.c.presentation_id.in_(shown)))
        for table in (t.judgment, t.skip, t.flag, t.ruling):  # a note may say who wrote it
            _empty_notes(connection, table, table.c.account_id == account.id)
        _forget_as_it_came(connection, t.judgment.c.account_id == account.id)
        detail = {"withdrawn": withdraw, "judgments": number, **_names(found)}
        _bury(store, connection, "user", account.pseudonym, reason, withdraw, detail, actor)
    return found


def purge_clip(
    store: Store,
    sha256: str,
    *,
    reason: str,
    runs: Path | None = None,
    dry_run: bool = False,
    actor: str = audit.COMMAND_LINE,
) -> Erasure:
    """Deletes a clip's bytes and every copy of it here.

    Args:
        sha256: of the original, or its first 8 digits or more.
    Raises: UserError if no clip or more than one begins so, or it is gone already.
    """
    if len(sha256) < 8 or not all(letter in "0123456789abcdef" for letter in sha256.lower()):
        raise UserError(f"{sha256!r} is no sha256: give at least its first 8 hex digits")
    with store.read() as connection:
        like = t.clip.c.sha256.like(f"{sha256.lower()}%")
        rows = connection.execute(select(t.clip).where(like)).all()
        if len(rows) != 1:
            raise UserError(f"{len(rows)} clips begin with {sha256}; expected exactly one")
        clip = rows[0]
        if clip.purged_ms is not None:
            raise UserError(f"clip {clip.sha256} was purged before")
        shows = select(t.task_clip.c.task_id).where(t.task_clip.c.clip_id == clip.id)
        waiting = t.task.c.state.in_(("open", "conflict"))
        open_tasks = select(t.task.c.id).where(t.task.c.id.in_(shows), waiting)
        tasks = list(connection.execute(open_tasks).scalars())
        of_clip = t.judgment.c.task_id.in_(shows)
        number = connection.execute(select(sa.func.count()).where(of_clip)).scalar_one()
        keys = _keys_of_clip(connection, clip)
    touched = snapshots.naming(store, clip_id=clip.id)
    found = Erasure(
        clip.sha256,
        keys,
        sum(size_of(store.media / key) for key in keys),
        tasks,
        number,
        touched,
        runs_naming(runs, touched),
    )
    if dry_run:
        return found
    with store.write() as connection:
        if tasks:
            connection.execute(update(t.task).where(t.task.c.id.in_(tasks)).values(state="flagged"))
            connection.execute(delete(t.lease).where(t.lease.c.task_id.in_(tasks)))
        gone = update(t.clip).where(t.clip.c.id == clip.id).values(purged_ms=store.now_ms())
        connection.execute(gone)
        detail = {"bytes": found.num_bytes, "tasks": tasks, "judgments": number, **_names(found)}
        _bury(store, connection, "clip", clip.sha256, reason, False, detail, actor)
    store.files.delete(
        keys
    )  # after the commit: a file too many can be deleted again, one too few not
    return found


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if it is not here."""
    return path.stat().st_size if path.is_file() else 0


def redact_note(
    store: Store, judgment_id: int, *, reason: str, actor: str = audit.COMMAND_LINE
) -> Erasure:
    """Empties the note of a judgment. The payload hash stays, so a repeated submission is still known.

    Raises: UserError if there is no such judgment.
    """
    found = Erasure(f"j{judgment_id}", judgments=1)
    with store.write() as connection:
        mine = t.judgment.c.id == judgment_id
        if connection.execute(select(t.judgment.c.id).where(mine)).first() is None:
            raise UserError(f"there is no judgment {judgment_id}")
        _empty_notes(connection, t.judgment, mine)
        _forget_as_it_came(connection, mine)
        _bury(store, connection, "note", found.subject, reason, False, {}, actor)
    return found


def expired_clips(store: Store) -> list[str]:
    """sha256 of the clips that are past the retention of every project they belong to."""
    kept_ms = sa.cast(t.project.c.retention_days, sa.BigInteger) * 86_400_000
    ages = (
        select(t.clip.c.sha256)
        .join(t.project_clip, t.project_clip.c.clip_id == t.clip.c.id)
        .join(t.project, t.project.c.id == t.project_clip.c.project_id)
        .where(t.clip.c.purged_ms.is_(None))
        .group_by(t.clip.c.id, t.clip.c.sha256)
        .having(
            sa.func.count() == sa.func.count(t.project.c.retention_days),
            sa.func.max(t.project_clip.c.created_ms + kept_ms) < store.now_ms(),
        )
        .order_by(t.clip.c.id)
    )
    with store.read() as connection:
        return list(connection.execute(ages).scalars())


def runs_naming(folder: Path | None, touched: list[Snapshot]) -> list[Path]:
    """Run folders under `folder` whose config or manifest names one of the snapshots, by folder or by hash."""
    if folder is None or not touched or not folder.is_dir():
        return []
    words = [word for s in touched for word in (s.manifest_sha256, f"snapshots/{s.name}")]
    found = {
        path.parent
        for name in NAMING_FILES
        for path in folder.rglob(name)
        if "snapshots" not in path.parts
        and path.stat().st_size <= MAX_READ_BYTES
        and any(word in path.read_text(encoding="utf-8", errors="replace") for word in words)
    }
    return sorted(found)


def _keys_of_clip(connection: Connection, clip: sa.Row[Any]) -> list[str]:
    """Everything in the media folder that shows this clip and nothing else that is still needed."""
    shown = select(t.task_clip.c.shown_key).where(t.task_clip.c.clip_id == clip.id).distinct()
    keys = [clip.storage_key, *connection.execute(shown).scalars()]
    if clip.first_frame_key is not None:
        others = select(t.clip.c.id).where(
            t.clip.c.first_frame_key == clip.first_frame_key,
            t.clip.c.id != clip.id,
            t.clip.c.purged_ms.is_(None),
        )
        if connection.execute(others.limit(1)).first() is None:
            keys.append(clip.first_frame_key)
    return keys


def _empty_notes(connection: Connection, table: sa.Table, where: sa.ColumnElement[bool]) -> None:
    connection.execute(update(table).where(where, table.c.note != "").values(note=""))


def _forget_as_it_came(connection: Connection, where: sa.ColumnElement[bool]) -> None:
    """What Label Studio sent for these judgments holds their notes a second time."""
    pulled, judgments = t.label_studio_annotation, select(t.judgment.c.id).where(where)
    connection.execute(update(pulled).where(pulled.c.judgment_id.in_(judgments)).values(body=None))


def _bury(
    store: Store,
    connection: Connection,
    kind: str,
    subject: str,
    reason: str,
    withdrawn: bool,
    detail: dict[str, Any],
    actor: str,
) -> None:
    values = {"kind": kind, "subject": subject, "reason": reason, "withdrawn": withdrawn}
    connection.execute(insert(t.tombstone).values(**values, at_ms=store.now_ms()))
    detail = {"reason": reason, **detail}
    audit.record(connection, store.now_ms(), actor, f"purge {kind}", subject, detail)


def _names(found: Erasure) -> dict[str, Any]:
    return {
        "snapshots": [snapshot.name for snapshot in found.snapshots],
        "runs": [str(run) for run in found.runs],
    }
