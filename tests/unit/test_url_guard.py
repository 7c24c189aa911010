"""URLs of users: nothing inside the network is asked, whatever name leads there."""

import asyncio
import gzip
import socket
import threading
from ipaddress import IPv4Network
from typing import Any

import httpx
import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Response

from deployments import url_guard
from deployments.url_guard import UrlGuardConfig, UrlRefused, check_url, resolve

HTTP = UrlGuardConfig(allow_http=True, timeout_s=2.0)
LOOPBACK = UrlGuardConfig(
    allow_http=True, timeout_s=2.0, allowed_networks=(IPv4Network("127.0.0.1/32"),)
)


def fetch(url: str, config: UrlGuardConfig, max_bytes: int) -> bytes:
    return asyncio.run(url_guard.fetch(url, config, max_bytes))


@pytest.fixture
def site(httpserver: HTTPServer) -> str:
    """The URL of a site that answers by path."""

    def answer(path: str, status: int = 200, body: bytes = b"", **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        httpserver.expect_request(path).respond_with_data(body, status, named)

    answer("/image", body=b"image")
    answer("/here", 302, location="/image")
    answer("/inside", 302, location="http://127.0.0.2/secret")
    answer("/file", 302, location="file:///etc/passwd")
    answer("/loop", 302, location="/loop")
    answer("/packed", body=gzip.compress(b"image"), content_encoding="gzip")
    answer("/nothing", 404)
    httpserver.expect_request("/host").respond_with_handler(
        lambda request: Response(request.headers["host"])
    )
    return httpserver.url_for("").rstrip("/")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1",
        "169.254.169.254", "224.0.0.1", "255.255.255.255", "[::1]", "[::]", "[fe80::1]",
        "[fd00::1]", "[::ffff:127.0.0.1]", "[::ffff:169.254.169.254]", "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]", "[2001:0:4136:e378:8000:63bf:3fff:fdd2]", "[ff02::1]", "localhost",
        "127.1", "2130706433", "0x7f000001",
    ],
)  # fmt: skip
def test_what_is_not_public_is_refused(host: str) -> None:
    with pytest.raises(UrlRefused, match=r"not on the public internet|cannot be found"):
        resolve(httpx.URL(f"http://{host}/"), HTTP)


def test_public_addresses_pass() -> None:
    assert resolve(httpx.URL("https://93.184.216.34/"), UrlGuardConfig()) == "93.184.216.34"
    v6 = "2606:2800:220:1:248:1893:25c8:1946"
    assert resolve(httpx.URL(f"https://[{v6}]/"), UrlGuardConfig()) == v6


def test_one_inner_address_among_public_ones_refuses_the_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answers(*hosts: str) -> Any:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 443)) for host in hosts]
        return lambda *arguments, **named: found

    monkeypatch.setattr(socket, "getaddrinfo", answers("93.184.216.34", "10.0.0.1"))
    with pytest.raises(UrlRefused):
        resolve(httpx.URL("https://example.com/"), UrlGuardConfig())
    monkeypatch.setattr(socket, "getaddrinfo", answers("93.184.216.34"))
    assert resolve(httpx.URL("https://example.com/"), UrlGuardConfig()) == "93.184.216.34"


def test_the_address_that_was_checked_is_the_one_that_is_asked(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that answers differently the second time leads nowhere else."""
    port = int(site.rpartition(":")[2])
    names: list[str] = []
    real = socket.getaddrinfo

    def answer(host: Any, *arguments: Any, **named: Any) -> Any:
        if host != "rebinding.example":
            return real(host, *arguments, **named)
        names.append(host)
        address = "127.0.0.1" if len(names) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    found = fetch(f"http://rebinding.example:{port}/host", LOOPBACK, 1000)
    assert found == f"rebinding.example:{port}".encode()
    assert len(names) == 1


@pytest.mark.parametrize(
    "url",
    ["http://example.com/", "ftp://example.com/", "file:///etc/passwd", "https://", "https:///x",
     "https://user:password@example.com/", "//example.com", "", "https://a:b/",
     "https://a:99999/"],
)  # fmt: skip
def test_urls_that_can_never_be_asked(url: str) -> None:
    with pytest.raises(UrlRefused):
        check_url(url, UrlGuardConfig())


def test_a_file_is_fetched_also_behind_a_redirect(site: str) -> None:
    assert fetch(f"{site}/image", LOOPBACK, 5) == b"image"
    assert fetch(f"{site}/here", LOOPBACK, 5) == b"image"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/inside", "not on the public internet"),
        ("/file", r"must begin with|cannot be reached"),
        ("/loop", "TooManyRedirects"),
        ("/packed", "encoding"),
        ("/nothing", "status 404"),
    ],
)
def test_what_is_not_to_be_had(site: str, path: str, message: str) -> None:
    with pytest.raises(UrlRefused, match=message):
        fetch(f"{site}{path}", LOOPBACK, 1000)


def test_a_file_beyond_the_limit_is_refused(site: str) -> None:
    with pytest.raises(UrlRefused, match="limited to 4 bytes"):
        fetch(f"{site}/image", LOOPBACK, 4)


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: "])
def test_an_answer_that_drips_is_refused_at_the_deadline(head: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(head)
                while not stop.wait(0.05):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        guard = LOOPBACK.model_copy(update={"timeout_s": 0.3})
        with pytest.raises(UrlRefused, match=r"longer than 0\.3 s"):
            fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/", guard, 1000)
        stop.set()
        thread.join()
