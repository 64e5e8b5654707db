"""Half-finished answers, kept on the server so that another browser can go on with them. Not judgments: the last one wins.

A task that is claimed again brings its draft along (`TaskView.draft`).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, bindparam, delete, select
from sqlalchemy.sql.dml import ReturningInsert

from annotation import schema as t
from annotation.accounts import Account
from annotation.database import DIALECTS
from annotation.refusals import NotFound, Refused
from annotation.store import Store

MAX_DRAFT = 20_000
"""Characters."""

_owned = select(t.presentation.c.id).where(
    t.presentation.c.token == bindparam("token"), t.presentation.c.account_id == bindparam("me")
)


def save_draft(store: Store, account: Account, presentation: str, body: str) -> int:
    """Keeps the page's own text about a task; returns when. Raises NotFound unless the task was shown to this annotator."""
    if len(body) > MAX_DRAFT:
        raise Refused([f"the draft has {len(body)} characters; at most {MAX_DRAFT}"])
    now = store.now_ms()
    values = {"token": presentation, "me": account.id, "text": body, "now": now}
    with store.write() as connection:
        if connection.execute(_kept[connection.dialect.name], values).first() is None:
            raise NotFound("no such presentation")
    return now


def _upsert(dialect: Any) -> ReturningInsert[tuple[int]]:
    """Keeps a text for a showing of annotator `me`, in the place of an earlier one."""
    row = _owned.add_columns(
        bindparam("text", type_=t.draft.c.body.type),
        bindparam("now", type_=t.draft.c.saved_ms.type),
    )
    added = dialect.insert(t.draft).from_select(["presentation_id", "body", "saved_ms"], row)
    kept: ReturningInsert[tuple[int]] = added.on_conflict_do_update(
        index_elements=[t.draft.c.presentation_id],
        set_={"body": added.excluded.body, "saved_ms": added.excluded.saved_ms},
    ).returning(t.draft.c.presentation_id)  # of an insert PostgreSQL's driver tells no row count
    return kept


_kept = {name: _upsert(dialect) for name, dialect in DIALECTS.items()}


def drop_draft(connection: Connection, presentation_id: int) -> None:
    """Of what was answered, skipped or flagged."""
    connection.execute(_dropped, {"shown": presentation_id})


_dropped = delete(t.draft).where(t.draft.c.presentation_id == bindparam("shown"))
