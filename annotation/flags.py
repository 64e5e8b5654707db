"""Flags: what annotators report about a task, the queue of held tasks, and what is decided about them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, insert, select, update

from annotation import schema as t
from annotation.accounts import Account
from annotation.refusals import NotFound, Refused
from annotation.store import Store
from annotation.verdicts import check_note

FLAGS_TO_HOLD = {"unsafe": 1, "broken": 1, "ambiguous_prompt": 2}
"""Flag -> how many people must raise it before the task is held for a decision."""
SKIPS_TO_HOLD = 3
"""Skips by this many people hold a task too."""
DECISIONS = ("reopen", "remove")


@dataclass(frozen=True)
class Held:
    """One task that waits for a decision."""

    task_id: int
    prompt: str
    num_judgments: int
    reports: list[dict[str, Any]]
    """Flags and skips, oldest first: who (pseudonym), what, note, when."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def hold_if_reported(connection: Connection, task_id: int) -> None:
    """Takes a task out of the queue once enough people have flagged or skipped it since the last decision."""
    since = _since_ruling(task_id)

    def reports(table: sa.Table, *where: sa.ColumnElement[bool]) -> int:
        query = select(sa.func.count(table.c.account_id.distinct())).where(
            table.c.task_id == task_id, table.c.created_ms > since, *where
        )
        return int(connection.execute(query).scalar_one())

    flagged = any(reports(t.flag, t.flag.c.kind == kind) >= n for kind, n in FLAGS_TO_HOLD.items())
    if flagged or reports(t.skip) >= SKIPS_TO_HOLD:
        connection.execute(
            update(t.task)
            .where(t.task.c.id == task_id, t.task.c.state.in_(("open", "done", "conflict")))
            .values(state="flagged")
        )


def held_tasks(store: Store, *, limit: int = 100) -> list[Held]:
    """The queue of flagged tasks, longest waiting first."""
    with store.read() as connection:
        tasks = connection.execute(
            select(t.task.c.id, t.task.c.num_judgments, t.prompt.c.text)
            .join(t.prompt, t.prompt.c.prompt_id == t.task.c.prompt_id)
            .where(t.task.c.state == "flagged")
            .order_by(t.task.c.id)
            .limit(limit)
        ).all()
        return [
            Held(task.id, task.text, task.num_judgments, _reports(connection, task.id))
            for task in tasks
        ]


def decide(store: Store, account: Account, task_id: int, decision: str, note: str = "") -> None:
    """Puts a flagged task back or takes it out for good; the decision is kept with its author.

    Raises: NotFound (no such task is flagged, or the annotator may not decide), Refused (no such decision).
    """
    problems = check_note(note)
    if decision not in DECISIONS:
        problems.append(f"decision {decision!r} is not one of {', '.join(DECISIONS)}")
    if problems:
        raise Refused(problems)
    with store.write() as connection:
        task = connection.execute(
            select(t.task).where(t.task.c.id == task_id).with_for_update(key_share=True)
        ).first()
        if not may_decide(connection, account) or task is None or task.state != "flagged":
            raise NotFound("no such flagged task")
        if decision == "reopen" and _has_purged_clip(connection, task_id):
            raise Refused(["a clip of this task was purged, so it cannot be shown any more"])
        back = "done" if task.num_judgments >= task.need_n else "open"
        connection.execute(
            insert(t.ruling).values(
                task_id=task_id,
                account_id=account.id,
                decision=decision,
                note=note,
                created_ms=store.now_ms(),
            )
        )
        connection.execute(
            update(t.task)
            .where(t.task.c.id == task_id)
            .values(state=back if decision == "reopen" else "removed")
        )


def may_decide(connection: Connection, account: Account) -> bool:
    """Experts decide about flags, and everyone who is more than an annotator."""
    row = connection.execute(select(t.account.c.expert).where(t.account.c.id == account.id)).one()
    return account.role != "annotator" or bool(row.expert)


def _has_purged_clip(connection: Connection, task_id: int) -> bool:
    purged = (
        select(t.clip.c.id)
        .join(t.task_clip, t.task_clip.c.clip_id == t.clip.c.id)
        .where(t.task_clip.c.task_id == task_id, t.clip.c.purged_ms.is_not(None))
    )
    return connection.execute(purged.limit(1)).first() is not None


def _since_ruling(task_id: int) -> sa.ScalarSelect[int]:
    return (
        select(sa.func.coalesce(sa.func.max(t.ruling.c.created_ms), -1))
        .where(t.ruling.c.task_id == task_id)
        .scalar_subquery()
    )


def _reports(connection: Connection, task_id: int) -> list[dict[str, Any]]:
    found = []
    for table, what in ((t.flag, t.flag.c.kind), (t.skip, t.skip.c.reason)):
        rows = connection.execute(
            select(t.account.c.pseudonym, what.label("what"), table.c.note, table.c.created_ms)
            .join(t.account, t.account.c.id == table.c.account_id)
            .where(table.c.task_id == task_id)
        )
        name = "flag" if table is t.flag else "skip"
        found += [{"report": name, **row._mapping} for row in rows]
    return sorted(found, key=lambda report: report["created_ms"])
