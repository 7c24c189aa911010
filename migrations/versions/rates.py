"""How fast each key makes requests."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One row a key that makes requests under a limit."""
    op.create_table(
        "request_rates",
        sa.Column("key_id", sa.String, sa.ForeignKey("api_keys.id"), primary_key=True),
        sa.Column("whole_at_us", sa.BigInteger, nullable=False),
    )
