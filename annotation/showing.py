"""One showing of a task to one annotator: orders drawn at random, opaque media tokens, and what is sent of it."""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row, insert, select

from annotation import schema as t
from annotation.accounts import Account
from annotation.database import DIALECTS
from annotation.history import choices_of, is_latest
from annotation.records import LETTERS, ClipView, Guideline, TaskView
from annotation.refusals import NotFound
from annotation.routing import MATERIAL, Assignment
from annotation.store import Store

SHOWN_AS_WORK = ("gold", "retest")
"""An annotator must not know these from real work."""


@dataclass(frozen=True)
class Drawn:
    """One showing as it is written and seen."""

    row: Mapping[str, Any]
    """Of `presentation`."""
    media: Sequence[Mapping[str, Any]]
    material: Mapping[str, Any]


def draw(
    store: Store, connection: Connection, chosen: Assignment, account_id: int, now: int
) -> Drawn:
    """Draws the order of clips and of dimensions and makes the opaque media tokens."""
    clips = list(chosen.material) or list(connection.execute(MATERIAL, {"task": chosen.task_id}))
    material = clips[0]._mapping
    rng = random.SystemRandom()
    rng.shuffle(clips)
    guideline = store.guideline_of(material["project_guideline"])
    dimensions = asked_dimensions(guideline, material)
    rng.shuffle(dimensions)
    keys = [clip.shown_key for clip in clips] + [material["first_frame_key"]]
    row = {
        "token": secrets.token_urlsafe(18),
        "task_id": chosen.task_id,
        "account_id": account_id,
        "clip_order": [clip.clip_id for clip in clips],
        "dimension_order": dimensions,
        "guideline_version": guideline.version,
        "purpose": chosen.purpose,
        "repeat": chosen.repeat,
        "shown_ms": now,
    }
    media = [
        {"token": secrets.token_urlsafe(18), "position": position, "storage_key": key}
        for position, key in enumerate(keys)
        if key is not None
    ]
    return Drawn(row, media, material)


def keep(store: Store, connection: Connection, drawn: Drawn, *, expires: int) -> None:
    """Writes a showing, its media tokens and its lease, which replaces one that ran out."""
    showing = drawn.row["token"]
    lease = {"task": drawn.row["task_id"], "account": drawn.row["account_id"]}
    with store.database.together(connection):
        connection.execute(_insert_presentation, drawn.row)
        connection.execute(_insert_media, [{**one, "showing": showing} for one in drawn.media])
        connection.execute(
            _lease[connection.dialect.name], {**lease, "showing": showing, "expires": expires}
        )


def asked_dimensions(guideline: Guideline, task: Mapping[str, Any]) -> list[str]:
    dimensions = list(guideline.dimensions(task["task_kind"]))
    if task["first_frame_key"] is None and "preservation" in dimensions:
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
    row = connection.execute(_shown, which).one()._mapping
    media = [m._mapping for m in connection.execute(_media, which)]
    drawn = Drawn(row, media, row)
    return seen(store, connection, drawn, lease_seconds=lease_seconds, show_opinions=show_opinions)


def seen(
    store: Store,
    connection: Connection,
    drawn: Drawn,
    *,
    lease_seconds: float,
    show_opinions: bool = True,
) -> TaskView:
    """The same, of a presentation at hand."""
    row, material = drawn.row, drawn.material
    urls = {m["position"]: f"/media/{m['token']}" for m in drawn.media}
    num_clips = len(row["clip_order"])
    guideline = store.guideline_of(row["guideline_version"])
    adjudicated = row["purpose"] == "adjudication" and show_opinions
    return TaskView(
        presentation=row["token"],
        prompt=material["text"],
        language=material["language"],
        task_kind=material["task_kind"],
        dimensions=tuple(row["dimension_order"]),
        questions={name: guideline.questions[name] for name in row["dimension_order"]},
        clips=tuple(ClipView(LETTERS[i], urls[i]) for i in range(num_clips)),
        first_frame_url=urls.get(num_clips),
        fps=material["shown_fps"],
        num_frames=material["shown_frames"],
        guideline_version=row["guideline_version"],
        lease_seconds=lease_seconds,
        kind=material["kind"],
        purpose="work" if row["purpose"] in SHOWN_AS_WORK else row["purpose"],
        opinions=_opinions(connection, row) if adjudicated else {},
        draft=row.get("draft"),
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
        t.draft.c.body.label("draft"),
    )
    .join(t.task, t.task.c.id == t.presentation.c.task_id)
    .join(t.prompt, t.prompt.c.prompt_id == t.task.c.prompt_id)
    .outerjoin(t.draft, t.draft.c.presentation_id == t.presentation.c.id)
    .where(t.presentation.c.id == sa.bindparam("presentation"))
)
_media = select(t.media.c.token, t.media.c.position).where(
    t.media.c.presentation_id == sa.bindparam("presentation")
)
_insert_presentation = insert(t.presentation).inline()
_this_showing = (
    select(t.presentation.c.id)
    .where(t.presentation.c.token == sa.bindparam("showing"))
    .scalar_subquery()
)
_insert_media = insert(t.media).values(
    token=sa.bindparam("token"),
    presentation_id=_this_showing,
    position=sa.bindparam("position"),
    storage_key=sa.bindparam("storage_key"),
)
_owned = select(t.presentation).where(t.presentation.c.token == sa.bindparam("token"))


def _lease_upsert(dialect: Any) -> sa.Insert:
    """The lease on a showing; an annotator has one per task."""
    added = dialect.insert(t.lease).values(
        task_id=sa.bindparam("task"),
        account_id=sa.bindparam("account"),
        presentation_id=_this_showing,
        expires_ms=sa.bindparam("expires"),
    )
    upsert: sa.Insert = added.on_conflict_do_update(
        index_elements=[t.lease.c.task_id, t.lease.c.account_id],
        set_={
            "presentation_id": added.excluded.presentation_id,
            "expires_ms": added.excluded.expires_ms,
        },
    )
    return upsert


_lease = {name: _lease_upsert(dialect) for name, dialect in DIALECTS.items()}


def own_presentation(connection: Connection, account: Account, token: str) -> Row[Any]:
    """Raises NotFound unless it was shown to this annotator."""
    row = connection.execute(_owned, {"token": token}).first()
    if row is None or row.account_id != account.id:
        raise NotFound("no such presentation")
    return row


def _opinions(connection: Connection, shown: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What the annotators of a task said, per dimension, in this showing's order of clips and in random order of people."""
    place = {clip_id: index for index, clip_id in enumerate(shown["clip_order"])}
    judged = connection.execute(
        select(t.judgment.c.id, t.presentation.c.clip_order)
        .join(t.presentation, t.presentation.c.id == t.judgment.c.presentation_id)
        .where(
            t.judgment.c.task_id == shown["task_id"], t.judgment.c.purpose == "work", is_latest()
        )
    ).all()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in shown["dimension_order"]}
    for row in judged:
        for choice in choices_of(connection, row.id):
            best, worst = (
                None if slot is None else place[row.clip_order[slot]]
                for slot in (choice.best, choice.worst)
            )
            scores = None
            if choice.scores is not None:
                by_clip = dict(zip(row.clip_order, choice.scores, strict=True))
                scores = [by_clip[clip_id] for clip_id in shown["clip_order"]]
            said = {"status": choice.status, "best": best, "worst": worst, "scores": scores}
            found.setdefault(choice.dimension, []).append(said)
    for said_of in found.values():
        random.SystemRandom().shuffle(said_of)
    return found
