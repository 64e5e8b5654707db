"""Revisions, task kinds, purposes (gold, practice, exam, re-test, adjudication), flags and their rulings, question texts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from alembic.operations import BatchOperations

from annotation.migrations.append_only import (
    allow_changes,
    forbid_changes,
    let_notes_be_emptied,
)

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

NEW_APPEND_ONLY = ("flag", "ruling", "exam")
QUEUE = ["state", sa.text("priority DESC"), "id"]
OLD_TASK_CHECKS = {
    "ck_task_state": "state in ('open', 'done', 'flagged')",
    "ck_task_overlap": "num_judgments <= need_n",
    "ck_task_need_n": "need_n >= 1",
}
NEW_TASK_CHECKS = {
    **OLD_TASK_CHECKS,
    "ck_task_state": "state in ('open', 'done', 'flagged', 'conflict', 'removed')",
    "ck_task_kind": "kind in ('best_worst', 'gsb', 'score')",
    "ck_task_purpose": "purpose in ('work', 'gold', 'practice', 'exam')",
}
OLD_JUDGMENT_CHECKS = {"ck_judgment_kind": "kind in ('best_worst', 'score')"}
NEW_JUDGMENT_CHECKS = {
    "ck_judgment_kind": "kind in ('best_worst', 'gsb', 'score')",
    "ck_judgment_revision": "(revision = 0) = (supersedes is null)",
}


def upgrade() -> None:
    op.add_column(
        "account", sa.Column("expert", sa.Boolean(), nullable=False, server_default=sa.false())
    )
    for column in (_purpose(), _number("repeat")):
        op.add_column("presentation", column)
    op.add_column("choice", sa.Column("confirmed", sa.Boolean(), nullable=True))
    op.drop_index("ix_task_queue", "task")  # SQLite, making the table anew, would forget its order
    with op.batch_alter_table("task") as batch_op:
        batch_op.add_column(
            sa.Column("kind", sa.String(length=12), nullable=False, server_default="best_worst")
        )
        batch_op.add_column(_purpose())
        batch_op.add_column(
            sa.Column("experts_only", sa.Boolean(), nullable=False, server_default=sa.false())
        )
        batch_op.add_column(sa.Column("answers", sa.JSON(), nullable=True))
        _swap_checks(batch_op, OLD_TASK_CHECKS, NEW_TASK_CHECKS)
        batch_op.create_index(batch_op.f("ix_task_purpose"), ["purpose"], unique=False)
    op.create_index("ix_task_queue", "task", QUEUE)
    allow_changes(["judgment"])
    with op.batch_alter_table("judgment") as batch_op:
        for column in (_purpose(), _number("repeat"), _number("revision")):
            batch_op.add_column(column)
        batch_op.add_column(sa.Column("supersedes", sa.Integer(), nullable=True))
        batch_op.add_column(
            sa.Column("language", sa.String(length=8), nullable=False, server_default="en")
        )
        _swap_checks(batch_op, OLD_JUDGMENT_CHECKS, NEW_JUDGMENT_CHECKS)
        batch_op.drop_constraint(op.f("uq_judgment_presentation_id"), type_="unique")
        batch_op.drop_constraint(op.f("uq_judgment_task_id_account_id"), type_="unique")
        batch_op.create_foreign_key(
            op.f("fk_judgment_supersedes_judgment"), "judgment", ["supersedes"], ["id"]
        )
        batch_op.create_unique_constraint(op.f("uq_judgment_supersedes"), ["supersedes"])
        batch_op.create_unique_constraint(
            op.f("uq_judgment_presentation_id_revision"), ["presentation_id", "revision"]
        )
        batch_op.create_unique_constraint(
            op.f("uq_judgment_task_id_account_id_repeat_revision"),
            ["task_id", "account_id", "repeat", "revision"],
        )
        batch_op.create_index(batch_op.f("ix_judgment_account_id"), ["account_id"], unique=False)
    forbid_changes(["judgment"])
    _create_tables()
    forbid_changes(NEW_APPEND_ONLY)
    let_notes_be_emptied(["judgment", "flag", "ruling"])


def _create_tables() -> None:
    op.create_table(
        "flag",
        sa.Column("id", sa.Integer(), nullable=False),
        *_who_and_what("flag"),
        sa.Column("presentation_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "kind in ('unsafe', 'broken', 'ambiguous_prompt')", name=op.f("ck_flag_kind")
        ),
        sa.ForeignKeyConstraint(
            ["presentation_id"],
            ["presentation.id"],
            name=op.f("fk_flag_presentation_id_presentation"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_flag")),
    )
    op.create_index(op.f("ix_flag_task_id_account_id"), "flag", ["task_id", "account_id"])
    op.create_table(
        "ruling",
        sa.Column("id", sa.Integer(), nullable=False),
        *_who_and_what("ruling"),
        sa.Column("decision", sa.String(length=12), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("decision in ('reopen', 'remove')", name=op.f("ck_ruling_decision")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ruling")),
    )
    op.create_index(op.f("ix_ruling_task_id"), "ruling", ["task_id"])
    op.create_table(
        "exam",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("correct", sa.Integer(), nullable=False),
        sa.Column("asked", sa.Integer(), nullable=False),
        sa.Column("passed", sa.Boolean(), nullable=False),
        sa.Column("guideline_version", sa.String(length=40), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["account_id"], ["account.id"], name=op.f("fk_exam_account_id_account")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_exam")),
        sa.UniqueConstraint("account_id", "attempt", name=op.f("uq_exam_account_id_attempt")),
    )
    op.create_table(
        "guideline",
        sa.Column("version", sa.String(length=40), nullable=False),
        sa.Column("questions", sa.JSON(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("version", name=op.f("pk_guideline")),
    )


def downgrade() -> None:
    """Raises RuntimeError if there is anything the older tables cannot hold."""
    held = {
        "judgment": "revision > 0 or repeat > 0 or purpose <> 'work' or kind = 'gsb'",
        "task": "purpose <> 'work' or kind <> 'best_worst' or state in ('conflict', 'removed')",
        "flag": "1 = 1",
        "exam": "1 = 1",
    }
    for table, condition in held.items():
        rows = op.get_bind().execute(sa.text(f"SELECT 1 FROM {table} WHERE {condition} LIMIT 1"))
        if rows.first():
            raise RuntimeError(f"revision 0001 cannot hold what table {table} has; nothing changed")
    allow_changes(NEW_APPEND_ONLY)
    for table in ("guideline", *NEW_APPEND_ONLY):
        op.drop_table(table)
    allow_changes(["judgment"])
    with op.batch_alter_table("judgment") as batch_op:
        _swap_checks(batch_op, NEW_JUDGMENT_CHECKS, OLD_JUDGMENT_CHECKS)
        batch_op.drop_index(op.f("ix_judgment_account_id"))
        batch_op.drop_constraint(
            op.f("uq_judgment_task_id_account_id_repeat_revision"), type_="unique"
        )
        batch_op.drop_constraint(op.f("uq_judgment_presentation_id_revision"), type_="unique")
        batch_op.drop_constraint(op.f("uq_judgment_supersedes"), type_="unique")
        batch_op.drop_constraint(op.f("fk_judgment_supersedes_judgment"), type_="foreignkey")
        for name in ("language", "supersedes", "revision", "repeat", "purpose"):
            batch_op.drop_column(name)
        batch_op.create_unique_constraint(op.f("uq_judgment_presentation_id"), ["presentation_id"])
        batch_op.create_unique_constraint(
            op.f("uq_judgment_task_id_account_id"), ["task_id", "account_id"]
        )
    forbid_changes(["judgment"])
    let_notes_be_emptied(["judgment"])
    op.drop_index("ix_task_queue", "task")
    with op.batch_alter_table("task") as batch_op:
        _swap_checks(batch_op, NEW_TASK_CHECKS, OLD_TASK_CHECKS)
        batch_op.drop_index(op.f("ix_task_purpose"))
        for name in ("answers", "experts_only", "purpose", "kind"):
            batch_op.drop_column(name)
    op.create_index("ix_task_queue", "task", QUEUE)
    for table, name in (
        ("choice", "confirmed"),
        ("presentation", "repeat"),
        ("presentation", "purpose"),
        ("account", "expert"),
    ):
        op.drop_column(table, name)


def _purpose() -> sa.Column[str]:
    return sa.Column("purpose", sa.String(length=12), nullable=False, server_default="work")


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=False, server_default=sa.text("0"))


def _who_and_what(table: str) -> tuple[sa.Column[int] | sa.ForeignKeyConstraint, ...]:
    return (
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name=op.f(f"fk_{table}_task_id_task")),
        sa.ForeignKeyConstraint(
            ["account_id"], ["account.id"], name=op.f(f"fk_{table}_account_id_account")
        ),
    )


def _swap_checks(batch_op: BatchOperations, old: dict[str, str], new: dict[str, str]) -> None:
    for name in old:
        if new.get(name) != old[name]:
            batch_op.drop_constraint(op.f(name), type_="check")
    for name in new:
        if old.get(name) != new[name]:
            batch_op.create_check_constraint(op.f(name), sa.text(new[name]))
