"""Where a project keeps its things: a folder, and in it `project.yaml` when the database or the clips live elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from annotation.database import parse_postgres_url
from reelhf.config import Config, load_config, to_yaml
from reelhf.errors import UserError

PLACE_FILE = "project.yaml"


class Place(Config):
    """Where a project keeps its judgments and its clips. `reelhf annotate init --database --media` writes it."""

    database: str | None = None
    """`postgresql://user@host/name`, with the password in ~/.pgpass or PGPASSWORD; unset, `annotation.db` in the folder."""
    media: str | None = None
    """Object storage that all servers share, such as `s3://bucket/prefix`; unset, the folder `media`."""


def read_place(folder: Path) -> Place:
    """What the folder's `project.yaml` says; the defaults where there is none."""
    path = folder / PLACE_FILE
    return load_config(Place, path) if path.is_file() else Place()


def write_place(folder: Path, place: Place) -> None:
    """Writes `project.yaml`, readable by its owner alone: an address may hold a password.

    Raises: UserError if the folder already says otherwise, holds a SQLite project, or cannot be written.
    """
    if place.database is not None:
        parse_postgres_url(place.database)
        if (folder / "annotation.db").exists():
            raise UserError(
                f"{folder} already holds a SQLite project; name a new folder for one in PostgreSQL"
            )
    path = folder / PLACE_FILE
    if path.exists():
        if read_place(folder) != place:
            raise UserError(f"{path} already names another place; edit it by hand if you mean it")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w", encoding="utf-8") as opened:
            opened.write(to_yaml(place))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def is_project(folder: Path) -> bool:
    """True if a project was made in this folder, whichever database it lives in."""
    return (folder / "annotation.db").exists() or (folder / PLACE_FILE).exists()
