"""The audit trail: who did what to the project, each entry chained to the one before by its hash.

What annotators say is kept elsewhere, append-only too. An entry names people by pseudonym only, so it can stay when an account goes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row, insert, select

from annotation import schema as t

START = "0" * 64
CHAIN_LOCK = 0x61756474  # PostgreSQL: two entries may not follow the same one
MAX_SUBJECT = 200
COMMAND_LINE = "command line"
"""The actor of what is not done by someone signed in, but typed by whoever owns the files."""


def record(
    connection: Connection,
    at_ms: int,
    actor: str,
    action: str,
    subject: str,
    detail: Mapping[str, Any],
) -> None:
    """Adds an entry inside the transaction that does the thing: neither is there without the other."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(sa.func.pg_advisory_xact_lock(CHAIN_LOCK)))
    last = select(t.event.c.hash).order_by(t.event.c.id.desc()).limit(1)
    values = {
        "at_ms": at_ms,
        "actor": actor,
        "action": action,
        "subject": subject,
        "detail": json.dumps(detail, sort_keys=True, ensure_ascii=False),
        "prev_hash": connection.execute(last).scalar() or START,
    }
    connection.execute(insert(t.event).values(**values, hash=entry_hash(values)))


def entry_hash(entry: Mapping[str, Any]) -> str:
    """sha256 of an entry and of all before it, through `prev_hash`."""
    fields = [
        entry[name] for name in ("prev_hash", "at_ms", "actor", "action", "subject", "detail")
    ]
    return hashlib.sha256(json.dumps(fields, ensure_ascii=False).encode()).hexdigest()


def entries(connection: Connection, *, limit: int | None = None) -> list[Row[Any]]:
    """The trail, oldest first; the last `limit` of it."""
    query = select(t.event).order_by(t.event.c.id.desc()).limit(limit)
    return list(connection.execute(query))[::-1]


def first_broken(connection: Connection) -> int | None:
    """Id of the first entry that was changed, or follows one that is gone; None if the chain holds."""
    before = START
    for row in connection.execute(select(t.event).order_by(t.event.c.id)):
        entry = row._mapping
        if entry["prev_hash"] != before or entry["hash"] != entry_hash(entry):
            return int(row.id)
        before = row.hash
    return None
