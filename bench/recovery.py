"""What each fault costs a video on two ranks: how soon it is found, and what is made again.

`detect`: from the fault until another rank of the broken group has ended, which must not go on;
where the ranks were not at fault, until the job is leased anew; where everything was killed, that
is counted from when the new server is ready. `pause`: the longest time between two steps that the
owner is told of. `again`: steps that were told twice. A hang is found by the time that steps take,
a lost pipeline by its lease, everything else by the death of a process. `detect_s_max` is of the
faults that kill a rank or its owner; a whole node's loss Ray has to notice first.
"""

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml

from bench.clusters import (
    CHECKPOINT_STEPS,
    ROOT,
    Cluster,
    add_pair,
    running_cluster,
    shipped_config,
)
from bench.machine import describe_machine
from training.random_checkpoint import write_random_checkpoint

NUM_STEPS = 40
AT_STEP = 16  # with what the stream is behind, between two checkpoints
FIELDS = {"prompt": "x", "model": "pair", "num_steps": NUM_STEPS, "num_frames": 29, "seed": 1}
HANG_S = 1.0
WAIT_S, POLL_S = 60.0, 0.01
RANK_DIES = ("a rank killed", "the denoiser killed")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done at AT_STEP; act returns those whose end shows that it was found."""

    name: str
    act: Callable[[Cluster], list[psutil.Process]]


def kill_rank(cluster: Cluster) -> list[psutil.Process]:
    killed, *others = cluster.ranks("t4")
    killed.kill()
    return others


def stop_rank(cluster: Cluster) -> list[psutil.Process]:
    stopped, *others = cluster.ranks("t4")
    stopped.suspend()
    return others


def kill_replica(deployment: str) -> Callable[[Cluster], list[psutil.Process]]:
    def act(cluster: Cluster) -> list[psutil.Process]:
        ranks = cluster.ranks("t4") if deployment == "Denoiser-t4" else []
        cluster.kill(deployment)
        return ranks

    return act


def kill_all(cluster: Cluster) -> list[psutil.Process]:
    cluster.kill_all()
    return []


FAULTS = (
    Fault("a rank killed", kill_rank),
    Fault("a rank hangs", stop_rank),
    Fault("the denoiser killed", kill_replica("Denoiser-t4")),
    Fault("the pipeline killed", kill_replica("VideoPipeline")),
    Fault("everything killed", kill_all),
)


@dataclass(frozen=True, slots=True)
class Recovery:
    """Of one fault."""

    fault: str
    detect_s: float
    pause_s: float
    steps_recomputed: int
    bit_equal: bool


class Bench:
    """A cluster, started again when it was killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        checkpoint = folder / "random"
        checkpoint.mkdir()
        write_random_checkpoint(checkpoint, dim=256, num_layers=4)
        config = shipped_config()
        config["applications"][0]["args"]["leases"] = {"lease_s": 4.0}
        add_pair(config, checkpoint, hang={"least_s": HANG_S})
        self.config = folder / "serve_config.yaml"
        self.config.write_text(yaml.safe_dump(config))
        self.ending = contextlib.ExitStack()
        self.cluster = self.start()

    def start(self) -> Cluster:
        """A new cluster on the same home folder."""
        self.ending.close()
        running = running_cluster(self.config, self.folder / "home")
        self.cluster = self.ending.enter_context(running)
        return self.cluster

    def content(self, video_id: str) -> str:
        """SHA-256 of the MP4."""
        path = self.folder / "video.mp4"
        self.cluster.client.download(video_id, path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def undisturbed(self) -> str:
        """The video without a fault."""
        video_id: str = self.cluster.client.create(FIELDS)["id"]
        for _ in self.cluster.client.follow(video_id):
            pass
        return self.content(video_id)

    def recover(self, fault: Fault, expected: str) -> Recovery:
        """The video with a fault."""
        video_id = self.cluster.client.create(FIELDS)["id"]
        for event in self.cluster.client.follow(video_id):
            if _is_step(event.data) and event.data["step"] >= AT_STEP:
                break
        attempt = self.cluster.job(video_id).attempt
        left = fault.act(self.cluster)
        began_s = time.monotonic()
        if not self.cluster.process.is_running():
            self.start()
            began_s = time.monotonic()
        if left:
            psutil.wait_procs(left, WAIT_S)
        else:
            while self.cluster.job(video_id).attempt == attempt:
                if time.monotonic() - began_s > WAIT_S:
                    raise TimeoutError(f"nobody has leased {video_id} again")
                time.sleep(POLL_S)
        detect_s = time.monotonic() - began_s
        for _ in self.cluster.client.follow(video_id):
            pass
        told = [(step, at_s) for step, at_s in self.cluster.steps(video_id) if step]
        pause_s = max(after - before for (_, before), (_, after) in pairwise(told))
        again = len(told) - len({step for step, _ in told})
        return Recovery(fault.name, detect_s, pause_s, again, self.content(video_id) == expected)


def lose_node(folder: Path) -> Recovery:
    """Of a group that has a rank on each of two nodes; in a process of its own, since Ray reads how
    its processes trust each other when it is imported.
    """
    fields = {name: value for name, value in FIELDS.items() if name != "model"}
    given = [folder / "random", folder / "of_nodes", json.dumps(fields), AT_STEP, CHECKPOINT_STEPS]
    trust = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = subprocess.run(
        [sys.executable, "-m", "bench.lost_node", *map(str, given)],
        cwd=ROOT,
        env={**os.environ, **trust},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Recovery("a node lost", *json.loads(done.stdout.splitlines()[-1]))


def _is_step(data: dict[str, Any]) -> bool:
    return bool(data["phase"] == "denoise" and data["step"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recovery", description=__doc__)
    parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        with bench.ending:
            expected = bench.undisturbed()
            found = [bench.recover(fault, expected) for fault in FAULTS]
        found.append(lose_node(Path(folder)))
    print(f"{'':22}{'detect s':>9}{'pause s':>9}{'again':>12}{'bit-equal':>10}")
    for recovery in found:
        print(
            f"{recovery.fault:22}{recovery.detect_s:9.2f}{recovery.pause_s:9.1f}"
            f"{recovery.steps_recomputed:12}{'yes' if recovery.bit_equal else 'NO':>10}"
        )
    print(f"a checkpoint every {CHECKPOINT_STEPS} steps; a hang is one after {HANG_S} s at least")
    figures = {
        "detect_s_max": max(round(r.detect_s, 3) for r in found if r.fault in RANK_DIES),
        "steps_recomputed_max": max(recovery.steps_recomputed for recovery in found),
        "bit_equal": all(recovery.bit_equal for recovery in found),
        "faults": len(found),
        "detect_s": {recovery.fault: round(recovery.detect_s, 3) for recovery in found},
        "checkpoint_steps": CHECKPOINT_STEPS,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
