"""Who gets which task next. Everything is decided inside the transaction that claims.

In this order: practice and the entry exam, where a project has them; then nothing once a limit is reached; conflicts, for an
expert; now and then a hidden gold task or a re-test; else the open task of the highest priority.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from pydantic import Field, NonNegativeFloat, PositiveInt
from sqlalchemy import Connection, Row, select

from annotation import schema as t
from annotation.exams import (
    ExamConfig,
    exam_required,
    exam_state,
    first_unanswered,
    next_exam_task,
)
from reelhf.config import Config

DAY_MS = 86_400_000
COUNTED = ("work", "gold", "retest", "adjudication")
"""Purposes whose judgments count as an annotator's work; practice and exams do not."""


class RoutingConfig(Config):
    """Who gets which task."""

    gold_rate: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the claims answered with a hidden task whose answer is known, while the annotator has one left."""
    retest_rate: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the claims answered with a task the annotator judged before, in a new order of clips."""
    retest_after_hours: NonNegativeFloat = 24.0
    """A re-test comes this long after the first judgment."""
    max_per_day: PositiveInt | None = None
    """Judgments one annotator may give per day (UTC)."""
    max_total: PositiveInt | None = None
    """Judgments one annotator may give in all."""
    adjudicate: bool = False
    """Finished tasks whose annotators contradict each other wait for an expert."""
    show_opinions: bool = True
    """The expert sees what the annotators said, without names."""
    exam: ExamConfig = ExamConfig()
    """The entry exam, in projects that have exam tasks."""


@dataclass(frozen=True)
class Assignment:
    """One task for one annotator, and why."""

    task_id: int
    purpose: str
    """`work`, `gold`, `practice`, `exam`, `retest` or `adjudication`."""
    repeat: int = 0
    """1 for a re-test; the number of the attempt in an exam."""
    material: Sequence[Row[Any]] = ()
    """What `MATERIAL` says of the task, if it was read on the way."""


_me: sa.BindParameter[int] = sa.bindparam("me")
_expert: sa.BindParameter[bool] = sa.bindparam("expert", type_=sa.Boolean())
_admin: sa.BindParameter[bool] = sa.bindparam("admin", type_=sa.Boolean())
_now: sa.BindParameter[int] = sa.bindparam("now")


def standing(connection: Connection, account_id: int, now: int) -> Row[Any]:
    """What decides first, in one statement: `held`, a showing whose lease is alive; `practice`, a task; `exam_required`."""
    return connection.execute(_standing, {"me": account_id, "now": now}).one()


def next_assignment(
    connection: Connection, me: Row[Any], config: RoutingConfig, now: int, stand: Row[Any]
) -> Assignment | None:
    """What an annotator gets next, its task locked until the transaction ends; None if `why_nothing` has a reason.

    Args:
        me: the annotator's account row, locked.
        stand: their `standing`, read under that lock.
    """
    if stand.practice is not None:
        return Assignment(stand.practice, "practice")
    exam = exam_state(connection, me.id, config.exam, required=stand.exam_required)
    if exam.required and not exam.passed:
        if exam.failed:
            return None
        task_id = next_exam_task(connection, me.id, exam.attempts)
        return None if task_id is None else Assignment(task_id, "exam", exam.attempts)
    if limit_reached(connection, me.id, config, now):
        return None
    if me.expert:
        task_id = connection.execute(_conflict, {"me": me.id, "now": now}).scalar_one_or_none()
        if task_id is not None:
            return Assignment(task_id, "adjudication")
    work = _take_work(connection, me, now)
    if work is None:
        return None  # gold and re-tests hide among real work
    return _hidden(connection, me, config, now) or work


def why_nothing(connection: Connection, account_id: int, config: RoutingConfig, now: int) -> str:
    """Why a claim gave nothing: `exam_failed`, `daily_limit`, `total_limit` or `empty`."""
    if exam_state(connection, account_id, config.exam).failed:
        return "exam_failed"
    return limit_reached(connection, account_id, config, now) or "empty"


def limit_reached(
    connection: Connection, account_id: int, config: RoutingConfig, now: int
) -> str | None:
    """`daily_limit` or `total_limit`, if an annotator has given as many judgments as they may."""
    limits = (
        ("total_limit", config.max_total, 0),
        ("daily_limit", config.max_per_day, now - now % DAY_MS),
    )
    for name, limit, since in limits:
        if limit is None:
            continue
        given = connection.execute(
            select(sa.func.count())
            .select_from(t.judgment)
            .where(
                t.judgment.c.account_id == account_id,
                t.judgment.c.revision == 0,
                t.judgment.c.purpose.in_(COUNTED),
                t.judgment.c.submitted_ms >= since,
            )
        ).scalar_one()
        if given >= limit:
            return name
    return None


def _hidden(
    connection: Connection, me: Row[Any], config: RoutingConfig, now: int
) -> Assignment | None:
    """By chance, a gold task or a re-test."""
    draw = random.SystemRandom().random()
    if draw < config.gold_rate:
        asks = {"me": me.id, "expert": me.expert, "admin": me.role == "admin"}
        task_id = connection.execute(_gold, asks).scalar_one_or_none()
        return None if task_id is None else Assignment(task_id, "gold")
    if draw < config.gold_rate + config.retest_rate:
        before = now - int(config.retest_after_hours * 3_600_000)
        task_id = connection.execute(_retest, {"me": me.id, "now": before}).scalar_one_or_none()
        return None if task_id is None else Assignment(task_id, "retest", 1)
    return None


def _take_work(connection: Connection, me: Row[Any], now: int) -> Assignment | None:
    """The next task that is open to an annotator, locked until the transaction ends."""
    asks = {"me": me.id, "expert": me.expert, "admin": me.role == "admin", "now": now}
    while True:
        task_id: int | None = connection.execute(_next_task, asks).scalars().first()
        if task_id is None:
            return None
        # PostgreSQL chose by a snapshot older than the row lock: leases that were committed in between show only now.
        material = connection.execute(_still_open, {**asks, "task": task_id}).all()
        if material:
            return Assignment(task_id, "work", material=material)


def _mine(table: sa.Table, *where: sa.ColumnElement[bool]) -> sa.Exists:
    return (
        select(table.c.id)
        .where(table.c.task_id == t.task.c.id, table.c.account_id == _me, *where)
        .correlate(t.task)
        .exists()
    )


def _untouched() -> list[sa.ColumnElement[bool]]:
    """Neither judged, skipped nor flagged by annotator `me`."""
    return [~_mine(t.judgment), ~_mine(t.skip), ~_mine(t.flag)]


def _others_leases() -> sa.ScalarSelect[int]:
    return (
        select(sa.func.count())
        .select_from(t.lease)
        .where(
            t.lease.c.task_id == t.task.c.id,
            t.lease.c.expires_ms > _now,
            t.lease.c.account_id != _me,
        )
        .correlate(t.task)
        .scalar_subquery()
    )


def _allowed() -> sa.ColumnElement[bool]:
    """Tasks for experts go to experts; those of a project with members go to its members."""
    members = (
        select(t.project_member.c.account_id)
        .where(t.project_member.c.project_id == t.task.c.project_id)
        .correlate(t.task)
    )
    member = sa.or_(
        _admin, ~members.exists(), members.where(t.project_member.c.account_id == _me).exists()
    )
    return sa.and_(sa.or_(~t.task.c.experts_only, _expert), member)


OPEN_TO_ME = (
    t.task.c.state == t.word("open"),
    t.task.c.purpose == t.word("work"),
    _allowed(),
    *_untouched(),
)
"""Conditions of the tasks that annotator `me` (`expert`, `admin`) could still be given, whoever else holds them now."""


def _open_now() -> tuple[sa.ColumnElement[bool], ...]:
    """Tasks open to annotator `me` at time `now`: judgments and other people's live leases leave a place."""
    return *OPEN_TO_ME, t.task.c.num_judgments + _others_leases() < t.task.c.need_n


_next_task = (
    select(t.task.c.id)
    .where(*_open_now())
    .order_by(t.task.c.priority.desc(), t.task.c.id)
    .limit(1)
    .with_for_update(of=t.task, key_share=True, skip_locked=True)
)
MATERIAL = (  # of a task, all that a showing needs: one row per clip
    select(
        t.task.c.id.label("task_id"),
        t.task.c.task_kind,
        t.task.c.kind,
        t.task.c.first_frame_key,
        t.task.c.shown_fps,
        t.task.c.shown_frames,
        t.prompt.c.text,
        t.prompt.c.language,
        t.task_clip.c.clip_id,
        t.task_clip.c.shown_key,
        t.project.c.guideline_version.label("project_guideline"),
    )
    .join(t.prompt, t.prompt.c.prompt_id == t.task.c.prompt_id)
    .join(t.project, t.project.c.id == t.task.c.project_id)
    .join(t.task_clip, t.task_clip.c.task_id == t.task.c.id)
    .where(t.task.c.id == sa.bindparam("task"))
    .order_by(t.task_clip.c.slot)
)
_still_open = MATERIAL.where(*_open_now())

_state_when_held = sa.case(
    (t.presentation.c.purpose == t.word("retest"), t.word("done")),
    (t.presentation.c.purpose == t.word("adjudication"), t.word("conflict")),
    else_=t.word("open"),
)
_standing = select(
    select(t.lease.c.presentation_id)
    .join(t.task, t.task.c.id == t.lease.c.task_id)
    .join(t.presentation, t.presentation.c.id == t.lease.c.presentation_id)
    .where(
        t.lease.c.account_id == _me,
        t.lease.c.expires_ms > _now,
        t.task.c.state == _state_when_held,
    )
    .limit(1)
    .scalar_subquery()
    .label("held"),
    first_unanswered("practice", 0).scalar_subquery().label("practice"),
    exam_required().label("exam_required"),
)

_times_shown = (
    select(sa.func.count())
    .select_from(t.judgment)
    .where(t.judgment.c.task_id == t.task.c.id)
    .correlate(t.task)
    .scalar_subquery()
)
_gold = (  # rotated: the one that was answered least often comes first
    select(t.task.c.id)
    .where(t.task.c.purpose == "gold", t.task.c.state == "open", _allowed(), *_untouched())
    .order_by(_times_shown, sa.func.random())
    .limit(1)
)
_retest = (
    select(t.task.c.id)
    .join(t.judgment, t.judgment.c.task_id == t.task.c.id)
    .where(
        t.judgment.c.account_id == _me,
        t.judgment.c.purpose == "work",
        t.judgment.c.revision == 0,
        t.judgment.c.submitted_ms <= _now,
        t.task.c.state == "done",
        ~_mine(t.skip),
        ~_mine(t.flag),
    )
    .where(
        ~select(sa.literal(1))
        .select_from(t.task_clip)
        .join(t.clip, t.clip.c.id == t.task_clip.c.clip_id)
        .where(t.task_clip.c.task_id == t.task.c.id, t.clip.c.purged_ms.is_not(None))
        .correlate(t.task)
        .exists(),
        ~select(sa.literal(1))
        .select_from(t.presentation)
        .where(
            t.presentation.c.task_id == t.task.c.id,
            t.presentation.c.account_id == _me,
            t.presentation.c.purpose == "retest",
        )
        .correlate(t.task)
        .exists(),
    )
    .order_by(t.judgment.c.submitted_ms)
    .limit(1)
)
_conflict = (
    select(t.task.c.id)
    .where(t.task.c.state == "conflict", _others_leases() == 0, *_untouched())
    .order_by(t.task.c.priority.desc(), t.task.c.id)
    .limit(1)
    .with_for_update(of=t.task, key_share=True, skip_locked=True)
)
