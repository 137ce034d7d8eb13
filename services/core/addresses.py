"""Parses host:port addresses, and explains why an address cannot be listened on."""

import errno
import re
import socket
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

_MAX_PORT = 65_535
_HOST = re.compile(r"[\w.-]+\Z")
_BRACKETED = re.compile(r"\[[0-9A-Fa-f:.]+(%\w+)?\]\Z")
_DNS = "dns:///"
_EXAMPLE = "write HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051"


class Address(NamedTuple):
    """A host, an IPv6 one without its brackets, and a port."""

    host: str
    port: int


def parse_address(text: str) -> Address:
    """Parse host:port, with an IPv6 host in brackets.

    Raises:
        ValueError: the address is invalid; the message says why and gives an example.
    """
    if text.startswith(("unix:", "/", "unix-abstract:")):
        raise ValueError(f"Unix sockets are not supported; {_EXAMPLE}")
    host, colon, port = text.rpartition(":")
    if not colon or (text.startswith("[") and text.endswith("]")):
        raise ValueError(f"it has no port; {_EXAMPLE}")
    if not host:
        raise ValueError(f"it has no host; 0.0.0.0:{port or 'PORT'} listens on every network interface")
    if ":" in host and not host.startswith("["):
        raise ValueError(f"an IPv6 address needs brackets; {_EXAMPLE}")
    if not (_HOST if not host.startswith("[") else _BRACKETED).match(host):
        raise ValueError(f"{host!r} is not a host name or IP address; {_EXAMPLE}")
    if not (port.isascii() and port.isdigit()):
        raise ValueError(f"{port!r} is not a port number; {_EXAMPLE}")
    if int(port) > _MAX_PORT:
        raise ValueError(f"port {port} is out of range, 0 to {_MAX_PORT} are allowed; {_EXAMPLE}")
    return Address(host.strip("[]"), int(port))


def _valid(text: str) -> str:
    parse_address(text)
    return text


def _peer(text: str) -> str:
    if text and parse_address(text.removeprefix(_DNS)).port == 0:
        raise ValueError("port 0 is not allowed here; write the port that the service listens on")
    return text


ListenAddress = Annotated[str, AfterValidator(_valid)]
"""host:port to listen on; port 0 takes a free one."""

OptionalListenAddress = Annotated[str, AfterValidator(lambda text: text and _valid(text))]
"""The same, or empty for none."""

PeerAddress = Annotated[str, AfterValidator(_peer)]
"""host:port of another process, or dns:///host:port; empty for none."""


def listen_problem(address: str, flag: str) -> str:
    """Why a server cannot listen on a host:port address, and a remedy; `flag` sets another address."""
    host, port = parse_address(address)
    try:
        for family, kind, protocol, _, socket_address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(socket_address)
        reason = "the system does not say why"
    except socket.gaierror as error:
        reason = f"the host {host!r} is unknown ({error.strerror})"
    except OSError as error:
        match error.errno:
            case errno.EADDRINUSE:
                reason = f"the port is in use; `ss -ltnp 'sport = :{port}'` shows by which process"
            case errno.EACCES:
                reason = f"this user may not listen on port {port}; ports from 1024 on are free to all"
            case errno.EADDRNOTAVAIL:
                reason = (
                    f"{host} is not an address of this machine; 0.0.0.0 listens on every network interface"
                )
            case _:
                reason = error.strerror or str(error)
    return f"{address} cannot be listened on: {reason}; {flag} sets another address"
