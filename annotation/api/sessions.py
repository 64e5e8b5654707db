"""Signed-in browsers: a random cookie outside, only its hash in the database."""

from __future__ import annotations

import hashlib
import secrets

from sqlalchemy import bindparam, delete, insert, select

from annotation import schema as t
from annotation.store import Account, Store

COOKIE = "reelhf_session"


class Sessions:
    """Signed-in browsers. Only the hash of a cookie is stored, so a stolen database signs nobody in."""

    def __init__(self, store: Store, hours: float):
        self._store, self._milliseconds = store, int(hours * 3_600_000)

    def start(self, account: Account) -> tuple[str, str]:
        """Returns the cookie value and the CSRF token."""
        token, csrf = secrets.token_urlsafe(32), secrets.token_urlsafe(24)
        now = self._store.now_ms()
        with self._store.write() as connection:
            connection.execute(delete(t.session).where(t.session.c.expires_ms < now))
            connection.execute(
                insert(t.session).values(
                    token_hash=_hash(token),
                    account_id=account.id,
                    csrf=csrf,
                    expires_ms=now + self._milliseconds,
                )
            )
        return token, csrf

    def find(self, token: str | None) -> tuple[Account, str] | None:
        """The account and CSRF token of a live session."""
        if not token:
            return None
        with self._store.read() as connection:
            row = connection.execute(
                _find_session, {"hash": _hash(token), "now": self._store.now_ms()}
            ).first()
        if row is None:
            return None
        return Account(row.id, row.name, row.role, row.pseudonym, row.simulated), row.csrf

    def end(self, token: str) -> None:
        with self._store.write() as connection:
            connection.execute(delete(t.session).where(t.session.c.token_hash == _hash(token)))


_find_session = (
    select(t.account, t.session.c.csrf)
    .join(t.account, t.account.c.id == t.session.c.account_id)
    .where(t.session.c.token_hash == bindparam("hash"), t.session.c.expires_ms > bindparam("now"))
)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
