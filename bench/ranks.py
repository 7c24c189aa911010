"""Runs a function on several gloo ranks, each a process of its own."""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

TIMEOUT_S = 300.0
# A server that has imported all once and started no thread: its forks are quick and safe.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["bench.ranks", "bench.shard_cases"])


def run_ranks(num_ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """work(rank, *args) on every rank, and what each returned.

    torch's ProcessRaisedException if one raised, which ends the others; TimeoutError.
    """
    with tempfile.TemporaryDirectory() as folder:
        results: SimpleQueue[tuple[int, Any]] = CONTEXT.SimpleQueue()
        ranks = start_processes(
            _run,
            (num_ranks, Path(folder) / "store", results, work, args),
            nprocs=num_ranks,
            join=False,
            start_method="forkserver",
        )
        try:
            deadline_s = time.monotonic() + TIMEOUT_S
            found: dict[int, Any] = {}
            while not ranks.join(timeout=0.05):
                while not results.empty():
                    found.update([results.get()])
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"the ranks have not ended within {TIMEOUT_S:g} s")
            while not results.empty():
                found.update([results.get()])
        finally:
            for process in ranks.processes:
                process.kill()
        return [found[rank] for rank in range(num_ranks)]


def _run(
    rank: int,
    num_ranks: int,
    store: Path,
    results: "SimpleQueue[tuple[int, Any]]",
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    with torch.inference_mode():
        results.put((rank, work(rank, *args)))
    dist.barrier()  # nobody leaves while another still needs it
    dist.destroy_process_group()
