"""Creates a second through HTTP, beside a FastAPI route that only validates the same body.

The ingress's application behind uvicorn in a process of its own, on a real database with its
shipped settings; the clients are processes with a connection each. Every create is authenticated,
priced, reserved and queued; the account's concurrency is raised. No job is run.
"""

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from autoscaling.tiers import GpuTier, ServedOn
from bench.clusters import no_pools
from bench.databases import fresh_database, fresh_sqlite, running_postgresql
from bench.machine import describe_machine
from credits.accounts import AccountId, change_account, create_account
from credits.api_keys import add_api_key
from credits.ledger import grant
from credits.plans import Plan, PlanTable
from credits.pricing import Credits, PriceTable, WorkWeights
from deployments.admission import Offer
from deployments.config import LimitsConfig
from deployments.database import migrate, open_database
from deployments.ingress import IngressParts, create_app
from deployments.url_guard import UrlGuardConfig
from deployments.webhooks import WebhookConfig
from media.object_store import LocalObjectStore
from models.catalog import load_model
from training.random_checkpoint import write_random_checkpoint

BODY = {"prompt": "a red circle moving right", "num_frames": 13, "seed": 7, "size": "64x64"}
API_KEY, PEPPER = "mk_live_bench", "bench"
CLIENTS = (1, 8)
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Rate:
    """Answers a second over all clients, how long they took, and the server process's CPU for one.

    The database's own CPU, on PostgreSQL, is not in it.
    """

    per_s: float
    cpu_ms: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Server:
    """A process that serves, and its port."""

    process: psutil.Process
    port: int

    def cpu_s(self) -> float:
        """CPU seconds, user and system, since it started."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


class BaselineBody(BaseModel):
    """The same body as declared fields."""

    prompt: str
    num_frames: int
    seed: int
    size: str


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.admission", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3, help="of each case")
    arguments = parser.parse_args()
    print(describe_machine())
    print(
        f"{'':20}{'clients':>8}{'answers/s':>11}{'of it':>7}{'p50 ms':>8}{'p99 ms':>8}{'CPU ms':>8}"
    )
    clients = ProcessPoolExecutor(max(CLIENTS), mp_context=multiprocessing.get_context("fork"))
    list(clients.map(time.sleep, [0.2] * max(CLIENTS)))  # forked now, while there is one thread
    with clients, contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "tiny"
        checkpoint.mkdir()
        write_random_checkpoint(checkpoint, dim=64, num_layers=1)
        server = stack.enter_context(running_postgresql())
        urls = {
            "postgresql": stack.enter_context(fresh_database(server)),
            "sqlite": stack.enter_context(fresh_sqlite()),
        }
        servers = {"validation alone": stack.enter_context(serving(serve_baseline))}
        for kind, url in urls.items():
            make_account(url)
            home = str(Path(folder) / kind)
            servers[kind] = stack.enter_context(serving(serve_ingress, url, home, str(checkpoint)))
        result = measure(clients, servers, arguments.seconds, arguments.rounds)
    print(json.dumps({**result.pop("postgresql"), **result}))


def measure(
    clients: ProcessPoolExecutor, servers: dict[str, Server], seconds: float, rounds: int
) -> dict[str, Any]:
    """All cases take turns in each round; the medians of the rounds are printed."""
    result: dict[str, Any] = {}
    for num_clients in CLIENTS:
        rates: dict[str, list[Rate]] = {kind: [] for kind in servers}
        for _ in range(rounds):
            for kind, server in servers.items():
                rates[kind].append(run(clients, server, num_clients, seconds))
        baseline = rates["validation alone"]
        for kind, found in rates.items():
            ratio = statistics.median(
                ours.per_s / theirs.per_s for ours, theirs in zip(found, baseline, strict=True)
            )
            per_s, p50_ms, p99_ms, cpu_ms = (
                statistics.median(getattr(rate, name) for rate in found)
                for name in ("per_s", "p50_ms", "p99_ms", "cpu_ms")
            )
            print(
                f"{kind:20}{num_clients:8}{per_s:11.0f}{ratio:7.2f}"
                f"{p50_ms:8.1f}{p99_ms:8.1f}{cpu_ms:8.2f}",
                flush=True,
            )
            if kind != "validation alone":
                result[kind] = {
                    "creates_per_s": round(per_s, 1),
                    "p99_ms": round(p99_ms, 1),
                    "baseline_ratio": round(ratio, 3),
                }
    return result


def run(clients: ProcessPoolExecutor, server: Server, num_clients: int, seconds: float) -> Rate:
    """One round: every client sends one request after the other."""
    start_at = time.time() + 1.0
    sent = [
        clients.submit(send, server.port, start_at, start_at + seconds) for _ in range(num_clients)
    ]
    before_s = server.cpu_s()
    latencies_ms = [latency for finished in sent for latency in finished.result()]
    cpu_s = server.cpu_s() - before_s
    return Rate(
        len(latencies_ms) / seconds,
        1000 * cpu_s / len(latencies_ms),
        statistics.median(latencies_ms),
        statistics.quantiles(latencies_ms, n=100)[98],
    )


def send(port: int, start_at: float, until: float) -> list[float]:
    """Latencies in milliseconds of requests on one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps(BODY)
    headers = {"content-type": "application/json", "authorization": f"Bearer {API_KEY}"}
    latencies_ms = []
    time.sleep(max(0.0, start_at - time.time()))
    while (began := time.time()) < until:
        connection.request("POST", "/v1/videos", body, headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(content.decode())
        latencies_ms.append(1000 * (time.time() - began))
    connection.close()
    return latencies_ms


def make_account(url: str) -> None:
    """An account that may have as many jobs as it likes."""
    engine = open_database(url)
    migrate(engine)
    account_id = AccountId("bench")
    with engine.begin() as connection:
        create_account(connection, account_id, "bench", Plan.ENTERPRISE)
        change_account(connection, account_id, {"max_jobs": 10**6})
        add_api_key(connection, account_id, API_KEY, PEPPER.encode())
        grant(connection, account_id, Credits(10**9))
    engine.dispose()


@contextlib.contextmanager
def serving(target: Callable[..., None], *arguments: str) -> Iterator[Server]:
    """A server in a process of its own."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(theirs, *arguments))
    process.start()
    try:
        port = ours.recv()
        while not _answers(port):
            time.sleep(0.1)
        yield Server(psutil.Process(process.pid), port)
    finally:
        process.terminate()
        process.join()


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/openapi.json")
        return connection.getresponse().status == 200
    except ConnectionError:
        return False
    finally:
        connection.close()


def serve_baseline(ready: Any) -> None:
    """A route that validates the body and answers."""
    app = FastAPI()

    def create(body: BaselineBody) -> dict[str, Any]:
        return {"id": "video_0", "object": "video", "prompt": body.prompt}

    app.add_api_route("/v1/videos", create, methods=["POST"])
    _serve(app, ready)


def serve_ingress(ready: Any, database_url: str, home: str, checkpoint: str) -> None:
    """The ingress's application, as its replica makes it."""
    os.environ |= {"MUTOSCOPE_PEPPER": PEPPER, "MUTOSCOPE_ADMIN_KEY": "mk_admin_bench"}
    model = load_model(Path(checkpoint))
    limits = PlanTable().limits
    roomy = limits[Plan.ENTERPRISE].model_copy(update={"max_stored_bytes": 10**15})
    parts = IngressParts(
        home=Path(home),
        database_url=database_url,
        local_account=None,
        store=LocalObjectStore(Path(home) / "storage"),
        offers={model.id: Offer(model, (ServedOn(tier=GpuTier.LOCAL),))},
        prices=PriceTable(),
        plans=PlanTable(limits={**limits, Plan.ENTERPRISE: roomy}),
        weights=WorkWeights(),
        limits=LimitsConfig(),
        rates={},
        webhooks=WebhookConfig(),
        image_urls=UrlGuardConfig(),
    )
    _serve(create_app(parts, lambda: None, no_pools), ready)


def _serve(app: FastAPI, ready: Any) -> None:
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    sockets = [config.bind_socket()]
    ready.send(sockets[0].getsockname()[1])
    server.run(sockets)


if __name__ == "__main__":
    main()
