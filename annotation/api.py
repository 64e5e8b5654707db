"""The HTTP side: sign-in, claim, submit, skip, media. The page and every simulated annotator use exactly these endpoints.

All answers are JSON. A request that changes something needs the session cookie and the session's CSRF token in
`X-CSRF-Token`. Clips leave only through `/media/{token}`; Gradio's own file routes are closed.
"""

from __future__ import annotations

import hashlib
import html
import re
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import sqlalchemy as sa
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from sqlalchemy import delete, insert, select

from annotation import claims
from annotation import schema as t
from annotation.config import AnnotateConfig
from annotation.store import Account, Store
from reelhf.errors import UserError

COOKIE = "reelhf_session"
MAX_BODY_BYTES = 64 * 1024
STATIC = Path(__file__).parent / "static"

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
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "x-frame-options": "DENY",
}

PUBLIC = re.compile(r"^/(login|api/login|healthz|link/[\w-]+|annotate/login\.css)$")
CLOSED = re.compile(
    r"^/(gradio_api/)?"
    r"(file|upload|upload_progress|proxy|stream|monitoring|deep_link|reset|component_server|"
    r"process_recording|vibe-|profiling|queue|run|call|api|cancel|dev|hash|custom_component)"
)
"""Gradio routes this page has no use for. `file=` echoes request headers, the session cookie among them."""


NEVER_SENT = {b"cookie", b"authorization"}
"""Request headers that Gradio copies into some answers, where a script could read the session cookie."""


class LoginThrottle:
    """Counts failed sign-ins per name and per address; forgets them after the pause."""

    def __init__(self, failures: int, pause: float, clock: Callable[[], float] = time.monotonic):
        self._failures, self._pause, self._clock = failures, pause, clock
        self._seen: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def wait(self, *keys: str) -> float:
        """Seconds until the next try is allowed; 0 if it is now."""
        now = self._clock()
        with self._lock:
            waits = [0.0]
            for key in keys:
                recent = [at for at in self._seen.get(key, ()) if now - at < self._pause]
                limit = self._failures * (10 if key.startswith("address ") else 1)
                if recent:
                    self._seen[key] = recent
                else:
                    self._seen.pop(key, None)
                if len(recent) >= limit:
                    waits.append(self._pause - (now - recent[-limit]))
            return max(waits)

    def failed(self, *keys: str) -> None:
        with self._lock:
            for key in keys:
                self._seen.setdefault(key, []).append(self._clock())

    def succeeded(self, key: str) -> None:
        with self._lock:
            self._seen.pop(key, None)


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
    .where(
        t.session.c.token_hash == sa.bindparam("hash"), t.session.c.expires_ms > sa.bindparam("now")
    )
)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gate:
    """Outermost layer: nothing but the sign-in page without a session, no closed route at all, security headers on every answer."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], sessions: Sessions):
        self._app, self._sessions = app, sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await (self._app(scope, receive, send) if scope["type"] == "lifespan" else _close(send))
            return

        async def send_safely(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                extra = [(k.encode(), v.encode()) for k, v in SECURITY_HEADERS.items()]
                message["headers"] = [
                    *(pair for pair in message["headers"] if pair[0].lower() not in NEVER_SENT),
                    *(pair for pair in extra if pair[0] not in present),
                ]
            await send(message)

        request = Request(scope)
        path = scope["path"]
        response: Response | None = None
        if not PUBLIC.match(path):
            found = await run_in_threadpool(self._sessions.find, request.cookies.get(COOKIE))
            scope.setdefault("state", {})["session"] = found
            if found is None:
                wants_page = request.method == "GET" and "text/html" in request.headers.get(
                    "accept", ""
                )
                response = (
                    RedirectResponse("/login", status_code=303)
                    if wants_page
                    else JSONResponse({"detail": "sign in first"}, status_code=401)
                )
            elif CLOSED.match(path) and path not in OWN_API:
                response = JSONResponse({"detail": "not served here"}, status_code=404)
            elif request.method not in ("GET", "HEAD", "OPTIONS") and not secrets.compare_digest(
                request.headers.get("x-csrf-token", "").encode(), found[1].encode()
            ):
                response = JSONResponse(
                    {"detail": "the X-CSRF-Token header is missing or wrong"}, status_code=403
                )
        await (response or self._app)(scope, receive, send_safely)


async def _close(send: Send) -> None:
    await send({"type": "websocket.close", "code": 1008})


OWN_API = {
    "/api/me",
    "/api/claim",
    "/api/submit",
    "/api/skip",
    "/api/heartbeat",
    "/api/progress",
    "/api/logout",
}


def create_app(store: Store, config: AnnotateConfig | None = None, *, page: bool = True) -> FastAPI:
    """The whole site of one project.

    Args:
        page: mount the Gradio page at `/`; False serves the HTTP API alone (it starts faster).
    Returns: an app whose `state.sign_in_link(account)` makes a one-time path that signs in.
    """
    config = config or AnnotateConfig()
    app = FastAPI(title=config.title, docs_url=None, redoc_url=None, openapi_url=None)
    sessions = Sessions(store, config.session_hours)
    throttle = LoginThrottle(config.login_failures, config.login_pause_seconds)
    links: dict[str, Account] = {}

    def sign_in_link(account: Account) -> str:
        token = secrets.token_urlsafe(24)
        links[token] = account
        return f"/link/{token}"

    app.state.sign_in_link = sign_in_link
    app.state.store = store

    def current(request: Request) -> Account:
        account: Account = request.state.session[0]
        return account

    def with_cookie(response: Response, account: Account) -> str:
        token, csrf = sessions.start(account)
        response.set_cookie(
            COOKIE,
            token,
            max_age=int(config.session_hours * 3600),
            httponly=True,
            samesite="lax",
            secure=config.secure_cookie,
            path="/",
        )
        return csrf

    def check_login(request: Request, name: str, password: str) -> Account:
        address = request.client.host if request.client else "unknown"
        keys = (f"name {name.casefold()[:80]}", f"address {address}")
        wait = throttle.wait(*keys)
        if wait > 0:
            seconds = str(int(wait) + 1)
            raise HTTPException(
                429, f"too many wrong passwords; try again in {seconds} s", {"Retry-After": seconds}
            )
        account = store.check_password(name, password) if len(password) <= 1000 else None
        if account is None:
            throttle.failed(*keys)
            raise HTTPException(401, "wrong name or password")
        throttle.succeeded(keys[0])
        return account

    # --- sign-in ---

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/login")
    def login_page(request: Request) -> Response:
        if sessions.find(request.cookies.get(COOKIE)):
            return RedirectResponse("/", status_code=303)
        return HTMLResponse(_login_page(config.title))

    @app.post("/login")
    async def login_form(request: Request) -> Response:
        _require_same_origin(request)
        fields = parse_qs((await _body(request)).decode("utf-8", "replace"))
        name, password = fields.get("name", [""])[0], fields.get("password", [""])[0]
        try:
            account = await run_in_threadpool(check_login, request, name, password)
        except HTTPException as error:
            page_text = _login_page(config.title, name=name, problem=str(error.detail))
            return HTMLResponse(page_text, status_code=error.status_code, headers=error.headers)
        response = RedirectResponse("/", status_code=303)
        await run_in_threadpool(with_cookie, response, account)
        return response

    @app.post("/api/login")
    async def login(request: Request) -> Response:
        _require_same_origin(request)
        raw = await _json(request)
        account = await run_in_threadpool(
            check_login, request, str(raw.get("name", "")), str(raw.get("password", ""))
        )
        response = JSONResponse({"name": account.name, "role": account.role})
        csrf = await run_in_threadpool(with_cookie, response, account)
        response.headers["X-CSRF-Token"] = csrf
        return response

    @app.get("/link/{token}")
    def link(token: str) -> Response:
        account = links.pop(token, None)
        if account is None:
            return RedirectResponse("/login", status_code=303)
        response = RedirectResponse("/", status_code=303)
        with_cookie(response, account)
        return response

    @app.post("/api/logout")
    def logout(request: Request) -> Response:
        sessions.end(request.cookies[COOKIE])
        response = JSONResponse({"signed_out": True})
        response.delete_cookie(COOKIE, path="/")
        return response

    # --- work ---

    @app.get("/api/me")
    def me(request: Request) -> dict[str, Any]:
        account = current(request)
        return {
            "name": account.name,
            "role": account.role,
            "csrf": request.state.session[1],
            "skip_reasons": claims.SKIP_REASONS,
        }

    @app.get("/api/progress")
    def progress(request: Request) -> dict[str, Any]:
        return asdict(claims.progress(store, current(request), wanted=config.wanted_tasks))

    @app.post("/api/claim")
    def claim(request: Request) -> dict[str, Any]:
        account = current(request)
        view = claims.claim(store, account, lease_seconds=config.lease_seconds)
        return {"task": None if view is None else view.to_json()}

    @app.post("/api/submit")
    async def submit(request: Request) -> dict[str, Any]:
        raw = await _json(request)
        verdict = claims.parse_verdict(raw.get("verdict") or {})
        receipt = await run_in_threadpool(
            claims.submit,
            store,
            current(request),
            str(raw.get("presentation", "")),
            str(raw.get("idempotency_key", "")),
            verdict,
        )
        return asdict(receipt)

    @app.post("/api/skip")
    async def skip(request: Request) -> dict[str, Any]:
        raw = await _json(request)
        await run_in_threadpool(
            claims.skip,
            store,
            current(request),
            str(raw.get("presentation", "")),
            str(raw.get("reason", "")),
            str(raw.get("note") or ""),
        )
        return {"skipped": True}

    @app.post("/api/heartbeat")
    async def heartbeat(request: Request) -> dict[str, Any]:
        raw = await _json(request)
        alive = await run_in_threadpool(
            lambda: claims.heartbeat(
                store,
                current(request),
                str(raw.get("presentation", "")),
                lease_seconds=config.lease_seconds,
            )
        )
        return {"leased": alive}

    @app.get("/media/{token}")
    def media(request: Request, token: str) -> Response:
        key = claims.media_key(store, current(request), token)
        kind = "image/png" if key.endswith(".png") else "video/mp4"
        headers = {"Cache-Control": "private, max-age=3600", "Content-Disposition": "inline"}
        return FileResponse(store.media / key, media_type=kind, headers=headers)

    @app.get("/annotate/{name}")
    def static(name: str) -> Response:
        kinds = {".js": "text/javascript", ".css": "text/css"}
        path = STATIC / name
        if path.suffix not in kinds or path.name != name or not path.is_file():
            raise HTTPException(404, "no such file")
        return FileResponse(path, media_type=kinds[path.suffix])

    # --- errors ---

    @app.exception_handler(claims.NotFound)
    def not_found(_request: Request, error: claims.NotFound) -> Response:
        return JSONResponse({"detail": str(error)}, status_code=404)

    @app.exception_handler(claims.Conflict)
    def conflict(_request: Request, error: claims.Conflict) -> Response:
        return JSONResponse({"detail": str(error)}, status_code=409)

    @app.exception_handler(claims.Refused)
    def refused(_request: Request, error: claims.Refused) -> Response:
        return JSONResponse({"detail": str(error), "problems": error.problems}, status_code=422)

    @app.exception_handler(sa.exc.OperationalError)
    def busy(_request: Request, error: sa.exc.OperationalError) -> Response:
        if "locked" not in str(error) and "full" not in str(error):
            raise error
        return JSONResponse(
            {"detail": "the database is busy or the disk is full; nothing was stored, try again"},
            status_code=503,
            headers={"Retry-After": "2"},
        )

    if page:
        from annotation.app import mount

        mount(app, store, config)
    else:

        @app.get("/")
        def no_page() -> dict[str, str]:
            return {"detail": "this server has no page, only the HTTP API"}

    app.add_middleware(Gate, sessions=sessions)
    return app


def _require_same_origin(request: Request) -> None:
    """Signing in has no session and so no CSRF token: a form on another site must not sign a browser in."""
    origin = request.headers.get("origin")
    if origin and origin != "null" and origin.split("://", 1)[-1] != request.headers.get("host"):
        raise HTTPException(403, "sign in from this site's own page")
    if request.headers.get("sec-fetch-site") == "cross-site":
        raise HTTPException(403, "sign in from this site's own page")


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request is larger than {MAX_BODY_BYTES} bytes")
    return body


async def _json(request: Request) -> dict[str, Any]:
    import json

    try:
        raw = json.loads(await _body(request) or b"{}")
    except ValueError as error:
        raise HTTPException(400, "the request is not JSON") from error
    if not isinstance(raw, dict):
        raise HTTPException(400, "the request is not a JSON object")
    return raw


def _login_page(title: str, *, name: str = "", problem: str = "") -> str:
    alert = f'<p class="problem" role="alert">{html.escape(problem)}</p>' if problem else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}: sign in</title><link rel="stylesheet" href="/annotate/login.css"></head>
<body><main><form method="post" action="/login">
<h1>{html.escape(title)}</h1>{alert}
<label>Name <input name="name" autocomplete="username" required autofocus value="{html.escape(name)}"></label>
<label>Password <input name="password" type="password" autocomplete="current-password" required></label>
<button type="submit">Sign in</button>
</form></main></body></html>"""


# --- running -------------------------------------------------------------------------------------


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another port with --port"
        ) from error
    return listener


@contextmanager
def running_server(
    store: Store,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    config: AnnotateConfig | None = None,
    page: bool = True,
    app: FastAPI | None = None,
) -> Iterator[str]:
    """Serves a project from a thread; yields its base URL and stops at the end.

    Args:
        port: 0 takes a free one.
        page: False leaves out the Gradio page.
    """
    import uvicorn

    listener = bind(host, port)
    app = app or create_app(store, config, page=page)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the annotation server did not start")
            time.sleep(0.01)
        yield f"http://{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()
