"""Files that leave the server: clips behind tokens that say nothing of their model, and the page's own script and styles."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, Response

from annotation import claims
from annotation.api.site import SignedIn, TheSite

STATIC = Path(__file__).parent.parent / "static"
STATIC_KINDS = {".js": "text/javascript", ".css": "text/css", ".json": "application/json"}

router = APIRouter()


@router.get("/media/{token}")
def media(token: str, site: TheSite, account: SignedIn) -> Response:
    key = claims.media_key(site.store, account, token)
    kind = "image/png" if key.endswith(".png") else "video/mp4"
    headers = {"Cache-Control": "private, max-age=3600", "Content-Disposition": "inline"}
    return FileResponse(site.store.media / key, media_type=kind, headers=headers)


@router.get("/annotate/{name}")
def static(name: str) -> Response:
    path = STATIC / name
    if path.suffix not in STATIC_KINDS or path.name != name or not path.is_file():
        raise HTTPException(404, "no such file")
    return FileResponse(path, media_type=STATIC_KINDS[path.suffix])
