"""One annotation project: a folder with its media, and its tables in SQLite beside them or in PostgreSQL.

What people say is append-only, enforced by triggers; `annotation.database` says what a transaction is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import select

from annotation import schema as t
from annotation.accounts import Accounts
from annotation.database import BUSY_SECONDS, open_postgres, open_sqlite
from annotation.place import Place, read_place
from annotation.storage import Files
from annotation.tasks import Tasks
from reelhf.errors import UserError


class Store(Accounts, Tasks):
    """Opens (and creates, and upgrades) a project. Safe to share among threads."""

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        create: bool = True,
        now: Callable[[], float] = time.time,
        busy_seconds: float = BUSY_SECONDS,
    ) -> Store:
        """Opens a project folder, or a `.db` file whose media lie in `media/` beside it.

        Args:
            create: False refuses a project that is not there.
            now: the clock, in seconds since 1970.
            busy_seconds: how long a write waits for others before it gives up.
        Raises: UserError if the place cannot be written or reached, is no project, or was made by a newer version.
        """
        path = Path(str(path).removeprefix("sqlite:///"))
        file = path if path.suffix in (".db", ".sqlite") else path / "annotation.db"
        place = read_place(file.parent) if file.parent == path else Place()
        if not create and place.database is None and not file.exists():
            raise UserError(f"no annotation project at {path} (looked for {file})")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            media = file.parent / "media"
            media.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make a project at {path}: {error.strerror}") from error
        if not os.access(file.parent, os.W_OK):
            raise UserError(f"cannot write to {file.parent}: the folder is read-only")
        if place.database is None:
            database = open_sqlite(file, busy_seconds=busy_seconds)
        else:
            database = open_postgres(place.database, busy_seconds=busy_seconds)
        store = cls(database, Files(media, place.media), now)
        try:
            database.upgrade(copy_beside=file)
            store.remember_guideline()
        except sa.exc.DatabaseError as error:
            store.close()
            raise UserError(
                f"{database.name} is not an annotation database: {error.orig}"
            ) from error
        except UserError:
            store.close()
            raise
        return store

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def counts(self) -> dict[str, int]:
        """Rows that say how far the project is: prompts, clips, tasks, open tasks, judgments (human and simulated), skips.

        A judgment that was changed counts once; `revisions` counts the changes.
        """
        first = t.judgment.c.revision == 0

        def number(table: sa.Table, *where: sa.ColumnElement[bool]) -> sa.ScalarSelect[int]:
            return select(sa.func.count()).select_from(table).where(*where).scalar_subquery()

        query = select(
            number(t.prompt).label("prompts"),
            number(t.clip).label("clips"),
            number(t.task).label("tasks"),
            number(t.task, t.task.c.state == "open").label("open_tasks"),
            number(t.task, t.task.c.state == "flagged").label("flagged_tasks"),
            number(t.task, t.task.c.state == "conflict").label("conflict_tasks"),
            number(t.judgment, first).label("judgments"),
            number(t.judgment, first, t.judgment.c.simulated).label("simulated_judgments"),
            number(t.judgment, first, ~t.judgment.c.simulated).label("human_judgments"),
            number(t.judgment, ~first).label("revisions"),
            number(t.skip).label("skips"),
            number(t.flag).label("flags"),
        )
        with self.read() as connection:
            return dict(connection.execute(query).one()._mapping)

    def clips_per_task(self) -> int:
        """The largest K among the tasks, 4 if there is none."""
        query = select(sa.func.max(t.task_clip.c.slot))
        with self.read() as connection:
            largest = connection.execute(query).scalar()
        return 4 if largest is None else largest + 1

    def backup(self, path: Path) -> Path:
        """Writes a consistent copy of the database (not of the media) while it is in use."""
        if path.exists():
            raise UserError(f"{path} is already there; name a new file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.database.copy_to(path)
        except (OSError, sa.exc.DatabaseError) as error:
            raise UserError(f"cannot write the backup {path}: {error}") from error
        return path
