"""Signed-in browsers: a random cookie outside, only its hash in the database."""

from __future__ import annotations

import hashlib
import secrets
import time

from sqlalchemy import bindparam, delete, insert, select

from annotation import schema as t
from annotation.accounts import Account
from annotation.store import Store

COOKIE = "reelhf_session"


REMEMBERED_SECONDS = 5.0
"""For so long a process believes what it read of a session: one task costs ten requests. A role that was taken away or a session that
another process ended works on for as long."""
MAX_REMEMBERED = 10_000


class Sessions:
    """Signed-in browsers. Only the hash of a cookie is stored, so a stolen database signs nobody in."""

    def __init__(self, store: Store, hours: float):
        self._store, self._milliseconds = store, int(hours * 3_600_000)
        self._remembered: dict[str, tuple[float, int, Account, str]] = {}
        """Hash of a cookie -> until when this may be believed, when the session expires, whose it is, its CSRF token."""

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
        if (known := self.remembered(token)) is not None:
            return known
        hashed, now = _hash(token), self._store.now_ms()
        with self._store.glance() as connection:
            row = connection.execute(_find_session, {"hash": hashed, "now": now}).first()
        if row is None:
            self._remembered.pop(hashed, None)
            return None
        account = Account.of(row)
        if len(self._remembered) >= MAX_REMEMBERED:
            self._remembered.clear()
        until = time.monotonic() + REMEMBERED_SECONDS
        self._remembered[hashed] = (until, row.expires_ms, account, row.csrf)
        return account, row.csrf

    def remembered(self, token: str | None) -> tuple[Account, str] | None:
        """The same, if it was read a moment ago; never asks the database."""
        known = self._remembered.get(_hash(token or ""))
        if known is None or time.monotonic() >= known[0] or self._store.now_ms() >= known[1]:
            return None
        return known[2], known[3]

    def end(self, token: str) -> None:
        hashed = _hash(token)
        with self._store.write() as connection:
            connection.execute(delete(t.session).where(t.session.c.token_hash == hashed))
        self._remembered.pop(hashed, None)


_find_session = (
    select(t.account, t.session.c.csrf, t.session.c.expires_ms)
    .join(t.account, t.account.c.id == t.session.c.account_id)
    .where(t.session.c.token_hash == bindparam("hash"), t.session.c.expires_ms > bindparam("now"))
)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
