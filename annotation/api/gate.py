"""The outermost layer: who may ask at all, and the headers of every answer."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, RedirectResponse, Response

from annotation.api.sessions import COOKIE, Sessions

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
}
NEVER_SENT = {b"cookie", b"authorization"}
"""Request headers that Gradio copies into some answers, where a script could read the session cookie."""

PUBLIC = re.compile(r"^/(login|api/login|healthz|link/[\w-]+|annotate/login\.css)$")
CLOSED = re.compile(
    r"^/(gradio_api/)?"
    r"(file|upload|upload_progress|proxy|stream|monitoring|deep_link|reset|component_server|"
    r"process_recording|vibe-|profiling|queue|run|call|api|cancel|dev|hash|custom_component)"
)
"""Gradio routes this page has no use for. `file=` echoes request headers, the session cookie among them."""
READS = ("GET", "HEAD", "OPTIONS")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """Nothing but the sign-in page without a session, no closed route at all, security headers on every answer.

    Args:
        own_paths: those that are ours although `CLOSED` matches them.
    """

    def __init__(
        self,
        app: Callable[[Message, Receive, Send], Awaitable[None]],
        sessions: Sessions,
        own_paths: Collection[str],
    ):
        self._app, self._sessions, self._own_paths = app, sessions, own_paths

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            refusal = await self._refusal(scope)
            await (refusal or self._app)(scope, receive, _safely(send))

    async def _refusal(self, scope: Message) -> Response | None:
        """The answer to a request that may not pass; None for one that may, whose session is then in `state.session`."""
        request, path = Request(scope), scope["path"]
        if PUBLIC.match(path):
            return None
        session = await run_in_threadpool(self._sessions.find, request.cookies.get(COOKIE))
        scope.setdefault("state", {})["session"] = session
        if session is None:
            if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
                return RedirectResponse("/login", status_code=303)
            return JSONResponse({"detail": "sign in first"}, status_code=401)
        if CLOSED.match(path) and path not in self._own_paths:
            return JSONResponse({"detail": "not served here"}, status_code=404)
        _, csrf = session
        sent = request.headers.get("x-csrf-token", "")
        if request.method not in READS and not secrets.compare_digest(sent.encode(), csrf.encode()):
            return JSONResponse(
                {"detail": "the X-CSRF-Token header is missing or wrong"}, status_code=403
            )
        return None


def _safely(send: Send) -> Send:
    """`send` with the security headers added and the request's secrets removed."""

    async def send_safely(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if pair[0].lower() not in NEVER_SENT]
            present = {name.lower() for name, _ in kept}
            added = [pair for pair in SECURITY_HEADERS.items() if pair[0] not in present]
            message["headers"] = kept + added
        await send(message)

    return send_safely
