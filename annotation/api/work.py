"""The work itself: claim a task, keep it alive, submit, change, skip or flag it, see how far one is."""

from __future__ import annotations

import time
from dataclasses import asdict, replace

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from annotation import claims, drafts
from annotation.api.site import JsonBody, SignedIn, Site, TheSite, whole
from annotation.records import TaskView
from annotation.showing import own_presentation
from annotation.verdicts import parse_verdict

TOTAL_SECONDS = 60.0
"""How long a page believes how many tasks are open to its annotator: counting reads all of them."""

router = APIRouter()
"""Answers are made here, in the thread that has worked: what FastAPI is given as a dict it checks in another one, for which a busy server has
to wait again."""


@router.get("/api/me")
def me(request: Request, site: TheSite, account: SignedIn) -> JSONResponse:
    return JSONResponse(
        {
            "id": account.pseudonym,
            "name": account.name,
            "role": account.role,
            "csrf": request.state.visitor.csrf,
            "skip_reasons": claims.SKIP_REASONS,
            "flags": claims.FLAG_KINDS,
            "must_watch": site.config.must_watch,
            "confirm_pairs": site.config.confirm_pairs,
            "guide": dict(site.store.guideline.guide),
            "guideline_version": site.store.guideline.version,
        }
    )


@router.get("/api/guide")
def guide(presentation: str, site: TheSite, account: SignedIn) -> JSONResponse:
    """How to judge a task that was shown to this annotator, in the version it was shown with."""
    with site.store.read() as connection:
        shown = own_presentation(connection, account, presentation)
    return JSONResponse({"guide": dict(site.store.guideline_of(shown.guideline_version).guide)})


@router.get("/api/progress")
def progress(site: TheSite, account: SignedIn) -> JSONResponse:
    if site.config.wanted_tasks is not None:
        return JSONResponse(
            asdict(claims.progress(site.store, account, wanted=site.config.wanted_tasks))
        )
    until, wanted = site.totals.get(account.id, (0.0, 0))
    if time.monotonic() < until:
        kept = claims.progress(site.store, account, wanted=wanted)
        if kept.judged < wanted:  # else there may be more than was counted
            return JSONResponse(asdict(kept))
    found = claims.progress(site.store, account, wanted=None)
    site.totals[account.id] = (time.monotonic() + TOTAL_SECONDS, found.wanted)
    return JSONResponse(asdict(found))


@router.post("/api/claim")
def claim(site: TheSite, account: SignedIn) -> JSONResponse:
    """The task, or why there is none."""
    config = site.config
    view = claims.claim(
        site.store, account, lease_seconds=config.lease_seconds, routing=config.routing
    )
    if view is not None:
        return JSONResponse({"task": _signed(site, view).to_json(), "reason": None})
    return JSONResponse(
        {"task": None, "reason": claims.reason_for_nothing(site.store, account, config.routing)}
    )


def _signed(site: Site, view: TaskView) -> TaskView:
    """The task with links that its annotator's browser may follow for some hours."""
    frame = view.first_frame_url
    return replace(
        view,
        clips=tuple(replace(clip, url=site.media_url(clip.url)) for clip in view.clips),
        first_frame_url=frame and site.media_url(frame),
    )


@router.post("/api/submit")
def submit(site: TheSite, account: SignedIn, raw: JsonBody) -> JSONResponse:
    verdict = parse_verdict(raw.get("verdict") or {})
    presentation, key = str(raw.get("presentation", "")), str(raw.get("idempotency_key", ""))
    receipt = claims.submit(
        site.store,
        account,
        presentation,
        key,
        verdict,
        revises=whole(raw, "revises"),
        routing=site.config.routing,
        must_watch=site.config.must_watch,
    )
    return JSONResponse(asdict(receipt))


@router.post("/api/back")
def back(site: TheSite, account: SignedIn, raw: JsonBody) -> JSONResponse:
    """What the annotator judged last, or before `before`, to be judged anew."""
    found = claims.reopen(
        site.store,
        account,
        before=whole(raw, "before"),
        lease_seconds=site.config.lease_seconds,
    )
    if found is None:
        return JSONResponse({"reopened": None})
    raw_task, raw_verdict = _signed(site, found.task).to_json(), found.verdict.to_json()
    told = {"judgment_id": found.judgment_id, "root": found.root}
    return JSONResponse({"reopened": {**told, "task": raw_task, "verdict": raw_verdict}})


@router.post("/api/skip")
def skip(site: TheSite, account: SignedIn, raw: JsonBody) -> JSONResponse:
    presentation, reason = str(raw.get("presentation", "")), str(raw.get("reason", ""))
    claims.skip(site.store, account, presentation, reason, str(raw.get("note") or ""))
    return JSONResponse({"skipped": True})


@router.post("/api/flag")
def flag(site: TheSite, account: SignedIn, raw: JsonBody) -> JSONResponse:
    presentation, kind = str(raw.get("presentation", "")), str(raw.get("flag", ""))
    claims.flag(site.store, account, presentation, kind, str(raw.get("note") or ""))
    return JSONResponse({"flagged": True})


@router.post("/api/heartbeat")
def heartbeat(site: TheSite, account: SignedIn, raw: JsonBody) -> JSONResponse:
    alive = claims.heartbeat(
        site.store,
        account,
        str(raw.get("presentation", "")),
        lease_seconds=site.config.lease_seconds,
    )
    return JSONResponse({"leased": alive})


@router.post("/api/draft")
def save_draft(site: TheSite, account: SignedIn, raw: JsonBody) -> JSONResponse:
    presentation, body = str(raw.get("presentation", "")), str(raw.get("draft") or "")
    return JSONResponse({"saved_ms": drafts.save_draft(site.store, account, presentation, body)})
