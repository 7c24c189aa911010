"""Kills a process, or its database connection, before every statement of a job's life.

Each row of the table is one point of one act: a child process runs the production function and dies
there by SIGKILL, or finds its connection ended by the server. Then come those who are left: the
client sends its request again, another pipeline takes what has no holder. At the end there must be
one job, one settlement, one charge and nothing reserved.
"""

import argparse
import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import OperationalError

from bench.databases import fresh_database, fresh_sqlite, running_postgresql
from bench.life import STEPS, Life, Step
from bench.machine import describe_machine
from credits.ledger import AlreadySettled
from deployments.database import migrate, open_database
from jobs.store import LeaseLost
from models.catalog import Model, load_model
from training.random_checkpoint import write_random_checkpoint

MAX_POINTS = 60
DIED = ("process", "connection")


@dataclass(frozen=True, slots=True)
class Row:
    """A point and what came of it."""

    role: str
    step: str
    point: str
    died: str
    faults: list[str]


def run_points(
    url: str, folder: Path, model: Model, died: str, steps: Sequence[Step] = STEPS
) -> Iterator[Row]:
    """Every point of these steps."""
    for step in steps:
        for index in range(1, MAX_POINTS):
            name = f"{step.role}-{step.name}-{died}-{index}"
            with contextlib.closing(Life(url, folder, model, name)) as life:
                life.begin()
                for act in step.before:
                    act(life)
                life.close()  # a connection is not to be shared with a child
                point = _die_at(url, folder, model, name, step, index, died)
                life.recover(step.again)
                if point is None:
                    break
                row = Row(step.role, step.name, point, died, life.faults(step.ends))
            yield row
        else:
            raise RuntimeError(f"{step.name} has more than {MAX_POINTS} points")


def _die_at(
    url: str, folder: Path, model: Model, name: str, step: Step, index: int, died: str
) -> str | None:
    """Run the step in a child that dies at its index-th point; the point, None if it has fewer."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(told)
            life = Life(url, folder, model, name)
            _arm(life.engine, index, died, tell)
            with contextlib.suppress(OperationalError, LeaseLost, AlreadySettled):
                step.act(life)
            status = 0
        finally:
            os._exit(status)
    os.close(tell)
    with os.fdopen(told) as said:
        point = said.read()
    _, status = os.waitpid(child, 0)
    if died == "process" and point and os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise RuntimeError(f"{name}: the child was not killed at {point}")
    if os.waitstatus_to_exitcode(status) == 1:
        raise RuntimeError(f"{name}: the child failed at {point!r}")
    return point or None


def _arm(engine: Engine, index: int, died: str, tell: int) -> None:
    """Count statements and commits; die before the index-th of them."""
    count = 0

    def at(connection: Connection, what: str) -> None:
        nonlocal count
        count += 1
        if count != index:
            return
        os.write(tell, what.encode())
        if died == "process":
            os.kill(os.getpid(), signal.SIGKILL)
        _end_connection(connection)

    def before_statement(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        at(connection, " ".join(statement.split())[:34])

    event.listen(engine, "before_cursor_execute", before_statement)
    event.listen(engine, "commit", lambda connection: at(connection, "COMMIT"))
    # What follows a COMMIT, before the act returns.
    event.listen(engine, "checkin", lambda *_: _after_commit())

    def _after_commit() -> None:
        nonlocal count
        count += 1
        if count == index and died == "process":
            os.write(tell, b"(after it)")
            os.kill(os.getpid(), signal.SIGKILL)
        elif count == index:
            os.write(tell, b"(after it)")


def _end_connection(connection: Connection) -> None:
    """As an operator, a proxy or a fail-over does."""
    pid = connection.connection.driver_connection.info.backend_pid  # type: ignore[union-attr]
    other = open_database(connection.engine.url.render_as_string(hide_password=False))
    with other.begin() as its_own:
        its_own.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    other.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fault_points", description=__doc__)
    parser.parse_args()
    print(describe_machine())
    result: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = folder / "tiny"
        checkpoint.mkdir()
        write_random_checkpoint(checkpoint, dim=64, num_layers=1)
        model = load_model(checkpoint)
        server = stack.enter_context(running_postgresql())
        urls = {
            "postgresql": stack.enter_context(fresh_database(server)),
            "sqlite": stack.enter_context(fresh_sqlite()),
        }
        for kind, url in urls.items():
            engine = open_database(url)
            migrate(engine)
            engine.dispose()
            rows = [
                row
                for died in (DIED if kind == "postgresql" else DIED[:1])
                for row in run_points(url, folder / kind, model, died)
            ]
            for row in rows:
                verdict = "; ".join(row.faults) or "ok"
                print(
                    f"{kind:11}{row.role:9}{row.step:18}{row.died:11}{row.point:36}{verdict}",
                    flush=True,
                )
            result[kind] = {
                "points": len(rows),
                "violations": sum(bool(row.faults) for row in rows),
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
