"""Jobs tell what their work is counted by, and stages how long they take."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add them: jobs from before are counted by their requests."""
    op.add_column("jobs", sa.Column("shape", sa.String))
    op.add_column(
        "jobs", sa.Column("num_steps", sa.Integer, nullable=False, server_default=sa.text("0"))
    )
    op.create_index("jobs_created", "jobs", ["created_at_ms"])
    op.create_table(
        "stage_times",
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("shape", sa.String, primary_key=True),
        sa.Column("tier", sa.String, primary_key=True),
        sa.Column("stage", sa.String, primary_key=True),
        sa.Column("degree", sa.Integer, primary_key=True),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("measured_at_ms", sa.BigInteger, nullable=False),
    )
    op.create_index("stage_times_measured", "stage_times", ["measured_at_ms"])
