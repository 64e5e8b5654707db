"""What an annotator reads when a request fails: each refusal has its status code, and nothing was stored."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from annotation.database import Busy
from annotation.refusals import Conflict, NotFound, Refused
from reelhf.errors import UserError

RETRY_SECONDS = 2
SQLITE_FULL = ("database or disk is full", "disk I/O error")
POSTGRES_FULL = "53100"
"""The code of `disk_full`: the words come in the server's language."""
SQLITE_BUSY = ("database is locked", "unable to open database file", "readonly database")


def not_found(_request: Request, error: NotFound) -> Response:
    return JSONResponse({"detail": str(error)}, status_code=404)


def conflict(_request: Request, error: Conflict) -> Response:
    return JSONResponse({"detail": str(error)}, status_code=409)


def refused(_request: Request, error: Refused) -> Response:
    return JSONResponse({"detail": str(error), "problems": error.problems}, status_code=422)


def user_error(_request: Request, error: UserError) -> Response:
    return JSONResponse({"detail": str(error)}, status_code=422)


def unavailable(_request: Request | None, error: Exception) -> Response:
    """503 for a database that is busy or gone, 507 for a disk that is full. The browser keeps the answer and tries again."""
    said, cause = str(error), getattr(error, "orig", None)
    full = getattr(cause, "sqlstate", None) == POSTGRES_FULL
    if isinstance(cause, sqlite3.Error):
        full = any(words in said for words in SQLITE_FULL)
        if not full and not any(words in said for words in SQLITE_BUSY):
            raise error  # a mistake of ours, which trying again does not mend
    if full:
        detail, status = "the server's disk is full; nothing was stored, tell whoever runs it", 507
    else:
        detail, status = "the database is busy or away; nothing was stored, try again", 503
    return JSONResponse(
        {"detail": detail}, status_code=status, headers={"Retry-After": str(RETRY_SECONDS)}
    )


def disk(_request: Request, error: OSError) -> Response:
    if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        raise error
    return JSONResponse(
        {"detail": "the server's disk is full; nothing was stored, tell whoever runs it"},
        status_code=507,
        headers={"Retry-After": str(RETRY_SECONDS)},
    )


ERROR_ANSWERS: dict[int | type[Exception], Callable[[Request, Any], Response]] = {
    NotFound: not_found,
    Conflict: conflict,
    Refused: refused,
    UserError: user_error,
    OperationalError: unavailable,
    PoolTimeout: unavailable,
    Busy: unavailable,
    OSError: disk,
}
