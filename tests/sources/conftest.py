"""A real S3 server, and a hub that speaks as much of Hugging Face's protocol as its client asks."""

import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError

from models.weight_files import sha256_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BUCKET = "models"


def free_ports(count: int) -> list[int]:
    """Whose neighbours ten thousand above, where the server's gRPC listens, are free, too."""
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            low = stack.enter_context(socket.socket())
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            if port > 55535:
                continue
            high = stack.enter_context(socket.socket())
            try:
                high.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            ports.append(port)
        return ports


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SeaweedFS, with one account."""
    folder = tmp_path_factory.mktemp("s3")
    master, volume, filer, s3, iceberg, lance = free_ports(6)
    account = {"accessKey": "reader", "secretKey": "secret"}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "reader", "credentials": [account], "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    command = [
        *(str(Path(sys.executable).with_name("weed")), "-logtostderr=true", "server"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", "-volume.max=20"),
        *(f"-master.port={master}", f"-volume.port={volume}", "-master.volumeSizeLimitMB=64"),
        *("-filer", f"-filer.port={filer}", "-master.telemetry=false"),
        *("-s3", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}"),
        *(f"-s3.port.iceberg={iceberg}", f"-s3.port.lance={lance}"),
    ]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{s3}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in access(url).items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        deadline_s = time.monotonic() + 60
        while True:
            try:
                client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
                break
            except (ClientError, EndpointConnectionError, ConnectionClosedError):  # not yet
                assert server.poll() is None, (folder / "log").read_text()[-2000:]
                assert time.monotonic() < deadline_s, (folder / "log").read_text()[-2000:]
                time.sleep(0.1)
    yield url
    server.kill()  # it takes half a minute to say goodbye, and there is nothing to lose
    server.wait(30)


def access(url: str) -> dict[str, str]:
    """How boto3 is told of a server."""
    return {
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": "reader",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of it, whose access the code under test has, too."""
    for name, value in access(s3_url).items():
        monkeypatch.setenv(name, value)
    return boto3.client("s3")


@dataclass
class Hub:
    """One repository of files; what was asked of it."""

    folder: Path
    url: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    # of the next file that is asked for, send so much and then nothing
    stall_after: int | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    wrong: str | None = None

    def listed(self) -> dict[str, Any] | list[dict[str, Any]]:
        """As the API tells of it."""
        return {"id": "owner/name", "sha": COMMIT, "siblings": self.entries()}

    def tree(self) -> list[dict[str, Any]]:
        """The same files, as its other half has them."""
        return [
            {
                "type": "file",
                "path": entry["rfilename"],
                "oid": entry["blobId"],
                "size": entry["size"],
                **({"lfs": {**lfs, "oid": lfs["sha256"]}} if (lfs := entry.get("lfs")) else {}),
            }
            for entry in self.entries()
        ]

    def entries(self) -> list[dict[str, Any]]:
        """Large files by their SHA-256, small ones by Git's sum."""
        found = []
        for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name, content = str(file.relative_to(self.folder)), file.read_bytes()
            entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if file.suffix in (".safetensors", ".bin"):
                sum_of = {"sha256": sha256_of(file), "size": len(content), "pointerSize": 130}
                entry["lfs"] = sum_of
            found.append(entry)
        return found

    def answer(self, path: str, asked: str | None) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers for a path, and a range of bytes."""
        api = "/api/models/owner/name"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            return 200, json.dumps(self.listed()).encode(), {}
        if path == f"{api}/tree/{COMMIT}":
            return 200, json.dumps(self.tree()).encode(), {}
        name = path.removeprefix(f"/owner/name/resolve/{COMMIT}/")
        entry = next((e for e in self.entries() if e["rfilename"] == name), None)
        if entry is None:
            return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
        content = (self.folder / name).read_bytes()
        if name == self.wrong:
            content = b"x" * len(content)
        sum_of = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
        headers = {"ETag": f'"{sum_of}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-ETag": f'"{sum_of}"', "X-Linked-Size": str(len(content))}
        if asked is None:
            return 200, content, headers
        first = int(asked.removeprefix("bytes=").split("-")[0])
        headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        return 206, content[first:], headers


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A server of the repository `owner/name`, which the test fills."""
    told = Hub(tmp_path / "repository")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.respond()

        def do_GET(self) -> None:
            self.respond()

        def log_message(self, *_: Any) -> None:
            pass

        def respond(self) -> None:
            asked = self.headers.get("Range")
            told.requests.append((self.command, self.path, asked))
            path = self.path.split("?")[0]
            asked = asked if self.command == "GET" else None
            status, content, headers = told.answer(path, asked)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            limit = told.stall_after
            if limit is not None and len(content) > limit:
                told.stall_after = None
                self.wfile.write(content[:limit])
                self.wfile.flush()
                told.stalled.set()
                told.released.wait(60)
                self.close_connection = True
                return
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield told
    told.released.set()
    server.shutdown()
    thread.join()
    server.server_close()
