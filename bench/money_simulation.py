"""Random histories of requests, crashes and settlements on a real database, from a seed.

A step is one transaction of a production function, committed or crashed between any two of its
statements. After each step every law of `bench.money_world` is checked. With --break one law is
switched off, and the simulation must find it out.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from bench.databases import fresh_database, fresh_sqlite, running_postgresql
from bench.machine import describe_machine
from bench.money_world import BREAKABLE, NUM_ACCOUNTS, OWNERS, World, break_law
from jobs.job import JobState
from models.catalog import Model, load_model

CRASH_SHARE = 0.3
MAX_CRASH_AT = 9


class Simulation:
    """One history: the seed decides every step."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.chance = random.Random(f"money-{seed}")
        self.steps: Counter[str] = Counter()
        self.acts: dict[str, tuple[int, Callable[[], None]]] = {
            "grant": (1, lambda: world.grant(self._account(), self.chance.randint(1, 120))),
            "admit": (6, self._admit),
            "lease": (5, lambda: world.lease(self._owner())),
            "progress": (3, lambda: world.progress(self._owner(), self._job(), self._percent())),
            "finish": (5, self._finish),
            "cancel": (2, lambda: world.cancel(self._job())),
            "retry": (2, lambda: world.retry(self._account(), self.chance.choice((5, 13)))),
            "delete": (2, lambda: world.delete(self._job())),
            "disable": (2, lambda: world.disable(self._account(), self.chance.random() < 0.4)),
            "hang": (2, lambda: world.let_leases_run_out(self._owner())),
            "expire": (1, lambda: world.expire(self._job())),
        }

    def step(self) -> list[str]:
        """One act, perhaps crashed, and the laws that do not hold after it."""
        names = list(self.acts) if self.world.num_jobs() else ["grant", "admit", "retry"]
        weights = [self.acts[name][0] for name in names]
        name = self.chance.choices(names, weights)[0]
        crash_at = None
        if self.chance.random() < CRASH_SHARE:
            crash_at = self.chance.randint(1, MAX_CRASH_AT)
        self.steps[name] += 1
        try:
            with self.world.crashing(crash_at):
                self.acts[name][1]()
        except Exception as error:  # whatever no refusal of ours explains
            return [f"{name}: {type(error).__name__}: {error}", *self.world.violations()]
        return [f"{name}: {fault}" for fault in self.world.violations()]

    def _admit(self) -> None:
        key = f"key-{self.chance.randrange(8)}" if self.chance.random() < 0.5 else None
        num_frames = 13 if key else self.chance.choice((5, 13, 29))
        self.world.admit(self._account(), num_frames, key)

    def _finish(self) -> None:
        state = self.chance.choice((JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED))
        self.world.finish(self._owner(), self._job(), self.chance.randrange(30), state)

    def _account(self) -> int:
        return self.chance.randrange(NUM_ACCOUNTS)

    def _owner(self) -> int:
        return self.chance.randrange(len(OWNERS))

    def _job(self) -> int:
        return self.chance.randrange(self.world.num_jobs())

    def _percent(self) -> int:
        return self.chance.randrange(100)


def simulate(
    url: str, model: Model, seed: int, num_steps: int, broken: str | None
) -> tuple[Counter[str], list[str]]:
    """Run one history; how often each act was tried, and the violations of the first bad step."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(url, Path(folder), model)
        try:
            if broken is not None:
                break_law(world.engine, broken)
            simulation = Simulation(world, seed)
            for number in range(num_steps):
                if faults := simulation.step():
                    return simulation.steps, [f"seed {seed}, step {number}: {f}" for f in faults]
            return simulation.steps, []
        finally:
            world.close()


@contextmanager
def databases(kind: str) -> Iterator[Callable[[], AbstractContextManager[str]]]:
    """Something that makes a context of a fresh database's URL, again and again."""
    if kind == "postgresql":
        with running_postgresql() as server:
            yield lambda: fresh_database(server)
        return
    yield fresh_sqlite


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.money_simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the first history")
    parser.add_argument("--seeds", type=int, default=1, help="how many histories")
    parser.add_argument("--steps", type=int, default=500, help="of each history")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--break", dest="broken", choices=BREAKABLE, help="switch this law off")
    arguments = parser.parse_args()
    print(describe_machine())
    model = load_model(Path(__file__).resolve().parent.parent / "models" / "demo")
    tried: Counter[str] = Counter()
    violations: list[str] = []
    with databases(arguments.database) as fresh:
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            with fresh() as url:
                steps, found = simulate(url, model, seed, arguments.steps, arguments.broken)
            tried += steps
            violations += found
    print(", ".join(f"{name} {count}" for name, count in sorted(tried.items())))
    for line in violations[:20]:
        print(line)
    result = {
        "seeds": arguments.seeds,
        "steps": sum(tried.values()),
        "violations": len(violations),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
