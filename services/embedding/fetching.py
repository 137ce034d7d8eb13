"""Photographs by their address: fetched within limits, and never from a private network.

A connection is opened to an address that was looked up and judged for it alone, a redirect's as well,
so neither a name that answers differently the next time nor a redirect leads inside (CWE-918).
Knows nothing of items or pictures.
"""

import asyncio
import ipaddress
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import httpcore2

from services.catalog import MAX_IMAGE_BYTES

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_REDIRECTS = {301, 302, 303, 307, 308}
_MOST_REDIRECTS = 5
_PASSING = {408, 425, 429}
_FIRST_PAUSE = 0.5
_TIMEOUTS = {"connect": 5.0, "read": 10.0, "write": 5.0, "pool": 60.0}
# Not what `is_global` says of them everywhere: inside of some networks, or IPv6 addresses that wrap an IPv4
# one, which a gateway on the way unwraps.
_INSIDE = tuple(
    ipaddress.ip_network(network)
    for network in (
        *("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "fec0::/10", "3fff::/20", "5f00::/16"),
        *("64:ff9b::/96", "64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96", "2001::/32", "2002::/16"),
    )
)
_HEADERS = [(b"accept", b"image/*"), (b"accept-encoding", b"identity"), (b"user-agent", b"vitrine")]


class FetchFailed(Exception):
    """Why a photograph could not be fetched, in words for its shop; `passing`: later it may be there."""

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


class Fetcher:
    """Fetches files by http and https; `allowed` are private networks that it may reach all the same.

    A file may have 16 MiB and take `seconds`, redirects included; what may pass is tried `tries` times.
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
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=connections,
            keepalive_expiry=10.0,
            network_backend=_Guarded(tuple(allowed), resolve or _look_up),
        )

    async def close(self) -> None:
        """Close what is open."""
        await self._pool.aclose()

    async def fetch(self, uri: str) -> bytes:
        """The file at an address.

        Raises:
            FetchFailed: it cannot be had.
        """
        for again in range(self._tries - 1):
            try:
                return await self._within_time(uri)
            except FetchFailed as error:
                if not error.passing:
                    raise
            await asyncio.sleep(_FIRST_PAUSE * 2**again * random.uniform(0.5, 1))  # noqa: S311 - no secret
        return await self._within_time(uri)

    async def _within_time(self, uri: str) -> bytes:
        try:
            async with asyncio.timeout(self._seconds):
                return await self._follow(uri)
        except (TimeoutError, httpcore2.TimeoutException):
            raise FetchFailed(f"took more than {self._seconds:g} seconds", passing=True) from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise FetchFailed(f"cannot be reached: {error}", passing=True) from None

    async def _follow(self, uri: str) -> bytes:
        for _ in range(_MOST_REDIRECTS + 1):
            answer = await self._get(_checked(uri))
            if isinstance(answer, bytes):
                return answer
            uri, before = _joined(uri, answer), uri
            if _scheme(before) == "https" and _scheme(uri) == "http":
                raise FetchFailed("redirects from https to http")
        raise FetchFailed(f"redirects more than {_MOST_REDIRECTS} times")

    async def _get(self, uri: str) -> bytes | str:
        """The file, or where it is said to be."""
        extensions = {"timeout": _TIMEOUTS}
        async with self._pool.stream("GET", uri, headers=_HEADERS, extensions=extensions) as response:
            headers = {name.lower(): value for name, value in response.headers}
            if response.status in _REDIRECTS:
                return headers.get(b"location", b"").decode("latin-1")
            if response.status != 200:  # noqa: PLR2004 - OK
                passing = response.status >= 500 or response.status in _PASSING  # noqa: PLR2004
                raise FetchFailed(f"answers with status {response.status}", passing=passing)
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length) > MAX_IMAGE_BYTES:
                raise FetchFailed(f"has {int(length)} bytes, at most {MAX_IMAGE_BYTES} are allowed")
            data = bytearray()
            async for chunk in response.aiter_stream():
                data += chunk
                if len(data) > MAX_IMAGE_BYTES:
                    raise FetchFailed(f"has more than {MAX_IMAGE_BYTES} bytes")
            return bytes(data)


class _Guarded(httpcore2.AnyIOBackend):
    """Opens connections to judged addresses alone; TLS still asks for the name."""

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
        found = [ipaddress.ip_address(text.partition("%")[0]) for text in await self._resolve(host, port)]
        reachable = [address for address in found if _may_reach(address, self._allowed)]
        if not reachable:
            raise FetchFailed(f"{host} is in a private network")
        for address in reachable[:-1]:
            try:
                return await super().connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await super().connect_tcp(str(reachable[-1]), port, timeout, local_address, socket_options)


async def _look_up(host: str, port: int) -> Sequence[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise FetchFailed(f"{host} is unknown: {error}", passing=True) from None
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _may_reach(address: Address, allowed: Sequence[Network]) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if any(address in network for network in allowed):
        return True
    return address.is_global and not address.is_multicast and not any(address in net for net in _INSIDE)


def _joined(uri: str, answer: str) -> str:
    try:
        return urljoin(uri, answer)
    except ValueError as error:
        raise FetchFailed(f"redirects to no address: {error}") from None


def _scheme(uri: str) -> str:
    return urlsplit(uri).scheme  # in lower case, whatever it is written in


def _checked(uri: str) -> str:
    """An address as it goes over the wire."""
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
