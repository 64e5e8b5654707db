"""The queue of flagged tasks: for reviewers and admins, and for experts whatever their role (`annotation.flags.may_decide`)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from annotation import flags
from annotation.accounts import Account
from annotation.api.media import check_link, send_file
from annotation.api.site import JsonBody, SignedIn, Site, TheSite, whole
from annotation.refusals import NotFound

router = APIRouter()


@router.get("/flags", include_in_schema=False)
def to_the_page(site: TheSite) -> RedirectResponse:
    """The mounted page begins at the slash."""
    return RedirectResponse(site.url("/flags/"))


@router.get("/api/flagged")
def flagged(site: TheSite, account: SignedIn) -> dict[str, Any]:
    """The tasks that wait longest for a decision, with links to their clips, and how many wait in all."""
    _require_decider(site, account)
    counts = site.store.counts()
    return {
        "tasks": [_with_links(site, held) for held in flags.held_tasks(site.store)],
        "waiting": counts["flagged_tasks"],
        "conflicts": counts["conflict_tasks"],
    }


def _with_links(site: Site, held: flags.Held) -> dict[str, Any]:
    def link(position: int) -> str:
        return site.media_url(f"/media/held/{held.task_id}/{position}")

    return {
        **held.to_json(),
        "clips": [link(position) for position in range(held.num_clips)],
        "first_frame_url": link(held.num_clips) if held.has_first_frame else None,
    }


@router.get("/media/held/{task_id}/{position}")
def held_media(
    request: Request,
    task_id: int,
    position: int,
    site: TheSite,
    account: SignedIn,
    until: str = "",
    signature: str = "",
) -> Response:
    """A clip of a flagged task, to whoever may decide about it."""
    _require_decider(site, account)
    check_link(site, f"/media/held/{task_id}/{position}", until, signature)
    return send_file(site, request, flags.held_media(site.store, task_id, position))


@router.post("/api/decide")
def decide(site: TheSite, account: SignedIn, raw: JsonBody) -> dict[str, Any]:
    task_id, decision = whole(raw, "task_id") or 0, str(raw.get("decision", ""))
    flags.decide(site.store, account, task_id, decision, str(raw.get("note") or ""))
    return {"decided": True}


def _require_decider(site: Site, account: Account) -> None:
    with site.store.read() as connection:
        if not flags.may_decide(connection, account):
            raise NotFound("no such list")
