"""Files that leave the server: clips behind signed links that say nothing of their model, and the page's own script and styles."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse, Response
from sqlalchemy import select

from annotation import claims
from annotation import schema as t
from annotation.api.signing import Expired, Forged
from annotation.api.site import SignedIn, Site, TheSite
from annotation.pages import STATIC
from annotation.refusals import NotFound
from annotation.store import Store

READ_AT_ONCE = 512 * 1024
"""Bytes of a clip that are read in the thread that looked it up: handing each piece from thread to thread costs more than reading it. So much may wait in
memory for a slow browser; larger answers are read as they leave."""
ONE_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
STATIC_KINDS = {".js": "text/javascript", ".css": "text/css", ".json": "application/json"}

router = APIRouter()


@router.get("/media/{token}")
def media(
    request: Request,
    token: str,
    site: TheSite,
    account: SignedIn,
    until: str = "",
    signature: str = "",
) -> Response:
    """A clip: to whom it was shown, by a link that has not expired."""
    check_link(site, f"/media/{token}", until, signature)
    return send_file(site, request, claims.media_key(site.store, account, token))


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
    request: Request, uid: str, position: int, site: TheSite, until: str = "", signature: str = ""
) -> Response:
    """A clip as it was sent to Label Studio: whoever has the signed link may see it until it expires."""
    try:
        site.signer.check(f"/media/task/{uid}/{position}", until, signature)
        key = pushed_key(site.store, uid, position)
    except (Forged, NotFound) as error:
        raise HTTPException(404, "no such clip") from error
    except Expired as error:
        raise HTTPException(410, "this link has expired; push the tasks again") from error
    return send_file(site, request, key, **{"Access-Control-Allow-Origin": "*"})


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


class UnmarkedFile(FileResponse):
    """A file without `Last-Modified` and `ETag`: when a copy was made, and which file it is, would tell clips apart."""

    def set_stat_headers(self, stat_result: os.stat_result) -> None:
        self.headers.setdefault("content-length", str(stat_result.st_size))

    def _should_use_range(self, http_if_range: str) -> bool:
        return False


def send_file(site: Site, request: Request, key: str, **headers: str) -> Response:
    """A stored file, whole or the range that was asked for; whole for `If-Range`, since there is no mark of ours that it could name."""
    kind = "image/png" if key.endswith(".png") else "video/mp4"
    headers = {"Cache-Control": "private, max-age=3600", "Content-Disposition": "inline", **headers}
    try:
        path = site.store.files.local(key)
        stat = path.stat()
        asked = None if "if-range" in request.headers else request.headers.get("range")
        span = range(stat.st_size) if asked is None else one_range(asked, stat.st_size)
        if span is None or len(span) > READ_AT_ONCE:
            response: Response = UnmarkedFile(path, media_type=kind, stat_result=stat)
        else:
            response = Response(_read(path, span), media_type=kind)
            response.headers["Accept-Ranges"] = "bytes"
            if asked is not None:
                response.status_code = 206
                response.headers["Content-Range"] = f"bytes {span[0]}-{span[-1]}/{stat.st_size}"
    except (FileNotFoundError, ValueError) as error:
        detail = "the file of this clip is gone; tell whoever runs the server"
        raise HTTPException(404, detail) from error
    response.headers.update(headers)
    return response


def one_range(asked: str, size: int) -> range | None:
    """The bytes that a Range header means, if it is one range with a part in the file; None for any other, which Starlette answers."""
    found = ONE_RANGE.fullmatch(asked)
    if found is None:
        return None
    first, last = found.groups()
    if first:
        span = range(int(first), min(int(last) + 1, size) if last else size)
    else:
        span = range(max(0, size - int(last)), size) if last else range(0)
    return span or None


def _read(path: Path, span: range) -> bytes:
    with path.open("rb") as file:
        file.seek(span.start)
        return file.read(len(span))


@router.get("/annotate/{name}")
def static(name: str) -> Response:
    path = STATIC / name
    if path.suffix not in STATIC_KINDS or path.name != name or not path.is_file():
        raise HTTPException(404, "no such file")
    return FileResponse(path, media_type=STATIC_KINDS[path.suffix])
