"""Events tell how many passes of the model a job's steps made do without."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column: until now none was skipped."""
    op.add_column(
        "job_events",
        sa.Column("skipped", sa.Integer, nullable=False, server_default=sa.text("0")),
    )
