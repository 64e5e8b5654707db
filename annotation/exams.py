"""Tasks whose answers are known: practice with feedback, the entry exam, and hidden gold tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from pydantic import Field, PositiveInt
from sqlalchemy import Connection, insert, select

from annotation import schema as t
from annotation.history import choices_of, is_latest
from annotation.known import Graded, grade
from annotation.store import Store
from reelhf.config import Config


class ExamConfig(Config):
    """What it takes to be let in."""

    threshold: float = Field(default=0.7, ge=0, le=1)
    """Fraction of the answers that must be right."""
    attempts: PositiveInt = 3
    """Tries; after the last failed one an annotator gets no more tasks."""


@dataclass(frozen=True)
class ExamState:
    """How far one annotator is with the entry exam."""

    required: bool
    """The project has exam tasks."""
    passed: bool
    attempts: int
    """Finished ones."""
    failed: bool
    """No try is left."""


@dataclass(frozen=True)
class ExamResult:
    """One finished attempt."""

    passed: bool
    correct: int
    asked: int
    threshold: float
    attempts_left: int


def next_exam_task(connection: Connection, account_id: int, attempt: int) -> int | None:
    """The first exam task an annotator has not answered in this attempt."""
    asks = {"me": account_id, "attempt": attempt}
    return connection.execute(_next_exam, asks).scalar_one_or_none()


def first_unanswered(purpose: str, attempt: int | sa.BindParameter[int]) -> sa.Select[int]:
    """The first task of a purpose that annotator `me` has not answered in that attempt."""
    return (
        select(t.task.c.id)
        .where(
            t.task.c.purpose == t.word(purpose),
            t.task.c.state == t.word("open"),
            ~select(t.judgment.c.id)
            .where(
                t.judgment.c.task_id == t.task.c.id,
                t.judgment.c.account_id == sa.bindparam("me"),
                t.judgment.c.repeat == attempt,
            )
            .correlate(t.task)
            .exists(),
        )
        .order_by(t.task.c.priority.desc(), t.task.c.id)
        .limit(1)
    )


_next_exam = first_unanswered("exam", sa.bindparam("attempt"))


def exam_state(
    connection: Connection, account_id: int, config: ExamConfig, *, required: bool | None = None
) -> ExamState:
    """How far one annotator is.

    Args:
        required: whether the project has exam tasks, if that was asked already.
    """
    if required is None:
        required = connection.execute(select(exam_required())).scalar_one()
    if not required:
        return ExamState(False, True, 0, False)
    passed = list(
        connection.execute(
            select(t.exam.c.passed).where(t.exam.c.account_id == account_id)
        ).scalars()
    )
    done = any(passed)
    return ExamState(True, done, len(passed), not done and len(passed) >= config.attempts)


def exam_required() -> sa.ColumnElement[bool]:
    """Condition: the project has exam tasks."""
    asked = (t.task.c.purpose == t.word("exam"), t.task.c.state == t.word("open"))
    return select(t.task.c.id).where(*asked).exists()


def finish_exam(
    connection: Connection,
    account_id: int,
    attempt: int,
    config: ExamConfig,
    *,
    guideline_version: str,
    now: int,
) -> ExamResult | None:
    """Stores and returns the result once every exam task of an attempt is answered."""
    if next_exam_task(connection, account_id, attempt) is not None:
        return None
    graded = [
        one
        for _, answers in graded_answers(
            connection,
            t.judgment.c.purpose == "exam",
            t.judgment.c.account_id == account_id,
            t.judgment.c.repeat == attempt,
        )
        for one in answers
    ]
    correct, asked = sum(one.correct for one in graded), len(graded)
    passed = correct >= config.threshold * asked
    connection.execute(
        insert(t.exam).values(
            account_id=account_id,
            attempt=attempt,
            correct=correct,
            asked=asked,
            passed=passed,
            guideline_version=guideline_version,
            created_ms=now,
        )
    )
    left = 0 if passed else config.attempts - attempt - 1
    return ExamResult(passed, correct, asked, config.threshold, left)


def graded_answers(
    connection: Connection, *where: sa.ColumnElement[bool]
) -> Iterator[tuple[Any, list[Graded]]]:
    """(judgment row, graded answers) of the judgments of tasks with known answers; the latest revision of each."""
    rows = connection.execute(
        select(t.judgment, t.task.c.answers, t.presentation.c.clip_order, t.account.c.pseudonym)
        .join(t.task, t.task.c.id == t.judgment.c.task_id)
        .join(t.presentation, t.presentation.c.id == t.judgment.c.presentation_id)
        .join(t.account, t.account.c.id == t.judgment.c.account_id)
        .where(t.task.c.answers.is_not(None), is_latest(), *where)
        .order_by(t.judgment.c.id)
    ).all()
    for row in rows:
        yield row, grade(row.answers, choices_of(connection, row.id), row.clip_order)


def gold_answers(store: Store) -> dict[str, list[bool]]:
    """Pseudonym -> whether each answer to a hidden gold task was right, in the order given."""
    found: dict[str, list[bool]] = {}
    with store.read() as connection:
        for row, graded in graded_answers(connection, t.judgment.c.purpose == "gold"):
            found.setdefault(row.pseudonym, []).extend(one.correct for one in graded)
    return found
