"""Alembic's entry: runs the migrations on the connection that `deployments.database` hands in."""

from alembic import context
from sqlalchemy import Connection

from credits.accounts import metadata as credits_metadata
from jobs.tables import metadata as jobs_metadata

connection: Connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=[credits_metadata, jobs_metadata],
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
