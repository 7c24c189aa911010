"""The tables of jobs and of their events."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    false,
    func,
    text,
)

metadata = MetaData()


jobs = Table(
    "jobs",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String, nullable=False, unique=True),
    Column("account_id", String, nullable=False),
    Column("state", String, nullable=False),
    Column("model", String, nullable=False),
    Column("tier", String, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("request", JSON, nullable=False),
    Column("quoted", BigInteger, nullable=False),
    Column("quote_exact", String, nullable=False),
    Column("reservation_id", String, nullable=False, unique=True),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("started_at_ms", BigInteger),
    Column("finished_at_ms", BigInteger),
    Column("lease_owner", String),
    Column("lease_expires_at_ms", BigInteger),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("percentage", Integer, nullable=False, server_default=text("0")),
    Column("cancel_requested", Boolean, nullable=False, server_default=false()),
    Column("deleted", Boolean, nullable=False, server_default=false()),
    Column("charged", BigInteger),
    Column("refunded", BigInteger),
    Column("reason", String),
    Column("video_key", String),
    Column("result", JSON(none_as_null=True)),
    Column("error_code", String),
    Column("error_message", String),
    Column("idempotency_key", String),
    Column("fields_hash", String),
    Column("size_bytes", BigInteger),
    Column("estimated_bytes", BigInteger, nullable=False, server_default=text("0")),
    # How long the video is kept once it is made, and until when; None: for as long as it is wanted.
    Column("kept_ms", BigInteger),
    Column("expires_at_ms", BigInteger),
    Column("made_by_retry", Boolean, nullable=False, server_default=false()),
    # What its work is counted by, `models.cost.VideoShape`; NULL in rows from before there was one.
    Column("shape", String),
    Column("num_steps", Integer, nullable=False, server_default=text("0")),
    # Its account's turn, see `jobs.order`.
    Column("turn", Integer, nullable=False, server_default=text("0")),
    CheckConstraint(
        "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state_known"
    ),
    CheckConstraint(
        "(state IN ('queued', 'running')) = (charged IS NULL)", name="final_means_settled"
    ),
    CheckConstraint("(state = 'running') = (lease_owner IS NOT NULL)", name="running_is_leased"),
    Index("jobs_of_account", "account_id", "number"),
    Index("jobs_idempotency_key", "account_id", "idempotency_key", unique=True),
    Index("jobs_same_fields", "account_id", "fields_hash", "number"),
    Index("jobs_of_account_by_state", "account_id", "state"),
    Index("jobs_open", "state", "tier", "priority", "created_at_ms"),
    Index("jobs_next", "state", "tier", "priority", "turn", "created_at_ms"),
    Index("jobs_turn", "state", "tier", "turn"),
    Index("jobs_created", "created_at_ms"),
    Index(
        "jobs_expiring",
        "expires_at_ms",
        sqlite_where=text("expires_at_ms IS NOT NULL AND deleted = 0"),
        postgresql_where=text("expires_at_ms IS NOT NULL AND NOT deleted"),
    ),
    Index(
        "jobs_purgeable",
        "number",
        # As SQLAlchemy asks for it there, or SQLite does not see that the index would do.
        sqlite_where=text("deleted = 1 AND video_key IS NOT NULL"),
        postgresql_where=text("deleted AND video_key IS NOT NULL"),
    ),
)

job_events = Table(
    "job_events",
    metadata,
    Column("job_id", String, ForeignKey("jobs.id"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("phase", String, nullable=False),
    Column("percentage", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("num_steps", Integer, nullable=False),
    Column("frame", Integer, nullable=False),
    Column("num_frames", Integer, nullable=False),
    Column("skipped", Integer, nullable=False, server_default=text("0")),
    Column("state", String),
    Column("created_at_ms", BigInteger, nullable=False),
)

# How long a stage takes: a step of a denoise by so many ranks, or the whole of any other.
stage_times = Table(
    "stage_times",
    metadata,
    Column("model", String, primary_key=True),
    Column("shape", String, primary_key=True),
    Column("tier", String, primary_key=True),
    Column("stage", String, primary_key=True),
    Column("degree", Integer, primary_key=True),
    Column("seconds", Float, nullable=False),
    Column("measured_at_ms", BigInteger, nullable=False),
    Index("stage_times_measured", "measured_at_ms"),
)


def now_ms() -> ColumnElement[int]:
    """The database's clock, in milliseconds since 1970."""
    return func.now_ms(type_=BigInteger())
