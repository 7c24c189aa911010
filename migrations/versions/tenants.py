"""Keys with a name and an end, accounts that can be disabled, the audit log."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Extend accounts, rebuild api_keys, make the audit log."""
    if op.get_bind().dialect.name == "postgresql":  # on SQLite, deployments.database gives it
        op.execute(
            "CREATE FUNCTION now_ms() RETURNS BIGINT LANGUAGE sql VOLATILE AS "
            "'SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)'"
        )
    op.add_column(
        "accounts", sa.Column("disabled", sa.Boolean, nullable=False, server_default=sa.false())
    )
    op.add_column(
        "accounts",
        sa.Column("created_at_ms", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    )
    _rebuild_keys()
    _create_audit_log()


def _rebuild_keys() -> None:
    op.drop_index("ix_api_keys_account_id", "api_keys")
    op.rename_table("api_keys", "old_keys")
    op.create_table(
        "api_keys",
        sa.Column("key_hash", sa.String, primary_key=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("account_id", sa.String, sa.ForeignKey("accounts.id"), nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("hint", sa.String, nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger),
        sa.Column("revoked_at_ms", sa.BigInteger),
        sa.Column("last_used_at_ms", sa.BigInteger),
    )
    op.execute(
        "INSERT INTO api_keys (key_hash, id, account_id, name, hint, created_at_ms) "
        "SELECT key_hash, 'key_' || substr(key_hash, 1, 24), account_id, '', '', 0 FROM old_keys"
    )
    op.drop_table("old_keys")
    op.create_index("ix_api_keys_account_id", "api_keys", ["account_id"])


def _create_audit_log() -> None:
    op.create_table(
        "audit_log",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("account_id", sa.String, sa.ForeignKey("accounts.id"), nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
    )
    op.create_index("ix_audit_log_account_id", "audit_log", ["account_id"])
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_log_no_{verb.lower()} BEFORE {verb} ON audit_log "
                "BEGIN SELECT RAISE(ABORT, 'audit_log is append-only'); END"
            )
        return
    op.execute(
        "CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log "
        "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
    )
