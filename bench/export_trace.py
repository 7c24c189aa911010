"""`python -m bench.export_trace URL > trace.jsonl`: the requests of a job table as a trace.

Accounts become numbers, prompts stay where they are. `python -m bench.replay_trace` runs it.
"""

import argparse
import sys
from collections.abc import Iterator

from sqlalchemy import Connection

from autoscaling.traces import TraceLine
from credits.accounts import plans_of
from deployments.database import open_database, reader
from jobs.trace import recorded_jobs
from models.request import read_stored


def export_trace(connection: Connection) -> Iterator[str]:
    """A line for each job, in the order of their arrival; plans are those of today."""
    numbers: dict[str, int] = {}
    recorded = list(recorded_jobs(connection))
    plans = plans_of(connection, {job.account_id for job in recorded})
    first_ms = min((job.created_at_ms for job in recorded), default=0)
    for job in sorted(recorded, key=lambda job: job.created_at_ms):
        request = read_stored(job.request)
        line = TraceLine(
            at_s=(job.created_at_ms - first_ms) / 1000,
            family=request.family,
            num_frames=request.num_frames,
            width=request.width,
            height=request.height,
            num_steps=request.num_steps,
            plan=plans[job.account_id],
            account=numbers.setdefault(job.account_id, len(numbers)),
        )
        yield line.model_dump_json()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.export_trace", description=__doc__)
    parser.add_argument("url", help="of the database: sqlite:///... or postgresql://...")
    arguments = parser.parse_args()
    engine = open_database(arguments.url)
    with reader(engine).begin() as connection:
        for line in export_trace(connection):
            sys.stdout.write(line + "\n")
    engine.dispose()


if __name__ == "__main__":
    main()
