"""Tables that only grow: triggers refuse every update and delete, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa
from alembic import op

VERBS = ("UPDATE", "DELETE")


def forbid_changes(tables: Iterable[str]) -> None:
    """Makes tables append-only. On PostgreSQL, TRUNCATE is refused too."""
    if op.get_bind().dialect.name == "sqlite":
        for table in tables:
            for verb in VERBS:
                op.execute(
                    f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                    f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
                )
        return
    op.execute(
        "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = '23000'; END $$"
    )
    for table in tables:
        for verb in VERBS:
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                "FOR EACH ROW EXECUTE FUNCTION refuse_change()"
            )
        op.execute(
            f"CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )


def allow_changes(tables: Iterable[str]) -> None:
    """Takes the triggers away: before a table is dropped, or remade by a migration that calls `forbid_changes` after."""
    sqlite = op.get_bind().dialect.name == "sqlite"
    for table in tables:
        for verb in VERBS if sqlite else (*VERBS, "TRUNCATE"):
            on = "" if sqlite else f" ON {table}"
            op.execute(f"DROP TRIGGER {table}_no_{verb.lower()}{on}")


def let_notes_be_emptied(tables: Iterable[str]) -> None:
    """Of append-only tables with a note: the one change that is let through is a note that said something and says nothing."""
    for table in tables:
        drop_update_trigger(table)
        make_update_trigger(table, when=f"NOT ({_only_empties_the_note(table)})")


def drop_update_trigger(table: str) -> None:
    on = "" if op.get_bind().dialect.name == "sqlite" else f" ON {table}"
    op.execute(f"DROP TRIGGER {table}_no_update{on}")


def make_update_trigger(table: str, when: str | None = None) -> None:
    sqlite = op.get_bind().dialect.name == "sqlite"
    each = "" if sqlite else "FOR EACH ROW "
    condition = f"WHEN ({when}) " if when else ""
    action = (
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        if sqlite
        else "EXECUTE FUNCTION refuse_change()"
    )
    op.execute(
        f"CREATE TRIGGER {table}_no_update BEFORE UPDATE ON {table} {each}{condition}{action}"
    )


def _only_empties_the_note(table: str) -> str:
    """The one change an append-only row may see: a note that said something says nothing."""
    sqlite = op.get_bind().dialect.name == "sqlite"
    same = "NEW.{0} IS OLD.{0}" if sqlite else "NEW.{0}::text IS NOT DISTINCT FROM OLD.{0}::text"
    columns = [column["name"] for column in sa.inspect(op.get_bind()).get_columns(table)]
    unchanged = [same.format(name) for name in columns if name != "note"]
    return " AND ".join(["OLD.note <> ''", "NEW.note = ''", *unchanged])
