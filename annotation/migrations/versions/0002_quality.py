"""Projects, the prompt pool, export snapshots, the audit trail, tombstones; notes can be emptied.

The text columns `clip.project` and `task.project` become rows of `project`: a task belongs to one project, a clip's bytes to any number.
"""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

from annotation.migrations.append_only import (
    allow_changes,
    drop_update_trigger,
    forbid_changes,
    let_notes_be_emptied,
    make_update_trigger,
)

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

APPEND_ONLY = ("event", "export_snapshot", "tombstone")
NOTED = ("judgment", "skip")  # append-only too, but their notes may be emptied
MEMBERS = (
    "(SELECT id AS clip_id, project FROM clip UNION "
    "SELECT tc.clip_id, task.project FROM task_clip tc JOIN task ON task.id = tc.task_id)"
)
"""Every clip with every project that it came in with or is shown in."""


def upgrade() -> None:
    now = int(time.time() * 1000)
    _create_tables()
    op.execute(f"INSERT INTO project (id, name, created_ms) VALUES (1, 'default', {now})")
    op.execute(
        "INSERT INTO project (id, name, created_ms) "
        f"SELECT 1 + row_number() OVER (ORDER BY project), project, {now} "
        f"FROM (SELECT DISTINCT project FROM {MEMBERS} m WHERE project <> 'default') fresh"
    )
    if op.get_bind().dialect.name == "postgresql":  # the ids above were not drawn from its sequence
        op.execute(
            "SELECT setval(pg_get_serial_sequence('project', 'id'), (SELECT max(id) FROM project))"
        )
    op.execute(
        "INSERT INTO project_clip (project_id, clip_id, created_ms) SELECT DISTINCT project.id, m.clip_id, "
        f"clip.created_ms FROM {MEMBERS} m JOIN project ON project.name = m.project JOIN clip ON clip.id = m.clip_id"
    )
    op.execute(
        "INSERT INTO project_prompt (project_id, prompt_id, status, weight, source, uses, created_ms) "
        "SELECT coalesce(pc.project_id, 1), prompt.prompt_id, 'active', 1.0, 'clips', 1, min(prompt.created_ms) "
        "FROM prompt LEFT JOIN clip ON clip.prompt_id = prompt.prompt_id LEFT JOIN project_clip pc ON pc.clip_id = clip.id "
        "GROUP BY coalesce(pc.project_id, 1), prompt.prompt_id"
    )
    with op.batch_alter_table("task") as batch:
        batch.add_column(sa.Column("project_id", sa.Integer(), nullable=True))
    op.execute(
        "UPDATE task SET project_id = (SELECT id FROM project WHERE project.name = task.project)"
    )
    with op.batch_alter_table("task", table_args=_checks("task")) as batch:
        batch.alter_column("project_id", existing_type=sa.Integer(), nullable=False)
        batch.create_foreign_key(
            op.f("fk_task_project_id_project"), "project", ["project_id"], ["id"]
        )
        batch.drop_column("project")
    with op.batch_alter_table("clip", table_args=_checks("clip")) as batch:
        batch.add_column(sa.Column("purged_ms", sa.BigInteger(), nullable=True))
        batch.drop_column("project")
    forbid_changes(APPEND_ONLY)
    let_notes_be_emptied(NOTED)


def _create_tables() -> None:
    op.create_table(
        "project",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=80), nullable=False),
        sa.Column("guideline_version", sa.String(length=40), nullable=True),
        sa.Column("retention_days", sa.Integer(), nullable=True),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "retention_days is null or retention_days >= 1", name=op.f("ck_project_retention_days")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_project")),
        sa.UniqueConstraint("name", name=op.f("uq_project_name")),
    )
    op.create_table(
        "project_clip",
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("clip_id", sa.Integer(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        _key("project_clip", "project_id", "project", "id"),
        _key("project_clip", "clip_id", "clip", "id"),
        sa.PrimaryKeyConstraint("project_id", "clip_id", name=op.f("pk_project_clip")),
    )
    op.create_index(op.f("ix_project_clip_clip_id"), "project_clip", ["clip_id"])
    op.create_table(
        "project_prompt",
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("prompt_id", sa.String(length=40), nullable=False),
        sa.Column("category", sa.String(length=40), nullable=True),
        sa.Column("status", sa.String(length=12), nullable=False),
        sa.Column("reason", sa.String(length=80), nullable=True),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("source", sa.String(length=200), nullable=False),
        sa.Column("uses", sa.Integer(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("status in ('active', 'held')", name=op.f("ck_project_prompt_status")),
        _key("project_prompt", "project_id", "project", "id"),
        _key("project_prompt", "prompt_id", "prompt", "prompt_id"),
        sa.PrimaryKeyConstraint("project_id", "prompt_id", name=op.f("pk_project_prompt")),
    )
    op.create_index(op.f("ix_project_prompt_prompt_id"), "project_prompt", ["prompt_id"])
    op.create_table(
        "project_member",
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("role", sa.String(length=20), nullable=False),
        sa.CheckConstraint(
            "role in ('annotator', 'reviewer', 'admin')", name=op.f("ck_project_member_role")
        ),
        _key("project_member", "project_id", "project", "id"),
        _key("project_member", "account_id", "account", "id"),
        sa.PrimaryKeyConstraint("project_id", "account_id", name=op.f("pk_project_member")),
    )
    op.create_index(op.f("ix_project_member_account_id"), "project_member", ["account_id"])
    op.create_table(
        "event",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.String(length=80), nullable=False),
        sa.Column("action", sa.String(length=40), nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("prev_hash", sa.String(length=64), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event")),
        sa.UniqueConstraint("prev_hash", name=op.f("uq_event_prev_hash")),
        sa.UniqueConstraint("hash", name=op.f("uq_event_hash")),
    )
    op.create_table(
        "export_snapshot",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=80), nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=True),
        sa.Column("query", sa.Text(), nullable=False),
        sa.Column("max_judgment_id", sa.Integer(), nullable=False),
        sa.Column("num_rows", sa.Text(), nullable=False),
        sa.Column("manifest_sha256", sa.String(length=64), nullable=False),
        sa.Column("folder", sa.String(length=400), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        _key("export_snapshot", "project_id", "project", "id"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_export_snapshot")),
        sa.UniqueConstraint("name", name=op.f("uq_export_snapshot_name")),
    )
    op.create_table(
        "tombstone",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column("subject", sa.String(length=80), nullable=False),
        sa.Column("reason", sa.String(length=200), nullable=False),
        sa.Column("withdrawn", sa.Boolean(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("kind in ('user', 'clip', 'note')", name=op.f("ck_tombstone_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tombstone")),
    )
    op.create_index(op.f("ix_tombstone_kind_subject"), "tombstone", ["kind", "subject"])


def _key(table: str, column: str, other: str, other_column: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        [column], [f"{other}.{other_column}"], name=op.f(f"fk_{table}_{column}_{other}")
    )


def _checks(table: str) -> list[sa.CheckConstraint]:
    """The table's own checks: a rebuilt SQLite table would lose them."""
    if op.get_bind().dialect.name != "sqlite":
        return []
    found = sa.inspect(op.get_bind()).get_check_constraints(table)
    return [sa.CheckConstraint(check["sqltext"], name=op.f(check["name"])) for check in found]


def downgrade() -> None:
    for table in NOTED:
        drop_update_trigger(table)
        make_update_trigger(table)
    allow_changes(APPEND_ONLY)
    for table in ("task", "clip"):
        with op.batch_alter_table(table) as batch:
            batch.add_column(sa.Column("project", sa.String(length=80), nullable=True))
    op.execute("UPDATE task SET project = (SELECT name FROM project WHERE id = task.project_id)")
    op.execute(
        "UPDATE clip SET project = coalesce((SELECT name FROM project WHERE id = (SELECT min(project_id) "
        "FROM project_clip WHERE clip_id = clip.id)), 'default')"
    )
    with op.batch_alter_table("task", table_args=_checks("task")) as batch:
        batch.alter_column("project", existing_type=sa.String(length=80), nullable=False)
        batch.drop_constraint(op.f("fk_task_project_id_project"), type_="foreignkey")
        batch.drop_column("project_id")
    with op.batch_alter_table("clip", table_args=_checks("clip")) as batch:
        batch.alter_column("project", existing_type=sa.String(length=80), nullable=False)
        batch.drop_column("purged_ms")
    for table in ("tombstone", "export_snapshot", "event", "project_member"):
        op.drop_table(table)
    for table in ("project_prompt", "project_clip", "project"):
        op.drop_table(table)
