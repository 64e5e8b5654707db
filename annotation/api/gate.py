"""The outermost layer: who may ask at all, and the headers of every answer."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, RedirectResponse, Response
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from annotation.accounts import Account
from annotation.api.errors import unavailable
from annotation.api.policy import Rule, has_rank, rule_for
from annotation.api.sessions import COOKIE, Sessions
from annotation.api.tokens import Tokens
from annotation.database import Busy

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio compiles its `js=` strings
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "media-src 'self'",
        "connect-src 'self'",
        "object-src 'none'",
        "frame-ancestors 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
SECURITY_HEADERS = {
    b"content-security-policy": CONTENT_SECURITY_POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
    b"x-frame-options": b"DENY",
    b"cross-origin-opener-policy": b"same-origin",
}
OVER_HTTPS = {b"strict-transport-security": b"max-age=31536000"}
NEVER_SENT = {b"cookie", b"authorization"}
"""Request headers that Gradio copies into some answers, where a script could read the session cookie."""

CLOSED = re.compile(
    r"^/((quality|flags)/)?(gradio_api/)?"
    r"(file|upload|upload_progress|proxy|stream|monitoring|deep_link|reset|component_server|"
    r"process_recording|vibe-|profiling|queue|run|call|api|cancel|dev|hash|custom_component)"
)
"""Gradio routes this page has no use for. `file=` echoes request headers, the session cookie among them."""
READS = ("GET", "HEAD", "OPTIONS")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Visitor:
    """Who was let in, and how: by a browser's cookie with its CSRF token, or by an API token with its scopes."""

    account: Account
    csrf: str | None = None
    scopes: frozenset[str] | None = None


class Gate:
    """Nothing but the public paths without a sign-in, no closed route at all, security headers on every answer.

    Args:
        own_paths: patterns of routes that are ours although `CLOSED` matches them.
        root_path: where a reverse proxy shows this site, such as `/labels`; it may strip that or leave it on.
        https: the site is reached over HTTPS only, and browsers shall remember it.
    """

    def __init__(
        self,
        app: Callable[[Message, Receive, Send], Awaitable[None]],
        sessions: Sessions,
        tokens: Tokens,
        own_paths: Collection[re.Pattern[str]],
        root_path: str = "",
        https: bool = False,
    ):
        self._app, self._sessions, self._tokens = app, sessions, tokens
        self._own_paths, self._root_path = own_paths, root_path
        self._headers = SECURITY_HEADERS | (OVER_HTTPS if https else {})

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            path = self._unrooted(scope["path"])
            if self._root_path:
                scope["root_path"], scope["path"] = self._root_path, self._root_path + path
            try:
                refusal = await self._refusal(scope, path)
            except (Busy, OperationalError, PoolTimeout) as error:
                refusal = unavailable(None, error)
            await (refusal or self._app)(scope, receive, self._safely(send))

    def _unrooted(self, path: str) -> str:
        if self._root_path and path.startswith(self._root_path + "/"):
            return path[len(self._root_path) :]
        return path

    async def _refusal(self, scope: Message, path: str) -> Response | None:
        """The answer to a request that may not pass; None for one that may, whose sender is then in `state.visitor`."""
        request = Request(scope)
        if "\0" in path:
            return _say(404, "not served here")
        rule = rule_for(path)
        if rule.public:
            return None
        visitor = self._known(request) or await run_in_threadpool(self._visitor, request)
        if visitor is None:
            if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
                return RedirectResponse(f"{self._root_path}/login", status_code=303)
            return _say(401, "sign in first")
        scope.setdefault("state", {})["visitor"] = visitor
        if CLOSED.match(path) and not any(own.match(path) for own in self._own_paths):
            return _say(404, "not served here")
        return _refused(rule, visitor, request)

    def _known(self, request: Request) -> Visitor | None:
        """A browser that was here a moment ago; spares the way through a thread."""
        if "authorization" in request.headers:
            return None
        session = self._sessions.remembered(request.cookies.get(COOKIE))
        return session and Visitor(session[0], csrf=session[1])

    def _visitor(self, request: Request) -> Visitor | None:
        kind, _, text = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            found = self._tokens.find(text.strip())
            return found and Visitor(found[0], scopes=found[1])
        session = self._sessions.find(request.cookies.get(COOKIE))
        return session and Visitor(session[0], csrf=session[1])

    def _safely(self, send: Send) -> Send:
        """`send` with the security headers added and the request's secrets removed."""

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message["headers"] if pair[0].lower() not in NEVER_SENT]
                present = {name.lower() for name, _ in kept}
                added = [pair for pair in self._headers.items() if pair[0] not in present]
                message["headers"] = kept + added
            await send(message)

        return send_safely


def _refused(rule: Rule, visitor: Visitor, request: Request) -> Response | None:
    """Why someone known may not do this."""
    if visitor.scopes is not None:
        if rule.scope is None:
            return _say(403, "API tokens are not accepted here")
        if rule.scope not in visitor.scopes:
            return _say(403, f"the API token lacks the scope {rule.scope!r}")
    if not has_rank(visitor.account.role, rule.role):
        return _say(403, f"this is for {rule.role}s")
    if visitor.csrf is not None and request.method not in READS:
        sent = request.headers.get("x-csrf-token", "")
        if not secrets.compare_digest(sent.encode(), visitor.csrf.encode()):
            return _say(403, "the X-CSRF-Token header is missing or wrong")
    return None


def _say(status: int, detail: str) -> Response:
    return JSONResponse({"detail": detail}, status_code=status)
