"""PostgreSQL, reservations that expire, and a count of an account's open reservations."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NOW_MS = {
    "sqlite": "(CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER))",
    "postgresql": "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)",
}
APPEND_ONLY = ("ledger_entries", "reservations", "settlements")


def upgrade() -> None:
    """Extend accounts and settlements, rebuild the ledger's table with its new kind."""
    op.execute(
        "ALTER TABLE accounts ADD COLUMN open_reservations INTEGER NOT NULL DEFAULT 0 "
        "CONSTRAINT open_reservations_not_negative CHECK (open_reservations >= 0)"
    )
    op.execute(
        "UPDATE accounts SET open_reservations = (SELECT count(*) FROM jobs WHERE "
        "jobs.account_id = accounts.id AND jobs.state IN ('queued', 'running'))"
    )
    op.add_column(
        "settlements", sa.Column("expired", sa.Boolean, nullable=False, server_default=sa.false())
    )
    _rebuild_entries()
    _refuse_changes()


def _rebuild_entries() -> None:
    for column in ("account_id", "reservation_id"):
        op.drop_index(f"ix_ledger_entries_{column}", "ledger_entries")
    op.rename_table("ledger_entries", "old_entries")
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
            "created_at_ms",
            sa.BigInteger,
            nullable=False,
            server_default=sa.text(NOW_MS[op.get_bind().dialect.name]),
        ),
        sa.CheckConstraint("amount > 0", name="amount_above_zero"),
        sa.CheckConstraint("debit <> credit", name="two_sides"),
        sa.CheckConstraint(
            "kind IN ('grant', 'reserve', 'confirm', 'refund', 'expire')", name="kind_known"
        ),
    )
    columns = "number, account_id, debit, credit, amount, kind, reservation_id"
    # Only SQLite databases can hold rows of the table before this one.
    created_at_ms = {
        "sqlite": "CAST((julianday(created_at) - 2440587.5) * 86400000 AS INTEGER)",
        "postgresql": "0",
    }[op.get_bind().dialect.name]
    op.execute(
        f"INSERT INTO ledger_entries ({columns}, created_at_ms) "
        f"SELECT {columns}, {created_at_ms} FROM old_entries"
    )
    op.drop_table("old_entries")
    op.create_index("ledger_entries_of_account", "ledger_entries", ["account_id", "number"])
    op.create_index("ix_ledger_entries_reservation_id", "ledger_entries", ["reservation_id"])


def _refuse_changes() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):  # the other tables have theirs since 0001
            op.execute(
                f"CREATE TRIGGER ledger_entries_no_{verb.lower()} BEFORE {verb} ON ledger_entries "
                "BEGIN SELECT RAISE(ABORT, 'ledger_entries is append-only'); END"
            )
        return
    op.execute(
        "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION '% is append-only', TG_TABLE_NAME "
        "USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )
