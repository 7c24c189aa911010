"""Connections to PostgreSQL, which may restart."""

import pytest
from sqlalchemy import text

from deployments.database import open_database

pytestmark = pytest.mark.database

OWN_PID = text("SELECT pg_backend_pid()")


def test_a_connection_that_the_server_has_closed_is_replaced_unnoticed(postgresql_url: str) -> None:
    engine, operator = open_database(postgresql_url), open_database(postgresql_url)
    with engine.begin() as connection:
        pid = connection.execute(OWN_PID).scalar_one()
    with operator.begin() as connection:
        connection.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    with engine.begin() as connection:
        assert connection.execute(OWN_PID).scalar_one() != pid
    engine.dispose()
    operator.dispose()
