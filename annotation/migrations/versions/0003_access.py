"""Access and work from outside: a third role, tokens, sign-in state that all server processes share, drafts, Label Studio."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

NEW_TABLES = (
    "identity",
    "api_token",
    "sign_in_failure",
    "sign_in_link",
    "site_secret",
    "draft",
    "label_studio_task",
    "label_studio_annotation",
    "webhook_event",
)


def upgrade() -> None:
    with op.batch_alter_table("account") as batch:
        batch.drop_constraint(op.f("ck_account_role"), type_="check")
        batch.create_check_constraint(
            op.f("ck_account_role"), "role in ('annotator', 'reviewer', 'admin')"
        )
    op.drop_index(op.f("ix_task_state_priority_id"), "task")
    op.create_index("ix_task_queue", "task", ["state", sa.text("priority DESC"), "id"])
    _sign_in_tables()
    op.create_table(
        "draft",
        sa.Column("presentation_id", sa.Integer(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("saved_ms", sa.BigInteger(), nullable=False),
        _parent("draft", "presentation_id", "presentation"),
        sa.PrimaryKeyConstraint("presentation_id", name=op.f("pk_draft")),
    )
    _label_studio_tables()


def downgrade() -> None:
    for table in reversed(NEW_TABLES):
        op.drop_table(table)
    op.drop_index("ix_task_queue", "task")
    op.create_index(op.f("ix_task_state_priority_id"), "task", ["state", "priority", "id"])
    op.execute("UPDATE account SET role = 'annotator' WHERE role = 'reviewer'")
    with op.batch_alter_table("account") as batch:
        batch.drop_constraint(op.f("ck_account_role"), type_="check")
        batch.create_check_constraint(op.f("ck_account_role"), "role in ('annotator', 'admin')")


def _sign_in_tables() -> None:
    op.create_table(
        "identity",
        sa.Column("issuer", sa.String(length=300), nullable=False),
        sa.Column("subject", sa.String(length=300), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        _parent("identity", "account_id", "account"),
        sa.PrimaryKeyConstraint("issuer", "subject", name=op.f("pk_identity")),
    )
    op.create_table(
        "api_token",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("label", sa.String(length=80), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=True),
        sa.Column("revoked_ms", sa.BigInteger(), nullable=True),
        _parent("api_token", "account_id", "account"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_token")),
        sa.UniqueConstraint("token_hash", name=op.f("uq_api_token_token_hash")),
    )
    op.create_table(
        "sign_in_failure",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key_hash", sa.String(length=64), nullable=False),
        sa.Column("failed_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sign_in_failure")),
    )
    op.create_index(
        op.f("ix_sign_in_failure_key_hash_failed_ms"),
        "sign_in_failure",
        ["key_hash", "failed_ms"],
    )
    op.create_table(
        "sign_in_link",
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        _parent("sign_in_link", "account_id", "account"),
        sa.PrimaryKeyConstraint("token_hash", name=op.f("pk_sign_in_link")),
    )
    op.create_table(
        "site_secret",
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("value", sa.String(length=100), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_site_secret")),
    )


def _label_studio_tables() -> None:
    op.create_table(
        "label_studio_task",
        sa.Column("uid", sa.String(length=40), nullable=False),
        sa.Column("server", sa.String(length=200), nullable=False),
        sa.Column("project", sa.Integer(), nullable=False),
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("their_id", sa.Integer(), nullable=True),
        sa.Column("clip_order", sa.JSON(), nullable=False),
        sa.Column("dimension_order", sa.JSON(), nullable=False),
        sa.Column("guideline_version", sa.String(length=40), nullable=False),
        sa.Column("pushed_ms", sa.BigInteger(), nullable=False),
        _parent("label_studio_task", "task_id", "task"),
        sa.PrimaryKeyConstraint("uid", name=op.f("pk_label_studio_task")),
        sa.UniqueConstraint(
            "server",
            "project",
            "task_id",
            name=op.f("uq_label_studio_task_server_project_task_id"),
        ),
    )
    op.create_table(
        "label_studio_annotation",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("uid", sa.String(length=40), nullable=False),
        sa.Column("their_id", sa.Integer(), nullable=False),
        sa.Column("updated_at", sa.String(length=40), nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("judgment_id", sa.Integer(), nullable=True),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("seen_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "state in ('stored', 'refused', 'surplus', 'deleted')",
            name=op.f("ck_label_studio_annotation_state"),
        ),
        _parent("label_studio_annotation", "uid", "label_studio_task"),
        _parent("label_studio_annotation", "judgment_id", "judgment"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_label_studio_annotation")),
        sa.UniqueConstraint(
            "uid",
            "their_id",
            "updated_at",
            "state",
            name=op.f("uq_label_studio_annotation_uid_their_id_updated_at_state"),
        ),
    )
    op.create_table(
        "webhook_event",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("received_ms", sa.BigInteger(), nullable=False),
        sa.Column("handled_ms", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_event")),
        sa.UniqueConstraint("digest", name=op.f("uq_webhook_event_digest")),
    )


def _parent(table: str, column: str, parent: str) -> sa.ForeignKeyConstraint:
    key = "uid" if parent == "label_studio_task" else "id"
    name = op.f(f"fk_{table}_{column}_{parent}")
    return sa.ForeignKeyConstraint([column], [f"{parent}.{key}"], name=name)
