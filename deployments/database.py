"""Opens the database and brings its schema up to date."""

import asyncio
import contextlib
import functools
import logging
import math
import select as sockets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    String,
    bindparam,
    create_engine,
    event,
    func,
    make_url,
    select,
)
from sqlalchemy.exc import InvalidatePoolError, OperationalError

ROOT = Path(__file__).resolve().parent.parent
BUSY_TIMEOUT_S = 30
AWAY_S = 0.5
# Of one process. What it needs above these for a moment is closed again, and a new connection takes
# PostgreSQL longer than any statement here.
KEPT_CONNECTIONS = 10
T = TypeVar("T")
logger = logging.getLogger("ray.serve")


def open_database(url: str) -> Engine:
    """An engine for SQLite or PostgreSQL; ValueError for any other.

    Transactions are READ COMMITTED on PostgreSQL and one writer at a time on SQLite, so every
    change names what it starts from.
    """
    parsed = make_url(url)
    match parsed.get_backend_name():
        case "sqlite":
            return _open_sqlite(parsed)
        case "postgresql":
            driver = parsed.set(drivername="postgresql+psycopg")
            engine = create_engine(driver, pool_size=KEPT_CONNECTIONS)
            event.listen(engine, "checkout", _reconnect_if_closed)
            return engine
        case other:
            raise ValueError(f"only sqlite and postgresql databases are supported, not {other!r}")


@functools.lru_cache(maxsize=32)
def reader(engine: Engine) -> Engine:
    """The same database for reading only: a transaction sees one state and waits for no writer."""
    options: dict[str, Any] = {"reads_only": True}
    if engine.dialect.name == "postgresql":
        options["isolation_level"] = "REPEATABLE READ"
    return engine.execution_options(**options)


@functools.lru_cache(maxsize=32)
def single_reader(engine: Engine) -> Engine:
    """The same database for transactions of one statement that reads.

    On PostgreSQL that saves the round trips of BEGIN and COMMIT.
    """
    return _autocommit(engine) if engine.dialect.name == "postgresql" else reader(engine)


@functools.lru_cache(maxsize=32)
def writer_at_once(engine: Engine) -> Engine:
    """The same database for what is one statement on PostgreSQL, and a transaction on SQLite."""
    return _autocommit(engine) if engine.dialect.name == "postgresql" else engine


def _autocommit(engine: Engine) -> Engine:
    return engine.execution_options(isolation_level="AUTOCOMMIT")


@contextlib.contextmanager
def exclusive(engine: Engine) -> Iterator[Connection]:
    """A transaction of which there is one at a time in all processes: for what starting does."""
    with engine.begin() as connection:
        lock_until_commit(connection, "start")
        yield connection


def lock_statement(name: ColumnElement[str]) -> ColumnElement[Any]:
    """What waits, in a statement of PostgreSQL's, for all others that name the same."""
    return func.pg_advisory_xact_lock(func.hashtextextended(name, 0))


_LOCK = select(lock_statement(bindparam("name", type_=String())))


def lock_until_commit(connection: Connection, name: str) -> None:
    """Of the transactions that lock the same name, one goes on at a time.

    On SQLite one writer goes on at a time anyway.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(_LOCK, {"name": name})


async def retry_while_away(act: Callable[[], T], *, for_s: float) -> T:
    """Run what asks the database in a thread, again and again while it is away.

    For what may be done twice. OperationalError if it is still away after for_s.
    """
    deadline_s = time.monotonic() + for_s
    while True:
        try:
            return await asyncio.to_thread(act)
        except OperationalError as error:
            if time.monotonic() > deadline_s:
                raise
            logger.warning("the database is away: %s", error.orig)
            await asyncio.sleep(AWAY_S)


async def when_back(act: Callable[[], T]) -> T:
    """One round of a loop: the database may be away for as long as it likes, that ends nothing."""
    return await retry_while_away(act, for_s=math.inf)


def migrate(engine: Engine, revision: str = "head") -> None:
    """Run the migrations that the database lacks; of several processes one does."""
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    with exclusive(engine) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def _reconnect_if_closed(connection: Any, _record: Any, _proxy: Any) -> None:
    """InvalidatePoolError, on which the pool connects anew, if the server has hung up.

    Nothing is asked on a connection that lies idle, so there is something to be read only at its
    end. This costs no round trip, as the pool's own pre-ping does.
    """
    idle = sockets.poll()
    idle.register(connection.fileno(), sockets.POLLIN)
    if idle.poll(0):
        raise InvalidatePoolError


def _open_sqlite(url: URL) -> Engine:
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    """Full fsync: the last commits hold money. Transactions are begun by us, not by sqlite3.

    now_ms() is a function of the database's own on PostgreSQL.
    """
    connection.isolation_level = None
    connection.create_function("now_ms", 0, lambda: time.time_ns() // 1_000_000)
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """A writer begins as one: it would fail if another wrote between its first read and write."""
    is_reader = connection.get_execution_options().get("reads_only", False)
    connection.exec_driver_sql("BEGIN" if is_reader else "BEGIN IMMEDIATE")
