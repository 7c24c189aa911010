"""Jobs remember what they were asked for, and by which Idempotency-Key."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Extend jobs; a key belongs to one job of an account."""
    op.add_column("jobs", sa.Column("idempotency_key", sa.String))
    op.add_column("jobs", sa.Column("fields_hash", sa.String))
    op.create_index("jobs_idempotency_key", "jobs", ["account_id", "idempotency_key"], unique=True)
    op.create_index("jobs_same_fields", "jobs", ["account_id", "fields_hash", "number"])
