"""A backup becomes a project again."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import select

from annotation import schema as t
from annotation.database import (
    known_revisions,
    open_postgres,
    parse_postgres_url,
    postgres_client,
)
from annotation.place import PLACE_FILE, Place, write_place
from annotation.store import Store
from reelhf.errors import UserError

SQLITE_HEAD = b"SQLite format 3\x00"
DUMP_HEAD = b"PGDMP"


@dataclass(frozen=True)
class Restored:
    """What the new project holds."""

    tasks: int
    judgments: int
    files: int
    """Media files that its rows name."""
    missing: int
    """Of them, those that are not in its media folder."""


def restore(
    source: Path, project: Path, media: Path | None = None, *, database: str | None = None
) -> Restored:
    """Makes a project of a backup; an older one is upgraded as it is opened.

    Args:
        source: what `Store.backup` wrote.
        project: a folder without a project.
        media: copied beside it, if given.
        database: the address of an empty PostgreSQL database, for a backup that came from one.
    Raises: UserError if the backup is none, is damaged or was made by a newer version, the folder holds a project, or the database
    holds anything.
    """
    if (project / "annotation.db").exists() or (project / PLACE_FILE).exists():
        raise UserError(f"{project} already holds a project; name a new folder")
    if media is not None and not media.is_dir():
        raise UserError(f"there is no media folder at {media}")
    if _is_dump(source):
        if database is None:
            raise UserError(
                f"{source} is a backup from PostgreSQL; make an empty database (createdb NAME) and name it with --database postgresql://user@host/NAME"
            )
        url = parse_postgres_url(database)
        _check_dump(source)
        _check_empty(database)
    else:
        _check_sqlite(source)
        if database is not None:
            raise UserError(f"{source} is a SQLite backup; it is restored without --database")
    try:
        project.mkdir(parents=True, exist_ok=True)
        if media is not None:
            shutil.copytree(media, project / "media", dirs_exist_ok=True)
        if database is None:
            aside = project / "annotation.db.restoring"
            shutil.copyfile(source, aside)
            aside.replace(project / "annotation.db")  # last: until then the folder holds no project
        else:
            whole = ("--single-transaction", "--exit-on-error", "--no-owner", "--no-privileges")
            postgres_client("pg_restore", *whole, str(source), database=url)
            write_place(project, Place(database=database))
    except OSError as error:
        raise UserError(f"cannot restore to {project}: {error.strerror or error}") from error
    return _found(project)


def _found(project: Path) -> Restored:
    with Store.open(project, create=False) as store:
        counts = store.counts()
        keys = _keys(store)
        missing = sum(not (store.media / key).is_file() for key in keys)
    return Restored(counts["tasks"], counts["judgments"], len(keys), missing)


def _is_dump(source: Path) -> bool:
    """True for a backup from PostgreSQL, False for one from SQLite. Raises UserError if it is neither."""
    try:
        with source.open("rb") as file:
            head = file.read(len(SQLITE_HEAD))
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from error
    if head != SQLITE_HEAD and not head.startswith(DUMP_HEAD):
        raise UserError(
            f"{source} is no backup: neither a SQLite database nor what pg_dump writes (what `reelhf annotate backup` wrote is one)"
        )
    return head != SQLITE_HEAD


def _check_sqlite(source: Path) -> None:
    try:
        connection = sqlite3.connect(f"file:{source}?mode=ro", uri=True)
        try:
            verdict = connection.execute("PRAGMA integrity_check").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        raise UserError(f"{source} is damaged: {error}") from error
    if verdict != "ok":
        raise UserError(f"{source} is damaged: {verdict}")


def _check_dump(source: Path) -> None:
    try:
        postgres_client("pg_restore", f"--file={os.devnull}", str(source))  # reads all of it
        told = postgres_client(
            "pg_restore", "--data-only", "--table=alembic_version", "--file=-", str(source)
        )
    except UserError as error:
        raise UserError(f"{source} cannot be read: {error}") from error
    found = re.search(r"^COPY .*alembic_version .*;\n(\w+)$", told, flags=re.MULTILINE)
    if found is None:
        raise UserError(f"{source} is a backup of another database, not of an annotation project")
    head, known = known_revisions()
    if found[1] not in known:
        raise UserError(
            f"{source} was made by a newer version (revision {found[1]}; this one knows {head})"
        )


def _check_empty(database: str) -> None:
    with (
        closing(open_postgres(database)) as opened,
        opened.engine.connect() as connection,
    ):
        tables = sa.inspect(connection).get_table_names()
    if tables:
        raise UserError(
            f"{opened.name} is not empty ({len(tables)} tables, {tables[0]} among them); nothing is restored over it. "
            "Name an empty database: createdb NAME"
        )


def _keys(store: Store) -> set[str]:
    """Every file of the media folder that a row names and that was not purged."""
    alive = t.clip.c.purged_ms.is_(None)
    with store.read() as connection:
        keys = set(connection.execute(select(t.clip.c.storage_key).where(alive)).scalars())
        keys |= set(connection.execute(select(t.clip.c.first_frame_key).where(alive)).scalars())
        keys |= set(
            connection.execute(
                select(t.task_clip.c.shown_key)
                .join(t.clip, t.clip.c.id == t.task_clip.c.clip_id)
                .where(alive)
            ).scalars()
        )
    return {key for key in keys if key}
