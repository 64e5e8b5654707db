"""Stores of released revisions keep everything when they are upgraded."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from annotation import schema
from annotation.database import open_sqlite
from annotation.store import Store
from reelhf.errors import UserError
from tests.annotation.annotation_cases import rows

NOW = 1_800_000_000_000
FIRST_ROWS = {
    "account": [(1, "ann", "hash", "annotator", "annotator-1", False, NOW)],
    "prompt": [("p1", "A prompt.", "en", "p1", NOW)],
    "clip": [
        (
            i,
            f"sha{i}",
            "p1",
            "default",
            "t2v",
            "m",
            "s",
            None,
            i,
            8.0,
            5,
            32,
            32,
            f"clips/{i}",
            None,
            None,
            NOW,
        )
        for i in (1, 2)
    ],
    "session": [("token", 1, "csrf", NOW)],
    "task": [
        (1, "p1", "default", "t2v", 0, 1, 0, "done", 1, None, 8.0, 5, NOW),
        (2, "p1", "default", "t2v", 0, 2, 3, "open", 0, None, 8.0, 5, NOW),
    ],
    "task_clip": [
        (1, 0, 1, "shown/1"),
        (1, 1, 2, "shown/2"),
        (2, 0, 1, "shown/1"),
        (2, 1, 2, "shown/2"),
    ],
    "presentation": [
        (1, "tok1", 1, 1, "[2, 1]", '["motion_quality"]', "2026-11-a", NOW),
        (2, "tok2", 2, 1, "[1, 2]", '["motion_quality"]', "2026-11-a", NOW),
    ],
    "media": [("m1", 1, 0, "shown/2")],
    "lease": [(2, 1, 2, NOW)],
    "judgment": [
        (
            1,
            1,
            1,
            1,
            "key-0123",
            "hash",
            "best_worst",
            False,
            False,
            "2026-11-a",
            4.0,
            "[1.0]",
            "a note",
            NOW,
        )
    ],
    "choice": [(1, "motion_quality", 0, "ok", 0, 1, 0, 1, False, True, None)],
    "skip": [(1, 2, 1, 2, "other", "tired", NOW)],
}


@pytest.fixture
def first_revision(tmp_path: Path) -> Path:
    """A project of the first released revision, with a row in every table."""
    database = open_sqlite(tmp_path / "annotation.db")
    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).parent / "migrations"))
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for table, values in FIRST_ROWS.items():
            for row in values:
                marks = ", ".join("?" * len(row))
                connection.exec_driver_sql(f"INSERT INTO {table} VALUES ({marks})", row)
    database.close()
    return tmp_path


def columns(database: Path, table: str, names: list[str]) -> list[tuple]:
    engine = sa.create_engine(f"sqlite:///{database}")
    with engine.connect() as connection:
        return [
            tuple(r) for r in connection.exec_driver_sql(f"SELECT {', '.join(names)} FROM {table}")
        ]


def names_in(database: Path, table: str) -> list[str]:
    engine = sa.create_engine(f"sqlite:///{database}")
    with engine.connect() as connection:
        return [c["name"] for c in sa.inspect(connection).get_columns(table)]


def test_a_store_of_the_first_revision_loses_nothing_and_works_on(first_revision):
    path = first_revision / "annotation.db"
    old_names = {table: names_in(path, table) for table in FIRST_ROWS}
    before = {table: columns(path, table, names) for table, names in old_names.items()}
    with Store.open(first_revision) as store:
        kept = set(names_in(path, "judgment"))
        assert set(old_names["judgment"]) <= kept
        for table, names in old_names.items():
            assert columns(path, table, names) == before[table], table
        (judgment,) = rows(store, schema.judgment)
        assert (judgment.revision, judgment.repeat, judgment.purpose) == (0, 0, "work")
        assert judgment.watched_seconds == [1.0]
        assert {task.kind for task in rows(store, schema.task)} == {"best_worst"}
        assert rows(store, schema.choice)[0].confirmed is None
        for table in ("judgment", "choice", "skip"):
            with pytest.raises(sa.exc.IntegrityError, match="append-only"), store.write() as c:
                c.exec_driver_sql(f"DELETE FROM {table}")
    (copy,) = first_revision.glob("annotation.db.before-*")
    assert columns(copy, "judgment", old_names["judgment"]) == before["judgment"]


def test_question_texts_cannot_change_under_one_version(tmp_path):
    with Store.open(tmp_path) as store:
        assert store.guideline_of(store.guideline.version) is store.guideline
        with store.write() as connection:
            connection.exec_driver_sql("UPDATE guideline SET questions = '{}'")
        with pytest.raises(UserError, match=r"give questions\.yaml a new version"):
            store.remember_guideline()


def test_the_wording_of_an_older_version_is_still_known(tmp_path):
    with Store.open(tmp_path) as store:
        texts = rows(store, schema.guideline)[0].questions
        texts["questions"]["motion_quality"]["label"] = "Movement"
        with store.write() as connection:
            connection.execute(
                sa.insert(schema.guideline).values(version="older", questions=texts, created_ms=0)
            )
        old = store.guideline_of("older")
    assert old.version == "older"
    assert old.questions["motion_quality"].label == "Movement"
    assert old.questions["motion_quality"].translations["zh"]["label"] == "运动"
