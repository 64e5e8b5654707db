"""The tables. What people say is append-only (`APPEND_ONLY`): triggers refuse every update and delete.

Times are whole milliseconds since 1970 UTC (`*_ms`). The migrations in `migrations/versions` create these tables; a test checks
that both agree.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    desc,
    false,
    literal_column,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

APPEND_ONLY = (
    "judgment",
    "choice",
    "skip",
    "flag",
    "ruling",
    "exam",
    "event",
    "export_snapshot",
    "tombstone",
)
"""Nothing in these is ever changed; only the note of a judgment, skip, flag or ruling may be emptied (`annotation.erasure`)."""

DEFAULT_PROJECT_ID = 1
"""Always there; a team that never names a project never sees it."""


def word(text: str) -> ColumnElement[str]:
    """A fixed word inside a statement that is asked often: with a bound value instead, PostgreSQL makes a new plan every time."""
    return literal_column(f"'{text}'")


project = Table(
    "project",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(80), nullable=False, unique=True),
    Column("guideline_version", String(40)),
    Column("retention_days", Integer),
    Column("created_ms", BigInteger, nullable=False),
    CheckConstraint("retention_days is null or retention_days >= 1", name="retention_days"),
)

account = Table(
    "account",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(80), nullable=False, unique=True),
    Column("password_hash", String(200), nullable=False),
    Column("role", String(20), nullable=False),
    Column("pseudonym", String(40), nullable=False, unique=True),
    Column("simulated", Boolean, nullable=False),
    Column("expert", Boolean, nullable=False, server_default=false()),
    Column("created_ms", BigInteger, nullable=False),
    CheckConstraint("role in ('annotator', 'reviewer', 'admin')", name="role"),
)

identity = Table(
    "identity",
    metadata,
    Column("issuer", String(300), primary_key=True),
    Column("subject", String(300), primary_key=True),
    Column("account_id", ForeignKey("account.id"), nullable=False),
    Column("created_ms", BigInteger, nullable=False),
)

api_token = Table(
    "api_token",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("token_hash", String(64), nullable=False, unique=True),
    Column("account_id", ForeignKey("account.id"), nullable=False),
    Column("label", String(80), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger),
    Column("revoked_ms", BigInteger),
)

sign_in_failure = Table(
    "sign_in_failure",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("key_hash", String(64), nullable=False),
    Column("failed_ms", BigInteger, nullable=False),
    Index(None, "key_hash", "failed_ms"),
)

sign_in_link = Table(
    "sign_in_link",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    Column("account_id", ForeignKey("account.id"), nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
)

site_secret = Table(
    "site_secret",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("value", String(100), nullable=False),
)

session = Table(
    "session",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    Column("account_id", ForeignKey("account.id"), nullable=False),
    Column("csrf", String(64), nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
)

prompt = Table(
    "prompt",
    metadata,
    Column("prompt_id", String(40), primary_key=True),
    Column("text", Text, nullable=False),
    Column("language", String(8), nullable=False),
    Column("cluster", String(40), nullable=False),
    Column("created_ms", BigInteger, nullable=False),
)

clip = Table(
    "clip",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("prompt_id", ForeignKey("prompt.prompt_id"), nullable=False),
    Column("task_kind", String(8), nullable=False),
    Column("model", String(200), nullable=False),
    Column("stage", String(200), nullable=False),
    Column("checkpoint", String(400)),
    Column("seed", BigInteger),
    Column("fps", Float, nullable=False),
    Column("num_frames", Integer, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("storage_key", String(200), nullable=False),
    Column("first_frame_sha256", String(64)),
    Column("first_frame_key", String(200)),
    Column("created_ms", BigInteger, nullable=False),
    Column("purged_ms", BigInteger),
    CheckConstraint("task_kind in ('t2v', 'i2v')", name="task_kind"),
)

project_clip = Table(
    "project_clip",
    metadata,
    Column("project_id", ForeignKey("project.id"), primary_key=True),
    Column("clip_id", ForeignKey("clip.id"), primary_key=True),
    Column("created_ms", BigInteger, nullable=False),
    Index(None, "clip_id"),
)

project_prompt = Table(
    "project_prompt",
    metadata,
    Column("project_id", ForeignKey("project.id"), primary_key=True),
    Column("prompt_id", ForeignKey("prompt.prompt_id"), primary_key=True),
    Column("category", String(40)),
    Column("status", String(12), nullable=False),
    Column("reason", String(80)),
    Column("weight", Float, nullable=False),
    Column("source", String(200), nullable=False),
    Column("uses", Integer, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    CheckConstraint("status in ('active', 'held')", name="status"),
    Index(None, "prompt_id"),
)

project_member = Table(
    "project_member",
    metadata,
    Column("project_id", ForeignKey("project.id"), primary_key=True),
    Column("account_id", ForeignKey("account.id"), primary_key=True),
    Column("role", String(20), nullable=False),
    CheckConstraint("role in ('annotator', 'reviewer', 'admin')", name="role"),
    Index(None, "account_id"),
)

event = Table(
    "event",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("actor", String(80), nullable=False),
    Column("action", String(40), nullable=False),
    Column("subject", String(200), nullable=False),
    Column("detail", Text, nullable=False),
    Column("prev_hash", String(64), nullable=False, unique=True),
    Column("hash", String(64), nullable=False, unique=True),
)

export_snapshot = Table(
    "export_snapshot",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(80), nullable=False, unique=True),
    Column("project_id", ForeignKey("project.id")),
    Column("query", Text, nullable=False),
    Column("max_judgment_id", Integer, nullable=False),
    Column("num_rows", Text, nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("folder", String(400), nullable=False),
    Column("created_ms", BigInteger, nullable=False),
)

tombstone = Table(
    "tombstone",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", String(12), nullable=False),
    Column("subject", String(80), nullable=False),
    Column("reason", String(200), nullable=False),
    Column("withdrawn", Boolean, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    CheckConstraint("kind in ('user', 'clip', 'note')", name="kind"),
    Index(None, "kind", "subject"),
)

task = Table(
    "task",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("project_id", ForeignKey("project.id"), nullable=False),
    Column("prompt_id", ForeignKey("prompt.prompt_id"), nullable=False),
    Column("task_kind", String(8), nullable=False),
    Column("kind", String(12), nullable=False, server_default="best_worst"),
    Column("purpose", String(12), nullable=False, server_default="work"),
    Column("experts_only", Boolean, nullable=False, server_default=false()),
    Column(
        "answers", JSON(none_as_null=True)
    ),  # known ones: dimension -> best, worst, tie, scores, why
    Column("round", Integer, nullable=False),
    Column("need_n", Integer, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("state", String(12), nullable=False),
    Column("num_judgments", Integer, nullable=False),
    Column("first_frame_key", String(200)),
    Column("shown_fps", Float, nullable=False),
    Column("shown_frames", Integer, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    CheckConstraint("state in ('open', 'done', 'flagged', 'conflict', 'removed')", name="state"),
    CheckConstraint("kind in ('best_worst', 'gsb', 'score')", name="kind"),
    CheckConstraint("purpose in ('work', 'gold', 'practice', 'exam')", name="purpose"),
    CheckConstraint("num_judgments <= need_n", name="overlap"),
    CheckConstraint("need_n >= 1", name="need_n"),
    Index(None, "purpose"),
    Index("ix_task_queue", "state", "purpose", desc("priority"), "id"),
)

task_clip = Table(
    "task_clip",
    metadata,
    Column("task_id", ForeignKey("task.id"), primary_key=True),
    Column("slot", Integer, primary_key=True),
    Column("clip_id", ForeignKey("clip.id"), nullable=False),
    Column("shown_key", String(200), nullable=False),
    UniqueConstraint("task_id", "clip_id"),
)

presentation = Table(
    "presentation",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("token", String(64), nullable=False, unique=True),
    Column("task_id", ForeignKey("task.id"), nullable=False),
    Column("account_id", ForeignKey("account.id"), nullable=False),
    Column("clip_order", JSON, nullable=False),
    Column("dimension_order", JSON, nullable=False),
    Column("guideline_version", String(40), nullable=False),
    Column("purpose", String(12), nullable=False, server_default="work"),
    Column("repeat", Integer, nullable=False, server_default=text("0")),
    Column("shown_ms", BigInteger, nullable=False),
    Index(None, "task_id", "account_id"),
)

media = Table(
    "media",
    metadata,
    Column("token", String(64), primary_key=True),
    Column("presentation_id", ForeignKey("presentation.id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("storage_key", String(200), nullable=False),
    Index(None, "presentation_id"),
)

lease = Table(
    "lease",
    metadata,
    Column("task_id", ForeignKey("task.id"), primary_key=True),
    Column("account_id", ForeignKey("account.id"), primary_key=True),
    Column("presentation_id", ForeignKey("presentation.id"), nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Index(None, "account_id"),
)

draft = Table(
    "draft",
    metadata,
    Column("presentation_id", ForeignKey("presentation.id"), primary_key=True),
    Column("body", Text, nullable=False),
    Column("saved_ms", BigInteger, nullable=False),
)

judgment = Table(
    "judgment",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("task_id", ForeignKey("task.id"), nullable=False),
    Column("account_id", ForeignKey("account.id"), nullable=False),
    Column("presentation_id", ForeignKey("presentation.id"), nullable=False),
    Column("idempotency_key", String(80), nullable=False, unique=True),
    Column("payload_hash", String(64), nullable=False),
    Column("kind", String(12), nullable=False),
    Column("purpose", String(12), nullable=False, server_default="work"),
    Column("repeat", Integer, nullable=False, server_default=text("0")),
    Column("revision", Integer, nullable=False, server_default=text("0")),
    Column("supersedes", ForeignKey("judgment.id"), unique=True),
    Column("surplus", Boolean, nullable=False),
    Column("simulated", Boolean, nullable=False),
    Column("guideline_version", String(40), nullable=False),
    Column("language", String(8), nullable=False, server_default="en"),
    Column("seconds", Float),
    Column("watched_seconds", JSON),
    Column("note", Text, nullable=False),
    Column("submitted_ms", BigInteger, nullable=False),
    CheckConstraint("kind in ('best_worst', 'gsb', 'score')", name="kind"),
    CheckConstraint("(revision = 0) = (supersedes is null)", name="revision"),
    UniqueConstraint("task_id", "account_id", "repeat", "revision"),
    UniqueConstraint("presentation_id", "revision"),
    Index(None, "account_id"),
)

choice = Table(
    "choice",
    metadata,
    Column("judgment_id", ForeignKey("judgment.id"), primary_key=True),
    Column("dimension", String(40), primary_key=True),
    Column("position", Integer, nullable=False),
    Column("status", String(16), nullable=False),
    Column("best", Integer),
    Column("worst", Integer),
    Column("first_best", Integer),
    Column("first_worst", Integer),
    Column("constrained", Boolean, nullable=False),
    Column("confirmed", Boolean),
    Column("admissible", Boolean, nullable=False),
    Column("scores", JSON),
    CheckConstraint("best is null or best <> worst", name="best_is_not_worst"),
    CheckConstraint("(best is null) = (worst is null)", name="both_or_none"),
    CheckConstraint("status in ('ok', 'tie', 'cannot_judge', 'no_valid_pair')", name="status"),
)

skip = Table(
    "skip",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("task_id", ForeignKey("task.id"), nullable=False),
    Column("account_id", ForeignKey("account.id"), nullable=False),
    Column("presentation_id", ForeignKey("presentation.id"), nullable=False),
    Column("reason", String(40), nullable=False),
    Column("note", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Index(None, "task_id", "account_id"),
)

flag = Table(
    "flag",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("task_id", ForeignKey("task.id"), nullable=False),
    Column("account_id", ForeignKey("account.id"), nullable=False),
    Column("presentation_id", ForeignKey("presentation.id"), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("note", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    CheckConstraint("kind in ('unsafe', 'broken', 'ambiguous_prompt')", name="kind"),
    Index(None, "task_id", "account_id"),
)

ruling = Table(  # what was decided about a flagged task
    "ruling",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("task_id", ForeignKey("task.id"), nullable=False),
    Column("account_id", ForeignKey("account.id"), nullable=False),
    Column("decision", String(12), nullable=False),
    Column("note", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    CheckConstraint("decision in ('reopen', 'remove')", name="decision"),
    Index(None, "task_id"),
)

exam = Table(  # one finished attempt at the entry exam
    "exam",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("account_id", ForeignKey("account.id"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("correct", Integer, nullable=False),
    Column("asked", Integer, nullable=False),
    Column("passed", Boolean, nullable=False),
    Column("guideline_version", String(40), nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    UniqueConstraint("account_id", "attempt"),
)

guideline = Table(  # every version of the question texts that was ever shown
    "guideline",
    metadata,
    Column("version", String(40), primary_key=True),
    Column("questions", JSON, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
)

label_studio_task = Table(
    "label_studio_task",
    metadata,
    Column("uid", String(40), primary_key=True),
    Column("server", String(200), nullable=False),
    Column("project", Integer, nullable=False),
    Column("task_id", ForeignKey("task.id"), nullable=False),
    Column("their_id", Integer),
    Column("clip_order", JSON, nullable=False),
    Column("dimension_order", JSON, nullable=False),
    Column("guideline_version", String(40), nullable=False),
    Column("pushed_ms", BigInteger, nullable=False),
    UniqueConstraint("server", "project", "task_id"),
)

label_studio_annotation = Table(
    "label_studio_annotation",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("uid", ForeignKey("label_studio_task.uid"), nullable=False),
    Column("their_id", Integer, nullable=False),
    Column("updated_at", String(40), nullable=False),
    Column("state", String(12), nullable=False),
    Column("reason", Text, nullable=False),
    Column("judgment_id", ForeignKey("judgment.id")),
    Column("body", JSON, nullable=False),
    Column("seen_ms", BigInteger, nullable=False),
    CheckConstraint("state in ('stored', 'refused', 'surplus', 'deleted')", name="state"),
    UniqueConstraint("uid", "their_id", "updated_at", "state"),
    Index(None, "judgment_id"),
)

webhook_event = Table(
    "webhook_event",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("received_ms", BigInteger, nullable=False),
    Column("handled_ms", BigInteger),
)
