"""Jobs know how many bytes their video has, or may have."""

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
    told = {
        "sqlite": "json_extract(result, '$.size_bytes')",
        "postgresql": "CAST(result ->> 'size_bytes' AS BIGINT)",
    }[op.get_bind().dialect.name]
    op.execute(f"UPDATE jobs SET size_bytes = {told} WHERE state = 'succeeded'")
