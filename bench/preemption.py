"""An enterprise request arrives at a busy replica: how long until its first step, and at what cost.

A pro account's video is at work on the only group of ranks, with many steps to go, when the local
enterprise account asks for a short one. `first step`: from the enterprise request's arrival at the
denoiser to the end of its first step, in steps of the video that it overtakes; that one's step
which is under way must end first. `cost`: how much longer the overtaken video waits for its next
step than the enterprise request's own steps and that one take. `with decode`: what it takes longer
than alone in all, the enterprise request's own steps not counted: here the enterprise video's
frames are decoded on the same two cores meanwhile, as any video's would be. All in steps of the
overtaken video; times are the database's.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from bench.clusters import Cluster, running_cluster, shipped_config
from bench.machine import describe_machine
from client.client import Client, Server
from credits.plans import Plan
from training.random_checkpoint import write_random_checkpoint

SLOW = {"prompt": "x", "num_steps": 30, "num_frames": 29, "size": "128x128", "seed": 1}
QUICK = {**SLOW, "num_steps": 5, "seed": 2}
AT_STEP = 10


@dataclass(frozen=True, slots=True)
class Steps:
    """When a video's denoise began and when each of its steps was told, in seconds."""

    began_s: float
    told_s: list[float]

    @property
    def seconds(self) -> float:
        """From the beginning to the last step."""
        return self.told_s[-1] - self.began_s

    def wait_s(self, moment_s: float) -> float:
        """The time between the steps told before and after a moment."""
        before = max(told_s for told_s in self.told_s if told_s <= moment_s)
        return min(told_s for told_s in self.told_s if told_s > moment_s) - before

    def step_s(self, count: int) -> float:
        """The median of the first steps, which nobody disturbs."""
        pairs = zip(self.told_s, self.told_s[1:count], strict=False)
        return statistics.median(after - before for before, after in pairs)


def read_steps(cluster: Cluster, video_id: str) -> Steps:
    times = [at_s for _, at_s in cluster.steps(video_id)]
    return Steps(times[0], times[1:])


def wait_for(client: Client, video_id: str) -> None:
    """RuntimeError unless it succeeds."""
    for event in client.follow(video_id):
        if "video" in event.data and event.data["video"]["status"] != "completed":
            raise RuntimeError(f"{video_id}: {event.data['video']['error']}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.preemption", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(describe_machine())
    rows: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "random"
        checkpoint.mkdir()
        write_random_checkpoint(checkpoint, dim=512, num_layers=4)
        config = shipped_config()
        served = {"path": str(checkpoint), "served_on": [{"tier": "local"}]}
        config["applications"][0]["args"]["models"] = [served]
        path = Path(folder) / "serve_config.yaml"
        path.write_text(yaml.safe_dump(config))
        with running_cluster(path, Path(folder) / "home") as cluster:
            key = _pro_account(cluster)
            with Client(Server(cluster.server.url, key)) as pro:
                wait_for(pro, pro.create(SLOW)["id"])  # warm
                for _ in range(arguments.rounds):
                    alone = pro.create(SLOW)["id"]
                    wait_for(pro, alone)
                    slow, quick = _overtake(pro, cluster.client)
                    undisturbed = read_steps(cluster, alone)
                    overtaken = read_steps(cluster, slow)
                    overtaking = read_steps(cluster, quick)
                    step_s = overtaken.step_s(AT_STEP)
                    first_s = overtaking.told_s[0] - overtaking.began_s
                    # It had the ranks for itself; the wait before its first step is no cost of its.
                    told_s = overtaking.told_s
                    own_s = (told_s[-1] - told_s[0]) * len(told_s) / (len(told_s) - 1)
                    waited_s = overtaken.wait_s(told_s[0]) - own_s - step_s
                    longer_s = overtaken.seconds - undisturbed.seconds - own_s
                    rows.append((first_s / step_s, waited_s / step_s, longer_s / step_s))
    print(
        f"{'':8}{'first step':>11}{'cost':>7}{'with decode':>13}   in steps of the overtaken video"
    )
    for number, (steps, cost, longer) in enumerate(rows, 1):
        print(f"round {number:<2}{steps:11.2f}{cost:7.2f}{longer:13.2f}")
    names = ("steps_to_first", "cost_steps", "cost_with_decode_steps")
    medians = [round(statistics.median(column), 2) for column in zip(*rows, strict=True)]
    print(json.dumps(dict(zip(names, medians, strict=True))))


def _overtake(pro: Client, enterprise: Client) -> tuple[str, str]:
    """The overtaken video and the overtaking one, both done."""
    slow = pro.create(SLOW)["id"]
    quick = ""
    for event in pro.follow(slow):
        if event.data["step"] == AT_STEP and not quick:
            quick = enterprise.create(QUICK)["id"]
    wait_for(enterprise, quick)
    return slow, quick


def _pro_account(cluster: Cluster) -> str:
    """The key of a new account."""
    admin = Server(cluster.server.url, (cluster.home / "admin_key").read_text())
    body = {"name": "pro", "plan": Plan.PRO, "credits": 1_000_000}
    with Client(admin) as operator:
        created = operator.call("POST", "/admin/v1/accounts", json=body)
    key: str = created["key"]
    return key


if __name__ == "__main__":
    main()
