"""API tokens: what a script shows instead of a password. Scoped, revocable, stored only as a hash."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import insert, or_, select, update

from annotation import schema as t
from annotation.accounts import Account
from annotation.store import Store
from reelhf.errors import UserError

PREFIX = "rhf_"
"""So that a token is recognised wherever it turns up: in a log, in a commit."""
SCOPES = {
    "judge": "claim tasks, see their clips, submit and skip",
    "read": "see one's own progress and the project's counts",
}


@dataclass(frozen=True)
class Token:
    """What is known of a token once it was made; not the token itself."""

    id: int
    label: str
    scopes: tuple[str, ...]
    created_ms: int
    expires_ms: int | None
    revoked_ms: int | None


class Tokens:
    """The tokens of a project."""

    def __init__(self, store: Store):
        self._store = store

    def create(
        self, account: Account, label: str, scopes: Collection[str], *, days: float | None = None
    ) -> tuple[str, Token]:
        """Makes a token; its text is told this once. Raises UserError for an unknown scope or an empty label."""
        unknown = sorted(set(scopes) - SCOPES.keys())
        if unknown or not scopes:
            raise UserError(
                f"scopes are {', '.join(SCOPES)}; got {', '.join(unknown) or 'none of them'}"
            )
        label = label.strip()
        if not 1 <= len(label) <= 80:
            raise UserError("a token's label has 1 to 80 characters")
        if days is not None and not 0 < days <= 3650:
            raise UserError(f"days is {days}; a token lives more than 0 and at most 3650 days")
        text = PREFIX + secrets.token_urlsafe(32)
        now = self._store.now_ms()
        values = {
            "account_id": account.id,
            "label": label,
            "scopes": sorted(set(scopes)),
            "created_ms": now,
            "expires_ms": None if days is None else now + int(days * 86_400_000),
        }
        with self._store.write() as connection:
            result = connection.execute(
                insert(t.api_token).values(token_hash=_hash(text), **values)
            )
        assert result.inserted_primary_key is not None
        made = self.of(account)
        return text, next(token for token in made if token.id == result.inserted_primary_key[0])

    def of(self, account: Account) -> list[Token]:
        """Every token of an account, newest first, dead ones too."""
        query = (
            select(t.api_token)
            .where(t.api_token.c.account_id == account.id)
            .order_by(t.api_token.c.id.desc())
        )
        with self._store.read() as connection:
            return [
                Token(r.id, r.label, tuple(r.scopes), r.created_ms, r.expires_ms, r.revoked_ms)
                for r in connection.execute(query)
            ]

    def revoke(self, account: Account, token_id: int) -> bool:
        """Ends a token of this account. False if it has no such live token."""
        with self._store.write() as connection:
            result = connection.execute(
                update(t.api_token)
                .where(
                    t.api_token.c.id == token_id,
                    t.api_token.c.account_id == account.id,
                    t.api_token.c.revoked_ms.is_(None),
                )
                .values(revoked_ms=self._store.now_ms())
            )
        return result.rowcount > 0

    def find(self, text: str) -> tuple[Account, frozenset[str]] | None:
        """Whose live token this is, and what it may do."""
        if not text.startswith(PREFIX) or len(text) > 200:
            return None
        query = (
            select(t.account, t.api_token.c.scopes)
            .join(t.account, t.account.c.id == t.api_token.c.account_id)
            .where(
                t.api_token.c.token_hash == _hash(text),
                t.api_token.c.revoked_ms.is_(None),
                or_(
                    t.api_token.c.expires_ms.is_(None),
                    t.api_token.c.expires_ms > self._store.now_ms(),
                ),
            )
        )
        with self._store.read() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        account = Account.of(row)
        return account, frozenset(row.scopes)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
