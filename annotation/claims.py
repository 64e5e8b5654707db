"""Handing out tasks and taking in verdicts: leases, overlap, idempotency, revisions. Each is one short write transaction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row, delete, insert, select, update

from annotation import schema as t
from annotation.accounts import Account
from annotation.drafts import drop_draft
from annotation.exams import ExamResult, Graded, finish_exam, grade
from annotation.flags import FLAGS_TO_HOLD, hold_if_reported
from annotation.history import choices_of, is_latest, last_judged
from annotation.records import TaskView, Verdict
from annotation.refusals import Conflict, NotFound, Refused
from annotation.routing import (
    COUNTED,
    OPEN_TO_ME,
    RoutingConfig,
    next_assignment,
    standing,
    why_nothing,
)
from annotation.rules import check_answers, settle
from annotation.showing import draw, keep, own_presentation, seen, view
from annotation.store import Store
from annotation.verdicts import check_note
from annotation.watching import unwatched

SKIP_REASONS = ("broken_clip", "unclear_prompt", "offensive", "cannot_tell", "other")
FLAG_KINDS = tuple(FLAGS_TO_HOLD)


@dataclass(frozen=True)
class Receipt:
    """What the annotator gets back: proof that the judgment is on disk."""

    judgment_id: int
    submitted_ms: int
    surplus: bool
    """True if enough others had answered meanwhile; the judgment is kept but not counted."""
    revision: int = 0
    feedback: tuple[Graded, ...] = ()
    """Of a practice task: each answer against the known one."""
    exam: ExamResult | None = None
    """After the last task of an entry exam."""


@dataclass(frozen=True)
class Reopened:
    """Something judged before, as it was shown and answered."""

    task: TaskView
    judgment_id: int
    """The revision that a new one would replace."""
    root: int
    """Names the judgment through all its revisions; ask for what comes before it to go further back."""
    verdict: Verdict


@dataclass(frozen=True)
class Progress:
    """How far one annotator is."""

    judged: int
    wanted: int
    """Tasks asked of this annotator: the number asked for, or all that are open to them."""
    seconds_per_task: float | None
    eta_seconds: float | None


def claim(
    store: Store, account: Account, *, lease_seconds: float, routing: RoutingConfig | None = None
) -> TaskView | None:
    """Leases the next task to an annotator; the task they already hold comes back unchanged. None when nothing is open.

    A task is open to someone who neither judged, skipped nor flagged it, as long as judgments plus other people's live leases
    stay below the number of judgments wanted. An expired lease simply no longer counts. `routing` says what else is mixed in.
    """
    routing = routing or RoutingConfig()
    now = store.now_ms()
    with store.write() as connection:
        me = _lock(connection, t.account, account.id)  # two tabs claim one after the other
        stand = standing(connection, account.id, now)
        expires = now + int(lease_seconds * 1000)
        if stand.held is not None:
            held = {"showing": stand.held, "me": account.id, "until": expires}
            connection.execute(_held_longer, held)
            return view(
                store,
                connection,
                stand.held,
                lease_seconds=lease_seconds,
                show_opinions=routing.show_opinions,
            )
        chosen = next_assignment(connection, me, routing, now, stand)
        if chosen is None:
            return None
        drawn = draw(store, connection, chosen, account.id, now)
        keep(store, connection, drawn, expires=expires)
        return seen(
            store,
            connection,
            drawn,
            lease_seconds=lease_seconds,
            show_opinions=routing.show_opinions,
        )


def reason_for_nothing(store: Store, account: Account, routing: RoutingConfig) -> str:
    """Why `claim` gave nothing: `exam_failed`, `daily_limit`, `total_limit` or `empty`."""
    with store.read() as connection:
        return why_nothing(connection, account.id, routing, store.now_ms())


# Statements of the hot path are built once: putting one together costs as much as running it.
_locked = {
    table: select(table).where(table.c.id == sa.bindparam("row_id")).with_for_update(key_share=True)
    for table in (t.account, t.task)
}


def _lock(connection: Connection, table: sa.Table, row_id: int) -> Row[Any]:
    """The row as it is now, to be changed by nobody else until the transaction ends."""
    return connection.execute(_locked[table], {"row_id": row_id}).one()


def _end_lease(connection: Connection, task_id: int, account_id: int) -> None:
    connection.execute(_ended, {"of_task": task_id, "of_account": account_id})


_ended = delete(t.lease).where(
    t.lease.c.task_id == sa.bindparam("of_task"),
    t.lease.c.account_id == sa.bindparam("of_account"),
)
_held_longer = (
    update(t.lease)
    .where(
        t.lease.c.account_id == sa.bindparam("me"),
        t.lease.c.presentation_id == sa.bindparam("showing"),
    )
    .values(expires_ms=sa.bindparam("until"))
)


def submit(
    store: Store,
    account: Account,
    presentation: str,
    key: str,
    verdict: Verdict,
    *,
    revises: int | None = None,
    routing: RoutingConfig | None = None,
    must_watch: float = 0.0,
) -> Receipt:
    """Stores a verdict once. The same key and verdict again returns the first receipt.

    Args:
        revises: the id of the judgment this one replaces; the older one stays on record.
        must_watch: fraction of each clip that a person must have watched; what is judged anew was watched before.
    Raises: NotFound (not this annotator's presentation), Refused (the answers break a rule), Conflict (the key was used for
    another verdict, the task was already judged by this annotator, or the judgment was revised meanwhile).
    """
    routing = routing or RoutingConfig()
    if not 8 <= len(key) <= 80:
        raise Refused(["the idempotency key has 8 to 80 characters"])
    said = [presentation, verdict.to_json(), *([] if revises is None else [revises])]
    payload_hash = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    with store.write() as connection:
        shown = connection.execute(
            _showing_locked, {"token": presentation, "me": account.id}
        ).first()
        if shown is None:
            raise NotFound("no such presentation")
        problems = check_answers(
            shown.kind,
            verdict.choices,
            dimensions=shown.dimension_order,
            num_clips=len(shown.clip_order),
        )
        problems += check_note(verdict.note)
        if problems:
            raise Refused(problems)
        stored, earlier = _said_before(connection, key, shown)
        if stored is not None:
            if stored.payload_hash != payload_hash or stored.account_id != account.id:
                raise Conflict("this submission was already stored with other answers")
            return _receipt(stored, shown, verdict)
        replaced = _replaced(earlier, shown, revises)
        now = store.now_ms()
        if must_watch and replaced is None and not account.simulated:
            _require_watched(shown, verdict, must_watch, now)
        judgment = _judgment_row(account, shown, verdict, replaced)
        judgment |= {"idempotency_key": key, "payload_hash": payload_hash, "submitted_ms": now}
        row = connection.execute(_insert_judgment, judgment).one()
        with store.database.together(connection):
            connection.execute(insert(t.choice), _choices(row.id, shown, verdict))
            if replaced is None and not row.surplus and shown.purpose == "work":
                _count_judgment(connection, shown)
            _end_lease(connection, shown.task_id, account.id)
            drop_draft(connection, shown.id)
        _settle_conflict(connection, shown, adjudicate=routing.adjudicate)
        exam = None
        if shown.purpose == "exam":
            exam = finish_exam(
                connection,
                account.id,
                shown.repeat,
                routing.exam,
                guideline_version=shown.guideline_version,
                now=row.submitted_ms,
            )
        return _receipt(row, shown, verdict, exam)


def _judgment_row(
    account: Account, shown: Row[Any], verdict: Verdict, replaced: Row[Any] | None
) -> dict[str, Any]:
    """What is stored of a verdict, but for its key and its time; `replaced` is the judgment that it revises."""
    return {
        "task_id": shown.task_id,
        "account_id": account.id,
        "presentation_id": shown.id,
        "kind": shown.kind,
        "purpose": shown.purpose,
        "repeat": shown.repeat,
        "revision": 0 if replaced is None else replaced.revision + 1,
        "supersedes": None if replaced is None else replaced.id,
        "surplus": _is_surplus(shown) if replaced is None else replaced.surplus,
        "simulated": account.simulated,
        "guideline_version": shown.guideline_version,
        "language": verdict.language,
        "seconds": verdict.seconds,
        "watched_seconds": list(verdict.watched_seconds) or None,
        "note": verdict.note,
    }


_showing_locked = (
    select(
        t.presentation,
        t.task.c.kind,
        t.task.c.state,
        t.task.c.need_n,
        t.task.c.num_judgments,
        t.task.c.answers,
        t.task.c.shown_fps,
        t.task.c.shown_frames,
    )
    .join(t.task, t.task.c.id == t.presentation.c.task_id)
    .where(
        t.presentation.c.token == sa.bindparam("token"),
        t.presentation.c.account_id == sa.bindparam("me"),
    )
    .with_for_update(of=t.task, key_share=True)
)
"""One showing and its task as it is now, to be changed by nobody else until the transaction ends."""
_counted = (
    update(t.task)
    .where(t.task.c.id == sa.bindparam("task"))
    .values(num_judgments=sa.bindparam("number"), state=sa.bindparam("new_state"))
)
_of_judgment = (
    t.judgment.c.id,
    t.judgment.c.account_id,
    t.judgment.c.presentation_id,
    t.judgment.c.payload_hash,
    t.judgment.c.revision,
    t.judgment.c.surplus,
    t.judgment.c.submitted_ms,
)
_insert_judgment = insert(t.judgment).returning(*_of_judgment)
_before = sa.union_all(
    select(sa.true().label("same_key"), *_of_judgment).where(
        t.judgment.c.idempotency_key == sa.bindparam("key")
    ),
    select(sa.false().label("same_key"), *_of_judgment).where(
        t.judgment.c.task_id == sa.bindparam("task"),
        t.judgment.c.account_id == sa.bindparam("me"),
        t.judgment.c.repeat == sa.bindparam("repeat"),
        is_latest(),
    ),
)


def _said_before(
    connection: Connection, key: str, shown: Row[Any]
) -> tuple[Row[Any] | None, Row[Any] | None]:
    """The judgment stored under that key, and the annotator's latest one of the task."""
    asks = {
        "key": key,
        "task": shown.task_id,
        "me": shown.account_id,
        "repeat": shown.repeat,
    }
    found = {row.same_key: row for row in connection.execute(_before, asks)}
    return found.get(True), found.get(False)


def _receipt(
    judgment: Row[Any], shown: Row[Any], verdict: Verdict, exam: ExamResult | None = None
) -> Receipt:
    feedback: Sequence[Graded] = ()
    if shown.purpose == "practice":
        feedback = grade(shown.answers or {}, verdict.choices, shown.clip_order)
    return Receipt(
        judgment.id,
        judgment.submitted_ms,
        judgment.surplus,
        judgment.revision,
        tuple(feedback),
        exam,
    )


def _replaced(earlier: Row[Any] | None, shown: Row[Any], revises: int | None) -> Row[Any] | None:
    """The judgment that a revision replaces; None for a first judgment. Raises Conflict where the two do not fit."""
    if revises is None:
        if earlier is not None:
            raise Conflict("you have already judged this task")
        return None
    if earlier is None or earlier.presentation_id != shown.id:
        raise Conflict("there is no judgment of yours to change here")
    if earlier.id != revises:
        raise Conflict("this judgment was changed meanwhile, perhaps in another tab")
    if shown.purpose in ("practice", "exam"):
        raise Conflict(f"an answer in the {shown.purpose} cannot be changed")
    return earlier


def _require_watched(shown: Row[Any], verdict: Verdict, fraction: float, now: int) -> None:
    problems = unwatched(
        verdict.watched_seconds,
        num_clips=len(shown.clip_order),
        clip_seconds=shown.shown_frames / shown.shown_fps,
        fraction=fraction,
        elapsed_seconds=(now - shown.shown_ms) / 1000,
    )
    if problems:
        raise Refused(problems)


def _is_surplus(shown: Row[Any]) -> bool:
    if shown.purpose == "work":
        return bool(shown.num_judgments >= shown.need_n)
    return shown.purpose == "adjudication" and shown.state != "conflict"


def _choices(judgment_id: int, shown: Row[Any], verdict: Verdict) -> list[dict[str, Any]]:
    """The rows of a judgment's choices."""
    position = {name: index for index, name in enumerate(shown.dimension_order)}
    return [
        {
            "judgment_id": judgment_id,
            "position": position[choice.dimension],
            "admissible": admissible,
            **asdict(choice),
            "scores": None if choice.scores is None else list(choice.scores),
        }
        for choice, admissible in settle(shown.kind, verdict.choices)
    ]


def _count_judgment(connection: Connection, shown: Row[Any]) -> None:
    """One more counted judgment; the task is done once it has as many as it wants."""
    number = shown.num_judgments + 1
    done = number >= shown.need_n and shown.state == "open"
    new_state = "done" if done else shown.state
    values = {"task": shown.task_id, "number": number, "new_state": new_state}
    connection.execute(_counted, values)


def _settle_conflict(connection: Connection, shown: Row[Any], *, adjudicate: bool) -> None:
    """Sends a finished task to an expert while its annotators contradict each other; an expert's decision finishes it."""
    decided = shown.purpose == "adjudication"
    if not decided and not (adjudicate and shown.purpose == "work"):
        return
    if not decided:
        by_expert = select(t.judgment.c.id).where(
            t.judgment.c.task_id == shown.task_id, t.judgment.c.purpose == "adjudication"
        )
        decided = connection.execute(by_expert.limit(1)).first() is not None
    torn = not decided and contradicted(connection, shown.task_id)
    connection.execute(
        update(t.task)
        .where(t.task.c.id == shown.task_id, t.task.c.state.in_(("done", "conflict")))
        .values(state="conflict" if torn else "done")
    )


def contradicted(connection: Connection, task_id: int) -> bool:
    """True if, in some dimension, one annotator's best clip is another's worst."""
    rows = connection.execute(
        select(t.choice.c.dimension, t.choice.c.best, t.choice.c.worst, t.presentation.c.clip_order)
        .join(t.judgment, t.judgment.c.id == t.choice.c.judgment_id)
        .join(t.presentation, t.presentation.c.id == t.judgment.c.presentation_id)
        .where(
            t.judgment.c.task_id == task_id,
            t.judgment.c.purpose == "work",
            is_latest(),
            t.choice.c.best.is_not(None),
        )
    ).all()
    picks: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        pair = (row.clip_order[row.best], row.clip_order[row.worst])
        picks.setdefault(row.dimension, []).append(pair)
    return any(
        a[0] == b[1] or a[1] == b[0] for pairs in picks.values() for a, b in combinations(pairs, 2)
    )


def reopen(
    store: Store, account: Account, *, before: int | None = None, lease_seconds: float
) -> Reopened | None:
    """The last thing an annotator judged, to be judged anew; None if there is nothing (further) back.

    Args:
        before: the `root` of one reopened earlier; the one before it comes back.
    """
    with store.read() as connection:
        row = last_judged(connection, account, before)
        if row is None:
            return None
        verdict = Verdict(
            tuple(choices_of(connection, row.id)),
            row.note,
            row.seconds,
            tuple(row.watched_seconds or ()),
            row.language,
        )
        task = view(store, connection, row.presentation_id, lease_seconds=lease_seconds)
    return Reopened(task, row.id, row.root, verdict)


def skip(store: Store, account: Account, presentation: str, reason: str, note: str = "") -> None:
    """Records that the annotator passes on a task, and why; after enough skips the task is held for a decision."""
    if reason not in SKIP_REASONS:
        raise Refused([f"reason {reason!r} is not one of {', '.join(SKIP_REASONS)}"])
    _pass_on(store, account, presentation, t.skip, {"reason": reason}, note)


def flag(store: Store, account: Account, presentation: str, kind: str, note: str = "") -> None:
    """Reports what is wrong with a task and passes on it; enough reports hold the task for a decision."""
    if kind not in FLAG_KINDS:
        raise Refused([f"flag {kind!r} is not one of {', '.join(FLAG_KINDS)}"])
    _pass_on(store, account, presentation, t.flag, {"kind": kind}, note)


def _pass_on(
    store: Store,
    account: Account,
    presentation: str,
    table: sa.Table,
    what: dict[str, str],
    note: str,
) -> None:
    """Stores a skip or flag once per annotator and task, and ends the lease."""
    if problems := check_note(note):
        raise Refused(problems)
    with store.write() as connection:
        shown = own_presentation(connection, account, presentation)
        if shown.purpose in ("practice", "exam"):
            raise Refused(
                [f"a task of the {shown.purpose} cannot be skipped; answer “can’t judge”"]
            )
        _lock(connection, t.task, shown.task_id)
        again = select(table.c.id).where(
            table.c.task_id == shown.task_id, table.c.account_id == account.id
        )
        if connection.execute(again).first() is None:
            connection.execute(
                insert(table).values(
                    task_id=shown.task_id,
                    account_id=account.id,
                    presentation_id=shown.id,
                    note=note,
                    created_ms=store.now_ms(),
                    **what,
                )
            )
        hold_if_reported(connection, shown.task_id)
        _end_lease(connection, shown.task_id, account.id)
        drop_draft(connection, shown.id)


def heartbeat(store: Store, account: Account, presentation: str, *, lease_seconds: float) -> bool:
    """Extends a live lease. False if it ran out and the task may have gone to someone else."""
    now = store.now_ms()
    expires = now + int(lease_seconds * 1000)
    asks = {"token": presentation, "me": account.id, "now": now, "until": expires}
    with store.write() as connection:
        if connection.execute(_extended, asks).rowcount > 0:
            return True
        own_presentation(connection, account, presentation)
        return False


_extended = (
    update(t.lease)
    .where(
        t.lease.c.account_id == sa.bindparam("me"),
        t.lease.c.expires_ms > sa.bindparam("now"),
        t.lease.c.task_id
        == select(t.presentation.c.task_id)
        .where(
            t.presentation.c.token == sa.bindparam("token"),
            t.presentation.c.account_id == sa.bindparam("me"),
        )
        .scalar_subquery(),
    )
    .values(expires_ms=sa.bindparam("until"))
)


def media_key(store: Store, account: Account, token: str) -> str:
    """Where the file behind a media token lies. Raises NotFound unless it was shown to this annotator (or they administer)."""
    with store.glance() as connection:
        row = connection.execute(_media_key, {"token": token}).first()
    if row is None or (row.account_id != account.id and account.role != "admin"):
        raise NotFound("no such clip")
    return str(row.storage_key)


_media_key = (
    select(t.media.c.storage_key, t.presentation.c.account_id)
    .join(t.presentation, t.presentation.c.id == t.media.c.presentation_id)
    .where(t.media.c.token == sa.bindparam("token"))
)
_my_work = (
    t.judgment.c.account_id == sa.bindparam("me"),
    t.judgment.c.revision == 0,
    t.judgment.c.purpose.in_(COUNTED),
)
_judged = select(sa.func.count()).select_from(t.judgment).where(*_my_work)
_recent_seconds = (
    select(t.judgment.c.seconds)
    .where(*_my_work, t.judgment.c.seconds.is_not(None))
    .order_by(t.judgment.c.id.desc())
    .limit(20)
)
_account = select(t.account).where(t.account.c.id == sa.bindparam("me"))
_number_open = select(sa.func.count()).select_from(t.task).where(*OPEN_TO_ME)


def progress(store: Store, account: Account, *, wanted: int | None) -> Progress:
    """Tasks judged and asked for, and the time left at this annotator's own pace (median of the last 20)."""
    me = {"me": account.id}
    with store.read() as connection:
        judged = connection.execute(_judged, me).scalar_one()
        seconds = sorted(connection.execute(_recent_seconds, me).scalars())
        if wanted is None:
            row = connection.execute(_account, me).one()
            asks = {**me, "expert": row.expert, "admin": row.role == "admin"}
            wanted = judged + connection.execute(_number_open, asks).scalar_one()
    pace = seconds[len(seconds) // 2] if seconds else None
    left = max(0, wanted - judged)
    return Progress(judged, wanted, pace, None if pace is None else pace * left)
