"""On PostgreSQL, a job's first event is not told: nobody can be waiting for it yet.

A transaction that tells something takes a lock of the whole server's until it is committed.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the trigger anew; SQLite has none."""
    if op.get_bind().dialect.name == "sqlite":
        return
    op.execute("DROP TRIGGER job_events_notify ON job_events")
    op.execute(
        "CREATE TRIGGER job_events_notify AFTER INSERT ON job_events "
        "FOR EACH ROW WHEN (NEW.seq > 1) EXECUTE FUNCTION notify_job_event()"
    )
