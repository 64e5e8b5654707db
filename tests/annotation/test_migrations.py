"""Tables are made, upgraded and taken back on both databases without losing a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from annotation import claims, routing, schema
from annotation.database import Database, open_postgres, open_sqlite
from annotation.place import Place, write_place
from annotation.store import Store
from reelhf.errors import UserError
from tests.annotation.annotation_cases import plain_verdict


@pytest.fixture
def empty(database: str, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A project folder whose database has no tables yet."""
    folder = tmp_path / "p"
    if database == "postgres":
        write_place(folder, Place(database=request.getfixturevalue("postgres").new_database()))
    folder.mkdir(exist_ok=True)
    return folder


def open_database(folder: Path) -> Database:
    place = folder / "project.yaml"
    if place.exists():
        return open_postgres(place.read_text().split("database:")[1].split()[0])
    return open_sqlite(folder / "annotation.db")


def migrate(folder: Path, revision: str, *, down: bool = False) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).parent / "migrations"))
    database = open_database(folder)
    with database._migrating() as connection:
        config.attributes["connection"] = connection
        (command.downgrade if down else command.upgrade)(config, revision)
    database.close()


def rows(folder: Path) -> dict[str, list[str]]:
    """Every row of every table, as text."""
    database = open_database(folder)
    with database.read() as connection:
        names = set(sa.inspect(connection).get_table_names()) - {"alembic_version"}
        found = {}
        for name in sorted(names):
            table = connection.execute(sa.text(f'SELECT * FROM "{name}"')).mappings()
            found[name] = sorted(
                json.dumps(dict(row), sort_keys=True, default=str) for row in table
            )
    database.close()
    return found


FIRST_PROJECT = (
    "INSERT INTO account VALUES (1, 'ann', 'hash', 'annotator', 'annotator-1', {no}, 1)",
    "INSERT INTO account VALUES (2, 'boss', 'hash', 'admin', 'annotator-2', {no}, 1)",
    "INSERT INTO session VALUES ('abc', 1, 'csrf', 99)",
    "INSERT INTO prompt VALUES ('p1', 'A ball.', 'en', 'p1', 1)",
    "INSERT INTO clip VALUES (1, 's1', 'p1', 'default', 't2v', 'm', 'base', NULL, 1, 8, 5, 32, 32, 'k1', NULL, NULL, 1)",
    "INSERT INTO clip VALUES (2, 's2', 'p1', 'default', 't2v', 'm', 'base', NULL, 2, 8, 5, 32, 32, 'k2', NULL, NULL, 1)",
    "INSERT INTO task VALUES (1, 'p1', 'default', 't2v', 0, 2, 0, 'open', 1, NULL, 8, 5, 1)",
    "INSERT INTO task_clip VALUES (1, 0, 1, 'shown/a')",
    "INSERT INTO task_clip VALUES (1, 1, 2, 'shown/b')",
    "INSERT INTO presentation VALUES (1, 'tok', 1, 1, '[1, 2]', '[\"motion_quality\"]', 'v1', 1)",
    "INSERT INTO media VALUES ('mtok', 1, 0, 'shown/a')",
    "INSERT INTO lease VALUES (1, 1, 1, 99)",
    "INSERT INTO judgment VALUES (1, 1, 1, 1, 'key-0123', 'hash', 'best_worst', {no}, {no}, 'v1', 2.5, NULL, 'a note', 1)",
    "INSERT INTO choice VALUES (1, 'motion_quality', 0, 'ok', 0, 1, 0, 1, {no}, {yes}, NULL)",
    "INSERT INTO skip VALUES (1, 1, 2, 1, 'other', 'why', 1)",
)
"""One row of every table of revision 0001, written as that revision wrote it."""


def test_a_store_of_the_first_revision_upgrades_without_losing_anything(empty):
    migrate(empty, "0001")
    database = open_database(empty)
    booleans = {"no": "0", "yes": "1"} if database.is_sqlite else {"no": "false", "yes": "true"}
    with database.engine.begin() as connection:
        for line in FIRST_PROJECT:
            connection.exec_driver_sql(line.format(**booleans))
        if not database.is_sqlite:  # rows with their own ids leave the counter behind
            connection.exec_driver_sql("SELECT setval('account_id_seq', 2)")
    database.close()
    before = rows(empty)
    assert all(before.values()), "every table has a row to lose"
    with Store.open(empty) as store:
        assert store.counts()["judgments"] == 1
        store.add_user("rev", "a long password", role="reviewer")
        with pytest.raises(sa.exc.IntegrityError, match="append-only"), store.write() as connection:
            connection.exec_driver_sql("DELETE FROM judgment")
    after = rows(empty)
    for table, kept in before.items():
        kept = [_without_project(row) for row in kept]  # a name that is now a row of its own
        lost = set(map(_core, kept)) - {_only(row, kept[0]) for row in after[table]}
        assert not lost, table
    assert [json.loads(row)["name"] for row in after["project"]] == ["default"]
    copies = list(empty.glob("annotation.db.before-*"))
    assert len(copies) == 1
    assert copies[0].stat().st_size > 1000


def _without_project(row: str) -> str:
    return json.dumps({k: v for k, v in json.loads(row).items() if k != "project"})


def _core(row: str) -> str:
    return json.dumps(json.loads(row), sort_keys=True)


def _only(row: str, like: str) -> str:
    """A row reduced to the columns that another has."""
    values = json.loads(row)
    return json.dumps({name: values.get(name) for name in json.loads(like)}, sort_keys=True)


def test_the_migrations_make_exactly_the_tables_of_the_schema(new_project):
    store = new_project(tasks=1)

    def comparable(_item: object, name: str, kind: str, *_: object) -> bool:
        # Alembic cannot read a descending index back from SQLite; the next test looks at that one.
        return not (store.database.is_sqlite and kind == "index" and name == "ix_task_queue")

    with store.read() as connection:
        options = {"compare_type": True, "include_object": comparable}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, schema.metadata) == []


def test_the_next_task_is_found_by_its_index_without_sorting(new_project):
    store = new_project(tasks=1)
    asks = {"me": 1, "now": 1, "expert": False, "admin": False}
    query = routing._next_task.params(asks).compile(store.database.engine)
    with store.write() as connection:
        if store.database.is_sqlite:
            values = tuple(query.params[name] for name in query.positiontup)
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", values).all()
        else:  # the table is so small that reading all of it is cheaper
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            rows = connection.exec_driver_sql(f"EXPLAIN {query}", query.params).all()
    plan = "\n".join(str(row) for row in rows)
    assert "ix_task_queue" in plan
    assert "TEMP B-TREE" not in plan
    assert "Sort" not in plan


def test_the_tables_can_be_taken_back_one_revision_at_a_time_and_made_again(empty):
    Store.open(empty).close()
    migrate(empty, "0001", down=True)
    migrate(empty, "base", down=True)
    assert rows(empty) == {}
    with Store.open(empty) as store:
        assert store.counts()["tasks"] == 0


def test_a_migration_that_would_orphan_rows_is_undone(tmp_path):
    with Store.open(tmp_path / "p") as store:
        with pytest.raises(RuntimeError, match="without their parent"):  # noqa: SIM117
            with store.database._migrating() as connection:
                connection.exec_driver_sql("INSERT INTO draft VALUES (77, '{}', 1)")
        with store.read() as connection:
            assert connection.execute(sa.select(schema.draft)).all() == []


def test_the_read_engine_cannot_write_on_postgres_and_takes_no_write_lock_on_sqlite(new_project):
    store = new_project(tasks=1)
    account = store.find_user("ann0")
    with store.read() as reading:
        assert (
            reading.execute(sa.select(sa.func.count()).select_from(schema.task)).scalar_one() == 1
        )
        task = claims.claim(store, account, lease_seconds=60)
        claims.submit(store, account, task.presentation, "key-0123", plain_verdict(task))
        seen = reading.execute(sa.select(sa.func.count()).select_from(schema.judgment)).scalar_one()
        assert seen == 0, "one read sees one state"
    if not store.database.is_sqlite:
        with pytest.raises(sa.exc.InternalError, match="read-only"), store.read() as connection:
            connection.execute(sa.insert(schema.site_secret).values(name="a", value="b"))


def test_an_address_that_is_no_database_is_refused_without_its_password(tmp_path):
    with pytest.raises(UserError, match="'mysql' address; expected postgresql://"):
        write_place(tmp_path / "a", Place(database="mysql://root@localhost/x"))
    pytest.importorskip("psycopg")
    write_place(tmp_path / "b", Place(database="postgresql://me:hush@127.0.0.1:1/none"))
    with pytest.raises(UserError, match="cannot reach the database") as refused:
        Store.open(tmp_path / "b")
    assert "hush" not in str(refused.value)
    assert (tmp_path / "b" / "project.yaml").stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match="already names another place"):
        write_place(tmp_path / "b", Place())
    Store.open(tmp_path / "c").close()
    with pytest.raises(UserError, match="already holds a SQLite project"):
        write_place(tmp_path / "c", Place(database="postgresql:///x"))
