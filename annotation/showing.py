"""One showing of a task to one annotator: orders drawn at random, opaque media tokens, and what is sent of it."""

from __future__ import annotations

import random
import secrets
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row, insert, select

from annotation import schema as t
from annotation.history import choices_of, is_latest
from annotation.records import LETTERS, ClipView, Guideline, TaskView
from annotation.refusals import NotFound
from annotation.routing import Assignment
from annotation.store import Account, Store

SHOWN_AS_WORK = ("gold", "retest")
"""An annotator must not know these from real work."""


def present(
    store: Store, connection: Connection, chosen: Assignment, account_id: int, now: int
) -> int:
    """Draws the order of clips and of dimensions and makes the opaque media tokens. Returns the presentation id."""
    task = connection.execute(_task, {"task": chosen.task_id}).one()
    clips = list(connection.execute(_clips, {"task": task.id}))
    rng = random.SystemRandom()
    rng.shuffle(clips)
    dimensions = asked_dimensions(store.guideline, task)
    rng.shuffle(dimensions)
    result = connection.execute(
        insert(t.presentation),
        {
            "token": secrets.token_urlsafe(18),
            "task_id": task.id,
            "account_id": account_id,
            "clip_order": [clip.clip_id for clip in clips],
            "dimension_order": dimensions,
            "guideline_version": store.guideline.version,
            "purpose": chosen.purpose,
            "repeat": chosen.repeat,
            "shown_ms": now,
        },
    )
    assert result.inserted_primary_key is not None
    presentation_id: int = result.inserted_primary_key[0]
    keys = [clip.shown_key for clip in clips] + [task.first_frame_key]
    connection.execute(
        insert(t.media),
        [
            {
                "token": secrets.token_urlsafe(18),
                "presentation_id": presentation_id,
                "position": position,
                "storage_key": key,
            }
            for position, key in enumerate(keys)
            if key is not None
        ],
    )
    return presentation_id


def asked_dimensions(guideline: Guideline, task: Row[Any]) -> list[str]:
    dimensions = list(guideline.dimensions(task.task_kind))
    if task.first_frame_key is None and "preservation" in dimensions:
        dimensions.remove("preservation")  # nothing to compare with
    return dimensions


def view(
    store: Store,
    connection: Connection,
    presentation_id: int,
    *,
    lease_seconds: float,
    show_opinions: bool = True,
) -> TaskView:
    """What an annotator's browser gets of a presentation."""
    which = {"presentation": presentation_id}
    row = connection.execute(_shown, which).one()
    media = connection.execute(_media, which)
    urls = {m.position: f"/media/{m.token}" for m in media}
    num_clips = len(row.clip_order)
    guideline = store.guideline_of(row.guideline_version)
    adjudicated = row.purpose == "adjudication" and show_opinions
    return TaskView(
        presentation=row.token,
        prompt=row.text,
        language=row.language,
        task_kind=row.task_kind,
        dimensions=tuple(row.dimension_order),
        questions={name: guideline.questions[name] for name in row.dimension_order},
        clips=tuple(ClipView(LETTERS[i], urls[i]) for i in range(num_clips)),
        first_frame_url=urls.get(num_clips),
        fps=row.shown_fps,
        num_frames=row.shown_frames,
        guideline_version=row.guideline_version,
        lease_seconds=lease_seconds,
        kind=row.kind,
        purpose="work" if row.purpose in SHOWN_AS_WORK else row.purpose,
        opinions=_opinions(connection, row) if adjudicated else {},
    )


_shown = (
    select(
        t.presentation,
        t.task.c.task_kind,
        t.task.c.kind,
        t.task.c.shown_fps,
        t.task.c.shown_frames,
        t.prompt.c.text,
        t.prompt.c.language,
    )
    .join(t.task, t.task.c.id == t.presentation.c.task_id)
    .join(t.prompt, t.prompt.c.prompt_id == t.task.c.prompt_id)
    .where(t.presentation.c.id == sa.bindparam("presentation"))
)
_media = select(t.media.c.token, t.media.c.position).where(
    t.media.c.presentation_id == sa.bindparam("presentation")
)
_owned = select(t.presentation).where(t.presentation.c.token == sa.bindparam("token"))
_task = select(t.task).where(t.task.c.id == sa.bindparam("task"))
_clips = select(t.task_clip).where(t.task_clip.c.task_id == sa.bindparam("task"))


def own_presentation(connection: Connection, account: Account, token: str) -> Row[Any]:
    """Raises NotFound unless it was shown to this annotator."""
    row = connection.execute(_owned, {"token": token}).first()
    if row is None or row.account_id != account.id:
        raise NotFound("no such presentation")
    return row


def _opinions(connection: Connection, shown: Row[Any]) -> dict[str, list[dict[str, Any]]]:
    """What the annotators of a task said, per dimension, in this showing's order of clips and in random order of people."""
    place = {clip_id: index for index, clip_id in enumerate(shown.clip_order)}
    judged = connection.execute(
        select(t.judgment.c.id, t.presentation.c.clip_order)
        .join(t.presentation, t.presentation.c.id == t.judgment.c.presentation_id)
        .where(t.judgment.c.task_id == shown.task_id, t.judgment.c.purpose == "work", is_latest())
    ).all()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in shown.dimension_order}
    for row in judged:
        for choice in choices_of(connection, row.id):
            best, worst = (
                None if slot is None else place[row.clip_order[slot]]
                for slot in (choice.best, choice.worst)
            )
            scores = None
            if choice.scores is not None:
                by_clip = dict(zip(row.clip_order, choice.scores, strict=True))
                scores = [by_clip[clip_id] for clip_id in shown.clip_order]
            said = {"status": choice.status, "best": best, "worst": worst, "scores": scores}
            found.setdefault(choice.dimension, []).append(said)
    for said_of in found.values():
        random.SystemRandom().shuffle(said_of)
    return found
