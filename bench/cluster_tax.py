"""What the cluster costs: CPU-seconds and wall seconds a video, against one plain process.

Both sides make the same videos with the same model code and ffmpeg and two torch threads, on a
warm start, in turns, so that a machine that is slower for a minute is so for both. The plain side
is a loop in one process; while it runs, the cluster's processes are stopped. The cluster's side
goes through HTTP; its CPU time is user + system time of every process of Ray, Serve and ffmpeg,
what they burn while idle included.
"""

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from sqlalchemy import update

from bench.clusters import ROOT, running_cluster, shipped_config
from bench.machine import describe_machine
from client.client import Client
from credits.accounts import accounts
from deployments.database import open_database
from training.random_checkpoint import write_random_checkpoint

NUM_THREADS = 2
DEMO = {"prompt": "a red circle moving right", "seed": 1}
LARGE = {
    "prompt": "a red circle moving right",
    "seed": 1,
    "model": "large",
    "num_frames": 29,
    "size": "128x128",
    "num_steps": 32,  # more than 20 CPU-seconds, also on a quick processor
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one video: CPU-seconds of all processes, by what they are, and wall seconds."""

    cpu_s: float
    wall_s: float
    by_process: Mapping[str, float] = field(default_factory=dict)


def cpu_s_by_process(root: psutil.Process) -> dict[psutil.Process, float]:
    """User + system seconds of a process and its descendants, those that ended included."""
    found = {}
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            ended = times.children_user + times.children_system
            found[process] = times.user + times.system + ended
    return found


def spent_by_name(
    before: Mapping[psutil.Process, float], after: Mapping[psutil.Process, float]
) -> dict[str, float]:
    """Between two readings, by what the processes are. An actor's title tells what it does now."""
    spent: dict[str, float] = defaultdict(float)
    for process, seconds in after.items():
        name = "ended since"
        with contextlib.suppress(psutil.NoSuchProcess):
            title = next(iter(process.cmdline()), process.name()).rsplit(":", 1)[-1]
            name = Path(title).name.split(".", 1)[0]
        spent[name] += seconds - before.get(process, 0.0)
    return spent


class PlainProcess:
    """`bench.plain_process` for one kind of video, warmed up by a first one."""

    def __init__(self, folder: Path, fields: dict[str, Any]) -> None:
        script = [sys.executable, "-m", "bench.plain_process", str(folder), json.dumps(fields)]
        self.process = subprocess.Popen(
            [*script, str(NUM_THREADS)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.make_video()

    def make_video(self) -> Cost:
        """One video; nothing else of ours should run meanwhile."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return Cost(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """No more lines: it ends, and its folder goes with it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def stopped(root: psutil.Process) -> Iterator[None]:
    """A process and its descendants, held for a few seconds, which their time-outs outlast."""
    processes = [root, *root.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in reversed(processes):
            process.resume()


def write_config(folder: Path, large: Path, num_ranks: int) -> Path:
    """The shipped configuration with one model more and as many threads as the plain process.

    Several ranks have a thread each, and each makes its own request's steps.
    """
    config = shipped_config()
    arguments = config["applications"][0]["args"]
    arguments["models"].append(
        {"path": str(large), "id": "large", "served_on": [{"tier": "local"}]}
    )
    arguments["tiers"][0]["torch_threads"] = NUM_THREADS // num_ranks
    if num_ranks > 1:
        arguments["tiers"][0]["denoiser"] = {"degrees": [1]}
        for deployment in config["applications"][0]["deployments"]:
            if "placement_group_bundles" in deployment:
                ranks = [{"CPU": 1 / num_ranks}] * num_ranks
                deployment["placement_group_bundles"] = [{"CPU": 0.1}, *ranks]
    arguments["encoder"] = {"cache_bytes": 0}  # the plain process encodes every prompt anew
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def make_video(client: Client, fields: dict[str, Any]) -> dict[str, Any]:
    """Create one and wait for its end; RuntimeError unless it succeeds."""
    return finish_video(client, client.create(fields)["id"])


def finish_video(client: Client, video_id: str) -> dict[str, Any]:
    """Follow to the end; RuntimeError unless it succeeds."""
    for event in client.follow(video_id):
        if "video" in event.data:
            video: dict[str, Any] = event.data["video"]
            if video["status"] != "completed":
                raise RuntimeError(f"{video_id}: {video['error']}")
            return video
    raise RuntimeError(f"{video_id}: the events ended early")


def run_cluster(cluster: psutil.Process, client: Client, fields: dict[str, Any]) -> Cost:
    """One video."""
    before, wall_s = cpu_s_by_process(cluster), time.monotonic()
    make_video(client, fields)
    wall_s = time.monotonic() - wall_s
    spent = spent_by_name(before, cpu_s_by_process(cluster))
    return Cost(sum(spent.values()), wall_s, spent)


def run_queue(
    cluster: psutil.Process, client: Client, fields: dict[str, Any], num_jobs: int
) -> Cost:
    """All jobs queued at once, for all of them."""
    before, started_s = cpu_s_by_process(cluster), time.monotonic()
    videos = [client.create(fields)["id"] for _ in range(num_jobs)]
    for video_id in videos:
        finish_video(client, video_id)
    wall_s = time.monotonic() - started_s
    return Cost(sum(spent_by_name(before, cpu_s_by_process(cluster)).values()), wall_s)


def raise_concurrency(home: Path, max_jobs: int) -> None:
    """Let the local account have that many jobs at once."""
    engine = open_database(f"sqlite:///{home / 'mutoscope.db'}")
    with engine.begin() as connection:
        connection.execute(update(accounts).values(max_jobs=max_jobs))
    engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster_tax", description=__doc__)
    parser.add_argument("--jobs", type=int, default=5, help="videos of each kind, one by one")
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2), help="of the denoiser")
    parser.add_argument("--queued", type=int, default=8, help="videos queued at once")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`: stop the cluster
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        large = Path(folder) / "large"
        large.mkdir()
        write_random_checkpoint(large, dim=512, num_layers=8)
        home = Path(folder) / "home"
        plain = {}
        for name, checkpoint, fields in (
            ("demo", ROOT / "models/demo", DEMO),
            ("large", large, LARGE),
        ):
            plain[name] = PlainProcess(checkpoint, fields)
            ending.callback(plain[name].close)
        config = write_config(Path(folder), large, arguments.ranks)
        running = ending.enter_context(running_cluster(config, home))
        cluster, client = running.process, running.client
        raise_concurrency(home, arguments.queued)
        for fields in (DEMO, LARGE):
            make_video(client, fields)

        def in_turns(name: str, fields: dict[str, Any]) -> tuple[list[Cost], list[Cost]]:
            ours, others = [], []
            for _ in range(arguments.jobs):
                ours.append(run_cluster(cluster, client, fields))
                with stopped(cluster):
                    others.append(plain[name].make_video())
            return ours, others

        cluster_demo, plain_demo = in_turns("demo", DEMO)
        cluster_large, plain_large = in_turns("large", LARGE)
        queued, plain_queued_s = [], 0.0
        for _ in range(2):
            queued.append(run_queue(cluster, client, LARGE, arguments.queued))
            for _ in range(3):
                with stopped(cluster):
                    cost = plain["large"].make_video()
                plain_large.append(cost)
                plain_queued_s += cost.wall_s
        num_queued = arguments.queued * len(queued)
        cluster_videos_per_s = num_queued / sum(cost.wall_s for cost in queued)
        plain_videos_per_s = 6 / plain_queued_s
    rows = {
        "demo prompt, plain process": plain_demo,
        "demo prompt, cluster": cluster_demo,
        "large job, plain process": plain_large,
        "large job, cluster": cluster_large,
    }
    print(f"{'median of':30}{'CPU s':>8}{'wall s':>8}")
    for name, costs in rows.items():
        print(f"{f'{name} ({len(costs)})':30}{_cpu_s(costs):8.2f}{_wall_s(costs):8.2f}")
    print("of that job's CPU-seconds in the cluster, by process:")
    names = {name for cost in cluster_large for name in cost.by_process}
    shares = {
        name: statistics.median(cost.by_process.get(name, 0.0) for cost in cluster_large)
        for name in names
    }
    for name, seconds in sorted(shares.items(), key=lambda share: -share[1])[:8]:
        print(f"    {name:30}{seconds:8.2f}")
    print(f"large jobs a minute: plain {60 * plain_videos_per_s:.2f}, ", end="")
    print(f"cluster with {arguments.queued} queued {60 * cluster_videos_per_s:.2f}, ", end="")
    print(f"{sum(cost.cpu_s for cost in queued) / num_queued:.2f} CPU-seconds each")
    result = {
        "cpu_ratio": round(_cpu_s(cluster_large) / _cpu_s(plain_large), 3),
        "throughput_ratio": round(cluster_videos_per_s / plain_videos_per_s, 3),
        "demo_overhead_cpu_s": round(_cpu_s(cluster_demo) - _cpu_s(plain_demo), 3),
        "demo_overhead_wall_s": round(_wall_s(cluster_demo) - _wall_s(plain_demo), 3),
    }
    print(json.dumps(result))


def _cpu_s(costs: list[Cost]) -> float:
    return statistics.median(cost.cpu_s for cost in costs)


def _wall_s(costs: list[Cost]) -> float:
    return statistics.median(cost.wall_s for cost in costs)


if __name__ == "__main__":
    main()
