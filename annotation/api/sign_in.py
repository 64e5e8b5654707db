"""Signing in and out: by the page's form, as JSON, or by a link that works once."""

from __future__ import annotations

import html
from urllib.parse import parse_qs

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from annotation.accounts import Account
from annotation.api.sessions import COOKIE
from annotation.api.site import Site, TheSite, read_body, read_json
from annotation.config import AnnotateConfig

MAX_PASSWORD = 1000
"""Characters; hashing a longer one would only cost time."""

MAX_NAME = 80

router = APIRouter()


@router.get("/healthz")
def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/login")
def login_page(request: Request, site: TheSite) -> Response:
    if site.sessions.find(request.cookies.get(COOKIE)):
        return RedirectResponse(site.url("/"), status_code=303)
    return HTMLResponse(render_login(site.config))


@router.post("/login")
async def login_form(request: Request, site: TheSite) -> Response:
    require_same_origin(request)
    fields = parse_qs((await read_body(request)).decode("utf-8", "replace"))
    name, password = fields.get("name", [""])[0], fields.get("password", [""])[0]
    try:
        account = await run_in_threadpool(check_login, site, request, name, password)
    except HTTPException as error:
        text = render_login(site.config, name=name, problem=str(error.detail))
        return HTMLResponse(text, status_code=error.status_code, headers=error.headers)
    response = RedirectResponse(site.url("/"), status_code=303)
    await run_in_threadpool(start_session, site, response, account)
    return response


@router.post("/api/login")
async def login(request: Request, site: TheSite) -> Response:
    require_same_origin(request)
    raw = await read_json(request)
    name, password = str(raw.get("name", "")), str(raw.get("password", ""))
    account = await run_in_threadpool(check_login, site, request, name, password)
    response = JSONResponse({"name": account.name, "role": account.role})
    csrf = await run_in_threadpool(start_session, site, response, account)
    response.headers["X-CSRF-Token"] = csrf
    return response


@router.get("/link/{token}")
def link(token: str, site: TheSite) -> Response:
    account = site.open_link(token)
    if account is None:
        return RedirectResponse(site.url("/login"), status_code=303)
    response = RedirectResponse(site.url("/"), status_code=303)
    start_session(site, response, account)
    return response


@router.post("/api/logout")
def logout(request: Request, site: TheSite) -> Response:
    site.sessions.end(request.cookies[COOKIE])
    response = JSONResponse({"signed_out": True})
    response.delete_cookie(COOKIE, path=site.url("/"))
    return response


def check_login(site: Site, request: Request, name: str, password: str) -> Account:
    """The account. Raises HTTPException 401 for a wrong name or password, 429 after too many of them."""
    address = request.client.host if request.client else "unknown"
    keys = (f"name {name.casefold()[:MAX_NAME]}", f"address {address}")
    wait = site.throttle.wait(*keys)
    if wait > 0:
        seconds = str(int(wait) + 1)
        raise HTTPException(
            429, f"too many wrong passwords; try again in {seconds} s", {"Retry-After": seconds}
        )
    fits = len(password) <= MAX_PASSWORD and len(name) <= MAX_NAME and "\0" not in name
    account = site.store.check_password(name, password) if fits else None
    if account is None:
        site.throttle.failed(*keys)
        raise HTTPException(401, "wrong name or password")
    site.throttle.succeeded(keys[0])
    return account


def start_session(site: Site, response: Response, account: Account) -> str:
    """Puts the cookie of a new session into the response. Returns the session's CSRF token."""
    token, csrf = site.sessions.start(account)
    response.set_cookie(
        COOKIE,
        token,
        max_age=int(site.config.session_hours * 3600),
        httponly=True,
        samesite="lax",
        secure=site.config.secure_cookie,
        path=site.url("/"),
    )
    return csrf


def require_same_origin(request: Request) -> None:
    """Signing in has no session and so no CSRF token: a form on another site must not sign a browser in."""
    origin = request.headers.get("origin")
    if origin and origin != "null" and origin.split("://", 1)[-1] != request.headers.get("host"):
        raise HTTPException(403, "sign in from this site's own page")
    if request.headers.get("sec-fetch-site") == "cross-site":
        raise HTTPException(403, "sign in from this site's own page")


def render_login(config: AnnotateConfig, *, name: str = "", problem: str = "") -> str:
    """The sign-in page as HTML; `name` is what was typed before, `problem` why it did not do."""
    alert = f'<p class="problem" role="alert">{html.escape(problem)}</p>' if problem else ""
    title, root = html.escape(config.title), html.escape(config.root_path)
    other = ""
    if config.oidc is not None:
        label = html.escape(config.oidc.label)
        other = f'<p><a id="oidc" href="{root}/oidc/start">{label}</a></p>'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}: sign in</title><link rel="stylesheet" href="{root}/annotate/login.css"></head>
<body><main><form method="post" action="{root}/login">
<h1>{title}</h1>{alert}
<label>Name <input name="name" autocomplete="username" required autofocus value="{html.escape(name)}"></label>
<label>Password <input name="password" type="password" autocomplete="current-password" required></label>
<button type="submit">Sign in</button>{other}
</form></main></body></html>"""
