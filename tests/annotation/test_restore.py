"""A backup from PostgreSQL becomes a project again; nothing is restored over anything. SQLite's are in test_erasure."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from annotation import schema
from annotation.database import parse_postgres_url, postgres_client
from annotation.place import read_place
from annotation.restore import restore
from annotation.store import Store
from reelhf.cli import main
from reelhf.errors import UserError
from tests.annotation.annotation_cases import Person, rows
from tests.postgres_cluster import Cluster

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.parametrize("database", ["postgres"], indirect=True),
]


@pytest.fixture
def judged(new_project) -> Store:
    store: Store = new_project(tasks=3, annotators=1)
    for _ in range(2):
        Person(store, "ann0").judge()
    return store


def tables_of(url: str) -> list[str]:
    engine = sa.create_engine(url.replace("postgresql", "postgresql+psycopg", 1))
    try:
        return sa.inspect(engine).get_table_names()
    finally:
        engine.dispose()


def everything(store: Store) -> dict[str, list[tuple]]:
    return {
        table.name: [tuple(row) for row in rows(store, table)]
        for table in schema.metadata.sorted_tables
    }


def test_a_backup_of_postgres_is_restored_into_an_empty_database_row_by_row(
    judged, postgres, tmp_path, capsys
):
    dump, folder = tmp_path / "copy.dump", tmp_path / "new"
    main(["annotate", "backup", str(judged.media.parent), "--out", str(dump)])
    assert "--database postgresql://" in capsys.readouterr().out
    url = postgres.new_database()
    media = ["--media", str(judged.media), "--database", url]
    main(["annotate", "restore", str(dump), str(folder), *media])
    said = capsys.readouterr().out
    assert "3 tasks, 2 judgments" in said
    assert "media files are there" in said
    assert read_place(folder).database == url
    with Store.open(folder, create=False) as copy:
        assert everything(copy) == everything(judged)
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), copy.write() as connection:
            connection.execute(sa.delete(schema.judgment))
        assert Person(copy, "ann0").judge().judgment_id == 3, "its counters go on where they were"


def test_what_cannot_be_restored_is_refused_and_leaves_no_table_and_no_folder(
    judged, postgres: Cluster, tmp_path: Path, capsys
):
    dump = judged.backup(tmp_path / "copy.dump")
    empty, own = postgres.new_database(), read_place(judged.media.parent).database
    cut = tmp_path / "cut.dump"
    cut.write_bytes(dump.read_bytes()[:-2000])
    newer, other = tmp_path / "newer.dump", tmp_path / "other.dump"
    with judged.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    judged.backup(newer)
    foreign = postgres.new_database()
    with psycopg.connect(foreign, autocommit=True) as connection:
        connection.execute("CREATE TABLE recipes (name text)")
    postgres_client(
        "pg_dump", "--format=custom", f"--file={other}", database=parse_postgres_url(foreign)
    )
    for source, database, words in (
        (dump, None, "make an empty database"),
        (dump, own, "is not empty"),
        (dump, foreign, "recipes among them"),
        (dump, "mysql://x/y", "expected postgresql://"),
        (dump, empty + "&port=1", "cannot reach the database"),
        (cut, empty, "cannot be read"),
        (newer, empty, "newer version (revision 9999"),
        (other, empty, "not of an annotation project"),
    ):
        with pytest.raises(UserError) as refused:
            restore(source, tmp_path / "new", database=database)
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "new").exists()
    assert tables_of(empty) == []
    assert tables_of(foreign) == ["recipes"]
    assert restore(dump, tmp_path / "new", database=empty).judgments == 2
    with pytest.raises(UserError, match="already holds a project"):
        restore(dump, tmp_path / "new", database=postgres.new_database())


def test_a_restore_that_breaks_off_leaves_the_database_empty(
    judged, postgres, tmp_path, monkeypatch
):
    """A backup that only shows its damage on the way in, past the check."""
    dump = judged.backup(tmp_path / "copy.dump")
    dump.write_bytes(dump.read_bytes()[:-2000])
    monkeypatch.setattr("annotation.restore._check_dump", lambda source: None)
    url = postgres.new_database()
    with pytest.raises(UserError, match="pg_restore failed"):
        restore(dump, tmp_path / "new", database=url)
    assert tables_of(url) == []
    assert not (tmp_path / "new" / "project.yaml").exists()
