"""A backup becomes a project again."""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select

from annotation import schema as t
from annotation.store import Store
from reelhf.errors import UserError

SQLITE_HEAD = b"SQLite format 3\x00"


@dataclass(frozen=True)
class Restored:
    """What the new project holds."""

    tasks: int
    judgments: int
    files: int
    """Media files that its rows name."""
    missing: int
    """Of them, those that are not in its media folder."""


def restore_sqlite(source: Path, project: Path, media: Path | None = None) -> Restored:
    """Makes a project of a SQLite backup; an older one is upgraded as it is opened.

    Args:
        source: what `Store.backup` wrote.
        project: a folder without a project.
        media: copied beside it, if given.
    Raises: UserError if the backup is none or is damaged, or the folder holds a project.
    """
    database = project / "annotation.db"
    if database.exists() or (project / "project.yaml").exists():
        raise UserError(f"{project} already holds a project; name a new folder")
    _check(source)
    if media is not None and not media.is_dir():
        raise UserError(f"there is no media folder at {media}")
    try:
        project.mkdir(parents=True, exist_ok=True)
        if media is not None:
            shutil.copytree(media, project / "media", dirs_exist_ok=True)
        aside = database.with_suffix(".restoring")
        shutil.copyfile(source, aside)
        aside.replace(database)  # last: until then the folder holds no project
    except OSError as error:
        raise UserError(f"cannot restore to {project}: {error.strerror or error}") from error
    with Store.open(project, create=False) as store:
        counts = store.counts()
        keys = _keys(store)
        missing = sum(not (store.media / key).is_file() for key in keys)
    return Restored(counts["tasks"], counts["judgments"], len(keys), missing)


def _check(source: Path) -> None:
    try:
        with source.open("rb") as file:
            head = file.read(len(SQLITE_HEAD))
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from error
    if head != SQLITE_HEAD:
        raise UserError(
            f"{source} is no SQLite backup. What PostgreSQL's backup wrote is restored with: pg_restore --clean --dbname DATABASE {source}"
        )
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
