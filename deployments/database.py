"""Opens the database and brings its schema up to date."""

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, make_url

ROOT = Path(__file__).resolve().parent.parent
BUSY_TIMEOUT_S = 30


def open_database(url: str) -> Engine:
    """An engine whose transactions are serialised: on SQLite each begins as a writer."""
    if not url.startswith("sqlite"):
        raise ValueError(f"only sqlite databases are supported, not {url.split(':')[0]!r}")
    database = make_url(url).database
    if database:
        Path(database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin)
    return engine


def reader(engine: Engine) -> Engine:
    """The same database for reading only: its transactions wait for no writer."""
    return engine.execution_options(reads_only=True)


def migrate(engine: Engine) -> None:
    """Run the migrations that the database lacks."""
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _configure_sqlite(connection: Any, _record: Any) -> None:
    """Full fsync: the last commits hold money. Transactions are begun by us, not by sqlite3."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    """A writer begins as one: it would fail if another wrote between its first read and write."""
    is_reader = connection.get_execution_options().get("reads_only", False)
    connection.exec_driver_sql("BEGIN" if is_reader else "BEGIN IMMEDIATE")
