"""The figures of the dashboard, as the values of its components."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import RedirectResponse

from annotation.api.site import TheSite
from annotation.quality.dashboard import dashboard
from reelhf.errors import UserError

router = APIRouter()


@router.get("/quality", include_in_schema=False)
def to_the_page(site: TheSite) -> RedirectResponse:
    """The mounted page begins at the slash."""
    return RedirectResponse(site.url("/quality/"))


@router.get("/api/quality")
def quality(site: TheSite, project: str = "", by: str = "model") -> dict[str, Any]:
    """For reviewers and admins (`policy`)."""
    try:
        return dashboard(site.store, project or None, by=by)
    except UserError as error:
        raise HTTPException(422, str(error)) from error
