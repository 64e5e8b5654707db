"""What an annotator reads when a request fails: each refusal has its status code, and nothing was stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import OperationalError

from annotation.refusals import Conflict, NotFound, Refused


def not_found(_request: Request, error: NotFound) -> Response:
    return JSONResponse({"detail": str(error)}, status_code=404)


def conflict(_request: Request, error: Conflict) -> Response:
    return JSONResponse({"detail": str(error)}, status_code=409)


def refused(_request: Request, error: Refused) -> Response:
    return JSONResponse({"detail": str(error), "problems": error.problems}, status_code=422)


def busy(_request: Request, error: OperationalError) -> Response:
    if "locked" not in str(error) and "full" not in str(error):
        raise error
    return JSONResponse(
        {"detail": "the database is busy or the disk is full; nothing was stored, try again"},
        status_code=503,
        headers={"Retry-After": "2"},
    )


ERROR_ANSWERS: dict[int | type[Exception], Callable[[Request, Any], Response]] = {
    NotFound: not_found,
    Conflict: conflict,
    Refused: refused,
    OperationalError: busy,
}
