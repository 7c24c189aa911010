"""Servers start and stop as their users expect, and the command finds them."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from sqlalchemy import select

from bench.clusters import ROOT, Cluster, environment, free_port, start
from client.client import Client, Server
from deployments.database import open_database, reader
from jobs.tables import jobs
from tests.serve.conftest import wait_until

pytestmark = pytest.mark.serve

STOP_S = 15.0
DEMO_S = 90.0
MUTOSCOPE = Path(sys.executable).with_name("mutoscope")


def run(
    command: list[str], home: Path, cwd: Path, **changes: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        cwd=cwd,
        env={**environment(home), **changes},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_a_taken_port_is_told_in_one_line(cluster: Cluster, tmp_path: Path) -> None:
    port = cluster.server.url.rsplit(":", 1)[1]
    second = run([sys.executable, "-m", "deployments.launch", "--port", port], tmp_path, ROOT)
    assert second.returncode == 1
    assert second.stdout == ""
    assert second.stderr.strip() == f"127.0.0.1:{port} is in use; choose another with PORT="


def test_a_damaged_checkpoint_stops_the_deployment_by_name(
    config_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "models" / "demo", tmp_path / "demo")
    weights = tmp_path / "demo" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    config = yaml.safe_load(config_path.read_text())
    config["applications"][0]["args"]["models"][0]["path"] = str(tmp_path / "demo")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    process = start(path, free_port(), tmp_path / "home")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "ready" not in output
    assert "vae/diffusion_pytorch_model.safetensors" in errors


@pytest.mark.long
def test_without_a_local_account_a_server_has_no_key_to_tell(
    config_path: Path, tmp_path: Path
) -> None:
    config = yaml.safe_load(config_path.read_text())
    del config["applications"][0]["args"]["local_account"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    scratch = tmp_path / "home" / "scratch"
    scratch.mkdir(parents=True)
    (scratch / "half").write_bytes(b"1")
    with start(path, free_port(), tmp_path / "home") as process:
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        assert not (scratch / "half").exists()  # left by a server that was killed
        process.terminate()
        assert "API key" not in process.stdout.read()
        assert process.wait(STOP_S) == 0


@pytest.mark.long
def test_the_demo_takes_any_prompt_and_a_second_interrupt_leaves_no_cluster(
    tmp_path: Path,
) -> None:
    prompt = """a "blue" ball's path; $(touch pwned) `id` \\ moving left"""
    home = tmp_path / "home"
    demo = subprocess.Popen(
        ["make", "demo", f"PROMPT={prompt.replace('$', '$$')}"],
        cwd=ROOT,
        env=environment(home),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with demo, contextlib.ExitStack() as ending:
        ending.callback(demo.terminate)
        assert demo.stdout is not None
        while "cluster ready" not in (line := demo.stdout.readline()):
            assert line, "the demo ended"
        engine = open_database(f"sqlite:///{home / 'mutoscope.db'}")

        def prompts() -> list[str]:
            with reader(engine).begin() as connection:
                return [row.request["prompt"] for row in connection.execute(select(jobs.c.request))]

        wait_until(lambda: prompts() == [prompt], 30)
        engine.dispose()
        os.killpg(demo.pid, signal.SIGINT)
        while "stopping" not in (line := demo.stdout.readline()):
            assert line, "the demo ended"
        os.killpg(demo.pid, signal.SIGINT)
        assert demo.wait(STOP_S + 5) != 0
    assert processes_with(home) == []
    assert not (ROOT / "pwned").exists()


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.long
def test_an_interrupt_of_any_thread_stops_everything_even_if_it_was_ignored_at_start(
    config_path: Path, tmp_path: Path
) -> None:
    process = start(config_path, free_port(), tmp_path / "home", preexec_fn=ignore_interrupts)
    with process, contextlib.ExitStack() as ending:
        ending.callback(process.terminate)  # what does not stop is a failure, not a wait
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) > 8
        # Linux gives a signal to the thread of that number, if it takes it.
        threads = psutil.Process(process.pid).threads()
        another = next(thread.id for thread in threads if thread.id != process.pid)
        asked_s = time.monotonic()
        os.kill(another, signal.SIGINT)
        assert process.wait(STOP_S) == 0
        assert time.monotonic() - asked_s < STOP_S
    assert [child for child in started if child.is_running()] == []


@pytest.mark.parametrize("num_children", [4, pytest.param(8, marks=pytest.mark.long)])
def test_a_stop_while_starting_leaves_nothing(
    config_path: Path, tmp_path: Path, num_children: int
) -> None:
    """With 8, Ray's workers have begun to start, and its own handlers of signals are in place."""
    process = start(config_path, free_port(), tmp_path / "home")
    with process, contextlib.ExitStack() as ending:
        ending.callback(process.terminate)  # what does not stop is a failure, not a wait
        root = psutil.Process(process.pid)
        deadline_s = time.monotonic() + 60
        while len(started := root.children(recursive=True)) < num_children:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0
    assert [child for child in started if child.is_running()] == []


LOSES_SIGNALS = """
import signal, time
from deployments import launch

class Destroyed:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)

for number in launch.SIGNALS:
    signal.signal(number, launch._stop)
launch.insist_on_signals()
Destroyed()
print("lost", flush=True)
try:
    time.sleep(30)
except launch.Stopped:
    print("stopped", flush=True)
"""


def test_a_signal_that_comes_while_nothing_may_be_raised_is_not_lost() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOSES_SIGNALS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "Exception ignored in" in done.stderr
    assert done.stdout.split() == ["lost", "stopped"]


def test_the_command_finds_the_server_by_itself(cluster: Cluster, tmp_path: Path) -> None:
    arguments = ["a red circle", "--frames", "5", "--size", "64x48", "--fps", "4", "--steps", "2"]
    arguments += ["--f-patch", "2", "--seed", "3", "--out", "x.mp4"]
    done = run([str(MUTOSCOPE), "generate", *arguments], cluster.home, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "64x48, 5 frames, seed 3" in done.stdout
    assert re.search(r"quoted 10, charged 10, refunded 0, balance [\d,]+", done.stdout)
    assert re.search(r"stages: text [\d.]+ s, denoise .*, decode .*, media", done.stdout)
    assert "denoising 2/2" in done.stderr
    assert "100%" in done.stderr
    assert (tmp_path / "x.mp4").stat().st_size > 500


def test_the_command_takes_url_and_key_from_the_environment(
    cluster: Cluster, tmp_path: Path
) -> None:
    given = {
        "MUTOSCOPE_URL": cluster.server.url,
        "MUTOSCOPE_API_KEY": cluster.server.api_key,
    }
    command = [str(MUTOSCOPE), "generate", "x", "--steps", "1"]
    done = run(command, tmp_path / "nothing", tmp_path, **given)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("video_*.mp4"))) == 1


@pytest.mark.parametrize(
    ("changes", "arguments", "told"),
    [
        ({}, [], "make serve"),
        ({"MUTOSCOPE_URL": "http://127.0.0.1:9", "MUTOSCOPE_API_KEY": "k"}, [], "cannot reach"),
    ],
)
def test_the_command_says_in_one_line_why_it_cannot(
    tmp_path: Path, changes: dict[str, str], arguments: list[str], told: str
) -> None:
    done = run([str(MUTOSCOPE), "generate", "x", *arguments], tmp_path, tmp_path, **changes)
    assert done.returncode == 1
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_refusal_is_told_in_one_line(cluster: Cluster, tmp_path: Path) -> None:
    for arguments in (["--size", "63x64"], ["--model", "sora-2"], ["--image", "none.png"]):
        done = run([str(MUTOSCOPE), "generate", "x", *arguments], cluster.home, tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("mutoscope: ")
        assert len(done.stderr.strip().splitlines()) == 1


def blocks() -> list[tuple[str, str]]:
    """The code blocks of the README with a language, in order."""
    return re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def processes_with(home: Path) -> list[str]:
    """Command lines of the processes that were started with this home folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("MUTOSCOPE_HOME") == str(home):
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.long
def check_that_words_are_encoded_once(server: Server) -> None:
    """The shipped configuration keeps what they were encoded to, and charges only work."""
    fields = {"prompt": "two green squares", "num_frames": 29, "num_steps": 1}
    charges = []
    with Client(server) as client:
        for seed in (1, 2):
            created = client.create({**fields, "seed": seed})
            *_, last = client.follow(created["id"])
            charges.append((last.data["video"]["charged"], last.data["video"]["reason"]))
    assert [charge for charge, _ in charges] == [58, 57]
    assert "encoded before" in charges[1][1]


def test_the_readme_does_what_it_says(tmp_path: Path) -> None:
    home, port = tmp_path / "home", str(free_port())
    server: subprocess.Popen[str] | None = None
    shell_environment = {**environment(home), "PORT": port}
    before = set((ROOT / "out").glob("*.mp4"))
    named = [ROOT / "out" / name for name in ("circle.mp4", "triangle.mp4")]
    for path in named:
        path.unlink(missing_ok=True)
    executed = []
    try:
        for language, block in blocks():
            text = block.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
            text = text.replace("~/.mutoscope", str(home))
            if text.strip() == "make serve":
                server = subprocess.Popen(
                    ["make", "serve"],
                    cwd=ROOT,
                    env=shell_environment,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
                assert server.stdout is not None
                while "ready" not in (line := server.stdout.readline()):
                    assert line, "the server ended"
                executed.append("make serve")
                continue
            interpreter = ["bash", "-ec"] if language == "bash" else [sys.executable, "-c"]
            done = subprocess.run(
                [*interpreter, text],
                cwd=ROOT,
                env=shell_environment,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            if text.startswith("curl"):
                assert json.loads(done.stdout)["status"] == "queued"
            if "accounts create" in text:
                assert done.stdout.splitlines()[-1].startswith("mk_live_")
            if text.strip() == "make demo":
                assert processes_with(home) == []
                took = re.search(r"all done in ([\d.]+) s", done.stdout)
                assert took is not None
                assert float(took[1]) <= DEMO_S
            executed.append(text.split()[0] + " " + text.split()[1])
        check_that_words_are_encoded_once(
            Server(f"http://127.0.0.1:{port}", (home / "api_key").read_text())
        )
    finally:
        if server is not None:
            os.killpg(server.pid, signal.SIGINT)
            server.wait(STOP_S + 5)
            assert server.stdout is not None
            server.stdout.close()
    assert executed[0] == "make demo"
    assert len(executed) == 6
    made = {path.name for path in set((ROOT / "out").glob("*.mp4")) - before}
    assert any(name.startswith("video_") for name in made)
    assert all(path.is_file() for path in named)
