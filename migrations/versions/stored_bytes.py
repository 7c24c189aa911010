"""Accounts know what their videos take, so that the quota is checked where credits are."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

USED = """
UPDATE accounts SET stored_bytes = (
    SELECT coalesce(sum(CASE WHEN state IN ('queued', 'running')
                             THEN estimated_bytes ELSE coalesce(size_bytes, 0) END), 0)
    FROM jobs WHERE jobs.account_id = accounts.id AND NOT deleted
)
"""


def upgrade() -> None:
    """Add the column and fill it from the jobs."""
    op.add_column(
        "accounts",
        sa.Column("stored_bytes", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    )
    op.execute(USED)
