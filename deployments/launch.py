"""`python -m deployments.launch`: a Ray cluster on this machine that serves serve_config.yaml.

It owns what it starts: SIGINT and SIGTERM end every process of the cluster and nothing else.
"""

import argparse
import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TextIO

import psutil
import yaml

from deployments.config import home_folder

ROOT = Path(__file__).resolve().parent.parent
READY_TIMEOUT_S = 300.0
GRACE_S = 3.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INSIST_S = 0.5
_stopping = threading.Event()


class Stopped(SystemExit):
    """SIGINT or SIGTERM came."""


class DeployFailed(Exception):
    """Serve gave the application up; the message is Serve's."""


def main() -> None:
    """Start, print where it listens, serve until a signal comes, stop everything."""
    parser = argparse.ArgumentParser(prog="python -m deployments.launch", description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "serve_config.yaml")
    parser.add_argument("--port", type=int, help="listen here instead of the config's port")
    arguments = parser.parse_args()
    config = yaml.safe_load(arguments.config.read_text())
    if arguments.port is not None:
        config["http_options"]["port"] = arguments.port
    host, port = config["http_options"]["host"], config["http_options"]["port"]
    if not port_is_free(host, port):
        sys.exit(f"{host}:{port} is in use; choose another with PORT=")
    home = home_folder()
    lock = lock_home(home)
    if lock is None:
        sys.exit(f"another server uses {home}; stop it or choose another MUTOSCOPE_HOME")
    # Explicitly, since a shell starts background jobs with SIGINT ignored.
    for number in SIGNALS:
        signal.signal(number, _stop)
    insist_on_signals()
    try:
        start_cluster(config, home)
        url = f"http://{host}:{port}"
        (home / "url").write_text(url)
        print(f"Mutoscope is ready at {url}", flush=True)
        # Only an application with a local_account has a key of its own.
        if (key := home / "api_key").exists():
            print(f"API key: {key.read_text()}  ({key})", flush=True)
        while True:
            # Not signal.pause(): one of Ray's threads may be the one that the kernel interrupts,
            # and Python's handler waits for this one.
            time.sleep(0.5)
    except SystemExit as stop:
        # A signal: our handler's, or Ray's own while it starts. Anything else is a failure.
        if stop.code not in (0, signal.SIGTERM):
            raise
    except DeployFailed as failure:
        sys.exit(f"the deployment failed:\n{failure}")
    finally:
        stop_cluster()
        (home / "url").unlink(missing_ok=True)
    # Nothing is left to be done, and Ray's destructors crash if it was stopped while it connected.
    sys.stdout.flush()
    os._exit(0)


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def lock_home(home: Path) -> TextIO | None:
    """Hold the home folder for this process, or None: two servers would share its jobs."""
    home.mkdir(parents=True, exist_ok=True)
    lock = (home / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def start_cluster(config: dict[str, object], home: Path) -> None:
    """Start Ray and deploy; returns when the application runs, else DeployFailed.

    config is the whole of serve_config.yaml; home is locked. The environment set here is what the
    cluster's processes get: our packages on their path, a token without which nobody can join it,
    and a folder for what is half made.
    """
    scratch = home / "scratch"
    scratch.mkdir(exist_ok=True)
    for left in scratch.iterdir():  # by a server that was killed: home is locked
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)  # its processes may not all be dead yet
        else:
            left.unlink(missing_ok=True)
    # Ray's sockets have names of at most 107 characters: it stays where it would be.
    os.environ.setdefault("RAY_TMPDIR", tempfile.gettempdir())
    os.environ["TMPDIR"] = str(scratch)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part
    )
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.25")
    # Stages of several jobs share the cores: a thread that waits must not spin for long. Not at
    # all would cost a sleep and a wake-up for each of a step's thousands of parallel regions.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # A step frees and takes the same large blocks over and over: glibc shall keep them, and in one
    # arena, instead of having the kernel clear new pages each time.
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(512 << 20))
    # For a moment of its start Ray takes SIGTERM for a crash, and aborts: its processes would live
    # on. This process is to have none of that; the cluster's keep it.
    os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"
    import ray

    del os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"]
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(config)
    ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=512 << 20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    for number in SIGNALS:  # ray.init puts its own in their place
        signal.signal(number, _stop)
    # What `serve run` and `serve deploy` do with a config file; Serve has no public call for it.
    client = serve_start(
        http_options=schema.http_options.model_dump(), proxy_location=schema.proxy_location
    )
    client.deploy_apps(schema)
    _wait_until_running([application.name for application in schema.applications])


def _wait_until_running(names: list[str]) -> None:
    from ray import serve

    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        applications = serve.status().applications
        states = {name: applications[name] for name in names if name in applications}
        for application in states.values():
            if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                details = [application.message] + [
                    deployment.message
                    for deployment in application.deployments.values()
                    if deployment.message
                ]
                raise DeployFailed("\n".join(details))
        if len(states) == len(names) and all(s.status == "RUNNING" for s in states.values()):
            return
        time.sleep(0.2)
    raise DeployFailed(f"not running after {READY_TIMEOUT_S:.0f} s")


def stop_cluster() -> None:
    """End every process that this one started, by pid.

    The database holds all that matters, so nothing is drained: jobs that run go on at the next
    start, when their leases have run out.
    """
    _stopping.set()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    started = psutil.Process().children(recursive=True)
    import ray

    try:
        ray.shutdown()
    finally:  # it may fail where ray.init was interrupted; its processes are to end all the same
        _, alive = psutil.wait_procs(started, timeout=GRACE_S)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=GRACE_S)


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stopped(0)


def insist_on_signals() -> None:
    """Send this process SIGINT after any of SIGNALS, again and again until it stops.

    What a handler raises is lost in a destructor and round a fork, of which Ray makes many while it
    starts; and then the handler of SIGTERM is Ray's. That a signal came is told here all the same.
    """
    told, tell = socket.socketpair()
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        with told, tell:
            while told.recv(1)[0] not in SIGNALS:
                continue
            while not _stopping.wait(INSIST_S):
                os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, name="signals", daemon=True).start()


if __name__ == "__main__":
    main()
