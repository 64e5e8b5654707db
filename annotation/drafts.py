"""Half-finished answers, kept on the server so that another browser can go on with them. Not judgments: the last one wins."""

from __future__ import annotations

from sqlalchemy import bindparam, insert, select, update

from annotation import schema as t
from annotation.refusals import NotFound, Refused
from annotation.store import Account, Store

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
    with store.write() as connection:
        shown = connection.execute(_owned, {"token": presentation, "me": account.id}).scalar()
        if shown is None:
            raise NotFound("no such presentation")
        values = {"body": body, "saved_ms": now}
        changed = connection.execute(
            update(t.draft).where(t.draft.c.presentation_id == shown).values(**values)
        )
        if changed.rowcount == 0:
            connection.execute(insert(t.draft).values(presentation_id=shown, **values))
    return now


def load_draft(store: Store, account: Account, presentation: str) -> str | None:
    """What was kept, if anything. Raises NotFound unless the task was shown to this annotator."""
    with store.read() as connection:
        shown = connection.execute(_owned, {"token": presentation, "me": account.id}).scalar()
        if shown is None:
            raise NotFound("no such presentation")
        return connection.execute(
            select(t.draft.c.body).where(t.draft.c.presentation_id == shown)
        ).scalar()
