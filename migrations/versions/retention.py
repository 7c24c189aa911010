"""Videos are kept for as long as the plan says, jobs that a retry made are known, and laws of the
ledger that only code kept are the database's.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

KEYS = {
    "ledger_entries": (
        "number = NEW.number",
        "reservation_id = NEW.reservation_id AND kind = NEW.kind",
    ),
    "reservations": ("id = NEW.id",),
    "audit_log": ("number = NEW.number",),
    "settlements": ("reservation_id = NEW.reservation_id",),
}
SUM = (
    "NEW.confirmed + NEW.refunded <> "
    "(SELECT amount FROM reservations WHERE id = NEW.reservation_id)"
)
UNEQUAL = "a settlement is of the whole reservation"


def upgrade() -> None:
    """Videos that are there already are kept until their account's plan changes."""
    op.add_column("jobs", sa.Column("kept_ms", sa.BigInteger))
    op.add_column("jobs", sa.Column("expires_at_ms", sa.BigInteger))
    op.add_column(
        "jobs", sa.Column("made_by_retry", sa.Boolean, nullable=False, server_default=sa.false())
    )
    op.create_index(
        "jobs_expiring",
        "jobs",
        ["expires_at_ms"],
        sqlite_where=sa.text("expires_at_ms IS NOT NULL AND deleted = 0"),
        postgresql_where=sa.text("expires_at_ms IS NOT NULL AND NOT deleted"),
    )
    if op.get_bind().dialect.name == "sqlite":
        # It was not used: SQLite must find the query's own words in the index's.
        op.drop_index("jobs_purgeable", "jobs")
        op.create_index(
            "jobs_purgeable",
            "jobs",
            ["number"],
            sqlite_where=sa.text("deleted = 1 AND video_key IS NOT NULL"),
        )
    op.drop_index("ix_ledger_entries_reservation_id", "ledger_entries")
    op.create_index(
        "ledger_entries_of_reservation", "ledger_entries", ["reservation_id", "kind"], unique=True
    )
    if op.get_bind().dialect.name == "sqlite":
        _refuse_on_sqlite()
    else:
        _refuse_on_postgresql()


def _refuse_on_sqlite() -> None:
    """INSERT OR REPLACE deletes what it replaces without a DELETE trigger's being asked."""
    for table, keys in KEYS.items():
        taken = " OR ".join(f"EXISTS (SELECT 1 FROM {table} WHERE {key})" for key in keys)
        op.execute(
            f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN {taken} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        )
    op.execute(
        "CREATE TRIGGER settlements_whole BEFORE INSERT ON settlements "
        f"WHEN {SUM} "
        f"BEGIN SELECT RAISE(ABORT, '{UNEQUAL}'); END"
    )


def _refuse_on_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION refuse_unequal() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF {SUM} THEN RAISE EXCEPTION '{UNEQUAL}' "
        "USING ERRCODE = 'integrity_constraint_violation'; END IF; RETURN NEW; END $$"
    )
    op.execute(
        "CREATE TRIGGER settlements_whole BEFORE INSERT ON settlements "
        "FOR EACH ROW EXECUTE FUNCTION refuse_unequal()"
    )
