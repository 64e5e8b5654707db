"""Flags: what annotators report about a task, the queue of held tasks, and what is decided about them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, insert, select, update

from annotation import audit
from annotation import schema as t
from annotation.accounts import Account
from annotation.records import LETTERS
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
    project: str
    num_judgments: int
    need_n: int
    fps: float
    num_clips: int
    has_first_frame: bool
    reports: list[dict[str, Any]]
    """Flags and skips, and what was decided before, oldest first: who (pseudonym), what, note, when; of a flag or skip also the
    letter under which that person saw each clip, in the task's own order."""

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
    query = (
        select(t.task, t.prompt.c.text, t.project.c.name.label("project"))
        .join(t.prompt, t.prompt.c.prompt_id == t.task.c.prompt_id)
        .join(t.project, t.project.c.id == t.task.c.project_id)
        .where(t.task.c.state == "flagged")
        .order_by(t.task.c.id)
        .limit(limit)
    )
    with store.read() as connection:
        tasks = connection.execute(query).all()
        clips = _clips_of(connection, [task.id for task in tasks])
        reports = _reports(connection, clips)
    return [
        Held(
            task.id,
            task.text,
            task.project,
            task.num_judgments,
            task.need_n,
            task.shown_fps,
            len(clips[task.id]),
            task.first_frame_key is not None,
            reports[task.id],
        )
        for task in tasks
    ]


def held_media(store: Store, task_id: int, position: int) -> str:
    """Where a clip of a flagged task lies, by its place in the task; after the clips comes the first frame. Raises NotFound."""
    task = select(t.task.c.first_frame_key).where(
        t.task.c.id == task_id, t.task.c.state == "flagged"
    )
    shown = (
        select(t.task_clip.c.shown_key)
        .where(t.task_clip.c.task_id == task_id)
        .order_by(t.task_clip.c.slot)
    )
    with store.read() as connection:
        row = connection.execute(task).first()
        keys = [] if row is None else [*connection.execute(shown).scalars(), row.first_frame_key]
    if not 0 <= position < len(keys) or keys[position] is None:
        raise NotFound("no such clip")
    return str(keys[position])


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
        detail = {"decision": decision}
        audit.record(
            connection, store.now_ms(), account.pseudonym, "flag decide", f"task {task_id}", detail
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


def _clips_of(connection: Connection, task_ids: list[int]) -> dict[int, list[int]]:
    """Task -> its clips, in its own order."""
    found: dict[int, list[int]] = {task_id: [] for task_id in task_ids}
    query = (
        select(t.task_clip.c.task_id, t.task_clip.c.clip_id)
        .where(t.task_clip.c.task_id.in_(task_ids))
        .order_by(t.task_clip.c.task_id, t.task_clip.c.slot)
    )
    for task_id, clip_id in connection.execute(query).tuples():
        found[task_id].append(clip_id)
    return found


def _reports(
    connection: Connection, clips: dict[int, list[int]]
) -> dict[int, list[dict[str, Any]]]:
    """Task -> what was said of it and decided about it, oldest first."""
    found: dict[int, list[dict[str, Any]]] = {task_id: [] for task_id in clips}
    kinds = {"flag": t.flag.c.kind, "skip": t.skip.c.reason, "ruling": t.ruling.c.decision}
    for name, what in kinds.items():
        table = what.table
        query = (
            select(
                table.c.task_id,
                t.account.c.pseudonym,
                what.label("what"),
                table.c.note,
                table.c.created_ms,
            )
            .join(t.account, t.account.c.id == table.c.account_id)
            .where(table.c.task_id.in_(list(clips)))
        )
        if name != "ruling":
            query = query.add_columns(t.presentation.c.clip_order).join(
                t.presentation, t.presentation.c.id == table.c.presentation_id
            )
        for row in connection.execute(query):
            said = {"report": name, **row._mapping}
            shown, own = said.pop("clip_order", None), clips[said.pop("task_id")]
            if shown is not None:
                said["letters"] = [LETTERS[shown.index(clip_id)] for clip_id in own]
            found[row.task_id].append(said)
    for said_of in found.values():
        said_of.sort(key=lambda said: said["created_ms"])
    return found
