"""The first tables: accounts, prompts, clips, tasks, leases, presentations, and the append-only judgments."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from annotation.migrations.append_only import allow_changes, forbid_changes

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

APPEND_ONLY = ("judgment", "choice", "skip")


def upgrade() -> None:
    op.create_table(
        "account",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=80), nullable=False),
        sa.Column("password_hash", sa.String(length=200), nullable=False),
        sa.Column("role", sa.String(length=20), nullable=False),
        sa.Column("pseudonym", sa.String(length=40), nullable=False),
        sa.Column("simulated", sa.Boolean(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("role in ('annotator', 'admin')", name=op.f("ck_account_role")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_account")),
        sa.UniqueConstraint("name", name=op.f("uq_account_name")),
        sa.UniqueConstraint("pseudonym", name=op.f("uq_account_pseudonym")),
    )
    op.create_table(
        "prompt",
        sa.Column("prompt_id", sa.String(length=40), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("language", sa.String(length=8), nullable=False),
        sa.Column("cluster", sa.String(length=40), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("prompt_id", name=op.f("pk_prompt")),
    )
    op.create_table(
        "clip",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("prompt_id", sa.String(length=40), nullable=False),
        sa.Column("project", sa.String(length=80), nullable=False),
        sa.Column("task_kind", sa.String(length=8), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("stage", sa.String(length=200), nullable=False),
        sa.Column("checkpoint", sa.String(length=400), nullable=True),
        sa.Column("seed", sa.BigInteger(), nullable=True),
        sa.Column("fps", sa.Float(), nullable=False),
        sa.Column("num_frames", sa.Integer(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("storage_key", sa.String(length=200), nullable=False),
        sa.Column("first_frame_sha256", sa.String(length=64), nullable=True),
        sa.Column("first_frame_key", sa.String(length=200), nullable=True),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("task_kind in ('t2v', 'i2v')", name=op.f("ck_clip_task_kind")),
        sa.ForeignKeyConstraint(
            ["prompt_id"], ["prompt.prompt_id"], name=op.f("fk_clip_prompt_id_prompt")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_clip")),
        sa.UniqueConstraint("sha256", name=op.f("uq_clip_sha256")),
    )
    op.create_table(
        "session",
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("csrf", sa.String(length=64), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["account_id"], ["account.id"], name=op.f("fk_session_account_id_account")
        ),
        sa.PrimaryKeyConstraint("token_hash", name=op.f("pk_session")),
    )
    op.create_table(
        "task",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("prompt_id", sa.String(length=40), nullable=False),
        sa.Column("project", sa.String(length=80), nullable=False),
        sa.Column("task_kind", sa.String(length=8), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("need_n", sa.Integer(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("num_judgments", sa.Integer(), nullable=False),
        sa.Column("first_frame_key", sa.String(length=200), nullable=True),
        sa.Column("shown_fps", sa.Float(), nullable=False),
        sa.Column("shown_frames", sa.Integer(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("state in ('open', 'done', 'flagged')", name=op.f("ck_task_state")),
        sa.CheckConstraint("need_n >= 1", name=op.f("ck_task_need_n")),
        sa.CheckConstraint("num_judgments <= need_n", name=op.f("ck_task_overlap")),
        sa.ForeignKeyConstraint(
            ["prompt_id"], ["prompt.prompt_id"], name=op.f("fk_task_prompt_id_prompt")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_task")),
    )
    with op.batch_alter_table("task", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_task_state_priority_id"), ["state", "priority", "id"], unique=False
        )

    op.create_table(
        "presentation",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("token", sa.String(length=64), nullable=False),
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("clip_order", sa.JSON(), nullable=False),
        sa.Column("dimension_order", sa.JSON(), nullable=False),
        sa.Column("guideline_version", sa.String(length=40), nullable=False),
        sa.Column("shown_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["account_id"], ["account.id"], name=op.f("fk_presentation_account_id_account")
        ),
        sa.ForeignKeyConstraint(
            ["task_id"], ["task.id"], name=op.f("fk_presentation_task_id_task")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_presentation")),
        sa.UniqueConstraint("token", name=op.f("uq_presentation_token")),
    )
    with op.batch_alter_table("presentation", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_presentation_task_id_account_id"),
            ["task_id", "account_id"],
            unique=False,
        )

    op.create_table(
        "task_clip",
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("clip_id", sa.Integer(), nullable=False),
        sa.Column("shown_key", sa.String(length=200), nullable=False),
        sa.ForeignKeyConstraint(["clip_id"], ["clip.id"], name=op.f("fk_task_clip_clip_id_clip")),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name=op.f("fk_task_clip_task_id_task")),
        sa.PrimaryKeyConstraint("task_id", "slot", name=op.f("pk_task_clip")),
        sa.UniqueConstraint("task_id", "clip_id", name=op.f("uq_task_clip_task_id_clip_id")),
    )
    op.create_table(
        "judgment",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("presentation_id", sa.Integer(), nullable=False),
        sa.Column("idempotency_key", sa.String(length=80), nullable=False),
        sa.Column("payload_hash", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column("surplus", sa.Boolean(), nullable=False),
        sa.Column("simulated", sa.Boolean(), nullable=False),
        sa.Column("guideline_version", sa.String(length=40), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=True),
        sa.Column("watched_seconds", sa.JSON(), nullable=True),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("submitted_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("kind in ('best_worst', 'score')", name=op.f("ck_judgment_kind")),
        sa.ForeignKeyConstraint(
            ["account_id"], ["account.id"], name=op.f("fk_judgment_account_id_account")
        ),
        sa.ForeignKeyConstraint(
            ["presentation_id"],
            ["presentation.id"],
            name=op.f("fk_judgment_presentation_id_presentation"),
        ),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name=op.f("fk_judgment_task_id_task")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_judgment")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_judgment_idempotency_key")),
        sa.UniqueConstraint("presentation_id", name=op.f("uq_judgment_presentation_id")),
        sa.UniqueConstraint("task_id", "account_id", name=op.f("uq_judgment_task_id_account_id")),
    )
    op.create_table(
        "lease",
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("presentation_id", sa.Integer(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["account_id"], ["account.id"], name=op.f("fk_lease_account_id_account")
        ),
        sa.ForeignKeyConstraint(
            ["presentation_id"],
            ["presentation.id"],
            name=op.f("fk_lease_presentation_id_presentation"),
        ),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name=op.f("fk_lease_task_id_task")),
        sa.PrimaryKeyConstraint("task_id", "account_id", name=op.f("pk_lease")),
    )
    with op.batch_alter_table("lease", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_lease_account_id"), ["account_id"], unique=False)

    op.create_table(
        "media",
        sa.Column("token", sa.String(length=64), nullable=False),
        sa.Column("presentation_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("storage_key", sa.String(length=200), nullable=False),
        sa.ForeignKeyConstraint(
            ["presentation_id"],
            ["presentation.id"],
            name=op.f("fk_media_presentation_id_presentation"),
        ),
        sa.PrimaryKeyConstraint("token", name=op.f("pk_media")),
    )
    with op.batch_alter_table("media", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_media_presentation_id"), ["presentation_id"], unique=False
        )

    op.create_table(
        "skip",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("presentation_id", sa.Integer(), nullable=False),
        sa.Column("reason", sa.String(length=40), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["account_id"], ["account.id"], name=op.f("fk_skip_account_id_account")
        ),
        sa.ForeignKeyConstraint(
            ["presentation_id"],
            ["presentation.id"],
            name=op.f("fk_skip_presentation_id_presentation"),
        ),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name=op.f("fk_skip_task_id_task")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_skip")),
    )
    with op.batch_alter_table("skip", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_skip_task_id_account_id"), ["task_id", "account_id"], unique=False
        )

    op.create_table(
        "choice",
        sa.Column("judgment_id", sa.Integer(), nullable=False),
        sa.Column("dimension", sa.String(length=40), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("best", sa.Integer(), nullable=True),
        sa.Column("worst", sa.Integer(), nullable=True),
        sa.Column("first_best", sa.Integer(), nullable=True),
        sa.Column("first_worst", sa.Integer(), nullable=True),
        sa.Column("constrained", sa.Boolean(), nullable=False),
        sa.Column("admissible", sa.Boolean(), nullable=False),
        sa.Column("scores", sa.JSON(), nullable=True),
        sa.CheckConstraint(
            "status in ('ok', 'tie', 'cannot_judge', 'no_valid_pair')",
            name=op.f("ck_choice_status"),
        ),
        sa.CheckConstraint("(best is null) = (worst is null)", name=op.f("ck_choice_both_or_none")),
        sa.CheckConstraint(
            "best is null or best <> worst", name=op.f("ck_choice_best_is_not_worst")
        ),
        sa.ForeignKeyConstraint(
            ["judgment_id"], ["judgment.id"], name=op.f("fk_choice_judgment_id_judgment")
        ),
        sa.PrimaryKeyConstraint("judgment_id", "dimension", name=op.f("pk_choice")),
    )
    forbid_changes(APPEND_ONLY)


def downgrade() -> None:
    allow_changes(APPEND_ONLY)
    op.drop_table("choice")
    with op.batch_alter_table("skip", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_skip_task_id_account_id"))

    op.drop_table("skip")
    with op.batch_alter_table("media", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_media_presentation_id"))

    op.drop_table("media")
    with op.batch_alter_table("lease", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_lease_account_id"))

    op.drop_table("lease")
    op.drop_table("judgment")
    op.drop_table("task_clip")
    with op.batch_alter_table("presentation", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_presentation_task_id_account_id"))

    op.drop_table("presentation")
    with op.batch_alter_table("task", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_task_state_priority_id"))

    op.drop_table("task")
    op.drop_table("session")
    op.drop_table("clip")
    op.drop_table("prompt")
    op.drop_table("account")
