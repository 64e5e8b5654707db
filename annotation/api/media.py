"""Files that leave the server: clips behind signed links that say nothing of their model, and the page's own script and styles."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, Response
from sqlalchemy import select

from annotation import claims
from annotation import schema as t
from annotation.api.signing import Expired, Forged
from annotation.api.site import SignedIn, Site, TheSite
from annotation.pages import STATIC
from annotation.refusals import NotFound
from annotation.store import Store

STATIC_KINDS = {".js": "text/javascript", ".css": "text/css", ".json": "application/json"}

router = APIRouter()


@router.get("/media/{token}")
def media(
    token: str, site: TheSite, account: SignedIn, until: str = "", signature: str = ""
) -> Response:
    """A clip: to whom it was shown, by a link that has not expired."""
    check_link(site, f"/media/{token}", until, signature)
    return send_file(site, claims.media_key(site.store, account, token))


def check_link(site: Site, path: str, until: str, signature: str) -> None:
    """Raises HTTPException 404 for a link that is not ours, 410 for one that has expired."""
    try:
        site.signer.check(path, until, signature)
    except Forged as error:
        raise HTTPException(404, "no such clip") from error
    except Expired as error:
        raise HTTPException(410, "this link has expired; load the page again") from error


@router.get("/media/task/{uid}/{position}")
def task_media(
    uid: str, position: int, site: TheSite, until: str = "", signature: str = ""
) -> Response:
    """A clip as it was sent to Label Studio: whoever has the signed link may see it until it expires."""
    try:
        site.signer.check(f"/media/task/{uid}/{position}", until, signature)
        key = pushed_key(site.store, uid, position)
    except (Forged, NotFound) as error:
        raise HTTPException(404, "no such clip") from error
    except Expired as error:
        raise HTTPException(410, "this link has expired; push the tasks again") from error
    return send_file(site, key, **{"Access-Control-Allow-Origin": "*"})


def pushed_key(store: Store, uid: str, position: int) -> str:
    """Where the clip in that place of a pushed task lies. Raises NotFound if there is none."""
    with store.read() as connection:
        row = connection.execute(
            select(t.label_studio_task).where(t.label_studio_task.c.uid == uid)
        ).first()
        if row is None or not 0 <= position < len(row.clip_order):
            raise NotFound("no such clip")
        query = select(t.task_clip.c.shown_key).where(
            t.task_clip.c.task_id == row.task_id,
            t.task_clip.c.clip_id == row.clip_order[position],
        )
        return str(connection.execute(query).scalar_one())


def send_file(site: Site, key: str, **headers: str) -> Response:
    """A stored file, whole or the range that was asked for."""
    kind = "image/png" if key.endswith(".png") else "video/mp4"
    headers = {"Cache-Control": "private, max-age=3600", "Content-Disposition": "inline", **headers}
    try:
        path = site.store.files.local(key)
    except (FileNotFoundError, ValueError) as error:
        detail = "the file of this clip is gone; tell whoever runs the server"
        raise HTTPException(404, detail) from error
    response = FileResponse(path, media_type=kind, headers=headers, stat_result=path.stat())
    for name in (
        "last-modified",
        "etag",
    ):  # when a copy was made, and which file it is, would tell clips apart
        del response.headers[name]
    return response


@router.get("/annotate/{name}")
def static(name: str) -> Response:
    path = STATIC / name
    if path.suffix not in STATIC_KINDS or path.name != name or not path.is_file():
        raise HTTPException(404, "no such file")
    return FileResponse(path, media_type=STATIC_KINDS[path.suffix])
