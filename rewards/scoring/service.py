"""A small HTTP service: upload a clip, get its scores.

GET  /health      {"status": "ok", "device": ..., "rewards": hash}
GET  /dimensions  what is scored, with each model's validated range
POST /score       form fields `clip` (a video file) and `prompt` -> scores, or {"detail": why not}
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, File, Form, Header, HTTPException, UploadFile

from reelhf.errors import UserError
from reelhf.video import VIDEO_SUFFIXES, probe_video, read_video
from rewards.data import Clip

if TYPE_CHECKING:
    from rewards.scoring.scorer import Scorer

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    max_megabytes: float = 64.0
    max_frames: int = 600
    max_pixels: int = 1920 * 1088
    max_prompt: int = 4000
    """Characters."""
    max_waiting: int = 8
    """Requests being scored or waiting for it; more are refused with 503."""


def create_app(
    scorer: Scorer, limits: Limits | None = None, *, token: str | None = None
) -> FastAPI:
    """The service over a loaded scorer. With a token, /score asks for `Authorization: Bearer TOKEN`."""
    app = FastAPI(title="ReelHF rewards", docs_url=None, redoc_url=None)
    allowed = limits or Limits()
    one_at_a_time = threading.Lock()  # a forward pass uses the whole device
    places = threading.BoundedSemaphore(allowed.max_waiting)

    def signed_in(authorization: Annotated[str | None, Header()] = None) -> None:
        given = (authorization or "").removeprefix("Bearer ")
        if token is not None and not secrets.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, "expected the header `Authorization: Bearer TOKEN`")

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "device": str(scorer.device), "rewards": scorer.hash}

    @app.get("/dimensions")
    def dimensions() -> dict[str, Any]:
        return {"dimensions": describe(scorer)}

    @app.post("/score", dependencies=[Depends(signed_in)])
    def score(
        clip: Annotated[UploadFile, File()], prompt: Annotated[str, Form()]
    ) -> dict[str, Any]:
        if not prompt.strip() or len(prompt) > allowed.max_prompt:
            raise HTTPException(
                422, f"prompt of {len(prompt)} characters; expected 1 to {allowed.max_prompt}"
            )
        if not places.acquire(blocking=False):
            raise HTTPException(503, f"{allowed.max_waiting} clips are waiting; try again later")
        try:
            decoded = receive(clip, allowed)
            with one_at_a_time:
                (row,) = scorer.score_clips([decoded], [prompt])
        finally:
            places.release()
        if not row["valid"]:
            raise HTTPException(422, f"the clip could not be scored: {row['reason']}")
        return row

    return app


def describe(scorer: Scorer) -> dict[str, dict[str, Any]]:
    """Dimension -> weight in the total, and the raw range it was validated in (null where unknown)."""
    found = {}
    for model in scorer.composite.models:
        for index, name in enumerate(model.dimensions):
            bounds = [
                float(b[index]) if b[index].isfinite() else None for b in (model.low, model.high)
            ]
            found[name] = {"weight": scorer.composite.weights[name], "validated_range": bounds}
    return found


def receive(upload: UploadFile, limits: Limits) -> Clip:
    """The uploaded clip, decoded. Raises HTTPException: 413 for too much, 415 for no video, 422 for one that is damaged."""
    suffix = Path(upload.filename or "").suffix.lower()
    if suffix not in VIDEO_SUFFIXES:
        raise HTTPException(
            415, f"{upload.filename!r} is no video file; expected {', '.join(VIDEO_SUFFIXES)}"
        )
    folder = Path(tempfile.mkdtemp(prefix="reelhf-score-"))
    try:
        path = folder / f"clip{suffix}"
        room = limits.max_megabytes * 1e6
        with path.open("wb") as file:
            while block := upload.file.read(BLOCK_BYTES):
                room -= len(block)
                if room < 0:
                    raise HTTPException(413, f"more than {limits.max_megabytes:g} MB")
                file.write(block)
        info = probe_video(path)  # counts frames without decoding them
        if info.frames > limits.max_frames or info.width * info.height > limits.max_pixels:
            raise HTTPException(
                413,
                f"{info.frames} frames of {info.width} x {info.height}; at most {limits.max_frames} frames of {limits.max_pixels} pixels",
            )
        return Clip(*read_video(path))
    except UserError as error:
        raise HTTPException(422, str(error).replace(str(folder) + "/", "")) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serve until interrupted. Raises UserError when the port is taken."""
    import socket

    import uvicorn

    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror}; give another --port"
        ) from None
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
