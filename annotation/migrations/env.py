"""Run by Alembic on a connection that `annotation.store` hands over."""

from alembic import context

from annotation.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite cannot alter most of a table in place
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
