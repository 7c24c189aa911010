"""A denoiser of two ranks: what it makes, whom it serves first, and what faults cost."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.clusters import CHECKPOINT_STEPS, Cluster, running_cluster
from client.client import Client, Event, Server
from credits.plans import Plan
from tests.serve.conftest import read_mp4, until, wait_until

pytestmark = pytest.mark.serve

NUM_STEPS = 40
FIELDS = {"prompt": "x", "model": "pair", "num_steps": NUM_STEPS, "num_frames": 29, "seed": 1}


@pytest.fixture(autouse=True)
def _no_job_is_left(cluster: Cluster) -> Iterator[None]:
    yield
    wait_until(lambda: cluster.client.credits()["reserved"] == 0, 60)


@dataclass
class Run:
    """A finished video: its last word, its file and the steps that were told."""

    video: dict[str, Any]
    content: bytes
    steps: list[int] = field(default_factory=list)


def run(
    client: Client, path: Path, act: Callable[[], None] | None = None, at: int = 12, **fields: Any
) -> Run:
    """Make a video, and act once when it has come to that step."""
    video_id = client.create({**FIELDS, **fields})["id"]
    steps: list[int] = []
    event: Event | None = None
    for event in client.follow(video_id):
        step = event.data["step"]
        if event.data["phase"] == "denoise" and step:
            steps.append(step)
            if act is not None and step >= at:
                act()
                act = None
    assert event is not None
    video = event.data["video"]
    if video["status"] == "completed":
        client.download(video_id, path)
    return Run(video, path.read_bytes() if path.exists() else b"", steps)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = run(cluster.client, tmp_path_factory.mktemp("undisturbed") / "x.mp4")
    assert made.video["status"] == "completed"
    assert made.steps == list(range(1, NUM_STEPS + 1))
    return made


def test_two_ranks_make_the_video_of_one(
    cluster: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    shared = tmp_path / "shared.mp4"
    shared.write_bytes(undisturbed.content)
    run(cluster.client, tmp_path / "alone.mp4", model="single")
    run(cluster.client, tmp_path / "other.mp4", model="single", seed=2)
    pixels = {
        name: read_mp4(tmp_path / f"{name}.mp4").astype(int)
        for name in ("shared", "alone", "other")
    }
    assert np.abs(pixels["shared"] - pixels["alone"]).mean() < 0.5
    assert np.abs(pixels["shared"] - pixels["other"]).mean() > 5


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_killed_rank_costs_no_step_and_no_bit(
    cluster: Cluster, undisturbed: Run, tmp_path: Path, rank: int
) -> None:
    made = run(cluster.client, tmp_path / "x.mp4", lambda: cluster.ranks("t4")[rank].kill())
    assert made.video["status"] == "completed"
    assert made.video["charged"] == made.video["quoted"]
    assert made.steps == list(range(1, NUM_STEPS + 1))
    assert made.content == undisturbed.content


def test_a_rank_that_hangs_is_found_by_the_time_its_step_takes(
    cluster: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    stopped = cluster.ranks("t4")
    made = run(cluster.client, tmp_path / "x.mp4", stopped[1].suspend)
    assert made.steps == list(range(1, NUM_STEPS + 1))
    assert made.content == undisturbed.content
    assert not any(process.is_running() for process in stopped)


@pytest.mark.long
def test_a_rank_that_dies_idle_is_replaced(
    cluster: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    killed = cluster.ranks("t4")
    killed[0].kill()
    made = run(cluster.client, tmp_path / "x.mp4")
    assert made.content == undisturbed.content
    assert not set(cluster.ranks("t4")) & set(killed)


def test_who_breaks_the_group_twice_is_out_and_the_next_is_served(
    cluster: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    before = cluster.client.credits()
    video_id = cluster.client.create(FIELDS)["id"]
    for event in cluster.client.follow(video_id):
        if event.data["phase"] == "denoise" and event.data["step"] in (8, 20):
            cluster.ranks("t4")[0].kill()
    video = cluster.client.get(video_id)
    assert (video["status"], video["error"]["code"]) == ("failed", "stage_failed")
    assert (video["charged"], video["refunded"]) == (0, video["quoted"])
    assert cluster.client.credits() == before
    assert run(cluster.client, tmp_path / "x.mp4").content == undisturbed.content


def test_a_killed_replica_goes_on_from_the_checkpoint(
    cluster: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    killed = cluster.replicas("Denoiser-t4")
    made = run(cluster.client, tmp_path / "x.mp4", lambda: cluster.kill("Denoiser-t4"), at=14)
    assert not any(process.is_running() for process in killed)
    again = len(made.steps) - NUM_STEPS  # none, if it was killed right after a checkpoint
    assert 0 <= again <= CHECKPOINT_STEPS  # all, if one was just being written
    in_order = enumerate(made.steps, start=1)
    killed_at = next((n - 1 for n, step in in_order if step != n), NUM_STEPS)
    assert made.steps == [*range(1, killed_at + 1), *range(killed_at + 1 - again, NUM_STEPS + 1)]
    assert made.video["charged"] == made.video["quoted"]
    assert made.content == undisturbed.content
    assert list((cluster.home / "storage").glob("checkpoints/*")) == []


def test_a_decode_that_is_lost_does_not_cost_the_denoise(
    cluster: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    made = run(
        cluster.client, tmp_path / "x.mp4", lambda: cluster.kill("VaeDecoder-t4"), at=NUM_STEPS
    )
    assert made.steps == list(range(1, NUM_STEPS + 1))
    assert made.content == undisturbed.content


def test_enterprise_work_overtakes_within_a_step(cluster: Cluster, tmp_path: Path) -> None:
    """Though others have all that the tier makes at once. The pro account's video is parked, and
    ends in the same bits.

    Its steps are longer than it takes a request to come from the pipeline to the denoiser.
    """
    long_steps: dict[str, Any] = {**FIELDS, "size": "256x256", "num_frames": 13, "num_steps": 20}
    expected = run(cluster.client, tmp_path / "expected.mp4", **long_steps)
    admin = (cluster.home / "admin_key").read_text()
    with Client(Server(cluster.server.url, admin)) as operator:
        created = operator.call(
            "POST",
            "/admin/v1/accounts",
            json={"name": "pro", "plan": Plan.PRO, "credits": 1000},
        )
    with Client(Server(cluster.server.url, created["key"])) as pro:
        slow = pro.create(long_steps)["id"]
        for event in pro.follow(slow):
            if event.data["step"] == 5:
                other = pro.create({**long_steps, "num_steps": 60, "seed": 3})["id"]
                until(pro, other, lambda event: event.data["phase"] == "denoise")
            if event.data["step"] == 8:
                quick = cluster.client.create({**long_steps, "num_steps": 4, "seed": 2})["id"]
        assert pro.get(slow)["status"] == "completed"
        pro.call("DELETE", f"/v1/videos/{other}")
        pro.download(slow, tmp_path / "slow.mp4")
    assert (tmp_path / "slow.mp4").read_bytes() == expected.content
    order = _order_of_steps(cluster, slow, quick)
    begun, first, last = (order.index((quick, step)) for step in (0, 1, 4))
    assert sum(video == slow for video, _ in order[begun:first]) <= 2
    assert [video for video, _ in order[first:last]].count(slow) == 0
    assert order[-1] == (slow, 20)
    told = [step for step, at_s in cluster.steps(other) if at_s < cluster.steps(quick)[-1][1]]
    assert told  # it was there all the while, and had the other of the two places


def _order_of_steps(cluster: Cluster, *videos: str) -> list[tuple[str, int]]:
    """Denoise steps as the database was told of them; at the same millisecond, the first named."""
    told = [(at_s, video, step) for video in videos for step, at_s in cluster.steps(video)]
    return [(video, step) for _, video, step in sorted(told, key=lambda entry: entry[0])]


@pytest.mark.long
def test_everything_killed_at_once_goes_on_after_a_fresh_start(
    config_path: Path, undisturbed: Run, tmp_path: Path
) -> None:
    with running_cluster(config_path, tmp_path / "home") as cluster:
        video_id = cluster.client.create(FIELDS)["id"]
        until(cluster.client, video_id, lambda event: event.data["step"] >= 14)
        cluster.kill_all()
    with running_cluster(config_path, tmp_path / "home") as cluster:
        events = list(cluster.client.follow(video_id))
        assert events[-1].data["video"]["status"] == "completed"
        assert events[-1].data["video"]["charged"] == undisturbed.video["charged"]
        cluster.client.download(video_id, tmp_path / "x.mp4")
    steps = [e.data["step"] for e in events if e.data["phase"] == "denoise" and e.data["step"]]
    assert NUM_STEPS <= len(steps) < NUM_STEPS + CHECKPOINT_STEPS
    assert (tmp_path / "x.mp4").read_bytes() == undisturbed.content


@pytest.mark.long
def test_a_tile_that_is_lost_with_its_decoder_is_made_again_alone(
    cluster: Cluster, tmp_path: Path
) -> None:
    large: dict[str, Any] = {"size": "288x288", "num_steps": 1, "num_frames": 13}
    expected = run(cluster.client, tmp_path / "a.mp4", **large)
    assert expected.video["status"] == "completed"
    decoders = cluster.replicas("VaeDecoder-t4")
    assert len(decoders) == 2
    used = [sum(decoder.cpu_times()[:2]) for decoder in decoders]
    video_id = cluster.client.create({**FIELDS, **large})["id"]

    def have_all_worked() -> bool:
        now = [sum(decoder.cpu_times()[:2]) for decoder in decoders]
        return all(after > before + 0.1 for before, after in zip(used, now, strict=True))

    wait_until(have_all_worked, 60)  # the pool shares the tiles
    decoders[0].kill()
    events = list(cluster.client.follow(video_id))
    assert events[-1].data["video"]["status"] == "completed"
    frames = [event.data["frame"] for event in events if event.data["phase"] == "decode"]
    assert frames == [8, 13]  # nothing above the lost tile began again
    cluster.client.download(video_id, tmp_path / "b.mp4")
    if (tmp_path / "b.mp4").read_bytes() != expected.content:
        pixels = [read_mp4(tmp_path / name).astype(int) for name in ("a.mp4", "b.mp4")]
        frames = np.abs(pixels[0] - pixels[1]).max(axis=(1, 2, 3))
        pytest.fail(f"the files differ, the pixels of each frame by {frames.tolist()}")
