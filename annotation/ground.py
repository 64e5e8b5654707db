"""What every part of a project stands on: its database, its files, its clock and the wording of its questions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, insert, select

from annotation import audit
from annotation import schema as t
from annotation.database import Database
from annotation.records import Guideline, Question, load_guideline
from annotation.storage import Files
from reelhf.errors import UserError


class Ground:
    """An open project without anything to do in it; `annotation.store.Store` is the whole."""

    def __init__(self, database: Database, files: Files, now: Callable[[], float]):
        self.database = database
        self.files = files
        self.media = files.folder
        self._now = now
        self.guideline: Guideline = load_guideline()
        self._wordings: dict[str, Guideline] = {}  # of other versions; none ever changes

    def close(self) -> None:
        self.database.close()

    def write(self) -> AbstractContextManager[Connection]:
        """One write transaction; commits at the end, rolls back on any error."""
        return self.database.write()

    def read(self) -> AbstractContextManager[Connection]:
        """One consistent read."""
        return self.database.read()

    def glance(self) -> AbstractContextManager[Connection]:
        """A single statement that reads."""
        return self.database.glance()

    def now_ms(self) -> int:
        return int(self._now() * 1000)

    def _record(self, connection: Connection, action: str, subject: str, **detail: Any) -> None:
        audit.record(connection, self.now_ms(), audit.COMMAND_LINE, action, subject, detail)

    # --- question texts ---

    def remember_guideline(self, guideline: Guideline | None = None) -> None:
        """Keeps the wording of a version, by default the present one. Raises UserError if that version has another wording here."""
        guideline = guideline or self.guideline
        texts = _texts(guideline)
        with self.read() as connection:
            known = connection.execute(_wording, {"version": guideline.version}).scalar()
        if known == texts:
            return
        if known is not None:
            raise UserError(
                f"the question texts changed, but their version is still {guideline.version!r}; give questions.yaml a new version"
            )
        values = {"version": guideline.version, "questions": texts, "created_ms": self.now_ms()}
        try:
            with self.write() as connection:
                connection.execute(insert(t.guideline).values(values))
        except sa.exc.IntegrityError:
            self.remember_guideline(guideline)  # another process was quicker

    def guideline_versions(self) -> list[str]:
        """Every version whose wording is kept here, oldest first."""
        oldest_first = (t.guideline.c.created_ms, t.guideline.c.version)
        with self.read() as connection:
            return list(
                connection.execute(select(t.guideline.c.version).order_by(*oldest_first)).scalars()
            )

    def guideline_of(self, version: str | None) -> Guideline:
        """The wording of a version that was shown here or that a project asks for; the present one for None and where it was not kept."""
        if version is None or version == self.guideline.version:
            return self.guideline
        if version in self._wordings:
            return self._wordings[version]
        with self.read() as connection:
            texts = connection.execute(_wording, {"version": version}).scalar()
        if texts is None:  # shown before wordings were kept
            return self.guideline
        questions = {
            name: Question(**{**q, "applies_to": tuple(q["applies_to"])})
            for name, q in texts["questions"].items()
        }
        self._wordings[version] = Guideline(version, questions, texts["guide"])
        return self._wordings[version]


_wording = select(t.guideline.c.questions).where(t.guideline.c.version == sa.bindparam("version"))


def _texts(guideline: Guideline) -> dict[str, Any]:
    questions = {
        name: {**asdict(q), "applies_to": list(q.applies_to)}
        for name, q in guideline.questions.items()
    }
    return {"questions": questions, "guide": dict(guideline.guide)}
