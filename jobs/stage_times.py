"""How long stages took, kept for whoever predicts how long the next ones will."""

from collections.abc import Collection
from typing import NamedTuple

from sqlalchemy import Connection, case, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from jobs.job import Phase
from jobs.tables import now_ms, stage_times

# A stage that waited for its turn seems to take longer, never shorter.
SHORTER, LONGER = 0.5, 0.05
# Users may ask for any number of sizes: of so many, those that were measured last say enough.
READ = 512
KEPT_MS = 30 * 86_400_000


class TimedStage(NamedTuple):
    """A stage of videos of one model and shape on one tier; a denoise's step by degree ranks."""

    model: str
    shape: str
    tier: str
    stage: Phase
    degree: int = 1


def note_times(connection: Connection, took_s: Collection[tuple[TimedStage, float]]) -> None:
    """Let what was measured move what is known: by half where it is shorter, a little if not.

    What nobody has measured for KEPT_MS is forgotten.
    """
    now = select(now_ms()).scalar_subquery()
    connection.execute(delete(stage_times).where(stage_times.c.measured_at_ms < now - KEPT_MS))
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    known = stage_times.c.seconds
    # in one order, so that no two who note the same wait for each other
    for stage, seconds in sorted(took_s):
        row = insert(stage_times).values(
            **stage._asdict(), seconds=seconds, measured_at_ms=now_ms()
        )
        weight = case((row.excluded.seconds < known, SHORTER), else_=LONGER)
        connection.execute(
            row.on_conflict_do_update(
                index_elements=list(TimedStage._fields),
                set_={
                    "seconds": known + weight * (row.excluded.seconds - known),
                    "measured_at_ms": row.excluded.measured_at_ms,
                },
            )
        )


def read_times(connection: Connection) -> dict[TimedStage, float]:
    """Seconds of those that were measured last."""
    query = select(stage_times).order_by(stage_times.c.measured_at_ms.desc()).limit(READ)
    return {
        TimedStage(row.model, row.shape, row.tier, Phase(row.stage), row.degree): row.seconds
        for row in connection.execute(query)
    }
