"""Accounts, keys, the ledger, jobs and their events."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create every table and, on SQLite, the triggers that keep the ledger append-only."""
    _create_credits()
    _create_jobs()
    for table in ("ledger_entries", "reservations", "settlements"):
        for verb in ("UPDATE", "DELETE"):
            _refuse(table, verb)


def _create_credits() -> None:
    op.create_table(
        "accounts",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("plan", sa.String, nullable=False),
        sa.Column("available", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("reserved", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("spent", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("max_jobs", sa.Integer),
        sa.CheckConstraint("available >= 0", name="available_not_negative"),
        sa.CheckConstraint("reserved >= 0", name="reserved_not_negative"),
        sa.CheckConstraint("spent >= 0", name="spent_not_negative"),
    )
    op.create_table(
        "api_keys",
        sa.Column("key_hash", sa.String, primary_key=True),
        sa.Column("account_id", sa.String, sa.ForeignKey("accounts.id"), nullable=False),
    )
    op.create_index("ix_api_keys_account_id", "api_keys", ["account_id"])
    op.create_table(
        "reservations",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("account_id", sa.String, sa.ForeignKey("accounts.id"), nullable=False),
        sa.Column("amount", sa.BigInteger, nullable=False),
        sa.CheckConstraint("amount > 0", name="reservation_above_zero"),
    )
    op.create_table(
        "settlements",
        sa.Column("reservation_id", sa.String, sa.ForeignKey("reservations.id"), primary_key=True),
        sa.Column("confirmed", sa.BigInteger, nullable=False),
        sa.Column("refunded", sa.BigInteger, nullable=False),
        sa.CheckConstraint("confirmed >= 0 AND refunded >= 0", name="settled_not_negative"),
    )
    op.create_table(
        "ledger_entries",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("account_id", sa.String, sa.ForeignKey("accounts.id"), nullable=False),
        sa.Column("debit", sa.String, nullable=False),
        sa.Column("credit", sa.String, nullable=False),
        sa.Column("amount", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("reservation_id", sa.String, sa.ForeignKey("reservations.id")),
        sa.Column(
            "created_at", sa.String, nullable=False, server_default=sa.text("CURRENT_TIMESTAMP")
        ),
        sa.CheckConstraint("amount > 0", name="amount_above_zero"),
        sa.CheckConstraint("debit <> credit", name="two_sides"),
        sa.CheckConstraint("kind IN ('grant', 'reserve', 'confirm', 'refund')", name="kind_known"),
    )
    op.create_index("ix_ledger_entries_account_id", "ledger_entries", ["account_id"])
    op.create_index("ix_ledger_entries_reservation_id", "ledger_entries", ["reservation_id"])


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("account_id", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("tier", sa.String, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("quoted", sa.BigInteger, nullable=False),
        sa.Column("quote_exact", sa.String, nullable=False),
        sa.Column("reservation_id", sa.String, nullable=False, unique=True),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("started_at_ms", sa.BigInteger),
        sa.Column("finished_at_ms", sa.BigInteger),
        sa.Column("lease_owner", sa.String),
        sa.Column("lease_expires_at_ms", sa.BigInteger),
        sa.Column("attempt", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("percentage", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("deleted", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("charged", sa.BigInteger),
        sa.Column("refunded", sa.BigInteger),
        sa.Column("reason", sa.String),
        sa.Column("video_key", sa.String),
        sa.Column("result", sa.JSON(none_as_null=True)),
        sa.Column("error_code", sa.String),
        sa.Column("error_message", sa.String),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')",
            name="state_known",
        ),
        sa.CheckConstraint(
            "(state IN ('queued', 'running')) = (charged IS NULL)", name="final_means_settled"
        ),
        sa.CheckConstraint(
            "(state = 'running') = (lease_owner IS NOT NULL)", name="running_is_leased"
        ),
    )
    op.create_index("jobs_of_account", "jobs", ["account_id", "number"])
    op.create_index("jobs_open", "jobs", ["state", "tier", "priority", "number"])
    op.create_index(
        "jobs_purgeable",
        "jobs",
        ["number"],
        sqlite_where=sa.text("deleted AND video_key IS NOT NULL"),
        postgresql_where=sa.text("deleted AND video_key IS NOT NULL"),
    )
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.String, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("phase", sa.String, nullable=False),
        sa.Column("percentage", sa.Integer, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("num_steps", sa.Integer, nullable=False),
        sa.Column("frame", sa.Integer, nullable=False),
        sa.Column("num_frames", sa.Integer, nullable=False),
        sa.Column("state", sa.String),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    )


def _refuse(table: str, verb: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute(
            f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        )
