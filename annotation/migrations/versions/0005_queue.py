"""The queue's index knows what a task is for: a claim looks for practice and exam tasks first, and found none by reading all work."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

NAME = "ix_task_queue"
PULLED = "ix_label_studio_annotation_judgment_id"


def upgrade() -> None:
    op.drop_index(NAME, "task")
    op.create_index(NAME, "task", ["state", "purpose", sa.text("priority DESC"), "id"])
    op.create_index(PULLED, "label_studio_annotation", ["judgment_id"])


def downgrade() -> None:
    op.drop_index(PULLED, "label_studio_annotation")
    op.drop_index(NAME, "task")
    op.create_index(NAME, "task", ["state", sa.text("priority DESC"), "id"])
