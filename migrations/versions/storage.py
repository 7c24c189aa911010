"""Jobs know their video's bytes, exact or estimated; an account's open jobs are found fast."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Extend jobs; what was finished before keeps the length that its result tells."""
    op.add_column("jobs", sa.Column("size_bytes", sa.BigInteger))
    op.add_column(
        "jobs",
        sa.Column("estimated_bytes", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    )
    op.create_index("jobs_of_account_by_state", "jobs", ["account_id", "state"])
    told = {
        "sqlite": "json_extract(result, '$.size_bytes')",
        "postgresql": "CAST(result ->> 'size_bytes' AS BIGINT)",
    }[op.get_bind().dialect.name]
    op.execute(f"UPDATE jobs SET size_bytes = {told} WHERE state = 'succeeded'")
