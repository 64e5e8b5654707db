"""Tables that only grow: triggers refuse every update and delete, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

from collections.abc import Iterable

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
