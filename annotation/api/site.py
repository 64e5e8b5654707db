"""What a route may ask for as an argument: the site it belongs to, the account that asks, the request's JSON."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from fastapi import Path as UrlPath
from sqlalchemy import delete, insert, select

from annotation import schema as t
from annotation.accounts import Account
from annotation.api.sessions import Sessions
from annotation.api.signing import Signer, site_key
from annotation.api.throttle import LoginThrottle
from annotation.api.tokens import Tokens
from annotation.config import AnnotateConfig
from annotation.refusals import Refused
from annotation.store import Store

MAX_BODY_BYTES = 64 * 1024
LINK_HOURS = 24
MAX_ID = 2**31 - 1
"""The largest number of a row in PostgreSQL's `integer`."""


@dataclass(frozen=True)
class Site:
    """One project as it is served. All its state lies in the database, so that several processes can be one site."""

    store: Store
    config: AnnotateConfig
    sessions: Sessions
    throttle: LoginThrottle
    tokens: Tokens
    signer: Signer
    totals: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Account -> until when the number of tasks asked of them may be believed, and that number."""

    @classmethod
    def of(cls, store: Store, config: AnnotateConfig) -> Site:
        return cls(
            store,
            config,
            Sessions(store, config.session_hours),
            LoginThrottle(store, config.login_failures, config.login_pause_seconds),
            Tokens(store),
            Signer(store, site_key(store, "media")),
        )

    def url(self, path: str) -> str:
        """A path of this site as a browser must ask for it."""
        return self.config.root_path + path

    def media_url(self, path: str) -> str:
        """The path of a clip, signed, as a browser must ask for it."""
        return self.url(self.signer.sign(path, seconds=self.config.media_hours * 3600))

    def sign_in_link(self, account: Account) -> str:
        """A path that signs in once, without a password, within a day."""
        token = secrets.token_urlsafe(24)
        with self.store.write() as connection:
            connection.execute(
                insert(t.sign_in_link).values(
                    token_hash=_hash(token),
                    account_id=account.id,
                    expires_ms=self.store.now_ms() + LINK_HOURS * 3_600_000,
                )
            )
        return self.url(f"/link/{token}")

    def open_link(self, token: str) -> Account | None:
        """Whom a link signs in; it does so once, whichever process is asked."""
        link = t.sign_in_link
        with self.store.write() as connection:
            row = connection.execute(
                delete(link)
                .where(link.c.token_hash == _hash(token))
                .returning(link.c.account_id, link.c.expires_ms)
            ).first()
            if row is None or row.expires_ms <= self.store.now_ms():
                return None
            found = connection.execute(
                select(t.account).where(t.account.c.id == row.account_id)
            ).one()
        return Account.of(found)


# Each is `async` only because FastAPI would send a plain function to a thread.


async def the_site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


async def signed_in(request: Request) -> Account:
    """Whoever the gate let in."""
    account: Account = request.state.visitor.account
    return account


async def read_body(request: Request, most: int = MAX_BODY_BYTES) -> bytes:
    """Raises HTTPException 413 as soon as too much has come."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise HTTPException(413, f"the request is larger than {most} bytes")
    return body


async def read_json(request: Request) -> dict[str, Any]:
    """The object in the body, empty when nothing was sent. Raises HTTPException 400 or 413."""
    body = await read_body(request)
    try:
        raw = json.loads(body or b"{}")
        storable = b"\\u" not in body or _storable(raw)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the request is not JSON") from error
    if not isinstance(raw, dict):
        raise HTTPException(400, "the request is not a JSON object")
    if not storable:
        raise HTTPException(400, "a text holds a NUL or half a character")
    return raw


def whole(raw: Mapping[str, Any], name: str) -> int | None:
    """The number of a row, which may be left out. Raises Refused if it is something else, or one that no database could look for."""
    value = raw.get(name)
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ID:
        return value
    raise Refused([f"{name} is a whole number from 0 to {MAX_ID}, or null"])


def _storable(value: object) -> bool:
    """False if a text in it is one that PostgreSQL or UTF-8 cannot hold."""
    text = json.dumps(value, ensure_ascii=False)
    return "\\u0000" not in text and not any(
        "\ud800" <= character <= "\udfff" for character in text
    )


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


TheSite = Annotated[Site, Depends(the_site)]
RowNumber = Annotated[int, UrlPath(ge=0, le=MAX_ID)]
SignedIn = Annotated[Account, Depends(signed_in)]
JsonBody = Annotated[dict[str, Any], Depends(read_json)]
