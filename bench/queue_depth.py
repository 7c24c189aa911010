"""How long it takes to lease a job of a table that holds very many, on PostgreSQL.

The rows are queued jobs of as many accounts as a plan's limits make them, of every priority, that
came over a day. Each lease is a transaction of its own, as a pipeline's; the job stays leased.
"""

import argparse
import json
import statistics
import time

from sqlalchemy import Connection, text

from bench.databases import fresh_database, running_postgresql
from bench.machine import describe_machine
from deployments.database import migrate, open_database
from jobs.demand import open_groups
from jobs.leases import lease

JOBS_OF_ACCOUNT = 3
FILL = text(
    """
INSERT INTO jobs (id, account_id, state, model, tier, priority, request, quoted, quote_exact,
                  reservation_id, created_at_ms, shape, num_steps, turn)
SELECT 'video_' || n, 'account-' || n / :jobs_of_account, 'queued', 'hunyuan-video', 'a100',
       n / :jobs_of_account % 4, '{}', 1, '1', 'reservation-' || n,
       now_ms() - :span_ms + CAST(n AS bigint) * CAST(:span_ms AS bigint) / CAST(:count AS bigint),
       '129x1280x720x1xalone', 50, 1 + n % :jobs_of_account
FROM generate_series(1, :count) AS n
"""
)


def fill(connection: Connection, count: int, span_s: float) -> None:
    """Queue so many jobs that came evenly over that time until now."""
    parameters = {
        "count": count,
        "span_ms": int(span_s * 1000),
        "jobs_of_account": JOBS_OF_ACCOUNT,
    }
    connection.execute(FILL, parameters)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.queue_depth", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--leases", type=int, default=1000)
    parser.add_argument("--hours", type=float, default=24.0, help="over which they came")
    arguments = parser.parse_args()
    print(describe_machine())
    with running_postgresql() as server, fresh_database(server) as url:
        engine = open_database(url)
        migrate(engine)
        began_s = time.monotonic()
        with engine.begin() as connection:
            fill(connection, arguments.jobs, arguments.hours * 3600)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE jobs"))
            connection.execute(text("CHECKPOINT"))
        print(f"{arguments.jobs:,} jobs queued in {time.monotonic() - began_s:.0f} s")
        took_ms = []
        for _ in range(arguments.leases):
            began_s = time.perf_counter()
            with engine.begin() as connection:
                job = lease(connection, "bench", ["a100"], 60_000)
            took_ms.append(1e3 * (time.perf_counter() - began_s))
            assert job is not None
        with engine.begin() as connection:
            began_s = time.perf_counter()
            groups = open_groups(connection)
            counted_s = time.perf_counter() - began_s
        engine.dispose()
    took_ms.sort()
    p99_ms = took_ms[int(0.99 * len(took_ms))]
    print(
        f"{len(took_ms)} leases: median {statistics.median(took_ms):.2f} ms, p99 {p99_ms:.2f} ms; "
        f"demand counted in {counted_s:.2f} s, in {len(groups)} groups"
    )
    print(
        json.dumps(
            {
                "jobs": arguments.jobs,
                "lease_p50_ms": round(statistics.median(took_ms), 3),
                "lease_p99_ms": round(p99_ms, 3),
                "demand_s": round(counted_s, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
