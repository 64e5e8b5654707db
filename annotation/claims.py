"""Handing out tasks and taking in verdicts: leases, overlap, idempotency. Each function is one short write transaction."""

from __future__ import annotations

import hashlib
import json
import math
import random
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row, delete, insert, select, update

from annotation import schema as t
from annotation.records import LETTERS, Choice, ClipView, TaskView, Verdict
from annotation.rules import check_choices
from annotation.store import Account, Store

SKIP_REASONS = ("broken_clip", "unclear_prompt", "offensive", "cannot_tell", "other")
SKIPS_TO_FLAG = 3
"""A task skipped by this many people is taken out of the queue and flagged."""
MAX_NOTE = 2000


class NotFound(Exception):
    """No such thing, or not yours: the two are not told apart."""


class Conflict(Exception):
    """It was already answered otherwise."""


class Refused(Exception):
    """The answer cannot be stored; `problems` says why, one sentence each."""

    def __init__(self, problems: list[str]):
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Receipt:
    """What the annotator gets back: proof that the judgment is on disk."""

    judgment_id: int
    submitted_ms: int
    surplus: bool
    """True if enough others had answered meanwhile; the judgment is kept but not counted."""


@dataclass(frozen=True)
class Progress:
    """How far one annotator is."""

    judged: int
    wanted: int
    """Tasks asked of this annotator: the number asked for, or all that are open to them."""
    seconds_per_task: float | None
    eta_seconds: float | None


def claim(store: Store, account: Account, *, lease_seconds: float) -> TaskView | None:
    """Leases the next task to an annotator; the task they already hold comes back unchanged. None when nothing is open.

    A task is open to someone who neither judged nor skipped it, as long as judgments plus other people's live leases
    stay below the number of judgments wanted. An expired lease simply no longer counts.
    """
    now = store.now_ms()
    expires = now + int(lease_seconds * 1000)
    with store.write() as connection:
        _lock(connection, t.account, account.id)  # two tabs of one person claim one after the other
        held = connection.execute(
            select(t.lease)
            .join(t.task, t.task.c.id == t.lease.c.task_id)
            .where(
                t.lease.c.account_id == account.id,
                t.lease.c.expires_ms > now,
                t.task.c.state == "open",
            )
            .limit(1)
        ).first()
        if held is not None:
            connection.execute(
                update(t.lease)
                .where(t.lease.c.task_id == held.task_id, t.lease.c.account_id == account.id)
                .values(expires_ms=expires)
            )
            return _view(store, connection, held.presentation_id, lease_seconds)
        task_id = _take_next(connection, account, now)
        if task_id is None:
            return None
        presentation_id = _present(store, connection, task_id, account, now)
        connection.execute(
            delete(t.lease).where(t.lease.c.task_id == task_id, t.lease.c.account_id == account.id)
        )
        connection.execute(
            insert(t.lease).values(
                task_id=task_id,
                account_id=account.id,
                presentation_id=presentation_id,
                expires_ms=expires,
            )
        )
        return _view(store, connection, presentation_id, lease_seconds)


def _take_next(connection: Connection, account: Account, now: int) -> int | None:
    """The next task that is open to an annotator, locked until the transaction ends."""
    me = {"me": account.id, "now": now}
    while True:
        task_id = connection.execute(_next_task, me).scalar_one_or_none()
        if task_id is None or connection.dialect.name == "sqlite":
            return task_id  # SQLite has one writer: nobody can have come between
        # PostgreSQL chose by a snapshot older than the row lock: leases that were committed in between show only now.
        if connection.execute(_still_open, {**me, "task": task_id}).first() is not None:
            return task_id


def _lock(connection: Connection, table: sa.Table, row_id: int) -> Row[Any]:
    """The row as it is now, to be changed by nobody else until the transaction ends."""
    query = select(table).where(table.c.id == row_id).with_for_update(key_share=True)
    return connection.execute(query).one()


def _open_tasks() -> sa.Select[tuple[int]]:
    """Tasks open to annotator `me` at time `now`."""
    me: sa.BindParameter[int] = sa.bindparam("me")
    now: sa.BindParameter[int] = sa.bindparam("now")
    others_leases = (
        select(sa.func.count())
        .select_from(t.lease)
        .where(
            t.lease.c.task_id == t.task.c.id,
            t.lease.c.expires_ms > now,
            t.lease.c.account_id != me,
        )
        .correlate(t.task)
        .scalar_subquery()
    )

    def mine(table: sa.Table) -> sa.Exists:
        return (
            select(table.c.id)
            .where(table.c.task_id == t.task.c.id, table.c.account_id == me)
            .correlate(t.task)
            .exists()
        )

    return select(t.task.c.id).where(
        t.task.c.state == "open",
        t.task.c.num_judgments + others_leases < t.task.c.need_n,
        ~mine(t.judgment),
        ~mine(t.skip),
    )


_next_task = (
    _open_tasks()
    .order_by(t.task.c.priority.desc(), t.task.c.id)
    .limit(1)
    .with_for_update(of=t.task, key_share=True, skip_locked=True)
)
_still_open = _open_tasks().where(t.task.c.id == sa.bindparam("task"))


def _present(store: Store, connection: Connection, task_id: int, account: Account, now: int) -> int:
    """Draws the order of clips and of dimensions and makes the opaque media tokens. Returns the presentation id."""
    task = connection.execute(select(t.task).where(t.task.c.id == task_id)).one()
    clips = list(connection.execute(select(t.task_clip).where(t.task_clip.c.task_id == task_id)))
    rng = random.SystemRandom()
    rng.shuffle(clips)
    dimensions = list(store.guideline.dimensions(task.task_kind))
    if task.first_frame_key is None and "preservation" in dimensions:
        dimensions.remove("preservation")  # nothing to compare with
    rng.shuffle(dimensions)
    result = connection.execute(
        insert(t.presentation).values(
            token=secrets.token_urlsafe(18),
            task_id=task_id,
            account_id=account.id,
            clip_order=[clip.clip_id for clip in clips],
            dimension_order=dimensions,
            guideline_version=store.guideline.version,
            shown_ms=now,
        )
    )
    assert result.inserted_primary_key is not None
    presentation_id = result.inserted_primary_key[0]
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


def _view(
    store: Store, connection: Connection, presentation_id: int, lease_seconds: float
) -> TaskView:
    row = connection.execute(
        select(
            t.presentation,
            t.task.c.task_kind,
            t.task.c.shown_fps,
            t.task.c.shown_frames,
            t.prompt.c.text,
            t.prompt.c.language,
        )
        .join(t.task, t.task.c.id == t.presentation.c.task_id)
        .join(t.prompt, t.prompt.c.prompt_id == t.task.c.prompt_id)
        .where(t.presentation.c.id == presentation_id)
    ).one()
    media = connection.execute(
        select(t.media.c.token, t.media.c.position).where(
            t.media.c.presentation_id == presentation_id
        )
    )
    urls = {m.position: f"/media/{m.token}" for m in media}
    num_clips = len(row.clip_order)
    return TaskView(
        presentation=row.token,
        prompt=row.text,
        language=row.language,
        task_kind=row.task_kind,
        dimensions=tuple(row.dimension_order),
        questions={name: store.guideline.questions[name] for name in row.dimension_order},
        clips=tuple(ClipView(LETTERS[i], urls[i]) for i in range(num_clips)),
        first_frame_url=urls.get(num_clips),
        fps=row.shown_fps,
        num_frames=row.shown_frames,
        guideline_version=row.guideline_version,
        lease_seconds=lease_seconds,
    )


def submit(
    store: Store, account: Account, presentation: str, key: str, verdict: Verdict
) -> Receipt:
    """Stores a verdict once. The same key and verdict again returns the first receipt.

    Raises: NotFound (not this annotator's presentation), Refused (the answers break a rule), Conflict (the key was used for
    another verdict, or the task was already judged by this annotator).
    """
    if not 8 <= len(key) <= 80:
        raise Refused(["the idempotency key has 8 to 80 characters"])
    payload = json.dumps([presentation, verdict.to_json()], sort_keys=True)
    payload_hash = hashlib.sha256(payload.encode()).hexdigest()
    with store.read() as connection:
        shown = _own_presentation(connection, account, presentation)
    problems = check_choices(
        verdict.choices, dimensions=shown.dimension_order, num_clips=len(shown.clip_order)
    )
    if len(verdict.note) > MAX_NOTE:
        problems.append(f"the note has {len(verdict.note)} characters; at most {MAX_NOTE}")
    if problems:
        raise Refused(problems)
    with store.write() as connection:
        task = _lock(connection, t.task, shown.task_id)
        earlier = connection.execute(
            select(t.judgment).where(
                sa.or_(
                    t.judgment.c.idempotency_key == key,
                    sa.and_(
                        t.judgment.c.task_id == shown.task_id,
                        t.judgment.c.account_id == account.id,
                    ),
                )
            )
        ).first()
        if earlier is not None:
            if earlier.idempotency_key != key:
                raise Conflict("you have already judged this task")
            if earlier.payload_hash != payload_hash or earlier.account_id != account.id:
                raise Conflict("this submission was already stored with other answers")
            return Receipt(earlier.id, earlier.submitted_ms, earlier.surplus)
        surplus = task.num_judgments >= task.need_n
        now = store.now_ms()
        result = connection.execute(
            insert(t.judgment).values(
                task_id=task.id,
                account_id=account.id,
                presentation_id=shown.id,
                idempotency_key=key,
                payload_hash=payload_hash,
                kind="best_worst",
                surplus=surplus,
                simulated=account.simulated,
                guideline_version=shown.guideline_version,
                seconds=verdict.seconds,
                watched_seconds=list(verdict.watched_seconds) or None,
                note=verdict.note,
                submitted_ms=now,
            )
        )
        assert result.inserted_primary_key is not None
        judgment_id = result.inserted_primary_key[0]
        position = {name: index for index, name in enumerate(shown.dimension_order)}
        connection.execute(
            insert(t.choice),
            [
                {
                    "judgment_id": judgment_id,
                    "position": position[c.dimension],
                    "admissible": c.status in ("ok", "tie"),
                    **asdict(c.with_first()),
                }
                for c in verdict.choices
            ],
        )
        if not surplus:
            count_judgment(connection, task)
        connection.execute(
            delete(t.lease).where(t.lease.c.task_id == task.id, t.lease.c.account_id == account.id)
        )
    return Receipt(judgment_id, now, surplus)


def count_judgment(connection: Connection, task: Row[Any]) -> None:
    """One more counted judgment; the task is done once it has as many as it wants."""
    number = task.num_judgments + 1
    connection.execute(
        update(t.task)
        .where(t.task.c.id == task.id)
        .values(num_judgments=number, state="done" if number >= task.need_n else task.state)
    )


def skip(store: Store, account: Account, presentation: str, reason: str, note: str = "") -> None:
    """Records that the annotator passes on a task, and why; after enough skips the task is flagged."""
    if reason not in SKIP_REASONS:
        raise Refused([f"reason {reason!r} is not one of {', '.join(SKIP_REASONS)}"])
    if len(note) > MAX_NOTE:
        raise Refused([f"the note has {len(note)} characters; at most {MAX_NOTE}"])
    with store.write() as connection:
        shown = _own_presentation(connection, account, presentation)
        _lock(connection, t.task, shown.task_id)
        again = select(t.skip.c.id).where(
            t.skip.c.task_id == shown.task_id, t.skip.c.account_id == account.id
        )
        if connection.execute(again).first() is None:
            connection.execute(
                insert(t.skip).values(
                    task_id=shown.task_id,
                    account_id=account.id,
                    presentation_id=shown.id,
                    reason=reason,
                    note=note,
                    created_ms=store.now_ms(),
                )
            )
        skips = connection.execute(
            select(sa.func.count()).select_from(t.skip).where(t.skip.c.task_id == shown.task_id)
        ).scalar_one()
        if skips >= SKIPS_TO_FLAG:
            connection.execute(
                update(t.task)
                .where(t.task.c.id == shown.task_id, t.task.c.state == "open")
                .values(state="flagged")
            )
        connection.execute(
            delete(t.lease).where(
                t.lease.c.task_id == shown.task_id, t.lease.c.account_id == account.id
            )
        )


def heartbeat(store: Store, account: Account, presentation: str, *, lease_seconds: float) -> bool:
    """Extends a live lease. False if it ran out and the task may have gone to someone else."""
    now = store.now_ms()
    with store.write() as connection:
        shown = _own_presentation(connection, account, presentation)
        result = connection.execute(
            update(t.lease)
            .where(
                t.lease.c.task_id == shown.task_id,
                t.lease.c.account_id == account.id,
                t.lease.c.expires_ms > now,
            )
            .values(expires_ms=now + int(lease_seconds * 1000))
        )
        return result.rowcount > 0


def media_key(store: Store, account: Account, token: str) -> str:
    """Where the file behind a media token lies. Raises NotFound unless it was shown to this annotator (or they administer)."""
    with store.read() as connection:
        row = connection.execute(
            select(t.media.c.storage_key, t.presentation.c.account_id)
            .join(t.presentation, t.presentation.c.id == t.media.c.presentation_id)
            .where(t.media.c.token == token)
        ).first()
    if row is None or (row.account_id != account.id and account.role != "admin"):
        raise NotFound("no such clip")
    return str(row.storage_key)


def progress(store: Store, account: Account, *, wanted: int | None) -> Progress:
    """Tasks judged and asked for, and the time left at this annotator's own pace (median of the last 20)."""
    mine = t.judgment.c.account_id == account.id
    with store.read() as connection:
        judged = connection.execute(
            select(sa.func.count()).select_from(t.judgment).where(mine)
        ).scalar_one()
        recent = connection.execute(
            select(t.judgment.c.seconds)
            .where(mine, t.judgment.c.seconds.is_not(None))
            .order_by(t.judgment.c.id.desc())
            .limit(20)
        ).scalars()
        seconds = sorted(recent)
        if wanted is None:
            done_by_me = select(t.judgment.c.task_id).where(mine)
            skipped = select(t.skip.c.task_id).where(t.skip.c.account_id == account.id)
            open_to_me = connection.execute(
                select(sa.func.count())
                .select_from(t.task)
                .where(
                    t.task.c.state == "open",
                    t.task.c.id.not_in(done_by_me),
                    t.task.c.id.not_in(skipped),
                )
            ).scalar_one()
            wanted = judged + open_to_me
    pace = seconds[len(seconds) // 2] if seconds else None
    left = max(0, wanted - judged)
    return Progress(judged, wanted, pace, None if pace is None else pace * left)


def parse_verdict(raw: Mapping[str, Any]) -> Verdict:
    """A verdict from decoded JSON. Raises Refused if it does not have the right shape."""
    try:
        choices = tuple(Choice(**choice) for choice in raw["choices"])
        seconds = raw.get("seconds")
        verdict = Verdict(
            choices=choices,
            note=str(raw.get("note") or ""),
            seconds=None if seconds is None else max(0.0, float(seconds)),
            watched_seconds=tuple(float(s) for s in raw.get("watched_seconds") or ()),
        )
        if not all(math.isfinite(s) for s in (verdict.seconds or 0.0, *verdict.watched_seconds)):
            raise ValueError("seconds must be finite")
    except (TypeError, KeyError, ValueError) as error:
        raise Refused([f"the answer has the wrong shape: {error}"]) from error
    for choice in verdict.choices:
        indices = (choice.best, choice.worst, choice.first_best, choice.first_worst)
        if not all(i is None or (isinstance(i, int) and not isinstance(i, bool)) for i in indices):
            raise Refused(["best and worst are whole numbers, counted from 0, or null"])
        if not isinstance(choice.constrained, bool) or not isinstance(choice.dimension, str):
            raise Refused(["a choice has a dimension (text) and `constrained` (true or false)"])
    return verdict


def _own_presentation(connection: Connection, account: Account, token: str) -> Row[Any]:
    row = connection.execute(select(t.presentation).where(t.presentation.c.token == token)).first()
    if row is None or row.account_id != account.id:
        raise NotFound("no such presentation")
    return row
