"""Runs a function on several gloo ranks, each a process of its own."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 300.0
# A server that has imported all once and started no thread: its forks are quick and safe.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["bench.ranks", "bench.shard_cases"])


def run_ranks(num_ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """work(rank, *args) on every rank, and what each returned; RuntimeError if one raised."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(num_ranks):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_run, args=(there, Path(folder) / "store", rank, num_ranks, work, args)
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return [_receive(pipe, rank) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _receive(pipe: Connection, rank: int) -> Any:
    if not pipe.poll(TIMEOUT_S):
        raise RuntimeError(f"rank {rank} has not answered for {TIMEOUT_S:g} s")
    result, error = pipe.recv()
    if error is not None:
        raise RuntimeError(f"rank {rank}:\n{error}")
    return result


def _run(
    pipe: Connection,
    store: Path,
    rank: int,
    num_ranks: int,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        with torch.inference_mode():
            result = work(rank, *args)
        # nobody leaves while another still needs it
        dist.barrier()
        pipe.send((result, None))
    except Exception:
        pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()
