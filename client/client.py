"""The HTTP client: create, follow, download; finds a local server's address and key by itself."""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

CONNECT_TIMEOUT_S = 10.0
STREAM_TIMEOUT_S = 60.0
RECONNECT_S = 1.0
MAX_RECONNECTS = 60
LAST_EVENTS = ("completed", "failed")


class ApiError(Exception):
    """The server refused: its status, its error code and its message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message

    def __str__(self) -> str:
        return f"{self.message} ({self.status} {self.code})"


class NotConfigured(Exception):
    """Neither the environment nor MUTOSCOPE_HOME says where the server is and with which key."""

    def __init__(self, variable: str) -> None:
        super().__init__(variable)
        self.variable = variable

    def __str__(self) -> str:
        return f"no server found: run `make serve`, or set MUTOSCOPE_URL and {self.variable}"


@dataclass(frozen=True, slots=True)
class Server:
    """Where to send requests, and the key to send."""

    url: str
    api_key: str


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event of a video."""

    seq: int
    kind: str
    data: dict[str, Any]


def find_server(*, as_admin: bool = False) -> Server:
    """MUTOSCOPE_URL and MUTOSCOPE_API_KEY, else what a local server wrote into its home.

    as_admin: with the operator's key, MUTOSCOPE_ADMIN_KEY, instead of an account's.
    """
    key = "admin_key" if as_admin else "api_key"
    home = Path(os.environ.get("MUTOSCOPE_HOME") or Path.home() / ".mutoscope")
    found = [
        os.environ.get(variable) or (path.read_text().strip() if path.is_file() else "")
        for variable, path in (
            ("MUTOSCOPE_URL", home / "url"),
            (f"MUTOSCOPE_{key.upper()}", home / key),
        )
    ]
    if not all(found):
        raise NotConfigured(f"MUTOSCOPE_{key.upper()}")
    return Server(*found)


class Client:
    """One account's view of a server."""

    def __init__(self, server: Server) -> None:
        self.http = httpx.Client(
            base_url=server.url,
            headers={"authorization": f"Bearer {server.api_key}"},
            timeout=httpx.Timeout(STREAM_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def create(
        self, fields: dict[str, Any], image: Path | None = None, control: Path | None = None
    ) -> dict[str, Any]:
        """Queue a video; the fields are those of POST /v1/videos, image and control its files."""
        given = {"input_reference": image, "control_reference": control}
        files = {
            name: (path.name, path.read_bytes()) for name, path in given.items() if path is not None
        }
        if not files:
            return self.call("POST", "/v1/videos", json=fields)
        form = {
            name: json.dumps(value) if isinstance(value, list | dict) else str(value)
            for name, value in fields.items()
        }
        return self.call("POST", "/v1/videos", data=form, files=files)

    def get(self, video_id: str) -> dict[str, Any]:
        """The video as it stands."""
        return self.call("GET", f"/v1/videos/{video_id}")

    def delete(self, video_id: str) -> dict[str, Any]:
        """Delete a finished video, cancel another."""
        return self.call("DELETE", f"/v1/videos/{video_id}")

    def credits(self) -> dict[str, Any]:
        """The account's plan and credits."""
        return self.call("GET", "/v1/credits")

    def follow(self, video_id: str) -> Iterator[Event]:
        """The video's events to the last one; after a break, on from where it broke."""
        seq = failures = 0
        while failures < MAX_RECONNECTS:
            with contextlib.suppress(httpx.TransportError):
                for event in self._stream(video_id, seq):
                    seq, failures = event.seq, 0
                    yield event
                    if event.kind in LAST_EVENTS:
                        return
            failures += 1
            time.sleep(RECONNECT_S)
        raise ApiError(0, "disconnected", f"lost the server while following {video_id}")

    def download(self, video_id: str, path: Path) -> int:
        """Save the MP4, whole or not at all; returns its length in bytes."""
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.http.stream("GET", f"/v1/videos/{video_id}/content") as response:
            _raise_for_status(response)
            with partial.open("wb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)
        partial.replace(path)
        return path.stat().st_size

    def _stream(self, video_id: str, seq: int) -> Iterator[Event]:
        headers = {"last-event-id": str(seq)}
        path = f"/v1/videos/{video_id}/events"
        with self.http.stream("GET", path, headers=headers) as response:
            _raise_for_status(response)
            block: dict[str, str] = {}
            for line in response.iter_lines():
                name, _, value = line.partition(": ")
                if line and name:
                    block[name] = value
                elif not line and "data" in block:
                    yield Event(int(block["id"]), block["event"], json.loads(block["data"]))
                    block = {}

    def pages(self, path: str, key: str) -> Iterator[dict[str, Any]]:
        """Every row of a list from the oldest, page by page; key: what its cursor takes."""
        after = None
        while True:
            cursor: dict[str, Any] = {} if after is None else {"after": after}
            page = self.call("GET", path, params={"order": "asc", "limit": "100", **cursor})
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["data"][-1][key]

    def call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """The JSON of any answer; ApiError if the server refuses."""
        response = self.http.request(method, path, **arguments)
        _raise_for_status(response)
        content: dict[str, Any] = response.json()
        return content


def _raise_for_status(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        error = json.loads(response.read())["error"]
        raise ApiError(response.status_code, error["code"], error["message"])
    except (ValueError, KeyError, TypeError):
        raise ApiError(response.status_code, "http_error", response.text[:200]) from None
