"""What a route may ask for as an argument: the site it belongs to, the account that asks, the request's JSON."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request

from annotation.api.sessions import Sessions
from annotation.api.throttle import LoginThrottle
from annotation.config import AnnotateConfig
from annotation.store import Account, Store

MAX_BODY_BYTES = 64 * 1024


@dataclass(frozen=True)
class Site:
    """One project as it is served."""

    store: Store
    config: AnnotateConfig
    sessions: Sessions
    throttle: LoginThrottle
    links: dict[str, Account] = field(default_factory=dict)
    """Tokens of the sign-in links that nobody has opened yet."""

    @classmethod
    def of(cls, store: Store, config: AnnotateConfig) -> Site:
        sessions = Sessions(store, config.session_hours)
        throttle = LoginThrottle(config.login_failures, config.login_pause_seconds)
        return cls(store, config, sessions, throttle)

    def sign_in_link(self, account: Account) -> str:
        """A path that signs in once, without a password."""
        token = secrets.token_urlsafe(24)
        self.links[token] = account
        return f"/link/{token}"


# Each is `async` only because FastAPI would send a plain function to a thread.


async def the_site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


async def signed_in(request: Request) -> Account:
    """Whoever the gate let in."""
    account: Account = request.state.session[0]
    return account


async def read_body(request: Request) -> bytes:
    """Raises HTTPException 413 as soon as too much has come."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request is larger than {MAX_BODY_BYTES} bytes")
    return body


async def read_json(request: Request) -> dict[str, Any]:
    """The object in the body, empty when nothing was sent. Raises HTTPException 400 or 413."""
    try:
        raw = json.loads(await read_body(request) or b"{}")
    except ValueError as error:
        raise HTTPException(400, "the request is not JSON") from error
    if not isinstance(raw, dict):
        raise HTTPException(400, "the request is not a JSON object")
    return raw


TheSite = Annotated[Site, Depends(the_site)]
SignedIn = Annotated[Account, Depends(signed_in)]
JsonBody = Annotated[dict[str, Any], Depends(read_json)]
