"""The work itself: claim a task, keep it alive, submit or skip it, see how far one is."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter, Request

from annotation import claims, drafts
from annotation.api.site import JsonBody, SignedIn, Site, TheSite
from annotation.records import TaskView

router = APIRouter()


@router.get("/api/me")
def me(request: Request, account: SignedIn) -> dict[str, Any]:
    return {
        "name": account.name,
        "role": account.role,
        "csrf": request.state.visitor.csrf,
        "skip_reasons": claims.SKIP_REASONS,
    }


@router.get("/api/progress")
def progress(site: TheSite, account: SignedIn) -> dict[str, Any]:
    return asdict(claims.progress(site.store, account, wanted=site.config.wanted_tasks))


@router.post("/api/claim")
def claim(site: TheSite, account: SignedIn) -> dict[str, Any]:
    view = claims.claim(site.store, account, lease_seconds=site.config.lease_seconds)
    return {"task": None if view is None else _signed(site, view).to_json()}


def _signed(site: Site, view: TaskView) -> TaskView:
    """The task with links that its annotator's browser may follow for some hours."""
    frame = view.first_frame_url
    return replace(
        view,
        clips=tuple(replace(clip, url=site.media_url(clip.url)) for clip in view.clips),
        first_frame_url=frame and site.media_url(frame),
    )


@router.post("/api/submit")
def submit(site: TheSite, account: SignedIn, raw: JsonBody) -> dict[str, Any]:
    verdict = claims.parse_verdict(raw.get("verdict") or {})
    presentation, key = str(raw.get("presentation", "")), str(raw.get("idempotency_key", ""))
    return asdict(claims.submit(site.store, account, presentation, key, verdict))


@router.post("/api/skip")
def skip(site: TheSite, account: SignedIn, raw: JsonBody) -> dict[str, Any]:
    presentation, reason = str(raw.get("presentation", "")), str(raw.get("reason", ""))
    claims.skip(site.store, account, presentation, reason, str(raw.get("note") or ""))
    return {"skipped": True}


@router.post("/api/heartbeat")
def heartbeat(site: TheSite, account: SignedIn, raw: JsonBody) -> dict[str, Any]:
    alive = claims.heartbeat(
        site.store,
        account,
        str(raw.get("presentation", "")),
        lease_seconds=site.config.lease_seconds,
    )
    return {"leased": alive}


@router.post("/api/draft")
def save_draft(site: TheSite, account: SignedIn, raw: JsonBody) -> dict[str, Any]:
    presentation, body = str(raw.get("presentation", "")), str(raw.get("draft") or "")
    return {"saved_ms": drafts.save_draft(site.store, account, presentation, body)}


@router.get("/api/draft")
def load_draft(presentation: str, site: TheSite, account: SignedIn) -> dict[str, Any]:
    return {"draft": drafts.load_draft(site.store, account, presentation)}
