"""Fetches image files by URI within limits, and never from a private network.

Each connection, also of a redirect, goes to an IP address that was resolved and checked for it, so neither
DNS rebinding nor a redirect reaches an internal host (CWE-918).
"""

import asyncio
import ipaddress
import os
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import httpcore2

from services.catalog.items import MAX_IMAGE_BYTES
from services.core.errors import ResourceExhausted
from services.embedding.images.name_lookup import NameLookup

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_REDIRECTS = 5
_TRANSIENT_STATUSES = {408, 425, 429}
_FIRST_RETRY_SECONDS = 0.5
_TIMEOUTS = {"connect": 5.0, "read": 10.0, "write": 5.0, "pool": 60.0}
# Not global everywhere, although `is_global` may say so: internal to some networks, or IPv6 addresses that
# wrap an IPv4 address, which a gateway unwraps.
_BLOCKED_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        *("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "fec0::/10", "3fff::/20", "5f00::/16"),
        *("64:ff9b::/96", "64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96", "2001::/32", "2002::/16"),
    )
)
_HEADERS = [(b"accept", b"image/*"), (b"accept-encoding", b"identity"), (b"user-agent", b"vitrine")]


class FetchFailed(Exception):
    """An image could not be fetched; the message is for the shop. `transient`: a retry may succeed."""

    def __init__(self, reason: str, *, transient: bool = False) -> None:
        super().__init__(reason)
        self.transient = transient


class ImageFetcher:
    """Fetches files by http and https; `allowed` are private networks that it may reach.

    A file may have 16 MiB and take `seconds`, including redirects; transient errors are retried, up to
    `tries` attempts. Connections ignore http_proxy and https_proxy, because a proxy resolves names itself and
    could reach private networks.
    """

    def __init__(
        self,
        *,
        allowed: Iterable[Network] = (),
        seconds: float = 20.0,
        tries: int = 3,
        connections: int = 32,
        resolve: Resolve | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._seconds, self._tries = seconds, tries
        self._names = NameLookup()
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=connections,
            keepalive_expiry=10.0,
            network_backend=_GuardedBackend(tuple(allowed), resolve or self._names),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.aclose()
        self._names.close()

    async def fetch(self, uri: str) -> bytes:
        """The file at an address.

        Raises:
            FetchFailed: the file cannot be fetched.
        """
        for attempt in range(self._tries - 1):
            try:
                return await self._within_time(uri)
            except FetchFailed as error:
                if not error.transient:
                    raise
            await asyncio.sleep(_FIRST_RETRY_SECONDS * 2**attempt * random.uniform(0.5, 1))  # noqa: S311 - no secret
        return await self._within_time(uri)

    async def _within_time(self, uri: str) -> bytes:
        try:
            async with asyncio.timeout(self._seconds):
                return await self._follow(uri)
        except (TimeoutError, httpcore2.TimeoutException):
            raise FetchFailed(f"took more than {self._seconds:g} seconds", transient=True) from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise FetchFailed(f"cannot be reached: {_cause(error)}", transient=True) from None

    async def _follow(self, uri: str) -> bytes:
        for _ in range(_MAX_REDIRECTS + 1):
            result = await self._get(_normalize(uri))
            if isinstance(result, bytes):
                return result
            uri, before = _join(uri, result), uri
            if _scheme(before) == "https" and _scheme(uri) == "http":
                raise FetchFailed("redirects from https to http")
        raise FetchFailed(f"redirects more than {_MAX_REDIRECTS} times")

    async def _get(self, uri: str) -> bytes | str:
        """The file, or the location of a redirect."""
        extensions = {"timeout": _TIMEOUTS}
        async with self._pool.stream("GET", uri, headers=_HEADERS, extensions=extensions) as response:
            headers = {name.lower(): value for name, value in response.headers}
            if response.status in _REDIRECTS:
                return headers.get(b"location", b"").decode("latin-1")
            if response.status != 200:  # noqa: PLR2004 - OK
                transient = response.status >= 500 or response.status in _TRANSIENT_STATUSES  # noqa: PLR2004
                raise FetchFailed(f"answers with status {response.status}", transient=transient)
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length) > MAX_IMAGE_BYTES:
                raise FetchFailed(f"has {int(length)} bytes, at most {MAX_IMAGE_BYTES} are allowed")
            data = bytearray()
            async for chunk in response.aiter_stream():
                data += chunk
                if len(data) > MAX_IMAGE_BYTES:
                    raise FetchFailed(f"has more than {MAX_IMAGE_BYTES} bytes")
            return bytes(data)


class _GuardedBackend(httpcore2.AnyIOBackend):
    """Connects only to allowed addresses; TLS still verifies the host name."""

    def __init__(self, allowed: Sequence[Network], resolve: Resolve) -> None:
        self._allowed, self._resolve = allowed, resolve

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await _addresses(self._resolve, host, port)
        candidates = [ipaddress.ip_address(text.partition("%")[0]) for text in addresses]
        reachable = [address for address in candidates if _may_reach(address, self._allowed)]
        if not reachable:
            raise FetchFailed(f"{host} is in a private network")
        for address in reachable[:-1]:
            try:
                return await super().connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await super().connect_tcp(str(reachable[-1]), port, timeout, local_address, socket_options)


async def _addresses(resolve: Resolve, host: str, port: int) -> Sequence[str]:
    try:
        return await resolve(host, port)
    except (socket.gaierror, UnicodeError) as error:
        raise FetchFailed(f"{host} is unknown: {error}", transient=True) from None
    except TimeoutError:
        raise FetchFailed(f"{host} cannot be looked up: no DNS server answers", transient=True) from None
    except ResourceExhausted:
        raise FetchFailed(f"{host} cannot be looked up: too many names wait", transient=True) from None


def _cause(error: Exception) -> str:
    """The cause as text, without the IP addresses of a system error, which may be private."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError) and cause.errno:
            return os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    return str(error)


def _may_reach(address: Address, allowed: Sequence[Network]) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if any(address in network for network in allowed):
        return True
    return (
        address.is_global
        and not address.is_multicast
        and not any(address in net for net in _BLOCKED_NETWORKS)
    )


def _join(uri: str, location: str) -> str:
    try:
        return urljoin(uri, location)
    except ValueError as error:
        raise FetchFailed(f"redirects to no address: {error}") from None


def _scheme(uri: str) -> str:
    return urlsplit(uri).scheme  # always in lower case


def _normalize(uri: str) -> str:
    """Validate a URI and encode it for the request."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
        if parts.scheme not in ("http", "https") or not host:
            raise FetchFailed("is no http or https address")
        if parts.username is not None or parts.password is not None:
            raise FetchFailed("carries credentials")
        name = f"[{host}]" if ":" in host else host.encode("idna").decode()
        path, query = (
            quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._"),
            quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]"),
        )
    except (ValueError, UnicodeError) as error:
        raise FetchFailed(f"is no address: {error}") from None
    return urlunsplit((parts.scheme, name if port is None else f"{name}:{port}", path, query, ""))
