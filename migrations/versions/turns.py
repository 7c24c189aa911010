"""Each job gets its account's turn when it comes, so that the queue's order is in an index."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

OPEN = "state IN ('queued', 'running')"
TURNS = f"""
UPDATE jobs SET turn = (
    SELECT count(*) FROM jobs AS older
    WHERE older.account_id = jobs.account_id AND older.number <= jobs.number AND older.{OPEN}
)
WHERE {OPEN}
"""


def upgrade() -> None:
    """Number what is open by account, the oldest first."""
    op.add_column(
        "jobs", sa.Column("turn", sa.Integer, nullable=False, server_default=sa.text("0"))
    )
    op.execute(TURNS)
    op.drop_index("jobs_open", "jobs")
    op.create_index("jobs_open", "jobs", ["state", "tier", "priority", "created_at_ms"])
    op.create_index("jobs_next", "jobs", ["state", "tier", "priority", "turn", "created_at_ms"])
    op.create_index("jobs_turn", "jobs", ["state", "tier", "turn"])
