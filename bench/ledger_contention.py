"""Reserves a second on one busy account and on a thousand, against a bare driver loop.

Eight processes with a connection each. The production side is `credits.ledger.reserve`, reservation
and ledger row and all. The bare side is the least that a
prepaid balance takes: one conditional UPDATE ... RETURNING with autocommit, straight through the
driver, with the same fsync settings. Both sides take turns in one run.
"""

import argparse
import json
import random
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import psycopg
from sqlalchemy import make_url

from bench.databases import fresh_database, fresh_sqlite, running_postgresql
from bench.machine import describe_machine
from credits.accounts import AccountId, create_account
from credits.ledger import Hold, grant, new_reservation_id, reserve
from credits.plans import Plan
from credits.pricing import Credits
from deployments.database import migrate, open_database, writer_at_once

NUM_CONNECTIONS = 8
NUM_ACCOUNTS = 1000
PLENTY = 10**9
BARE_UPDATE = (
    "UPDATE bare_accounts SET available = available - {0}, reserved = reserved + {0} "
    "WHERE id = {0} AND available >= {0} RETURNING available"
)


@dataclass(frozen=True, slots=True)
class Rate:
    """Of one round: reserves a second over all connections, and the slowest percent's latency."""

    per_s: float
    p99_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ledger_contention", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3, help="of each case and side")
    arguments = parser.parse_args()
    print(describe_machine())
    print(f"{'':12}{'accounts':>9}{'bare/s':>9}{'reserve/s':>11}{'ratio':>7}{'p99 ms':>8}")
    result = {}
    for kind, database in (("postgresql", postgresql_database), ("sqlite", fresh_sqlite)):
        with (
            database() as url,
            ProcessPoolExecutor(NUM_CONNECTIONS, mp_context=get_context("spawn")) as workers,
        ):
            fill(url)
            figures: dict[str, Any] = {"database": kind}
            for name, num_accounts in (("hot", 1), ("spread", NUM_ACCOUNTS)):
                bare, production = [], []
                for _ in range(arguments.rounds):
                    bare.append(run(workers, run_bare, url, num_accounts, arguments.seconds))
                    production.append(
                        run(workers, run_production, url, num_accounts, arguments.seconds)
                    )
                ratio = statistics.median(
                    ours.per_s / theirs.per_s for ours, theirs in zip(production, bare, strict=True)
                )
                p99_ms = statistics.median(rate.p99_ms for rate in production)
                print(
                    f"{kind:12}{num_accounts:9}{_median(bare):9.0f}{_median(production):11.0f}"
                    f"{ratio:7.2f}{p99_ms:8.1f}",
                    flush=True,
                )
                figures |= {f"{name}_ratio": round(ratio, 3)}
                if name == "hot":
                    figures |= {"p99_ms": round(p99_ms, 2)}
            result[kind] = figures
    print(json.dumps(result))


@contextmanager
def postgresql_database() -> Iterator[str]:
    with running_postgresql() as server, fresh_database(server) as url:
        yield url


def fill(url: str) -> None:
    """The schema, the accounts, and the bare side's table with the same rows."""
    engine = open_database(url)
    migrate(engine)
    with engine.begin() as connection:
        for index in range(NUM_ACCOUNTS):
            account_id = AccountId(str(index))
            create_account(connection, account_id, "bench", Plan.ENTERPRISE)
            grant(connection, account_id, Credits(PLENTY))
        connection.exec_driver_sql(
            "CREATE TABLE bare_accounts AS SELECT id, available, reserved FROM accounts"
        )
        connection.exec_driver_sql("CREATE UNIQUE INDEX bare_accounts_id ON bare_accounts (id)")
    engine.dispose()


def run(
    workers: ProcessPoolExecutor, side: "Side", url: str, num_accounts: int, seconds: float
) -> Rate:
    """One round of a side on all connections at once."""
    for start_in_s in (0.0, 1.0):  # the first, empty round brings up the workers
        start_at = time.time() + start_in_s
        until = start_at + (seconds if start_in_s else 0.0)
        rounds = [
            workers.submit(side, url, worker, num_accounts, start_at, until)
            for worker in range(NUM_CONNECTIONS)
        ]
        latencies_s = [latency for finished in rounds for latency in finished.result()]
    p99_ms = 1000 * statistics.quantiles(latencies_s, n=100)[98]
    return Rate(len(latencies_s) / seconds, p99_ms)


def run_bare(
    url: str, worker: int, num_accounts: int, start_at: float, until: float
) -> list[float]:
    """Latencies in seconds of the bare loop on one connection of the driver's own."""
    if url.startswith("sqlite"):
        connection = sqlite3.connect(str(make_url(url).database), timeout=30, isolation_level=None)
        connection.execute("PRAGMA synchronous=FULL")
        statement = BARE_UPDATE.format("?")

        def update(account_id: str) -> None:
            parameters = (1, 1, account_id, 1)
            assert connection.execute(statement, parameters).fetchone() is not None

        return _timed(update, worker, num_accounts, start_at, until)
    with psycopg.connect(url, autocommit=True) as postgresql:
        statement = BARE_UPDATE.format("%s")

        def update(account_id: str) -> None:
            row = postgresql.execute(statement.encode(), (1, 1, account_id, 1)).fetchone()
            assert row is not None

        return _timed(update, worker, num_accounts, start_at, until)


def run_production(
    url: str, worker: int, num_accounts: int, start_at: float, until: float
) -> list[float]:
    """Latencies in seconds of production reserves on one connection.

    On PostgreSQL a reserve is one statement, and needs no transaction round it; on SQLite it is
    three, between BEGIN and COMMIT.
    """
    engine = writer_at_once(open_database(url))

    with engine.connect() as connection:

        def reserve_one(account_id: str) -> None:
            with connection.begin():
                hold = Hold(
                    AccountId(account_id), new_reservation_id(), Credits(1), max_open=PLENTY
                )
                reserve(connection, hold)

        latencies_s = _timed(reserve_one, worker, num_accounts, start_at, until)
    engine.dispose()
    return latencies_s


def _timed(
    act: Callable[[str], None], worker: int, num_accounts: int, start_at: float, until: float
) -> list[float]:
    chance = random.Random(worker)
    latencies_s = []
    time.sleep(max(0.0, start_at - time.time()))
    while (began := time.time()) < until:
        act(str(chance.randrange(num_accounts)))
        latencies_s.append(time.time() - began)
    return latencies_s


def _median(rates: list[Rate]) -> float:
    return statistics.median(rate.per_s for rate in rates)


Side = Callable[[str, int, int, float, float], list[float]]

if __name__ == "__main__":
    main()
