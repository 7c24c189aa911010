"""`make demo`: start the cluster, make one video through it, stop it, leave nothing behind."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from client.client import ApiError, Client, find_server
from client.generate import GenerationFailed, generate

STOP_TIMEOUT_S = 20.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """The whole life of a small cluster."""
    prompt = " ".join(sys.argv[1:]) or "a red circle moving right"
    started_s = time.monotonic()
    for number in SIGNALS:
        signal.signal(number, lambda *_: sys.exit(130))
    if home_is_in_use():
        os.environ["MUTOSCOPE_HOME"] = str(Path("out/demo-home").absolute())
        print("a server is running: the demo uses out/demo-home as its home folder")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    print("starting the cluster ...", flush=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "deployments.launch", "--port", str(port)],
        cwd=Path(__file__).resolve().parent.parent,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        if "ready" not in ready:
            sys.exit("the cluster did not start")
        server.stdout.readline()
        print(f"cluster ready after {time.monotonic() - started_s:.1f} s", flush=True)
        os.environ.pop("MUTOSCOPE_URL", None)
        os.environ.pop("MUTOSCOPE_API_KEY", None)
        with Client(find_server()) as client:
            generate(client, {"prompt": prompt})
    except (ApiError, GenerationFailed) as error:
        sys.exit(f"demo: {error}")
    finally:
        for number in SIGNALS:  # a second one shall not leave the cluster behind
            signal.signal(number, signal.SIG_IGN)
        server.terminate()  # before anything is said: nobody may listen any more
        print("stopping the cluster ...", flush=True)
        server.wait(STOP_TIMEOUT_S)
        print(f"all done in {time.monotonic() - started_s:.1f} s", flush=True)


def home_is_in_use() -> bool:
    """Whether a server holds the lock of the home folder."""
    lock = Path(os.environ.get("MUTOSCOPE_HOME") or Path.home() / ".mutoscope") / "lock"
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


if __name__ == "__main__":
    main()
