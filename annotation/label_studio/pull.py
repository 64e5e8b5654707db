"""What was said on Label Studio becomes judgments here: each annotation once, checked by our rules, with its fate on record."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row, delete, func, insert, select, update

from annotation import claims
from annotation import schema as t
from annotation.accounts import Account
from annotation.label_studio.template import read_verdict
from annotation.refusals import Conflict, Refused
from annotation.store import Store
from reelhf.errors import UserError


@dataclass
class Pulled:
    """What a pull did; `reasons` says why annotations were refused, by their ids."""

    stored: int = 0
    surplus: int = 0
    refused: int = 0
    deleted: int = 0
    known: int = 0
    foreign: int = 0
    """Tasks in the project that we did not send."""
    reasons: dict[int, str] = field(default_factory=dict)


def pull(
    client: Any,
    store: Store,
    *,
    server: str,
    project: int,
    names: Mapping[str, str] | None = None,
) -> Pulled:
    """Brings in every annotation of a project that is new or changed, and notes those that were deleted there.

    A changed annotation becomes a revision of its judgment. A deleted one is marked; what was said stays on record.

    Args:
        names: Label Studio e-mail -> our account; others get an account of their own on first sight.
    Raises: UserError if a named account does not exist.
    """
    with store.read() as connection:
        ours = {
            row.uid: row
            for row in connection.execute(
                select(t.label_studio_task).where(
                    t.label_studio_task.c.server == server, t.label_studio_task.c.project == project
                )
            )
        }
    if not ours:
        raise UserError(f"nothing was pushed to project {project} of {server}")
    people = _People(client, store, server, names or {})
    handled_until = store.now_ms()
    result, seen = Pulled(), set()
    for task in client.tasks.list(project=project, fields="all", page_size=200):
        link = ours.get(str((task.data or {}).get("uid")))
        if link is None:
            result.foreign += 1
            continue
        for annotation in map(_plain, task.annotations or ()):
            seen.add((link.uid, int(annotation["id"])))
            _take(store, people, link, annotation, result)
    _note_deleted(store, list(ours), seen, result)
    with store.write() as connection:
        connection.execute(
            update(t.webhook_event)
            .where(
                t.webhook_event.c.handled_ms.is_(None),
                t.webhook_event.c.received_ms <= handled_until,
            )
            .values(handled_ms=store.now_ms())
        )
    return result


def _take(
    store: Store, people: _People, link: Row[Any], annotation: dict[str, Any], result: Pulled
) -> None:
    """One annotation: known, stored, surplus or refused."""
    their_id, updated_at = int(annotation["id"]), str(annotation.get("updated_at") or "")
    table = t.label_studio_annotation
    with store.read() as connection:
        known = connection.execute(
            select(table.c.id).where(
                table.c.uid == link.uid,
                table.c.their_id == their_id,
                table.c.updated_at == updated_at,
                table.c.state != "deleted",
            )
        ).first()
    if known is not None:
        result.known += 1
        return
    judgment_id, state, reason = None, "refused", ""
    earlier = select(func.max(table.c.judgment_id)).where(
        table.c.uid == link.uid, table.c.their_id == their_id
    )
    with store.read() as connection:
        revises = connection.execute(earlier).scalar()
    if annotation.get("was_cancelled"):
        reason = "skipped on Label Studio"
    else:
        try:
            verdict = read_verdict(annotation, link.dimension_order)
            account = people.account(annotation)
            presentation = _presentation(store, link, account)
            key = "ls:" + hashlib.sha256(f"{link.uid} {their_id} {updated_at}".encode()).hexdigest()
            receipt = claims.submit(store, account, presentation, key, verdict, revises=revises)
            judgment_id = receipt.judgment_id
            state = "surplus" if receipt.surplus else "stored"
        except Refused as error:
            reason = str(error)
        except Conflict as error:
            reason = f"a second one by the same person: {error}"
    with store.write() as connection:
        connection.execute(
            insert(table).values(
                uid=link.uid,
                their_id=their_id,
                updated_at=updated_at,
                state=state,
                reason=reason,
                judgment_id=judgment_id,
                body=json.loads(json.dumps(annotation.get("result"), default=str)),
                seen_ms=store.now_ms(),
            )
        )
    setattr(result, state, getattr(result, state) + 1)
    if reason:
        result.reasons[their_id] = reason


def _presentation(store: Store, link: Row[Any], account: Account) -> str:
    """The token of the showing this person had on Label Studio, made on first sight."""
    query = select(t.presentation.c.token, t.presentation.c.clip_order).where(
        t.presentation.c.task_id == link.task_id, t.presentation.c.account_id == account.id
    )
    with store.write() as connection:
        for row in connection.execute(query):
            if row.clip_order == link.clip_order:
                return str(row.token)
        token = secrets.token_urlsafe(18)
        connection.execute(
            insert(t.presentation).values(
                token=token,
                task_id=link.task_id,
                account_id=account.id,
                clip_order=link.clip_order,
                dimension_order=link.dimension_order,
                guideline_version=link.guideline_version,
                shown_ms=store.now_ms(),
            )
        )
    return token


def _note_deleted(
    store: Store, uids: list[str], seen: set[tuple[str, int]], result: Pulled
) -> None:
    """Annotations we knew that are no longer there. A later pull that meets them again takes the mark back."""
    table = t.label_studio_annotation
    with store.read() as connection:
        rows = connection.execute(
            select(table.c.uid, table.c.their_id, table.c.state, table.c.judgment_id)
        ).all()
    ours = set(uids)
    marked = {(row.uid, row.their_id) for row in rows if row.state == "deleted"}
    judgments = {
        (row.uid, row.their_id): row.judgment_id
        for row in rows
        if row.state != "deleted" and row.uid in ours
    }
    with store.write() as connection:
        for (uid, their_id), judgment_id in judgments.items():
            if (uid, their_id) not in seen and (uid, their_id) not in marked:
                result.deleted += 1
                connection.execute(
                    insert(table).values(
                        uid=uid,
                        their_id=their_id,
                        updated_at="",
                        state="deleted",
                        reason="no longer on Label Studio",
                        judgment_id=judgment_id,
                        body=None,
                        seen_ms=store.now_ms(),
                    )
                )
        for uid, their_id in marked & seen:
            connection.execute(
                delete(table).where(
                    table.c.uid == uid, table.c.their_id == their_id, table.c.state == "deleted"
                )
            )


class _People:
    """Label Studio's users as our accounts."""

    def __init__(self, client: Any, store: Store, server: str, names: Mapping[str, str]):
        self._store, self._server = store, server
        self._accounts: dict[int, Account] = {}
        for user in client.users.list() if names else ():
            if user.email in names:
                account = store.find_user(names[user.email])
                if account is None:
                    raise UserError(f"the map names {names[user.email]!r}, who has no account here")
                self._accounts[int(user.id)] = account

    def account(self, annotation: Mapping[str, Any]) -> Account:
        """Whose annotation it is. Raises Refused if it does not say."""
        who = annotation.get("completed_by")
        number = who.get("id") if isinstance(who, Mapping) else who
        if not isinstance(number, int):
            raise Refused(["the annotation does not say who made it"])
        if number not in self._accounts:
            server = hashlib.sha256(self._server.encode()).hexdigest()[:8]
            name = f"label-studio-{server}-{number}"
            self._accounts[number] = self._store.find_user(name) or self._store.add_user(
                name, secrets.token_urlsafe(32)
            )
        return self._accounts[number]


def _plain(annotation: Any) -> dict[str, Any]:
    """An annotation as a dictionary, whatever the SDK made of it."""
    return dict(annotation) if isinstance(annotation, Mapping) else annotation.dict()


def new_hints(store: Store) -> int:
    """How many webhook events no pull has answered yet."""
    unanswered = t.webhook_event.c.handled_ms.is_(None)
    query = select(func.count()).select_from(t.webhook_event).where(unanswered)
    with store.read() as connection:
        return connection.execute(query).scalar_one()
