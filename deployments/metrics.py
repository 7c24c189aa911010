"""`/metrics`: what the database says, so that every replica says the same.

Nothing is counted in a process: a replica that starts anew forgets nothing.
"""

from collections import Counter
from collections.abc import Iterator

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection, Engine

from credits.accounts import plans_of
from credits.ledger import EntryKind
from credits.totals import total
from deployments.database import reader
from jobs.store import count_by_state, count_lost_leases, count_queued


class DatabaseCollector(Collector):
    """Reads one set of figures from the database at each collection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def describe(self) -> list[Metric]:
        """Nothing beforehand: else registering would read everything once more."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Queue, jobs, credits, leases."""
        yield from self._jobs()
        yield from self._credits()

    def _jobs(self) -> Iterator[Metric]:
        depth = GaugeMetricFamily(
            "mutoscope_queue_depth", "Jobs that wait, by tier and plan.", labels=("tier", "plan")
        )
        queued = count_queued(self.connection)
        plans = plans_of(self.connection, {account_id for _, account_id in queued})
        summed: Counter[tuple[str, str]] = Counter()
        for (tier, account_id), count in queued.items():
            summed[tier, plans[account_id]] += count
        for (tier, plan), count in sorted(summed.items()):
            depth.add_metric((tier, plan), count)
        yield depth
        states = GaugeMetricFamily("mutoscope_jobs", "Jobs by state.", labels=("state",))
        for state, count in count_by_state(self.connection).items():
            states.add_metric((state,), count)
        yield states
        yield CounterMetricFamily(
            "mutoscope_lease_losses",
            "Times a job was leased again because its holder was gone.",
            value=count_lost_leases(self.connection),
        )

    def _credits(self) -> Iterator[Metric]:
        totals = total(self.connection)
        moved = CounterMetricFamily(
            "mutoscope_credits", "Credits that moved, by kind of transfer.", labels=("kind",)
        )
        for kind in EntryKind:
            moved.add_metric((kind,), totals.moved[kind])
        yield moved
        yield GaugeMetricFamily(
            "mutoscope_credits_reserved", "Credits that reservations hold.", value=totals.reserved
        )
        yield GaugeMetricFamily(
            "mutoscope_ledger_imbalance",
            "Credits by which accounts and ledger differ; anything but 0 is a fault.",
            value=totals.imbalance,
        )


def metrics_response(engine: Engine) -> Response:
    """The figures in Prometheus' text format."""
    with reader(engine).begin() as connection:
        registry = CollectorRegistry()
        registry.register(DatabaseCollector(connection))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
