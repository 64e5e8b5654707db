"""A store made by the first revision loses nothing on the way to the newest, and can go back."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from annotation import schema
from annotation.store import Store

MIGRATIONS = Path(schema.__file__).parent / "migrations"

OLD_ROWS = """
INSERT INTO account VALUES (1, 'ann', 'x', 'annotator', 'annotator-1', 0, 5);
INSERT INTO prompt VALUES ('p1', 'A red ball', 'en', 'p1', 5), ('p2', 'A red ball!', 'en', 'p1', 6), ('p3', 'Unused', 'en', 'p3', 7);
INSERT INTO clip VALUES
  (1, 'aa', 'p1', 'default', 't2v', 'm1', 's1', NULL, 7, 8.0, 5, 32, 32, 'clips/aa.mp4', NULL, NULL, 5),
  (2, 'bb', 'p1', 'fetv', 't2v', 'm2', 's2', 'ck', NULL, 8.0, 5, 32, 32, 'clips/bb.mp4', NULL, NULL, 6);
INSERT INTO task VALUES (1, 'p1', 'fetv', 't2v', 0, 2, 3, 'open', 1, NULL, 8.0, 5, 7);
INSERT INTO task_clip VALUES (1, 0, 1, 'shown/a.mp4'), (1, 1, 2, 'shown/b.mp4');
INSERT INTO presentation VALUES (1, 'tok', 1, 1, '[2, 1]', '["motion_quality"]', 'v1', 8);
INSERT INTO judgment VALUES (1, 1, 1, 1, 'key-0123', 'hash', 'best_worst', 0, 0, 'v1', 4.0, '[1.0, 2.0]', 'a note', 9);
INSERT INTO choice VALUES (1, 'motion_quality', 0, 'ok', 0, 1, 0, 1, 0, 1, NULL);
INSERT INTO skip VALUES (1, 1, 1, 1, 'other', 'why', 9);
INSERT INTO lease VALUES (1, 1, 1, 99);
INSERT INTO media VALUES ('media-token', 1, 0, 'shown/b.mp4');
"""


def config_for(connection: sa.Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


@pytest.fixture
def old_store(tmp_path: Path) -> Path:
    """A project folder as revision 0001 wrote it."""
    database = tmp_path / "old" / "annotation.db"
    database.parent.mkdir()
    engine = sa.create_engine(f"sqlite:///{database}")
    with engine.begin() as connection:
        command.upgrade(config_for(connection), "0001")
    engine.dispose()
    with sqlite3.connect(database) as connection:
        connection.executescript(OLD_ROWS)
    return database.parent


def rows_of(database: Path) -> dict[str, list[dict]]:
    connection = sqlite3.connect(database)
    connection.row_factory = sqlite3.Row
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    found = {
        name: [dict(row) for row in connection.execute(f"SELECT * FROM {name}")]
        for (name,) in names
        if name != "alembic_version"
    }
    connection.close()
    return found


def test_an_old_store_keeps_every_row_and_every_value(old_store):
    before = rows_of(old_store / "annotation.db")
    with Store.open(old_store) as store:
        after = rows_of(old_store / "annotation.db")
        names = {row["id"]: row["name"] for row in after["project"]}
        for table, rows in before.items():
            assert len(after[table]) == len(rows), table
            for old, new in zip(rows, after[table], strict=True):
                if table == "task":
                    assert names[new["project_id"]] == old["project"]
                kept = {name: value for name, value in old.items() if name != "project"}
                assert {name: new[name] for name in kept} == kept
        assert names == {1: "default", 2: "fetv"}
        shared = {(row["project_id"], row["clip_id"]) for row in after["project_clip"]}
        assert shared == {(1, 1), (2, 1), (2, 2)}, "a task's clips are in its project too"
        pool = {(row["project_id"], row["prompt_id"]) for row in after["project_prompt"]}
        assert pool == {(1, "p1"), (2, "p1"), (1, "p2"), (1, "p3")}
        assert store.counts()["judgments"] == 1


def test_the_copy_made_before_a_migration_is_the_old_store(old_store):
    before = rows_of(old_store / "annotation.db")
    Store.open(old_store).close()
    (copy,) = old_store.glob("annotation.db.before-*")
    assert rows_of(copy) == before


def test_the_checks_and_triggers_of_old_tables_are_still_there(old_store):
    with Store.open(old_store) as store:
        for statement in (
            "UPDATE task SET num_judgments = 9",
            "UPDATE task SET state = 'nonsense'",
            "UPDATE clip SET task_kind = 'nonsense'",
            "UPDATE judgment SET seconds = 1",
            "UPDATE judgment SET note = 'other words'",
            "UPDATE judgment SET note = '', seconds = 1",
            "UPDATE judgment SET rowid = 7, note = ''",
            "UPDATE task SET project_id = 99",
        ):
            with pytest.raises(sa.exc.IntegrityError), store.write() as connection:
                connection.exec_driver_sql(statement)
        with store.write() as connection:
            connection.exec_driver_sql("UPDATE judgment SET note = ''")


def test_going_back_restores_the_old_columns(old_store):
    before = rows_of(old_store / "annotation.db")
    Store.open(old_store).close()
    engine = sa.create_engine(f"sqlite:///{old_store / 'annotation.db'}")
    with engine.begin() as connection:
        command.downgrade(config_for(connection), "0001")
    engine.dispose()
    assert rows_of(old_store / "annotation.db") == before
