"""Requests to addresses that users name: never to what only this machine can reach.

Every connection, those of redirects too, resolves its host once, refuses the name if any of its
addresses is not public, and goes to the address that was checked, so that a name that answers
differently the next time (DNS rebinding) gains nothing.
"""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from pydantic import BaseModel, Field, IPvAnyNetwork

# Addresses that carry an IPv4 address which is_global does not look at: NAT64, 6to4, Teredo.
TUNNELS = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "2002::/16", "2001::/32"))
PORTS = {"https": 443, "http": 80}
# Looking up a name may take a minute, whoever still waits for it: not on the threads of others.
RESOLVERS = ThreadPoolExecutor(16, "resolver")


class UrlRefused(Exception):
    """The URL may not be asked, or has no answer for us; the message says why."""


class UrlGuardConfig(BaseModel, frozen=True, extra="forbid"):
    """allowed_networks: addresses that are not public and may be asked all the same."""

    allow_http: bool = False
    allowed_networks: tuple[IPvAnyNetwork, ...] = ()
    max_redirects: int = Field(3, ge=0)
    timeout_s: float = Field(10.0, gt=0)


class GuardedTransport(httpx.AsyncBaseTransport):
    """Checks each request, and sends it to the address that it checked."""

    def __init__(self, config: UrlGuardConfig) -> None:
        self.config = config
        self.inner = httpx.AsyncHTTPTransport(trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """UrlRefused, or the answer. TLS still proves the host's name, not the address."""
        loop = asyncio.get_running_loop()
        address = await loop.run_in_executor(RESOLVERS, resolve, request.url, self.config)
        to_address = httpx.Request(
            request.method,
            request.url.copy_with(host=address),
            headers=request.headers,
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": request.url.host},
        )
        try:
            return await self.inner.handle_async_request(to_address)
        except (OSError, ValueError) as error:  # such as a host name that TLS cannot ask for
            raise UrlRefused(f"the URL cannot be reached: {type(error).__name__}") from error

    async def aclose(self) -> None:
        """Close the connections."""
        await self.inner.aclose()


@contextlib.asynccontextmanager
async def guarded_stream(
    config: UrlGuardConfig, method: str, url: str, **arguments: Any
) -> AsyncIterator[httpx.Response]:
    """Ask a URL and yield its answer, of which nothing is read yet.

    UrlRefused if there is none, or none that is read within timeout_s, all told: an answer that
    comes a byte at a time holds nobody up for longer. Follows no redirect unless told to, and no
    proxy of the environment.
    """
    check_url(url, config)
    client = httpx.AsyncClient(
        transport=GuardedTransport(config), timeout=None, max_redirects=config.max_redirects
    )
    try:
        async with (
            asyncio.timeout(config.timeout_s),
            client,
            client.stream(method, url, **arguments) as answer,
        ):
            yield answer
    except TimeoutError as error:
        raise UrlRefused(f"the URL took longer than {config.timeout_s:g} s") from error
    except httpx.HTTPError as error:
        raise UrlRefused(f"the URL cannot be reached: {type(error).__name__}") from error


def check_url(url: str, config: UrlGuardConfig) -> httpx.URL:
    """The URL, parsed; UrlRefused for one that could never be asked. Resolves nothing."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise UrlRefused("the URL cannot be read") from error
    schemes = ("https", "http") if config.allow_http else ("https",)
    if parsed.scheme not in schemes:
        raise UrlRefused(f"the URL must begin with {' or '.join(f'{s}://' for s in schemes)}")
    if not parsed.host or parsed.userinfo:
        raise UrlRefused("the URL must name a host and no password")
    if parsed.port is not None and not 0 < parsed.port < 65536:
        raise UrlRefused("the URL's port must be 1 to 65535")
    return parsed


def resolve(url: httpx.URL, config: UrlGuardConfig) -> str:
    """An address of the URL's host, once all of them are found to be public; UrlRefused."""
    check_url(str(url), config)
    port = url.port or PORTS[url.scheme]
    try:
        found = socket.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UrlRefused(f"the host {url.host!r} cannot be found") from error
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not _is_allowed(address, config):
            raise UrlRefused(f"the host {url.host!r} is not on the public internet")
    return addresses[0]


async def fetch(url: str, config: UrlGuardConfig, max_bytes: int) -> bytes:
    """What the URL holds; UrlRefused if it is not to be had, is longer, or takes too long."""
    content = bytearray()
    identity = {"accept-encoding": "identity"}  # what is packed small may unpack to anything
    async with guarded_stream(
        config, "GET", url, headers=identity, follow_redirects=True
    ) as answer:
        if answer.status_code != 200:
            raise UrlRefused(f"the URL answers with status {answer.status_code}")
        if "content-encoding" in answer.headers:
            raise UrlRefused("the URL answers in an encoding that was not asked for")
        async for chunk in answer.aiter_raw():
            content += chunk
            if len(content) > max_bytes:
                raise UrlRefused(f"what the URL holds is limited to {max_bytes} bytes")
    return bytes(content)


def _is_allowed(address: str, config: UrlGuardConfig) -> bool:
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if any(ip in network for network in config.allowed_networks):
        return True
    is_tunnel = any(ip in network for network in TUNNELS)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or is_tunnel)
